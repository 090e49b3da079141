"""Figures of mode `regions`, from a run's own model and validation images (DSeq-JEPA Figs. 3, 4, 6, 7).

    draw_all(model, views, config, rows, dir)   regions.png    saliency, Otsu mask, ranked regions under both rules, I-JEPA's blocks
                                                steps.png      prediction loss of step k (Fig. 4)
                                                clusters.png   k-means of patch tokens (Figs. 6, 7)

    python figures_regions.py runs/NAME/epoch-*.pt                      clusters.png over the course of training, a column a checkpoint,
                                                                        and regions.png of the last
    python figures_regions.py runs/NAME/last.pt --data-dir PHOTOS       both, on any folder of images

The rest is called by evaluate.py --figures. Checked in tests/test_figures_regions.py.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from build import build_model, build_views
from dseq_jepa import sequential
from figures import BLUE, CYCLE, GREEN, ORANGE, PINK, RED, _bare, _save, _spread, plt
from plumbing.device import seed_all
from plumbing.errors import BadInput
from plumbing.runs import config_of, load_checkpoint, restore
from regions import LEVELS, cls_similarity, discriminative_regions, min_max, multi_block, otsu

STEP_IMAGES = 10_000            # as Fig. 4
REST = "#BBBBBB"                # colour of R_N


def draw_all(model, views, config, rows, run_dir):
    """Every figure of the mode that this model allows; yields the paths."""
    model.eval()
    if config.cls and config.proxy == "cls":
        yield draw_regions(model, views, config, run_dir / "regions.png")
    if config.method in ("dseq-jepa", "dseq-c-jepa") and config.order == "discriminative":
        yield draw_steps(model, views, config, run_dir / "steps.png")
    yield draw_clusters([(model, f"{config.method}")], views, config, run_dir / "clusters.png")


@torch.inference_mode()
def draw_regions(model, views, config, path, count=6):
    """Where it would look: [CLS] saliency (Eq. 1), Otsu's mask (Eq. 2), ranked regions (Eqs. 3, 4), beside I-JEPA's blocks."""
    index, grid, N = _spread(views, count), model.encoder.grid, config.region_count
    images = views.clean(index)
    middle, _ = model.target_encoder(images, keep=(model.block,))
    saliency = min_max(cls_similarity(middle[:, 0], middle[:, 1:])).cpu()
    level = (255 * saliency).long().clamp(0, LEVELS - 1)
    mask = level > otsu(level, torch.ones_like(level, dtype=torch.bool))[:, None]
    ranks = [discriminative_regions(saliency.unflatten(1, grid), N, rule, config.min_patches) for rule in ("otsu", "otsu-refill")]
    seed_all(config.seed)
    context, targets = multi_block(count, grid, min_patches=config.min_patches)
    blocks = torch.where(context, 1, 0)
    for k in range(targets.shape[1]):
        blocks = torch.where(targets[:, k], k + 2, blocks)
    pixels = _photos(images, views)
    titles = ["image", f"saliency, block {model.block}", "above Otsu's threshold", "regions, one threshold", "regions, refilled", "I-JEPA: context, targets"]
    figure, axes = plt.subplots(count, 6, figsize=(12.5, 2.05 * count), layout="constrained", squeeze=False)
    for i, axis in enumerate(axes):
        axis[0].imshow(pixels[i])
        axis[1].imshow(saliency[i].unflatten(0, grid).numpy(), cmap="magma")
        axis[2].imshow(mask[i].unflatten(0, grid).numpy(), cmap="gray", vmin=0, vmax=1)
        for a, rank in ((axis[3], ranks[0][i]), (axis[4], ranks[1][i])):
            _overlay(a, pixels[i], rank, {k: CYCLE[k - 1] for k in range(1, N)} | {N: REST}, {N: "rest"})
        _overlay(axis[5], pixels[i], blocks[i], {1: BLUE, 2: ORANGE, 3: GREEN, 4: RED, 5: PINK}, {1: "context", **{k: f"{k - 1}" for k in range(2, 6)}})
    _bare(axes)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.suptitle(f"Discriminative regions in order, 1 first (as Figs. 3 and 6): {config.method}, {config.encoder}, N = {N}", fontsize=11)
    return _save(figure, path)


def _overlay(axis, pixels, labels, colours, names):
    """Colour patches by label over the photo (0 stays uncoloured) and write each label at its patch nearest to the centre."""
    side = pixels.shape[0] // labels.shape[0]
    shade = torch.zeros(*labels.shape, 4)
    for label, colour in colours.items():
        shade[labels == label] = torch.tensor([*plt.matplotlib.colors.to_rgb(colour), 0.55])
    axis.imshow(pixels)
    axis.imshow(shade.repeat_interleave(side, 0).repeat_interleave(side, 1).numpy())
    for label in colours:
        places = (labels == label).nonzero().float()
        if len(places):
            row, column = places[(places - places.mean(0)).square().sum(1).argmin()].tolist()
            axis.text((column + 0.5) * side, (row + 0.5) * side, names.get(label, str(label)), ha="center", va="center", fontsize=7, color="white",
                      bbox=dict(boxstyle="round,pad=0.15", facecolor="black", alpha=0.6, linewidth=0))


def draw_steps(model, views, config, path):
    """Mean prediction loss of R_2 ... R_N and the number of images that have each, salient regions only (Fig. 4)."""
    losses, images = step_losses(model, views, config)
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    names = [f"R_{k + 2}" if k + 2 < config.region_count else "rest" for k in range(len(losses))]
    bars = axis.bar(names, losses.nan_to_num(0).tolist(), color=BLUE)
    axis.bar_label(bars, [f"{n:,}" for n in images.tolist()], fontsize=8)
    axis.set(xlabel="predicted region (number of images that have it above)", ylabel="smooth-L1 loss", ylim=(0, max(1e-6, 1.15 * losses.nan_to_num(0).max().item())),
             title=f"Prediction loss per step, {config.regions} (as Fig. 4)")
    return _save(figure, path)


@torch.no_grad()
def step_losses(model, views, config):
    """(mean loss (N-1,), images (N-1,)) of each step over up to STEP_IMAGES images; NaN where no image has the step."""
    total, count = (torch.zeros(config.region_count - 1, dtype=torch.float64) for _ in range(2))
    for index in _spread(views, min(STEP_IMAGES, len(views))).split(64):
        images = views.clean(index)
        seed_all(config.seed, int(index[0]))
        batch = views(index)._replace(views=images[:, None])
        _, h, saliency = model.look(batch)
        rank = discriminative_regions(saliency.unflatten(1, model.encoder.grid), config.region_count, config.regions, config.min_patches) \
            if config.regions != "random" else batch.actions[:, 0].unflatten(1, model.encoder.grid)
        plan = sequential(rank.flatten(1), config.region_count)
        loss, predicted = model.step_losses(*model.predict(images, plan), plan, h)
        total += (loss * predicted).sum(0).cpu().double()
        count += predicted.sum(0).cpu().double()
    return total / count, count.long()


@torch.inference_mode()
def draw_clusters(models, views, config, path, count=6, k=5):
    """k-means of the target encoder's last patch tokens, over the shown images together (Figs. 6, 7).

    models: [(model, words), ...], a column each: the same run at several checkpoints shows structure emerge."""
    index = _spread(views, count)
    images, grid = views.clean(index), models[0][0].encoder.grid
    pixels = _photos(images, views)
    figure, axes = plt.subplots(count, 1 + len(models), figsize=(2.1 * (1 + len(models)), 2.05 * count), layout="constrained", squeeze=False)
    for column, (model, words) in enumerate(models, 1):
        tokens, = model.eval().target_encoder(images)
        tokens = F.normalize(tokens[:, tokens.shape[1] - grid[0] * grid[1]:].float().cpu(), dim=2)
        labels = k_means(tokens.flatten(0, 1), k, seed=config.seed).view(count, *grid)
        axes[0, column].set_title(words, fontsize=9)
        for i in range(count):
            _overlay(axes[i, column], pixels[i], labels[i] + 1, dict(zip(range(1, k + 1), CYCLE)), dict.fromkeys(range(1, k + 1), ""))
    for i in range(count):
        axes[i, 0].imshow(pixels[i])
    axes[0, 0].set_title("image", fontsize=9)
    _bare(axes)
    figure.suptitle(f"k-means of patch tokens, k = {k} (as Figs. 6, 7)", fontsize=10)
    return _save(figure, path)


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


def _photos(images, views):
    """Normalised (n, 3, H, W) on any device -> (n, H, W, 3) in [0, 1], NumPy."""
    images = images * views.std.view(3, 1, 1) + views.mean.view(3, 1, 1)
    return images.clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def main(argv=None):
    """Draw clusters.png of several checkpoints of one run, a column each, and regions.png. Exit status 0, or 2 for bad input."""
    p = argparse.ArgumentParser(prog="figures_regions.py", description="Regions, and patch clusters over the course of training (Figs. 3, 6, 7).")
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="epoch-*.pt and last.pt of a run trained with --keep-every K")
    p.add_argument("--data-dir", metavar="DIR", help="a folder of images to show instead of the run's own")
    p.add_argument("--out", metavar="DIR", default=".", help="where the figures go (default: here)")
    options = p.parse_args(argv)
    try:
        models = []
        for path in options.checkpoints:
            checkpoint = load_checkpoint(path)
            config = config_of(checkpoint, **(dict(dataset="folder", data_dir=options.data_dir, limit=0) if options.data_dir else {}))
            if config.mode != "regions":
                raise BadInput(f"{path}: was trained in mode {config.mode}; expected a checkpoint of mode regions")
            model = build_model(config, {})
            restore(model, checkpoint)
            models.append((model, f"step {checkpoint['step']:,}"))
            if model.encoder.grid != models[0][0].encoder.grid or model.encoder.dim != models[0][0].encoder.dim:
                raise BadInput(f"{path}: is not of the same run as {options.checkpoints[0]}; give checkpoints of one run")
        if not Path(options.out).is_dir():
            raise BadInput(f"--out {options.out}: no such folder; make it first")
        views = build_views(config, "train" if options.data_dir else "val", torch.device("cpu"))
        print(f"drew {draw_clusters(models, views, config, Path(options.out) / 'clusters.png')}")
        if config.cls and config.proxy == "cls":
            print(f"drew {draw_regions(models[-1][0], views, config, Path(options.out) / 'regions.png')}")
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
