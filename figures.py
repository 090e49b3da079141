"""Figures, each drawn from a run's own files and features and titled with what it shows and the figure it redraws.

    draw_curves(run_dir)                        curves.png         training: loss, learning rate, health of the features
    draw_all(model, views, config, rows, dir)   views.png          what the model sees and is told (Fig. 3)
                                                retrieval.png      nearest neighbours of a view (Fig. 4)
                                                maps.png           2-D maps of z and z_agg (Figs. 5, 6, 13, 14)
                                                lengths.png        accuracy against M_val (Fig. 8, right)
                                                path.png           path integration (Fig. 7)

From the JSON that evaluate.py wrote for several runs:

    draw_heatmap(files, path)                   top-1 for every M_tr and M_val (Figs. 9-12)
    draw_sweep(files, path)                     R^2 and top-1 against M_tr (Fig. 8, left and middle)
    draw_transfer(files, path)                  transfer: top-1 against M_val and against its cost (Fig. 15)

Colours are Okabe & Ito's and viridis, which colour-blind readers can tell apart.
"""
import json
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from plumbing import runs
from plumbing.device import seed_all
from plumbing.files import save_atomically

BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK)
GALLERY = 1500                  # validation samples that a figure of features shows at most
FEW = 100                       # with fewer points than this there are no neighbourhoods for UMAP to keep


