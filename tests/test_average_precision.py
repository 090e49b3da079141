"""Average precision equals pycocotools', and a few cases are worked by hand."""
import contextlib
import io

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dense.average_precision import areas_of, average_precision, match

NAMES = ("AP", "AP50", "AP75", "APS", "APM", "APL")
SIDE = 160


def draw(rng, count, low, high):
    """Boxes (count, 4) inside the image, sides from low to high pixels."""
    sides = rng.uniform(low, high, (count, 2))
    corner = rng.uniform(0, SIDE - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def ellipses(boxes):
    """The ellipses in boxes (n, 4): masks (n, SIDE, SIDE) bool."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    masks = [np.zeros((0, SIDE, SIDE), dtype=bool)]
    for x1, y1, x2, y2 in boxes:
        across = (2 * x - x1 - x2) / (x2 - x1)
        down = (2 * y - y1 - y2) / (y2 - y1)
        masks.append((across ** 2 + down ** 2 <= 1)[None])
    return np.concatenate(masks)


def on_grid(boxes, grid):
    """Corners rounded to a grid, at least one step apart."""
    boxes = (boxes.clip(0, SIDE) / grid).round() * grid
    boxes[:, :2] = np.minimum(boxes[:, :2], SIDE - grid)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + grid)
    return boxes


def random_set(seed, images=12, classes=3, high=150, grid=0.1):
    """[(truths, detections) of an image]: each {class: (boxes, crowd or scores)}.

    Detections are truths moved a little, some twice, and others from nowhere. Scores are tied; on
    a coarse grid, in pixels, so are overlaps."""
    rng = np.random.default_rng(seed)
    everything = []
    for _ in range(images):
        truths = {}
        found = {}
        for k in range(classes):
            boxes = on_grid(draw(rng, rng.integers(0, 5), 4, high), grid)
            crowd = rng.random(len(boxes)) < 0.25
            moved = np.repeat(boxes, rng.integers(0, 4, len(boxes)), axis=0)
            moved = moved + rng.normal(0, 0.06, moved.shape) * (moved[:, 2:] - moved[:, :2]).min(
                1, initial=high, keepdims=True)
            others = draw(rng, rng.integers(0, 4), 4, high)
            boxes_found = on_grid(np.concatenate([moved, others]), grid)
            truths[k] = boxes, crowd
            found[k] = boxes_found, rng.random(len(boxes_found)).round(1)
        everything.append((truths, found))
    return everything


def ours(everything, kind):
    classes = {}
    for truths, found in everything:
        for k, (boxes, crowd) in truths.items():
            ours, scores = found[k]
            if len(boxes) + len(ours) == 0:
                continue
            shapes, their_shapes = ours, boxes
            if kind == "segm":
                shapes, their_shapes = ellipses(ours), ellipses(boxes)
            # COCO's area of a truth is its mask's, for boxes too.
            areas = areas_of(ellipses(boxes))
            matches = match(scores, shapes, their_shapes, areas, crowd)
            classes.setdefault(k, []).append(matches)
    return average_precision(list(classes.values()))


def theirs(everything, kind):
    """The same from pycocotools."""
    annotations = []
    results = []
    for image, (truths, found) in enumerate(everything):
        for k, (boxes, crowd) in truths.items():
            for box, mask, is_crowd in zip(boxes, ellipses(boxes), crowd):
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=image, category_id=k, bbox=as_xywh(box),
                    area=float(mask.sum()), iscrowd=int(is_crowd), segmentation=encode(mask)))
            for box, mask, score in zip(found[k][0], ellipses(found[k][0]), found[k][1]):
                shape = dict(bbox=as_xywh(box))
                if kind == "segm":
                    shape = dict(segmentation=encode(mask))
                results.append(dict(image_id=image, category_id=k, score=score, **shape))
    truth = COCO()
    truth.dataset = dict(annotations=annotations,
                         images=[dict(id=i, height=SIDE, width=SIDE)
                                 for i in range(len(everything))],
                         categories=[dict(id=k) for k in everything[0][0]])
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(results), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return {name: value if value > -1 else np.nan for name, value in zip(NAMES, judge.stats)}


def as_xywh(box):
    return [float(v) for v in (box[0], box[1], box[2] - box[0], box[3] - box[1])]


def encode(mask):
    return rle.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(5))
def test_it_equals_pycocotools(kind, seed):
    """Crowds, ties, all sizes, images without truths or detections. Seed 3: overlaps are tied, too;
    seed 4: no object is large."""
    everything = random_set(seed, high=90 if seed == 4 else 150, grid=20 if seed == 3 else 0.1)
    found = ours(everything, kind)
    for name, value in theirs(everything, kind).items():
        assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    assert np.isnan(found["APL"]) == (seed == 4) and 0.1 < found["AP"] < 0.9


def test_only_the_hundred_best_detections_of_an_image_count():
    rng = np.random.default_rng(0)
    truth = draw(rng, 30, 20, 60)
    noise = draw(rng, 120, 20, 60)
    boxes = np.concatenate([noise, truth + 1])
    scores = np.concatenate([rng.random(120), rng.random(30)]).round(2)
    everything = [({0: (truth, np.zeros(30, bool))}, {0: (boxes, scores)})]
    found = ours(everything, "bbox")
    assert found["AP"] == pytest.approx(theirs(everything, "bbox")["AP"], abs=1e-12)
    keep = np.argsort(-scores, kind="stable")[:100]
    everything[0][1][0] = boxes[keep], scores[keep]
    assert ours(everything, "bbox") == pytest.approx(found, nan_ok=True)


def ap_of(boxes, scores, truths, crowd, name="AP50"):
    boxes, scores, truths = (np.array(x, dtype=float) for x in (boxes, scores, truths))
    crowd = np.array(crowd, dtype=bool)
    matches = match(scores, boxes, truths, areas_of(truths), crowd)
    return average_precision([[matches]])[name]


def test_by_hand():
    near, far = [0, 0, 10, 10], [50, 50, 60, 60]
    assert ap_of([near], [0.9], [near], [False], "AP") == 1
    # Found one of two: precision 1 at recalls 0, 0.01, ..., 0.5, then 0.
    assert ap_of([near], [0.9], [near, far], [False, False]) == pytest.approx(51 / 101)
    # A miss before the hit: precision 1/2 throughout; after it: nothing lost.
    assert ap_of([far, near], [0.9, 0.8], [near], [False]) == pytest.approx(0.5)
    assert ap_of([near, far], [0.9, 0.8], [near], [False]) == 1
    # The second detection of one object is wrong; the second in a crowd is not.
    assert ap_of([near, near, far], [0.9, 0.8, 0.7], [near, far], [False, False]) == pytest.approx(
        (51 + 50 * 2 / 3) / 101)
    assert ap_of([near, near, far], [0.9, 0.8, 0.7], [near, far], [True, False]) == 1
    # IoU 0.6 is right at 0.50, 0.55 and 0.60 of the ten thresholds.
    assert ap_of([[0, 0, 10, 6]], [1.0], [near], [False], "AP") == pytest.approx(0.3)


def test_sizes_and_nothing():
    small, large = [0, 0, 10, 10], [0, 0, 100, 100]
    # The small detection matches nothing, and is neither right nor wrong among large ones.
    assert ap_of([small, large], [0.9, 0.8], [large], [False], "APL") == 1
    assert ap_of([small, large], [0.9, 0.8], [large], [False], "AP") == pytest.approx(0.5)
    assert np.isnan(ap_of([small], [0.9], [large], [False], "APS"))
    assert ap_of(np.zeros((0, 4)), [], [small], [False]) == 0
    assert np.isnan(ap_of([small], [0.9], np.zeros((0, 4)), []))
    assert np.isnan(average_precision([])["AP"])


def test_of_equal_overlaps_the_last_truth_is_taken():
    """The first detection lies half-way between two truths, the second on one of them."""
    truths = [[0, 0, 10, 10], [2, 0, 12, 10]]
    boxes = [[1, 0, 11, 10], truths[0]]
    everything = [({0: (np.array(truths), np.zeros(2, bool))},
                   {0: (np.array(boxes), np.array([0.9, 0.8]))})]
    assert ours(everything, "bbox")["AP"] == pytest.approx(theirs(everything, "bbox")["AP"])
    both = 7                    # thresholds up to 0.8, below IoU 9/11
    by_hand = (both + (10 - both) * 0.5 * 51 / 101) / 10
    assert ap_of(boxes, [0.9, 0.8], truths, [False, False], "AP") == pytest.approx(by_hand)
    backwards = ap_of(boxes, [0.9, 0.8], truths[::-1], [False, False], "AP")
    assert backwards < by_hand
