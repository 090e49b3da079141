"""Average precision of boxes and masks as COCO defines it (DSeq-JEPA 0.A.1.3: "the standard COCO
protocol"), in NumPy.

    match(scores, found, truths, areas, crowd)      one class of one image  ->  Matches
    average_precision([[Matches of an image, ...] of a class, ...])     ->  {"AP": ..., "AP50": ...}

D detections and G truths of one class in one image: boxes (n, 4), corners x1 y1 x2 y2, or masks
(n, H, W) bool. Detections, best score first, each take the free truth that they overlap most, if by
enough. Precision at 101 recalls is averaged over recalls, over ten thresholds of IoU and over
classes. Who matches a crowd (a region of many objects that nobody drew one by one) or a truth that
is not of the size asked for counts neither as right nor as wrong.

Checked in tests/test_average_precision.py against pycocotools.
"""
from itertools import product
from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100                      # detections of a class in an image that count
SIZES = [(0, 1e10), (0, 32 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e10)]      # pixels: all, S, M, L
LEAST, LARGEST = np.array(SIZES).T[:, :, None]                  # (4, 1) each


class Matches(NamedTuple):
    """What became of the d best detections of a class in an image."""
    scores: np.ndarray          # (d,) falling
    outcomes: np.ndarray        # (4 sizes, 10 thresholds, d) int8: 1 right, 0 wrong, -1 ignored
    truths: np.ndarray          # (4 sizes,) how many truths are to be found


# ---------------------------------------------------------------- one image

def areas_of(shapes):
    """Pixels of boxes or masks: (n,) float64."""
    if shapes.ndim == 2:
        return (shapes[:, 2:] - shapes[:, :2]).prod(1)
    return shapes.sum((1, 2), dtype=np.float64)


def ious(found, truths, crowd):
    """IoU of detections with truths (D, G), both boxes or both masks.

    With a crowd the share of the detection that lies in it, for it is one of many there."""
    if found.ndim == 2:
        corners = np.minimum(found[:, None, 2:], truths[:, 2:])
        sides = (corners - np.maximum(found[:, None, :2], truths[:, :2])).clip(min=0)
        both = sides.prod(2)
    else:
        # float32 multiplies quickly, and counts exactly up to 2^24 pixels.
        both = np.tensordot(found.astype(np.float32), truths.astype(np.float32),
                            axes=((1, 2), (1, 2))).astype(np.float64)
    ours = areas_of(found)[:, None]
    union = np.where(crowd, ours, ours + areas_of(truths) - both)
    return both / np.where(both > 0, union, 1)


def match(scores, found, truths, areas, crowd):
    """Matches of one class in one image.

    scores (D,) and found: the detections.  truths, their areas (G,) as annotated, crowd (G,)."""
    best = np.argsort(-scores, kind="stable")[:MOST]
    scores, found = scores[best], found[best]
    # Of equal overlaps the last truth wins, and argmax takes the first: so, backwards.
    truths, areas, crowd = truths[::-1], areas[::-1], crowd[::-1]
    overlaps = ious(found, truths, crowd)
    ignored = crowd | _out_of_range(areas)                              # (4, G)
    outcomes = np.zeros((len(SIZES), len(THRESHOLDS), len(best)), dtype=np.int8)
    outcomes -= _out_of_range(areas_of(found))[:, None]     # unmatched, these are of another size
    free = np.ones((len(SIZES), len(THRESHOLDS), len(crowd)), dtype=bool)
    for d in range(len(best) if len(crowd) else 0):
        fits = free & (overlaps[d] >= THRESHOLDS[:, None])
        counts = fits & ~ignored[:, None]
        fits = np.where(counts.any(2, keepdims=True), counts, fits)     # rather one that counts
        size, threshold = fits.any(2).nonzero()
        chosen = np.where(fits, overlaps[d], -1).argmax(2)[size, threshold]
        outcomes[size, threshold, d] = np.where(ignored[size, chosen], -1, 1)
        free[size, threshold, chosen] = crowd[chosen]                   # a crowd holds many
    return Matches(scores, outcomes, (~ignored).sum(1))


def _out_of_range(areas):
    """areas (n,) -> (4, n) bool"""
    return (areas < LEAST) | (areas > LARGEST)


# ---------------------------------------------------------------- all images

def average_precision(classes):
    """{"AP", "AP50", "AP75", "APS", "APM", "APL": value in [0, 1], NaN where there is no truth}

    classes: for each class, the Matches of images that hold any of it, in the images' order, which
    settles ties of scores. Classes without a truth are left out of the mean."""
    means = np.array([_precision(matches) for matches in classes]).reshape(-1, len(SIZES), 10)
    values = dict(AP=means[:, 0], AP50=means[:, 0, 0], AP75=means[:, 0, 5],
                  APS=means[:, 1], APM=means[:, 2], APL=means[:, 3])
    return {name: _mean(value) for name, value in values.items()}


def _precision(matches):
    """Mean precision of one class over recalls: (4, 10), NaN for sizes without a truth."""
    scores, outcomes, truths = zip(*matches)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    outcomes = np.concatenate(outcomes, axis=2)[:, :, order]
    truths = np.sum(truths, axis=0)
    means = np.full(outcomes.shape[:2], np.nan)
    for size, threshold in product(np.flatnonzero(truths), range(len(THRESHOLDS))):
        outcome = outcomes[size, threshold]
        right = outcome[outcome >= 0].cumsum(dtype=np.int64)
        precision = right / np.arange(1, len(right) + 1)
        # The best at this recall or a higher one, 0 for recalls that are never reached.
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        means[size, threshold] = precision[np.searchsorted(right / truths[size], RECALLS)].mean()
    return means


def _mean(values):
    """Mean of what is not NaN; NaN if there is nothing."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