def draw_curves(run_dir):
    """Training curves from metrics.csv -> curves.png."""
    rows = runs.read_metrics(run_dir / "metrics.csv")
    panels = [("prediction loss", {"loss": BLUE}), ("learning rate", {"lr": BLUE}),
              ("spread of features (1 healthy, 0 collapsed)", {"z_std": BLUE, "z_agg_std": ORANGE}),
              ("effective rank of features (RankMe)", {"z_rank": BLUE, "z_agg_rank": ORANGE}),
              ("regions predicted per image", {"steps": BLUE}),
              ("online k-NN top-1, % (not the protocol)", {"knn_z": BLUE, "knn_z_agg": ORANGE, "knn_patches": BLUE, "knn_cls": ORANGE}),
              ("online R\u00b2 of the action (not the protocol)", {"action_r2": BLUE})]
    measured = {name for r in rows for name, value in r.items() if value == value}          # NaN where no online probe was due
    panels = [(title, {n: c for n, c in lines.items() if n in measured}) for title, lines in panels if measured & lines.keys()]
    across = -(-len(panels) // 2)
    figure, axes = plt.subplots(2, across, figsize=(4.8 * across, 6), layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (title, lines) in zip(axes.flat, panels):
        for name, colour in lines.items():
            shown = [r for r in rows if r[name] == r[name]]
            axis.plot([r["epoch"] for r in shown], [r[name] for r in shown], color=colour, marker="." if len(shown) < 60 else None,
                      label=re.sub("knn_|_std|_rank", "", name))
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    return _save(figure, run_dir / "curves.png")


def draw_all(model, views, config, rows, run_dir):
    """Every figure that the run's mode and the measured rows allow; yields the paths."""
    draw_views = draw_scanpaths if config.mode == "saccade" else draw_sequences
    yield draw_views(views, config, run_dir / "views.png")
    gallery = make_gallery(model, views, config)
    yield draw_retrieval(gallery, views, run_dir / "retrieval.png")
    yield draw_maps(gallery, views, config, run_dir / "maps.png")
    if any(r["from"].startswith("z_agg") for r in rows if r["probe"] == "classify"):
        yield draw_lengths(rows, config, run_dir / "lengths.png")
    if any(r["probe"] == "path" for r in rows):
        yield draw_path(rows, run_dir / "path.png")


# ---------------------------------------------------------------- what the model sees

def draw_scanpaths(views, config, path, count=6):
    """Where it looked (Fig. 3b): fixations in order over image and saliency, and the patches the encoder saw."""
    index, M, p = _spread(views, count), config.views, config.patch_size
    seed_all(config.seed)
    images, saliency = views.images[index].cpu(), views.saliency[index].float().cpu()
    fixations, patches = views.scanpaths(index, M + 1)
    pixels = _pixels(patches, views)
    figure, axes = plt.subplots(count, M + 3, figsize=(1.5 * (M + 3), 1.55 * count), layout="constrained", squeeze=False)
    for row, axis in enumerate(axes):
        axis[0].imshow(images[row].permute(1, 2, 0).numpy())
        axis[1].imshow(saliency[row].numpy(), cmap="magma")
        y, x = fixations[row].cpu().T.tolist()
        axis[0].plot(x, y, color="white", linewidth=1)
        for k in range(M + 1):
            colour = RED if k == M else BLUE
            axis[0].add_patch(plt.Rectangle((x[k] - p // 2 - 0.5, y[k] - p // 2 - 0.5), p, p, fill=False, edgecolor=colour))
            axis[0].text(x[k], y[k], str(k + 1), color="white", ha="center", va="center", fontsize=8,
                         bbox=dict(boxstyle="circle,pad=0.15", facecolor=colour, linewidth=0))
            axis[2 + k].imshow(pixels[row, k])
        axis[0].set(xlim=(-0.5, config.image_size - 0.5), ylim=(config.image_size - 0.5, -0.5))
    _bare(axes)
    for a, title in zip(axes[0], ["image", "saliency", *(f"view {k + 1}" for k in range(M)), "to predict"]):
        a.set_title(title, fontsize=9)
    ior = "with" if config.ior else "without"
    figure.suptitle(f"Where it looked (as Fig. 3b): fixations from {config.saliency} saliency, {ior} inhibition of return", fontsize=10)
    return _save(figure, path)


def draw_sequences(views, config, path, count=3):
    """Rows of views with the action that leads to the next one written under each (Fig. 3a)."""
    index, M = _spread(views, count), config.views
    seed_all(config.seed)
    batch = views(index, M)
    pixels = _pixels(batch.views, views)
    figure, axes = plt.subplots(count, M + 1, figsize=(2.6 * (M + 1), 2.9 * count), layout="constrained", squeeze=False)
    for row, axis in enumerate(axes):
        for k in range(M + 1):
            axis[k].imshow(pixels[row, k])
            if k < M:
                words = [f"{name} " + " ".join(f"{v:+.2f}" for v in batch.actions[row, k, columns].tolist())
                         for name, columns in views.groups.items()]
                axis[k].set_xlabel("\n".join(words) + "  \u2192", fontsize=7)
    _bare(axes)
    for a, title in zip(axes[0], [*(f"view {k + 1}" for k in range(M)), "to predict"]):
        a.set_title(title, fontsize=9)
    figure.suptitle(f"Views and actions, mode {config.mode} (as Fig. 3a): under each view, the action that leads to the next", fontsize=10)
    return _save(figure, path)


# ---------------------------------------------------------------- features of the validation set

class Gallery(NamedTuple):
    """Up to GALLERY validation samples: first views and features, on the CPU."""
    pixels: torch.Tensor    # (n, H, W, 3) of view 1, in [0, 1]
    z: torch.Tensor         # (n, D) of view 1
    z_agg: torch.Tensor     # (n, D+E)
    params: torch.Tensor    # (n, P) of view 1
    labels: torch.Tensor    # (n,)


@torch.inference_mode()
def make_gallery(model, views, config):
    """Views and features of an even choice of the validation samples, M_val = M_tr."""
    model.eval()
    rows = []
    for index in _spread(views, min(GALLERY, len(views))).split(250):
        seed_all(config.seed, int(index[0]))
        batch, M = views(index, config.views), config.views
        z, a = model.encode(batch.views), model.embed(batch.actions)
        z_agg = model.aggregate(z[:, :M], a[:, :M - 1])
        rows.append((torch.from_numpy(_pixels(batch.views[:, :1], views)[:, 0]), z[:, 0], z_agg, batch.params[:, 0], batch.labels))
    return Gallery(*(torch.cat(column).cpu() for column in zip(*rows)))


def draw_retrieval(gallery, views, path, count=6):
    """The three nearest neighbours, by cosine of z, of a view (Fig. 4): same kind of thing, same transformation?"""
    z = F.normalize(gallery.z, dim=1)
    queries = torch.linspace(0, len(z) - 1, count).long()
    similarity = z[queries] @ z.T
    similarity[torch.arange(count), queries] = -2
    best, nearest = similarity.topk(min(3, len(z) - 1), dim=1)
    figure, axes = plt.subplots(count, 4, figsize=(7, 1.85 * count), layout="constrained", squeeze=False)
    for row, axis in enumerate(axes):
        for column, i in enumerate([queries[row], *nearest[row]]):
            axis[column].imshow(gallery.pixels[i].numpy())
            name = _class_name(views, gallery.labels[i])
            axis[column].set_xlabel(name if column == 0 else f"{name}, cos {best[row, column - 1]:.2f}", fontsize=8)
    _bare(axes)
    for a, title in zip(axes[0], ("query", "nearest", "2nd", "3rd")):
        a.set_title(title, fontsize=9)
    figure.suptitle(f"Nearest encoder features among {len(z):,} validation views (as Fig. 4)", fontsize=10)
    return _save(figure, path)


def draw_maps(gallery, views, config, path):
    """2-D maps of z by class and by the view's own parameters, and of z_agg by class (Figs. 5, 6; without actions 13, 14)."""
    flat_z, method = project(gallery.z)
    flat_agg, _ = project(gallery.z_agg)
    names = {"saccade": ["x of fixation", "y of fixation"], "augment": ["crop y", "crop x", "brightness", "blur sigma"],
             "rotation": ["angle x", "angle y", "angle z"]}[config.mode]
    columns = {"saccade": [0, 1], "augment": [0, 1, 4, 8], "rotation": [6, 7, 8]}[config.mode]
    figure, (top, bottom) = plt.subplots(2, max(3, len(names)), figsize=(3.4 * max(3, len(names)), 6.4), layout="constrained")
    shown = gallery.labels.unique()[:len(CYCLE)]
    for axis, points, title in zip(top, (flat_z, flat_agg), ("z of view 1, by class", f"z_agg, M = {config.views}, by class")):
        for colour, label in zip(CYCLE, shown):
            rows = gallery.labels == label
            axis.scatter(*points[rows].T, s=6, color=colour, label=_class_name(views, label), linewidths=0)
        axis.set_title(title, fontsize=10)
    few = f"{len(shown)} of {len(views.classes)} classes" if len(views.classes) > len(shown) else None
    top[2].legend(*top[0].get_legend_handles_labels(), title=few, loc="center left", markerscale=3)
    for axis, name, column in zip(bottom, names, columns):
        points = axis.scatter(*flat_z.T, s=6, c=gallery.params[:, column], cmap="viridis", linewidths=0)
        figure.colorbar(points, ax=axis)
        axis.set_title(f"z of view 1, by {name}", fontsize=10)
    _bare(np.array([top, bottom]))
    for axis in (*top[2:], *bottom[len(names):]):
        axis.axis("off")
    redrawn = {("rotation", True): " (as Fig. 5)", ("saccade", True): " (as Fig. 6)", ("rotation", False): " (as Fig. 13)",
               ("saccade", False): " (as Fig. 14)"}.get((config.mode, config.condition != "none"), "")
    figure.suptitle(f"{method} of {len(flat_z):,} validation samples, condition {config.condition}{redrawn}", fontsize=11)
    return _save(figure, path)


def project(x):
    """Features (n, D) -> 2-D points (n, 2) and the name of the method: UMAP if umap-learn is installed, else PCA."""
    try:
        if len(x) >= FEW:
            from umap import UMAP
            return UMAP(random_state=0, n_jobs=1).fit_transform(x.numpy()), "UMAP"
        method = "PCA"
    except ImportError:
        method = "PCA (umap-learn is not installed)"
    x = x - x.mean(0)
    return (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).numpy(), method


# ---------------------------------------------------------------- measured rows

def draw_lengths(rows, config, path):
    """Accuracy on z_agg against the number of observed views (Fig. 8, right), trained and untrained."""
    rows = [r for r in rows if r["probe"] == "classify"]
    agg = sorted((int(r["from"].split("M=")[1]), r) for r in rows if "M=" in r["from"])
    z = next(r for r in rows if r["from"] == "z")
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for key, colour in (("value", BLUE), ("untrained", ORANGE)):
        name = "trained" if key == "value" else "untrained"
        axis.plot([M for M, _ in agg], [r[key] for _, r in agg], color=colour, marker="o", label=f"z_agg, {name}")
        axis.axhline(z[key], color=colour, linestyle="--", label=f"z, {name}")
    axis.set(xlabel="observed views M_val", ylabel="top-1, %", xticks=[M for M, _ in agg],
             title=f"Accuracy and number of views, M_tr = {config.views} (as Fig. 8)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, path)


def draw_path(rows, path):
    """Path integration against sequence length (Fig. 7): all inputs, actions zeroed, views zeroed; dotted: untrained."""
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for suffix, words, colour in (("", "views and actions", RED), (", no actions", "actions set to zero", BLUE),
                                  (", no views", "views set to zero", GREEN)):
        found = [(r, re.fullmatch(r"z_agg, a_M, M=(\d+)" + suffix, r["from"])) for r in rows if r["probe"] == "path"]
        lengths, trained, untrained = zip(*sorted((int(m.group(1)), r["value"], r["untrained"]) for r, m in found if m))
        axis.plot(lengths, trained, color=colour, marker="o", label=words)
        axis.plot(lengths, untrained, color=colour, linestyle=":")
    axis.plot([], color="grey", linestyle=":", label="the same, untrained")
    axis.set(xlabel="observed views M_val", ylabel="R\u00b2 of the action from view 1 to M+1", xticks=lengths,
             title="Path integration (as Fig. 7)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return _save(figure, path)


# ---------------------------------------------------------------- several runs

def draw_heatmap(files, path):
    """Top-1 on z_agg for every M_tr (one probes.json each) and M_val (Figs. 9-12)."""
    table = {}
    for result, rows in map(_read, files):
        table |= {(result["config"]["views"], M): r["value"] for M, r in rows if M and r["probe"] == "classify"}
    trained, probed = (sorted({key[i] for key in table}) for i in range(2))
    figure, axis = plt.subplots(figsize=(1.5 + 0.9 * len(probed), 1.3 + 0.7 * len(trained)), layout="constrained")
    values = [[table.get((a, b), float("nan")) for b in probed] for a in trained]
    axis.imshow(values, cmap="viridis")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white",
                      bbox=dict(facecolor="black", alpha=0.35, linewidth=0, pad=1.5))
    axis.set(xticks=range(len(probed)), xticklabels=probed, yticks=range(len(trained)), yticklabels=trained,
             xlabel="M_val", ylabel="M_tr", title="top-1 on z_agg, % (as Figs. 9-12)")
    return _save(figure, path)


def draw_sweep(files, path):
    """R^2 of the relative action, and top-1 on z_agg at fixed M_val, against M_tr (Fig. 8, left and middle); one probes.json a run.

    Each data set and condition has lines of its own; where runs differ in neither, nor in M_tr (seeds), the line joins their means."""
    panels = {}, {}                                     # {(setting, what): {M_tr: values}}
    for result, rows in map(_read, files):
        c = result["config"]
        for M, r in rows:
            if r["probe"] == "action" or (r["probe"] == "classify" and M):
                line = f"{c['dataset']} {c['mode']}, condition {c['condition']}", f"M_val {M}" if M else r["predicts"]
                panels[bool(M)].setdefault(line, {}).setdefault(c["views"], []).append(r["value"])
    settings = sorted({setting for panel in panels for setting, _ in panel})
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axis, panel, ylabel in zip(axes, panels, ("R\u00b2 of the relative action, from z", "top-1 on z_agg, %")):
        for i, ((setting, what), points) in enumerate(panel.items()):
            M_tr, colour = sorted(points), CYCLE[i % len(CYCLE)]
            label = what if len(settings) == 1 else f"{setting}: {what}"
            axis.plot(M_tr, [sum(points[M]) / len(points[M]) for M in M_tr], color=colour, label=label)
            axis.plot([M for M in M_tr for _ in points[M]], [v for M in M_tr for v in points[M]], "o", color=colour)
        axis.set(xlabel="observed views in training, M_tr", ylabel=ylabel, xticks=sorted({M for points in panel.values() for M in points}))
        axis.grid(alpha=0.3)
        if panel:
            axis.legend(fontsize=8)
    figure.suptitle(f"Training length{': ' + settings[0] if len(settings) == 1 else ''} (as Fig. 8, left and middle)", fontsize=11)
    return _save(figure, path)


def draw_transfer(files, path):
    """Top-1 on another data set's classes (Fig. 15) against M_val, and against what it costs (B.6): one probes-transfer-*.json a line."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    for i, (result, rows) in enumerate(map(_read, files)):
        rows = [(M, r) for M, r in rows if r["probe"] == "transfer"]
        name = f"{result['config']['name']}, patches of {rows[0][1]['patch_size']} px"
        for axis, x in zip(axes, ([M for M, _ in rows], [r["gmac"] for _, r in rows])):
            for key, style, label in (("value", "-o", name), ("untrained", ":", f"{name}, untrained")):
                axis.plot(x, [r[key] for _, r in rows], style, color=CYCLE[i % len(CYCLE)], label=label)
    axes[0].set(xlabel="observed views M_val", ylabel="top-1 on z_agg, %")
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[1].set(xlabel="multiply-adds an image, billions")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"Transfer to {result['dataset']} (as Fig. 15)", fontsize=11)
    return _save(figure, path)


def _read(file):
    """What evaluate.py wrote, and its rows as (M_val, row), by M_val; 0 where a row has none."""
    result = json.loads(Path(file).read_text())
    lengths = [re.search(r"M=(\d+)", r["from"]) for r in result["rows"]]
    return result, sorted(((int(m[1]) if m else 0, r) for m, r in zip(lengths, result["rows"])), key=lambda pair: pair[0])


# ---------------------------------------------------------------- helpers

def _spread(views, count):
    """`count` sample indices, evenly over the split."""
    return torch.linspace(0, len(views) - 1, count).long()


def _pixels(images, views):
    """Normalised (B, K, 3, H, W) on any device -> (B, K, H, W, 3) in [0, 1], NumPy."""
    images = images * views.std.view(3, 1, 1) + views.mean.view(3, 1, 1)
    return images.clamp(0, 1).permute(0, 1, 3, 4, 2).cpu().numpy()


def _class_name(views, label):
    return str(views.classes[label]) if label >= 0 else "unlabelled"


def _bare(axes):
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])


def _save(figure, path):
    save_atomically(Path(path), lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)
    return path
