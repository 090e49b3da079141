"""Figures of mode `regions`, from a model and validation images (DSeq-JEPA Figs. 3, 4, 6, 7).

    draw_all(model, views, config, rows, run_dir)
                    regions.png     saliency, Otsu's mask, ranked regions, I-JEPA's blocks
                    steps.png       prediction loss of step k (Fig. 4)
                    clusters.png    k-means of patch tokens (Figs. 6, 7)

evaluate.py --figures calls it. As a script, it draws clusters.png over the course of
training, a column a checkpoint, and regions.png of the last one; or both, on any folder of images:

    python -m figures.regions runs/NAME/epoch-*.pt
    python -m figures.regions runs/NAME/last.pt --data-dir PHOTOS

Checked in tests/test_figures_regions.py.
"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from build import build_model, build_views
from config import config_of
from dseq_jepa import sequential
from figures.canvas import BLUE, CYCLE, bare, save, spread, subplots, title_columns, to_pixels
from plumbing import command, flags
from plumbing.command import refuse_unwritable
from plumbing.device import seed_all
from plumbing.errors import BadInput, printable
from plumbing.runs import load_checkpoint, restore
from probes_regions import object_auc, of_patches
from regions import LEVELS, discriminative_regions, multi_block, otsu

STEP_IMAGES = 10_000            # as Fig. 4
REST = "#BBBBBB"                # colour of R_N


def draw_all(model, views, config, rows, run_dir):
    """Every figure of the mode that this model allows; yields the paths.  rows: not used."""
    model.eval()
    if config.cls and config.proxy == "cls":
        yield draw_regions(model, views, config, run_dir / "regions.png")
    if config.method in ("dseq-jepa", "dseq-c-jepa") and config.order == "discriminative":
        yield draw_steps(model, views, config, run_dir / "steps.png")
    yield draw_clusters([(model, config.method)], views, config, run_dir / "clusters.png")


# ---------------------------------------------------------------- regions

@torch.inference_mode()
def draw_regions(model, views, config, path, count=6):
    """Saliency (Eq. 1), Otsu's mask (Eq. 2), ranked regions (Eqs. 3, 4), beside I-JEPA's blocks."""
    grid = model.encoder.grid
    N = config.region_count
    images = views.clean(spread(views, count))
    tokens, _ = model.target_encoder(images, keep=(model.block,))
    saliency = model.cls_saliency(tokens).cpu()
    scores, outlines = _object(views, saliency, grid, count)
    saliency = saliency.unflatten(1, grid)
    sizes = (config.min_patches, config.max_patches)
    once = discriminative_regions(saliency, N, "otsu", *sizes)
    refilled = discriminative_regions(saliency, N, "otsu-refill", *sizes)
    foreground = _above_otsu(saliency)
    blocks = _ijepa_blocks(count, grid, config)
    photos = to_pixels(images, views)

    region_style = {k: (str(k), CYCLE[k - 1]) for k in range(1, N)}
    region_style[N] = ("rest", REST)
    block_style = {1: ("c", BLUE)}
    block_style |= {k: (str(k - 1), CYCLE[k - 1]) for k in range(2, 6)}
    figure, axes = subplots(count, 6, figsize=(12.5, 2.05 * count), squeeze=False)
    for i in range(count):
        axes[i, 0].imshow(photos[i])
        axes[i, 1].imshow(saliency[i].numpy(), cmap="magma")
        axes[i, 1].set_xlabel(scores[i], fontsize=8)
        if outlines is not None:
            side = photos.shape[1] / grid[0]
            places = (torch.arange(photos.shape[1]) + 0.5) / side - 0.5      # pixels, in patches
            axes[i, 1].contour(places, places, outlines[i].numpy(), levels=[0.5], colors="white",
                               linewidths=0.8)
        axes[i, 2].imshow(foreground[i].numpy(), cmap="gray", vmin=0, vmax=1)
        _overlay(axes[i, 3], photos[i], once[i], region_style)
        _overlay(axes[i, 4], photos[i], refilled[i], region_style)
        _overlay(axes[i, 5], photos[i], blocks[i], block_style)

    bare(axes)
    title_columns(axes, ["image", f"saliency, block {model.block}", "above Otsu's threshold",
                         "regions, one threshold", "regions, refilled",
                         "I-JEPA: context c, targets"])
    figure.suptitle("Discriminative regions in order, 1 first (as Figs. 3 and 6): "
                    f"{config.method}, {config.encoder}, N = {N}", fontsize=11)
    return save(figure, path)


def _object(views, saliency, grid, count):
    """Where the data set knows the object: words on how saliency (n, P) finds it, and masks (n, S,
    S); elsewhere empty words and None."""
    if views.masks is None:
        return [""] * count, None
    masks = views.masks(spread(views, count)).cpu()
    aucs = object_auc(saliency, of_patches(masks, grid)).tolist()
    return [f"AUC of the object {auc:.2f}" for auc in aucs], masks


def _above_otsu(saliency):
    """Eq. 2.  (B, H, W) in [0, 1]  ->  (B, H, W) bool"""
    level = (255 * saliency.flatten(1)).long().clamp(0, LEVELS - 1)
    return (level > otsu(level)).view_as(saliency)


def _ijepa_blocks(B, grid, config):
    """I-JEPA's masks to colour.  ->  (B, H, W) int64: 1 context, 2 to 5 the targets, 0 neither"""
    seed_all(config.seed)
    context, targets = multi_block(B, grid, min_patches=config.min_patches)
    blocks = context.long()
    for k in range(targets.shape[1]):
        blocks = torch.where(targets[:, k], k + 2, blocks)
    return blocks


