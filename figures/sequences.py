"""Figures of a run, each titled with what it shows and which figure of seq-JEPA it redraws.

    draw_curves(run_dir)    curves.png      training: loss, learning rate, health of the features
    draw_all(model, views, config, rows, run_dir)
                            views.png       what the model sees and is told (Fig. 3)
                            retrieval.png   nearest neighbours of a view (Fig. 4)
                            maps.png        2-D maps of z and z_agg (Figs. 5, 6, 13, 14)
                            lengths.png     accuracy against M_val (Fig. 8, right)
                            path.png        path integration (Fig. 7)

Every function reads the same way: get the numbers, draw, label, save.
Checked in tests/test_figures.py.
"""
import math
import re
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from figures.canvas import (
    BLUE,
    CYCLE,
    GREEN,
    ORANGE,
    RED,
    bare,
    legend_below,
    plain,
    save,
    spread,
    subplots,
    title_columns,
    to_pixels,
)
from figures.tsne import tsne
from plumbing import runs
from plumbing.device import seed_all

DOT = 12            # area of a point in a map, square points
GALLERY = 1500      # validation samples that a figure of features shows at most
FEW = 100           # with fewer points than this there are no neighbourhoods to keep

# Panels of curves.png: title -> columns of metrics.csv. A run shows the columns that it measured.
PANELS = {
    "loss": ["loss"],
    "terms of the loss": ["invariance", "equivariance", "variance", "covariance"],
    "learning rate": ["lr"],
    "spread of features (1 healthy, 0 collapsed)": ["z_std", "z_agg_std"],
    "effective rank of features (RankMe)": ["z_rank", "z_agg_rank"],
    "regions predicted per image": ["steps"],
    "share of saliency: centre, border ring": ["saliency_centre", "saliency_ring"],
    "object: AUC of saliency, share of R_1 on it": ["object_auc", "object_r1"],
    "online k-NN top-1, % (not the protocol)": ["knn_z", "knn_z_agg", "knn_patches", "knn_cls"],
    "online R\u00b2 of the action (not the protocol)": ["action_r2"],
}


def draw_curves(run_dir):
    """Training curves from metrics.csv -> curves.png."""
    curves = defaultdict(list)                          # {column: [(epoch, value), ...]}
    for row in runs.read_metrics(run_dir / "metrics.csv"):
        for column, value in row.items():
            if not math.isnan(value):                   # NaN: no online probe was due
                curves[column].append((row["epoch"], value))
    panels = {}
    for title, columns in PANELS.items():
        measured = [column for column in columns if column in curves]
        if measured:
            panels[title] = measured

    across = math.ceil(len(panels) / 2)
    figure, axes = subplots(2, across, figsize=(4.8 * across, 6))
    for axis, (title, columns) in zip(axes.flat, panels.items()):
        for column, colour in zip(columns, CYCLE):
            epochs, values = zip(*curves[column])
            axis.plot(epochs, values, color=colour, marker="." if len(epochs) < 60 else None,
                      label=re.sub("knn_|_std|_rank", "", column))
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(columns) > 1:
            axis.legend()
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    return save(figure, run_dir / "curves.png")


# ---------------------------------------------------------------- what the model sees

def draw_scanpaths(views, config, path, count=6):
    """Where it looked (Fig. 3b): fixations in order, saliency, and the patches the encoder saw."""
    M = config.views
    index = spread(views, count)
    seed_all(config.seed)
    images = views.images[index].cpu()
    saliency = views.saliency[index].float().cpu()
    fixations, patches = views.scanpaths(index, M + 1)
    patches = to_pixels(patches, views)

    figure, axes = subplots(count, M + 3, figsize=(max(7, 1.5 * (M + 3)), 1.55 * count),
                            squeeze=False)
    for row in range(count):
        image_axis, saliency_axis, *patch_axes = axes[row]
        image_axis.imshow(images[row].permute(1, 2, 0).numpy())
        _overlay_scanpath(image_axis, fixations[row].tolist(), config.patch_size)
        image_axis.set(xlim=(-0.5, config.image_size - 0.5), ylim=(config.image_size - 0.5, -0.5))
        saliency_axis.imshow(saliency[row].numpy(), cmap="magma")
        for axis, patch in zip(patch_axes, patches[row]):
            axis.imshow(patch)

    bare(axes)
    title_columns(axes, ["image", "saliency", *_view_titles(M)])
    ior = "with" if config.ior else "without"
    figure.suptitle("Where it looked (as Fig. 3b): fixations from "
                    f"{plain(config.saliency)} saliency, {ior} inhibition of return", fontsize=10)
    return save(figure, path)


