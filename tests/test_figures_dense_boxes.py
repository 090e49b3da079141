"""Pictures of detections show what was found, and nothing that was not."""
import numpy as np
from matplotlib.image import imread

from figures.canvas import CYCLE
from figures.dense_boxes import MOST, Shown, draw_detections, sure


def square(label, at, score=None):
    """A square of 20 pixels as Shown."""
    mask = np.zeros((1, 60, 80), dtype=bool)
    mask[0, at:at + 20, at:at + 20] = True
    box = np.array([[at, at, at + 20, at + 20]], dtype=float)
    return Shown(box, np.array([label]), mask, None if score is None else np.array([score]))


def test_only_what_is_sure_is_shown():
    n = 20
    scores = np.linspace(1, 0, n)
    found = sure(np.zeros((n, 4)), np.arange(n), scores, np.zeros((n, 5, 5), bool))
    assert found.labels.tolist() == list(range(10)) and (found.scores >= 0.5).all()
    many = sure(np.zeros((n, 4)), np.arange(n), np.ones(n), np.zeros((n, 5, 5), bool))
    assert len(many.labels) == len(many.boxes) == len(many.masks) == MOST


def test_masks_are_coloured_where_they_are(tmp_path):
    """White images; a class that is found where another is: two colours, in the rows they are in.
    """
    white = np.full((3, 60, 80), 255, dtype=np.uint8)
    nothing = Shown(np.zeros((0, 4)), np.zeros(0, int), np.zeros((0, 60, 80), bool), np.zeros(0))
    pictures = [(white, square(3, 10), square(7, 35, 0.9)), (white, square(3, 10), nothing)]
    classes = [f"$class_{k}" for k in range(8)]                 # names need not be mathematics
    pixels = imread(draw_detections(pictures, classes, tmp_path / "d.png"))[:, :, :3]
    tints = []
    for colour in CYCLE[:3]:
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        tinted = np.abs(pixels - (0.4 * rgb + 0.6)).max(2) < 0.01
        tints.append(np.argwhere(tinted))
    height, width = pixels.shape[:2]
    first, second, third = tints
    assert len(first) > 1000 and len(second) > 500 and len(third) == 0
    assert (first[:, 0] < height / 2).mean() > 0.99             # class 3: above, in both pictures
    assert 0.4 < (first[:, 1] < width / 2).mean() < 0.6
    assert (second[:, 0] > height / 2).mean() > 0.99            # class 7: below, in the first
    assert (second[:, 1] < width / 2 + 20).mean() > 0.99


def test_objects_of_a_single_class_differ_in_colour(tmp_path):
    white = np.full((3, 60, 80), 255, dtype=np.uint8)
    two = Shown(*(np.concatenate(both) for both in zip(square(0, 5)[:3], square(0, 35)[:3])))
    pixels = imread(draw_detections([(white, two, two)], ["object"], tmp_path / "d.png"))[:, :, :3]
    for colour in CYCLE[:2]:
        rgb = np.array([int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - (0.4 * rgb + 0.6)).max(2) < 0.01).sum() > 500
