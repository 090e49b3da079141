"""What a detector finds: boxes, masks and names over images (DSeq-JEPA Table 2 in pictures).

    draw_detections(pictures, classes, path)        above what is there, below what was found

dense/detect.py calls it. Checked in tests/test_figures_dense_boxes.py.
"""
from typing import NamedTuple

import numpy as np

from figures.canvas import CYCLE, bare, plain, save, subplots

SURE = 0.5                      # score from which on something found is shown
MOST = 12                       # and at most so many in an image, best first
WHITE = "#FFFFFF"


class Shown(NamedTuple):
    """Objects over an image: n of them."""
    boxes: np.ndarray           # (n, 4) x1 y1 x2 y2, pixels
    labels: np.ndarray          # (n,)
    masks: np.ndarray           # (n, H, W) bool
    scores: np.ndarray = None   # (n,), or None for what is there


def sure(boxes, labels, scores, masks):
    """What `dense.detect.predict` found, as Shown: that of a score of 0.5 and more."""
    some = np.flatnonzero(scores >= SURE)[:MOST]
    return Shown(boxes[some], labels[some], masks[some], scores[some])


def draw_detections(pictures, classes, path):
    """Two rows: what is there, what was found.  pictures: [(image (3, H, W) uint8, Shown, Shown)]

    Of an image each class has a colour, in both rows the same; if there is but one class, each
    object.  -> path"""
    across = len(pictures)
    figure, axes = subplots(2, across, figsize=(2.9 * across, 6.2), squeeze=False)
    for column, (image, there, found) in enumerate(pictures):
        labels = np.union1d(there.labels, found.labels)
        for row, shown in enumerate((there, found)):
            number = np.searchsorted(labels, shown.labels)
            if len(classes) == 1:
                number = np.arange(len(shown.labels))
            axis = axes[row, column]
            axis.imshow(image.transpose(1, 2, 0))
            _objects(axis, shown, classes, number % len(CYCLE))
            axis.set(xlim=(-0.5, image.shape[2] - 0.5), ylim=(image.shape[1] - 0.5, -0.5))
        if len(found.labels) == 0:
            axes[1, column].set_xlabel(f"nothing of a score of {SURE} or more", fontsize=8)
    axes[0, 0].set_ylabel("what is there", fontsize=11)
    axes[1, 0].set_ylabel("what was found", fontsize=11)
    bare(axes)
    return save(figure, path)


def _objects(axis, shown, classes, colours):
    """Masks in colours (n,) of CYCLE, their boxes, and names in the boxes' upper corners."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle
    for i in reversed(range(len(shown.labels))):            # the best one last, on top
        colour = CYCLE[colours[i]]
        mask = shown.masks[i]
        axis.imshow(mask[:, :, None] * np.array(to_rgba(colour, 0.4)), interpolation="nearest")
        if 0 < mask.sum() < mask.size:
            axis.contour(mask, levels=[0.5], colors=WHITE, linewidths=0.8)
        x1, y1, x2, y2 = shown.boxes[i] - 0.5               # a pixel's centre has whole numbers
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.6,
                                 edgecolor=colour))
        words = plain(classes[int(shown.labels[i])])
        if shown.scores is not None:
            words += f" {shown.scores[i]:.2f}"
        axis.text(max(0, x1), max(0, y1), words, fontsize=7.5, color=WHITE, va="top", clip_on=True,
                  bbox=dict(facecolor=colour, edgecolor="none", pad=1.2))