def _overlay_scanpath(axis, fixations, p):
    """Join and number the fixations [(row, column), ...] and frame each one's patch of side p."""
    from matplotlib.patches import Rectangle

    rows, columns = zip(*fixations)
    axis.plot(columns, rows, color="white", linewidth=1)
    for number, (y, x) in enumerate(fixations, 1):
        colour = RED if number == len(fixations) else BLUE             # the last is to be predicted
        corner = (x - p // 2 - 0.5, y - p // 2 - 0.5)
        axis.add_patch(Rectangle(corner, p, p, fill=False, edgecolor=colour))
        axis.text(x, y, str(number), color="white", ha="center", va="center", fontsize=8,
                  bbox=dict(boxstyle="circle,pad=0.15", facecolor=colour, linewidth=0))


def draw_sequences(views, config, path, count=3):
    """Rows of views, under each the action that leads to the next (Fig. 3a)."""
    M = config.views
    index = spread(views, count)
    seed_all(config.seed)
    batch = views(index, M)
    pixels = to_pixels(batch.views, views)

    figure, axes = subplots(count, M + 1, figsize=(max(7, 2.6 * (M + 1)), 2.9 * count),
                            squeeze=False)
    for row in range(count):
        for axis, view in zip(axes[row], pixels[row]):
            axis.imshow(view)
        for axis, action in zip(axes[row], batch.actions[row]):        # none under the last view
            axis.set_xlabel(_action_words(action, views.groups) + "  \u2192", fontsize=7)

    bare(axes)
    title_columns(axes, _view_titles(M))
    figure.suptitle(f"Views and actions, mode {config.mode} (as Fig. 3a): "
                    "under each view, the action that leads to the next", fontsize=10)
    return save(figure, path)


def _action_words(action, groups):
    """An action (A,) in words: a line for each of its groups."""
    lines = []
    for name, columns in groups.items():
        numbers = [f"{number:+.2f}" for number in action[columns].tolist()]
        lines.append(" ".join([name, *numbers]))
    return "\n".join(lines)


def _view_titles(M):
    return [*(f"view {k + 1}" for k in range(M)), "to predict"]


# ---------------------------------------------------------------- features of the validation set

class Gallery(NamedTuple):
    """Up to GALLERY validation samples: first views and features, on the CPU."""
    pixels: torch.Tensor    # (n, H, W, 3) of view 1, in [0, 1]
    z: torch.Tensor         # (n, D) of view 1
    z_agg: torch.Tensor     # (n, D+E); (n, 0) of a method without aggregate
    params: torch.Tensor    # (n, P) of view 1
    labels: torch.Tensor    # (n,)


@torch.inference_mode()
def make_gallery(model, views, config):
    """Views and features of an even choice of the validation samples, M_val = M_tr."""
    model.eval()
    M = config.views
    parts = []
    for index in spread(views, min(GALLERY, len(views))).split(250):
        seed_all(config.seed, int(index[0]))
        batch = views(index, M)
        z = model.encode(batch.views)
        a = model.embed(batch.actions)
        z_agg = z.new_empty(len(z), 0)
        if config.aggregates:
            z_agg = model.aggregate(z[:, :M], a[:, :M - 1])
        pixels = torch.from_numpy(to_pixels(batch.views[:, 0], views))
        parts.append(Gallery(pixels, z[:, 0], z_agg, batch.params[:, 0], batch.labels))
    return Gallery(*(torch.cat(field).cpu() for field in zip(*parts)))


def draw_retrieval(gallery, views, path, count=6):
    """Nearest neighbours of a view by cosine of z (Fig. 4): same thing, same transformation?"""
    z = F.normalize(gallery.z, dim=1)
    queries = torch.linspace(0, len(z) - 1, count).long()
    similarity = z[queries] @ z.T
    similarity[torch.arange(count), queries] = -2    # below any cosine: none is its own neighbour
    cosines, nearest = similarity.topk(min(3, len(z) - 1), dim=1)

    figure, axes = subplots(count, 4, figsize=(7, 1.85 * count), squeeze=False)
    for row, query in enumerate(queries):
        axes[row, 0].imshow(gallery.pixels[query].numpy())
        axes[row, 0].set_xlabel(_class_name(views, gallery.labels[query]), fontsize=8)
        for axis, i, cosine in zip(axes[row, 1:], nearest[row], cosines[row]):
            name = _class_name(views, gallery.labels[i])
            axis.imshow(gallery.pixels[i].numpy())
            axis.set_xlabel(f"{name}, cos {cosine:.2f}", fontsize=8)

    bare(axes)
    title_columns(axes, ["query", "nearest", "2nd", "3rd"])
    figure.suptitle(f"Nearest encoder features among {len(z):,} validation views (as Fig. 4)",
                    fontsize=10)
    return save(figure, path)


# (mode, whether the model is told actions) -> which figure of the paper maps.png redraws
MAPS_REDRAW = {("rotation", True): " (as Fig. 5)", ("saccade", True): " (as Fig. 6)",
               ("rotation", False): " (as Fig. 13)", ("saccade", False): " (as Fig. 14)"}


def draw_maps(gallery, views, config, path):
    """z and z_agg in 2-D by class, z by each of `views.maps` (Figs. 5, 6; not told, 13, 14).

    Of a method without aggregate only z."""
    flat_z, method = project(gallery.z)

    down = 2 if views.maps else 1
    across = max(2, len(views.maps))
    figure, axes = subplots(down, across, figsize=(3.4 * across + 1.6, 3.2 * down), squeeze=False)
    z_axis, agg_axis = axes[0, :2]
    _scatter_classes(z_axis, flat_z, gallery.labels, views)
    for axis, column in zip(axes[-1], views.maps.values()):
        values = gallery.params[:, column]
        points = axis.scatter(*flat_z.T, s=DOT, c=values, cmap="viridis", linewidths=0)
        figure.colorbar(points, ax=axis)

    bare(axes)
    for axis in [*axes[0, 2:], *axes[1:, len(views.maps):].flat]:
        axis.axis("off")
    z_axis.set_title("z of view 1, by class", fontsize=10)
    if config.aggregates:
        flat_agg, _ = project(gallery.z_agg)
        _scatter_classes(agg_axis, flat_agg, gallery.labels, views)
        agg_axis.set_title(f"z_agg, M = {config.views}, by class", fontsize=10)
    else:
        agg_axis.axis("off")
    for axis, name in zip(axes[-1], views.maps):
        axis.set_title(f"z of view 1, by {name}", fontsize=10)
    handles, names = z_axis.get_legend_handles_labels()
    total = len(views.classes)
    shown = f"{len(names)} of {total} classes" if len(names) < total else None
    figure.legend(handles, names, title=shown, loc="outside right upper", markerscale=2)
    redrawn = MAPS_REDRAW.get((config.mode, config.condition != "none"), "")
    redrawn = redrawn if config.aggregates else f", {config.method}"
    figure.suptitle(f"{method} of {len(flat_z):,} validation samples, "
                    f"condition {config.condition}{redrawn}", fontsize=11)
    return save(figure, path)


def _scatter_classes(axis, points, labels, views):
    """The points of the first classes there are, as many as there are colours."""
    for colour, label in zip(CYCLE, labels.unique()):
        mine = (labels == label).numpy()
        axis.scatter(*points[mine].T, s=DOT, color=colour, linewidths=0,
                     label=_class_name(views, label))


def _class_name(views, label):
    return plain(views.classes[label]) if label >= 0 else "unlabelled"


def project(x):
    """Features (n, D) -> points (n, 2) and the method's name.

    UMAP if it is installed, else t-SNE; PCA of a few."""
    if len(x) < FEW:
        return _pca(x), "PCA"
    try:
        from umap import UMAP
    except ImportError:
        return tsne(x).numpy(), "t-SNE"
    return UMAP(random_state=0, n_jobs=1).fit_transform(x.numpy()), "UMAP"


def _pca(x):
    x = x - x.mean(0)
    directions = torch.linalg.svd(x, full_matrices=False).Vh[:2]
    points = x @ directions.T
    return F.pad(points, (0, 2 - len(directions))).numpy()         # one sample has one direction


# ---------------------------------------------------------------- measured rows

def draw_lengths(rows, config, path, classes=0):
    """Accuracy on z_agg against observed views (Fig. 8, right), trained and untrained.

    classes: how many there are, for a line at chance; 0: no line."""
    z = next(r for r in rows if r["probe"] == "classify" and r["from"] == "z")
    agg = by_length(rows, "classify")
    lengths = [M for M, _ in agg]

    figure, axis = subplots(figsize=(5, 4.2))
    for key, name, colour in (("value", "trained", BLUE), ("untrained", "untrained", ORANGE)):
        if z[key] is None:                              # evaluate.py --no-untrained
            continue
        values = [r[key] for _, r in agg]
        axis.plot(lengths, values, color=colour, marker="o", label=f"z_agg, {name}")
        axis.axhline(z[key], color=colour, linestyle="--", label=f"z, {name}")

    if classes:
        axis.axhline(100 / classes, color="grey", linestyle=":", label="chance")
    axis.set(xlabel="observed views M_val", ylabel="top-1, %", xticks=lengths,
             title=f"Accuracy and number of views, M_tr = {config.views} (as Fig. 8)")
    axis.grid(alpha=0.3)
    legend_below(figure, axis)
    return save(figure, path)


def draw_path(rows, path):
    """Path integration against sequence length (Fig. 7): all inputs, no actions, no views."""
    path_rows = by_length(rows, "path")

    figure, axis = subplots(figsize=(5, 4.2))
    for ending, words, colour in (("", "views and actions", RED),
                                  (", no actions", "actions set to zero", BLUE),
                                  (", no views", "views set to zero", GREEN)):
        mine = [(M, r) for M, r in path_rows if r["from"] == f"z_agg, a_M, M={M}{ending}"]
        if mine:
            lengths = [M for M, _ in mine]
            trained = [r["value"] for _, r in mine]
            untrained = [r["untrained"] for _, r in mine]
            axis.plot(lengths, trained, color=colour, marker="o", label=words)
            axis.plot(lengths, untrained, color=colour, linestyle=":")      # None leaves a gap
    axis.plot([], color="grey", linestyle=":", label="the same, untrained")

    axis.set(xlabel="observed views M_val", ylabel="R\u00b2 of the action from view 1 to M+1",
             xticks=sorted({M for M, _ in path_rows}), title="Path integration (as Fig. 7)")
    axis.grid(alpha=0.3)
    legend_below(figure, axis)
    return save(figure, path)


def by_length(rows, probe):
    """The rows of a probe that name an inference length, as [(M_val, row), ...] by M_val."""
    found = []
    for row in rows:
        named = re.search(r"M=(\d{1,4})\b", row["from"])
        if row["probe"] == probe and named:
            found.append((int(named[1]), row))
    return sorted(found, key=lambda pair: pair[0])


# ---------------------------------------------------------------- all of one run

def draw_all(model, views, config, rows, run_dir, draw_views=draw_sequences):
    """Every figure that the measured rows allow; yields the paths.

    rows: what evaluate.py measured. draw_views: draws views.png, as draw_sequences does."""
    yield draw_views(views, config, run_dir / "views.png")
    gallery = make_gallery(model, views, config)
    yield draw_retrieval(gallery, views, run_dir / "retrieval.png")
    yield draw_maps(gallery, views, config, run_dir / "maps.png")
    if by_length(rows, "classify"):
        yield draw_lengths(rows, config, run_dir / "lengths.png", len(views.classes))
    if by_length(rows, "path"):
        yield draw_path(rows, run_dir / "path.png")
