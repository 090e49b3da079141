"""Masks as pycocotools decodes them, and nearly so without it."""
import numpy as np
import pytest
from pycocotools import mask as official

from sources import masks
from sources.masks import decode, decode_runs, enclosing, nearly

H, W = 40, 60
STAR = [30, 2, 36, 16, 52, 18, 40, 26, 44, 38, 30, 30, 16, 38, 20, 26, 8, 18, 24, 16]


def random_mask(seed, height=H, width=W):
    """A few overlapping rectangles and single pixels."""
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < 0.02
    for _ in range(3):
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top:top + rng.integers(1, 15), left:left + rng.integers(1, 25)] = True
    return mask


def as_runs(mask):
    """Run lengths, uncompressed, by the slowest of ways."""
    counts = [0]
    value = False
    for pixel in mask.flatten(order="F"):
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(mask):
    """pycocotools' text for a mask."""
    return official.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize("seed", range(20))
def test_run_lengths_are_decoded_as_pycocotools_encodes_them(seed):
    mask = random_mask(seed)
    assert np.array_equal(decode_runs(compressed(mask), H, W), mask)
    assert np.array_equal(decode_runs(as_runs(mask), H, W), mask)


def test_run_lengths_of_large_and_uniform_masks():
    for mask in (np.zeros((3000, 2000), bool), np.ones((3000, 2000), bool)):
        assert np.array_equal(decode_runs(compressed(mask), 3000, 2000), mask)
    wide = random_mask(1, 500, 900)
    assert np.array_equal(decode_runs(compressed(wide), 500, 900), wide)


def test_polygons_are_pycocotools():
    parts = [STAR, [0, 0, 12.5, 0, 0, 12.5]]
    runs = official.merge(official.frPyObjects(parts, H, W))
    assert np.array_equal(decode(parts, H, W), official.decode(runs).astype(bool))
    assert not decode([[1, 1, 5, 5]], H, W).any()               # a line has no inside
    assert not nearly(parts)


def test_polygons_without_pycocotools_are_nearly_the_same(monkeypatch):
    parts = [STAR, [0, 0, 12.5, 0, 0, 12.5], [50, 30, 70, 30, 70, 50, 50, 50]]  # the last leaves it
    exact = decode(parts, H, W)
    monkeypatch.setattr(masks, "official", None)
    near = decode(parts, H, W)
    assert nearly(parts) and not nearly(dict(size=[H, W], counts=as_runs(exact)))
    assert (exact & near).sum() / (exact | near).sum() > 0.93
    # Pixels (x, y) with x + y + 1 < 4.2.
    triangle = decode([[0, 0, 4.2, 0, 0, 4.2]], H, W)
    assert triangle[:4].sum(1).tolist() == [4, 3, 2, 1] and triangle.sum() == 10
    for x, y in ((-9, 5), (W + 1, 5), (5, -9), (5, H + 1)):             # beside the image
        assert not decode([[x, y, x + 5, y, x, y + 5]], H, W).any()


def test_a_box_encloses_a_mask():
    mask = np.zeros((H, W), bool)
    mask[3, 5] = mask[10, 20] = True
    assert enclosing(mask) == (5, 3, 21, 11)
