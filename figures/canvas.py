"""What all figures share: colours, axes, words that are safe to show, and how a figure is saved.

Colours are Okabe & Ito's and viridis, which colour-blind readers can tell apart.
Checked in tests/test_figures.py.
"""
from pathlib import Path

import torch

from plumbing.files import save_atomically

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PINK = "#CC79A7"
SKY = "#56B4E9"
YELLOW = "#F0E442"
BLACK = "#000000"
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW, BLACK)

LONGEST_NAME = 60   # characters of a class or a run that a figure shows


def subplots(down=1, across=1, *, figsize, **options):
    """A figure and its axes, as pyplot's; nothing has to be closed.

    Matplotlib is imported where something is drawn: who only trains, or has mistyped a flag, does
    not wait for it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(down, across, **options)


def plain(words):
    """Words that a user chose, such as the name of a class, as they can stand in a figure.

    Matplotlib would set `$...$` as mathematics, leave a name with `_` before it out of legends, and
    end in an error at what is no text."""
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(words))
    if len(words) > LONGEST_NAME:
        words = words[:LONGEST_NAME] + "\N{HORIZONTAL ELLIPSIS}"
    if words.startswith("_"):
        words = " " + words
    return words.replace("$", r"\$")


def spread(views, count):
    """`count` sample indices, evenly over the split."""
    return torch.linspace(0, len(views) - 1, count).long()


def to_pixels(images, views):
    """Normalised (..., 3, H, W) on any device -> (..., H, W, 3) in [0, 1], NumPy."""
    images = images * views.std.view(3, 1, 1) + views.mean.view(3, 1, 1)
    return images.clamp(0, 1).movedim(-3, -1).cpu().numpy()


def bare(axes):
    """Pictures without ticks."""
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])


def title_columns(axes, titles):
    """Words above each column of a grid of pictures."""
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)


def save(figure, path):
    """Write the figure.  -> path"""
    save_atomically(Path(path), lambda part: figure.savefig(part, dpi=110, format="png"))
    return path


def legend_below(figure, axis):
    """Names of the axis' lines under everything else, where they hide no line."""
    lines, names = axis.get_legend_handles_labels()
    figure.legend(lines, names, fontsize=8, loc="outside lower center", ncols=2)