def _overlay(axis, photo, labels, style):
    """Colour the patches of a photo by label; write each label at its patch nearest to the centre.

    photo (S, S, 3), labels (H, W), style {label: (words, colour)}; other labels stay uncoloured."""
    from matplotlib.colors import to_rgb

    side = photo.shape[0] // labels.shape[0]
    shade = torch.zeros(*labels.shape, 4)
    for label, (_, colour) in style.items():
        shade[labels == label] = torch.tensor([*to_rgb(colour), 0.55])
    axis.imshow(photo)
    axis.imshow(shade.repeat_interleave(side, 0).repeat_interleave(side, 1).numpy())
    for label, (words, _) in style.items():
        places = (labels == label).nonzero().float()
        if len(places):
            from_centre = (places - places.mean(0)).square().sum(1)
            row, column = places[from_centre.argmin()].tolist()
            axis.text((column + 0.5) * side, (row + 0.5) * side, words,
                      ha="center", va="center", fontsize=7, color="white",
                      bbox=dict(boxstyle="round,pad=0.15", facecolor="black", alpha=0.6,
                                linewidth=0))


# ---------------------------------------------------------------- the loss of every step

def draw_steps(model, views, config, path):
    """Mean loss of R_2 ... R_N and how many images have each, salient regions only (Fig. 4)."""
    losses, images = step_losses(model, views, config)
    losses = losses.nan_to_num(0)
    names = [f"R_{k}" for k in range(2, config.region_count)] + ["rest"]

    figure, axis = subplots(figsize=(5, 3.6))
    bars = axis.bar(names, losses.tolist(), color=BLUE)
    axis.bar_label(bars, [f"{n:,}" for n in images.tolist()], fontsize=8)

    axis.set(xlabel="predicted region; above it, how many images have it",
             ylabel="smooth-L1 loss", ylim=(0, max(1e-6, 1.15 * losses.max().item())),
             title=f"Prediction loss per step, {config.regions} (as Fig. 4)")
    return save(figure, path)


@torch.no_grad()
def step_losses(model, views, config):
    """Mean loss (N-1,) of each step, NaN where no image has it, and the images (N-1,) that have it.

    Over up to STEP_IMAGES images."""
    N = config.region_count
    total = torch.zeros(N - 1, dtype=torch.float64)
    count = torch.zeros(N - 1, dtype=torch.float64)
    for index in spread(views, min(STEP_IMAGES, len(views))).split(64):
        images = views.clean(index)
        seed_all(config.seed, int(index[0]))
        batch = views(index)._replace(views=images[:, None])
        _, h, saliency = model.look(batch)
        if config.regions == "random":
            rank = batch.actions[:, 0]
        else:
            rank = model.plan.regions(saliency, model.encoder.grid)
        plan = sequential(rank, N)
        loss, predicted = model.step_losses(*model.predict(images, plan), plan, h)
        total += (loss * predicted).sum(0).cpu().double()
        count += predicted.sum(0).cpu().double()
    return total / count, count.long()


# ---------------------------------------------------------------- clusters of patch tokens

