"""Figures, drawn from a run's own files and features; each says what it shows and which figure of the paper it redraws.

    draw_curves(run_dir)                  curves.png       loss, learning rate, spread and rank of the features
    draw_all(model, views, config, dir)   the mode's figures
"""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import runs
from build import seed_all

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"      # Okabe & Ito: told apart by everyone


def draw_curves(run_dir):
    """Training curves from metrics.csv -> curves.png."""
    rows = runs.read_metrics(run_dir / "metrics.csv")
    if not rows:
        return
    epoch = [r["epoch"] for r in rows]
    panels = [("prediction loss, 1 - cosine (Eq. 4)", {"loss": BLUE}), ("learning rate", {"lr": BLUE}),
              ("spread of features (1 healthy, 0 collapsed)", {"z_std": BLUE, "z_agg_std": ORANGE}),
              ("effective rank (RankMe)", {"z_rank": BLUE, "z_agg_rank": ORANGE})]
    figure, axes = plt.subplots(1, 4, figsize=(18, 3.6), layout="constrained")
    for axis, (title, lines) in zip(axes, panels):
        for name, colour in lines.items():
            axis.plot(epoch, [r[name] for r in rows], color=colour, marker="." if len(rows) < 60 else None,
                      label=name.replace("_std", "").replace("_rank", ""))
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend()
    return _save(figure, run_dir / "curves.png")


def draw_all(model, views, config, run_dir):
    """Every figure of the run's mode; yields the paths."""
    yield draw_scanpaths(views, config, run_dir / "scanpaths.png")


def draw_scanpaths(views, config, path, count=6):
    """Where it looked (Fig. 3b): fixations in order over image and saliency, and the patches the encoder saw."""
    index = torch.linspace(0, len(views) - 1, count).long()
    M, p, side = config.views, config.patch_size, config.image_size
    seed_all(config.seed)
    images, saliency = views.images[index].cpu(), views.saliency[index].float().cpu()
    fixations, patches = views.scanpaths(index, M + 1)
    pixels = (patches * views.std.view(3, 1, 1) + views.mean.view(3, 1, 1)).clamp(0, 1).permute(0, 1, 3, 4, 2).cpu()
    figure, axes = plt.subplots(count, M + 3, figsize=(1.5 * (M + 3), 1.55 * count), layout="constrained")
    for row, axis in enumerate(axes):
        axis[0].imshow(images[row].permute(1, 2, 0))
        axis[1].imshow(saliency[row], cmap="magma")
        y, x = fixations[row].cpu().T
        axis[0].plot(x, y, color="white", linewidth=1)
        for k in range(M + 1):
            colour = RED if k == M else BLUE
            axis[0].add_patch(plt.Rectangle((x[k] - p // 2 - 0.5, y[k] - p // 2 - 0.5), p, p, fill=False, edgecolor=colour, linewidth=1))
            axis[0].text(x[k], y[k], str(k + 1), color="white", ha="center", va="center", fontsize=8,
                         bbox=dict(boxstyle="circle,pad=0.15", facecolor=colour, linewidth=0))
            axis[2 + k].imshow(pixels[row, k])
        axis[0].set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
        for a in axis:
            a.set(xticks=[], yticks=[])
    for a, title in zip(axes[0], ["image", "saliency", *(f"view {k + 1}" for k in range(M)), "to predict"]):
        a.set_title(title, fontsize=9)
    ior = "with" if config.ior else "without"
    figure.suptitle(f"Where it looked (as Fig. 3b): fixations from {config.saliency} saliency, {ior} inhibition of return", fontsize=10)
    return _save(figure, path)


def _save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
