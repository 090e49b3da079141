"""Average precision of boxes and masks as COCO defines it (DSeq-JEPA 0.A.1.3: "the standard COCO
protocol"), in NumPy.

    ious = box_ious(boxes, truths, crowd)  or  mask_ious(masks, truths, crowd)          (D, G)
    match(scores, areas, ious, truth_areas, crowd)      one class of one image  ->  Matches
    average_precision([[Matches of an image, ...] of a class, ...])     ->  {"AP": ..., "AP50": ...}

D detections and G truths of one class in one image. Detections, best score first, each take the
free truth that they overlap most, if by enough. Precision at 101 recalls is averaged over recalls,
over the ten thresholds of IoU 0.50, 0.55, ..., 0.95, and over classes. Some truths are to be
ignored: crowds (regions of many objects that nobody drew one by one) and those not of the size
asked for. Who matches these counts neither as right nor as wrong.

Images are looked at one by one, on any rank, and leave only their small Matches behind.
Checked in tests/test_average_precision.py against pycocotools.
"""
from typing import NamedTuple

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100                      # detections of a class in an image that count
SIZES = {"": (0, 1e10), "S": (0, 32 ** 2), "M": (32 ** 2, 96 ** 2), "L": (96 ** 2, 1e10)}  # pixels
RANGES = np.array(list(SIZES.values()))[:, :, None]             # (4, 2, 1)


class Matches(NamedTuple):
    """What became of the d best detections of a class in an image."""
    scores: np.ndarray          # (d,) falling
    outcomes: np.ndarray        # (4 sizes, 10 thresholds, d) int8: 1 right, 0 wrong, -1 ignored
    truths: np.ndarray          # (4 sizes,) how many truths are to be found


# ---------------------------------------------------------------- one image

def box_ious(boxes, truths, crowd):
    """boxes (D, 4) and truths (G, 4), corners x1 y1 x2 y2; crowd (G,) bool  ->  (D, G)

    IoU; with a crowd the share of the detection that lies in it, for it is one of many there."""
    corners = np.minimum(boxes[:, None, 2:], truths[:, 2:])
    sides = (corners - np.maximum(boxes[:, None, :2], truths[:, :2])).clip(min=0)
    return _over_union(sides.prod(2), box_areas(boxes), box_areas(truths), crowd)


def mask_ious(masks, truths, crowd):
    """As `box_ious`, of masks (D, H, W) and (G, H, W) bool."""
    # float32 multiplies quickly, and counts exactly up to 2^24 pixels.
    intersection = np.tensordot(masks.astype(np.float32), truths.astype(np.float32),
                                axes=((1, 2), (1, 2)))
    return _over_union(intersection.astype(np.float64), mask_areas(masks), mask_areas(truths),
                       crowd)


def _over_union(intersection, ours, theirs, crowd):
    union = ours[:, None] + theirs - intersection
    union = np.where(crowd, ours[:, None], union)
    return intersection / np.where(intersection > 0, union, 1)


def box_areas(boxes):
    """(n, 4) -> (n,)"""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def mask_areas(masks):
    """(n, H, W) bool -> (n,)"""
    return masks.sum((1, 2), dtype=np.float64)


def match(scores, areas, ious, truth_areas, crowd):
    """Matches of one class in one image.

    scores, areas (D,) of detections; ious (D, G); truth_areas, crowd (G,) of truths."""
    best = np.argsort(-scores, kind="stable")[:MOST]
    # Of equal overlaps the last truth wins, and argmax takes the first: so, backwards.
    ious, truth_areas, crowd = ious[best, ::-1], truth_areas[::-1], crowd[::-1]
    ignored = crowd | _out_of_range(truth_areas)                        # (4, G)
    outcomes = np.zeros((len(RANGES), len(THRESHOLDS), len(best)), dtype=np.int8)
    outcomes -= _out_of_range(areas[best])[:, None]     # unmatched, these are of another size
    free = np.ones((len(RANGES), len(THRESHOLDS), len(crowd)), dtype=bool)
    for d in range(len(best) if len(crowd) else 0):
        fits = free & (ious[d] >= THRESHOLDS[:, None])
        counts = fits & ~ignored[:, None]
        fits = np.where(counts.any(2, keepdims=True), counts, fits)     # rather one that counts
        size, threshold = fits.any(2).nonzero()
        chosen = np.where(fits, ious[d], -1).argmax(2)[size, threshold]
        outcomes[size, threshold, d] = np.where(ignored[size, chosen], -1, 1)
        free[size, threshold, chosen] = crowd[chosen]                   # a crowd holds many
    return Matches(scores[best], outcomes, (~ignored).sum(1))


def _out_of_range(areas):
    """areas (n,) -> (4, n) bool"""
    return (areas < RANGES[:, 0]) | (areas > RANGES[:, 1])


# ---------------------------------------------------------------- all images

def average_precision(classes):
    """{"AP", "AP50", "AP75", "APS", "APM", "APL": value in [0, 1], NaN where there is no truth}

    classes: for each class, the Matches of images that hold any of it, in the images' order, which
    settles ties of scores. Classes without a truth are left out of the mean."""
    precisions = [_precision(matches) for matches in classes if matches]
    precisions = np.stack([*precisions, np.full((len(RANGES), len(THRESHOLDS)), np.nan)])
    values = dict(AP=precisions[:, 0], AP50=precisions[:, 0, :1], AP75=precisions[:, 0, 5:6])
    for size, name in enumerate(SIZES):
        values["AP" + name] = precisions[:, size]
    return {name: _mean(value) for name, value in values.items()}


def _precision(matches):
    """Mean precision of one class over recalls: (4, 10), NaN for sizes without a truth."""
    scores, outcomes, truths = zip(*matches)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    outcomes = np.concatenate(outcomes, axis=2)[:, :, order]
    truths = np.sum(truths, axis=0)
    means = np.full(outcomes.shape[:2], np.nan)
    for size, threshold in np.ndindex(means.shape):
        if truths[size] == 0:
            continue
        outcome = outcomes[size, threshold]
        outcome = outcome[outcome >= 0]
        right = outcome.cumsum(dtype=np.int64)
        precision = right / np.arange(1, len(right) + 1)
        # The best at this recall or a higher one, 0 for recalls that are never reached.
        precision = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        means[size, threshold] = precision[np.searchsorted(right / truths[size], RECALLS)].mean()
    return means


def _mean(values):
    """Mean of what is not NaN; NaN if there is nothing."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else float("nan")