@torch.inference_mode()
def draw_clusters(models, views, config, path, count=6, k=5):
    """k-means of the target encoder's last patch tokens, over all shown images (Figs. 6, 7).

    models: [(model, words), ...], a column each: several checkpoints show structure emerge."""
    images = views.clean(spread(views, count))
    photos = to_pixels(images, views)
    style = {label: ("", CYCLE[label - 1]) for label in range(1, k + 1)}

    across = 1 + len(models)
    figure, axes = subplots(count, across, figsize=(2.1 * across, 2.05 * count), squeeze=False)
    for i in range(count):
        axes[i, 0].imshow(photos[i])
    for column, (model, _) in enumerate(models, 1):
        labels = _cluster(model, images, k, config.seed)
        for i in range(count):
            _overlay(axes[i, column], photos[i], labels[i] + 1, style)

    bare(axes)
    title_columns(axes, ["image", *(words for _, words in models)])
    figure.suptitle(f"k-means of patch tokens, k = {k} (as Figs. 6, 7)", fontsize=10)
    return save(figure, path)


def _cluster(model, images, k, seed):
    """images (B, 3, S, S)  ->  (B, H, W) int64 in 0..k-1, the cluster of each patch"""
    H, W = model.encoder.grid
    tokens, = model.eval().target_encoder(images)
    patches = tokens[:, tokens.shape[1] - H * W:]                # without [CLS], if there is one
    patches = F.normalize(patches.float().cpu(), dim=2)
    if not patches.isfinite().all():
        raise BadInput("the features of patches are not finite; if the run diverged, give a "
                       "checkpoint from before that")
    return k_means(patches.flatten(0, 1), k, seed).view(len(images), H, W)


def k_means(x, k, seed=0, steps=50):
    """Lloyd's algorithm from k-means++ seeds.  x (n, D)  ->  (n,) int64 in 0..k-1"""
    generator = torch.Generator().manual_seed(seed)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    for _ in range(k - 1):
        distance = torch.cdist(x, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(steps):
        label = torch.cdist(x, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add(0, label, x)
        size = torch.bincount(label, minlength=k)[:, None]
        centres = torch.where(size > 0, sums / size.clamp(min=1), centres)
    return label


# ---------------------------------------------------------------- the script

def draw_checkpoints(options):
    """Draw clusters.png of several checkpoints of one run, a column each, and regions.png."""
    out = Path(options.out)
    if not out.is_dir():
        raise BadInput(f"--out {out}: no such folder; make it first")
    for name in ("clusters.png", "regions.png"):
        refuse_unwritable(out / name, "choose another --out")
    models = []
    for path in options.checkpoints:
        model, words, config = _load(path, options.data_dir)
        models.append((model, words))
        first, _ = models[0]
        if (model.encoder.grid, model.encoder.dim) != (first.encoder.grid, first.encoder.dim):
            raise BadInput(f"{path}: is not of the same run as {options.checkpoints[0]}; "
                           "give checkpoints of one run")
    split = "train" if options.data_dir else "val"
    views = build_views(config, split, torch.device("cpu"))
    print(f"drew {printable(draw_clusters(models, views, config, out / 'clusters.png'))}")
    if config.cls and config.proxy == "cls":
        print(f"drew {printable(draw_regions(model, views, config, out / 'regions.png'))}")
    return 0


def _load(path, data_dir):
    """A checkpoint's model, step in words, and Config (with images from `data_dir`, if given)."""
    checkpoint = load_checkpoint(path)
    changes = dict(dataset="folder", data_dir=data_dir, limit=0) if data_dir else {}
    config = config_of(checkpoint, **changes)
    if config.mode != "regions":
        raise BadInput(f"{path}: was trained in mode {config.mode}; "
                       "expected a checkpoint of mode regions")
    model = build_model(config, {})
    restore(model, checkpoint)
    return model, f"step {checkpoint['step']:,}", config


def parse(argv=None):
    """Options from the command line."""
    p = flags.Parser(
        prog="python -m figures.regions",
        description="Regions, and patch clusters over the course of training (Figs. 3, 6, 7).")
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                   help="epoch-*.pt and last.pt of a run trained with --keep-every K")
    p.add_argument("--data-dir", metavar="DIR",
                   help="a folder of images to show instead of the run's own")
    p.add_argument("--out", metavar="DIR", default=".", help="where the figures go (default: here)")
    return p.parse_args(argv)


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    return command.run(draw_checkpoints, parse, argv, less="give it fewer checkpoints")


if __name__ == "__main__":
    sys.exit(main())
