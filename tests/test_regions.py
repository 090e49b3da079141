"""Regions against OpenCV, SciPy and slow per-image readings of the paper; masks and orders by hand
and by brute force.

Last the mode: crops against torchvision, blocks in range, everything a function of the seed."""
import itertools
import math
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.stats import chisquare
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms.v2 import functional as TF

import augmentations
import regions
from build import views_of
from images import Part, Split, canvas_side
from regions import (
    LABELLED,
    RULES,
    Crops,
    PictureCrops,
    cls_similarity,
    components,
    discriminative_regions,
    grad_cam,
    min_max,
    multi_block,
    otsu,
    random_regions,
    reorder,
    where_salient,
)

GRIDS = [(14, 14), (8, 8), (7, 9), (5, 12), (1, 11), (16, 3)]
EIGHT = np.ones((3, 3))


def noise_maps(kind, count, grid, seed=0):
    """(count, H, W) float32, each from 0 to 1."""
    rng = np.random.default_rng(seed)
    maps = rng.random((count, *grid), dtype=np.float32)
    if kind == "blurred":
        maps = ndimage.gaussian_filter(maps, (0, 1.5, 1.5))
    if kind == "spiky":
        maps = ndimage.gaussian_filter(maps, (0, 1, 1)) ** 12
    if kind.startswith("levels"):
        levels = int(kind[6:])
        maps = rng.integers(0, levels, maps.shape).astype(np.float32) / (levels - 1)
    return min_max(torch.from_numpy(maps).flatten(1)).view(count, *grid)


def structured_maps(H, W):
    """Maps without noise: constant, two-valued, checkerboard, stripes, single patches, a ramp."""
    r, c = np.indices((H, W))
    single = np.zeros((H, W))
    single[H // 2, W // 3] = 1
    maps = [
        np.zeros((H, W)),
        np.ones((H, W)),
        np.full((H, W), 0.4),
        (r + c) % 2,
        (r + c) % 2 * 0.5 + 0.25,
        r % 2,
        c % 3 == 0,
        (r % 2 == 0) & (c % 2 == 0),
        single,
        1 - single,
        r * W + c,
        (r > H // 2) * 0.3 + (c > W // 2) * 0.3,
    ]
    return torch.from_numpy(
        np.stack(maps).astype(np.float32)
        / max(1, H * W - 1) ** (np.stack(maps).max((1, 2), keepdims=True) > 1)
    )


def spiral(n):
    """A path one patch wide that winds inwards between walls one patch wide."""
    mask, r, c, turn = np.zeros((n, n), bool), 0, 0, 0
    mask[0, 0] = True
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
    for _ in range(2 * n):
        dr, dc = steps[turn % 4]
        while True:
            ahead, beyond = (r + dr, c + dc), (r + 2 * dr, c + 2 * dc)
            if not (0 <= ahead[0] < n and 0 <= ahead[1] < n) or (
                0 <= beyond[0] < n and 0 <= beyond[1] < n and mask[beyond]
            ):
                break
            r, c = ahead
            mask[r, c] = True
        turn += 1
    return mask


def cv2_otsu(values):
    """values: a flat uint8 array -> OpenCV's threshold.

    Where two splits are exactly as good, OpenCV's rounding decides; what must come out of ours is
    the lower one."""
    threshold = int(
        cv2.threshold(values.reshape(1, -1), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[0]
    )
    levels, counts = np.unique(values, return_counts=True)
    n1, S1 = counts.cumsum(), (counts * levels).cumsum()
    n, S = int(n1[-1]), int(S1[-1])
    rough = (n * S1 - S * n1)[:-1] ** 2 / (n1 * (n - n1))[:-1]
    near = [i for i in range(len(rough)) if rough[i] > rough.max() * (1 - 1e-9)]
    if len(near) < 2:
        return threshold
    exact = {
        int(levels[i]): Fraction(
            (n * int(S1[i]) - S * int(n1[i])) ** 2, int(n1[i]) * (n - int(n1[i]))
        )
        for i in near
    }
    assert exact[threshold] == max(exact.values())
    return min(level for level in exact if exact[level] == exact[threshold])


def cut(part, saliency, most):
    """A region too large, as a list of its connected parts: of its `most` most salient patches, of
    the next, ..."""
    patches = np.flatnonzero(part)
    patches = patches[np.argsort(-saliency.ravel()[patches], kind="stable")]
    parts = []
    for start in range(0, len(patches), most):
        layer = np.zeros(part.shape, bool)
        layer.ravel()[patches[start:start + most]] = True
        labels, count = ndimage.label(layer, EIGHT)
        parts += [labels == k for k in range(1, count + 1)]
    return parts


def slow_regions(saliency, N, rule, min_patches, rounds, most=None):
    """One image, written from Sec. 3.2 (and from SPEC's words for the refill) with OpenCV and
    SciPy."""
    values, left, found = np.uint8(255 * saliency), np.ones(saliency.shape, bool), []
    for _ in range(1 if rule == "otsu" else rounds):
        if len(found) >= N - 1 or left.sum() < min_patches:
            break
        above = left & (values > cv2_otsu(values[left]))
        labels, count = ndimage.label(above, EIGHT)
        parts = [labels == k for k in range(1, count + 1)]
        if most:
            parts = [piece for part in parts for piece in cut(part, saliency, most)]
            parts.sort(key=lambda part: part.argmax())                  # raster order
        parts = [part for part in parts if part.sum() >= min_patches]
        found += sorted(parts, key=lambda part: -saliency[part].astype(np.float64).mean())
        left &= ~above
    rank = np.full(saliency.shape, N)
    for k, part in enumerate(found[:N - 1]):
        rank[part] = k + 1
    return rank


# ---- saliency

def test_cls_similarity_is_the_cosine_in_float32():
    cls, patches = torch.randn(3, 8), torch.randn(3, 5, 8)
    similarity = cls_similarity(cls, patches)
    for b, p in itertools.product(range(3), range(5)):
        a, v = cls[b].numpy(), patches[b, p].numpy()
        assert similarity[b, p].item() == pytest.approx(
            a @ v / np.linalg.norm(a) / np.linalg.norm(v), abs=1e-6
        )
    assert cls_similarity(cls.bfloat16(), patches.bfloat16()).dtype == torch.float32


def test_min_max_by_hand():
    rows = torch.tensor(
        [[1.0, 3.0, 2.0], [-5.0, -5.0, -5.0], [0.0, 1e-38, 5e-39], [-1.0, 0.0, 3.0]]
    )
    expected = [[0, 1, 0.5], [0, 0, 0], [0, 1, 0.5], [0, 0.25, 1]]
    torch.testing.assert_close(min_max(rows), torch.tensor(expected))


def test_grad_cam_by_hand():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]]])
    # channel weights 1 and -1
    gradients = torch.tensor([[[3.0, 0.0], [0.0, -3.0], [0.0, 0.0]]])
    assert grad_cam(tokens, gradients).tolist() == [[0.0, 4.0, 0.0]]


def test_where_salient_of_saliency_that_is_alike_everywhere():
    for grid, centre, ring in [((14, 14), 36 / 196, 52 / 196), ((8, 8), 1 / 4, 28 / 64),
                               ((4, 6), 2 * 2 / 24, 16 / 24)]:
        found = where_salient(torch.full((3, grid[0] * grid[1]), 0.3), grid)
        assert found["saliency_centre"].item() == pytest.approx(centre)
        assert found["saliency_ring"].item() == pytest.approx(ring)
    assert where_salient(torch.zeros(2, 64), (8, 8))["saliency_ring"] == 0


# ---- Otsu

@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["blurred", "noise", "spiky", "levels2", "levels5", "levels16"])
def test_otsu_equals_opencv(kind, grid):
    maps = noise_maps(kind, 150, grid).numpy()
    values = np.uint8(255 * maps).reshape(len(maps), -1)
    level = torch.from_numpy(values).long()
    threshold = otsu(level)
    for b in range(len(maps)):
        assert threshold[b, 0] == cv2_otsu(values[b])


@pytest.mark.parametrize("kind", ["blurred", "noise", "spiky", "levels2", "levels5"])
def test_later_thresholds_are_opencv_s_of_what_is_left(kind):
    maps = noise_maps(kind, 200, (13, 14))
    level = (255 * maps).long().flatten(1)
    thresholds = otsu(level, rounds=6)
    assert thresholds.shape == (200, 6)
    for b in range(200):
        left = level[b].numpy().astype(np.uint8)
        for threshold in thresholds[b].tolist():
            assert threshold == cv2_otsu(left)
            left = left[left <= threshold]


def test_otsu_of_constants_is_zero_as_opencv_has_it():
    level = torch.tensor([0, 1, 128, 255])[:, None].expand(4, 30)
    assert otsu(level, 2).tolist() == [[0, 0]] * 4
    assert [cv2_otsu(np.full(30, v, np.uint8)) for v in level[:, 0]] == [0] * 4


def test_otsu_ties_go_to_the_lowest_level():
    """n patches each at 0 and 2 v, m at v: splitting below v is as good as above it. Between used
    levels, all are alike."""
    for n, m, v in [(3, 5, 100), (1, 1, 7), (10, 2, 127), (7, 90, 40), (300, 500, 127)]:
        level = torch.tensor([[0] * n + [v] * m + [2 * v] * n])
        assert otsu(level).item() == 0
    assert otsu(torch.tensor([[20] * 5 + [90] * 7])).item() == 20


# ---- components

def numbered(groups):
    """components(groups) with SciPy's numbers: 1, 2, ... in order of first patches, 0 = background.

    (B, H, W)  ->  the same shape, NumPy"""
    groups = torch.as_tensor(groups)
    first = components(groups)
    P = first.shape[1]
    number = (first == torch.arange(P)).long().cumsum(1)
    number = torch.cat([number, torch.zeros(len(first), 1, dtype=torch.long)], 1).gather(1, first)
    return number.view(groups.shape).numpy()


def assert_components(masks):
    """Equal to SciPy's on each of the masks (B, H, W), in one call of each."""
    labels, _ = ndimage.label(masks, np.stack([np.zeros((3, 3)), EIGHT, np.zeros((3, 3))]))
    highest = np.maximum.accumulate(np.append(0, labels.max((1, 2))))[:-1, None, None]
    np.testing.assert_array_equal(numbered(masks), np.where(masks, labels - highest, 0))


@pytest.mark.parametrize("grid", GRIDS + [(1, 1), (2, 1), (1, 2), (13, 15), (23, 28)])
def test_components_equal_scipy_on_thousands_of_masks(grid):
    rng = np.random.default_rng(1)
    masks = rng.random((1500, *grid)) < rng.uniform(0, 1, (1500, 1, 1))
    blurred = ndimage.gaussian_filter(rng.random((500, *grid)), (0, 1, 1)) > 0.5
    assert_components(np.concatenate([masks, blurred]))


@pytest.mark.parametrize("H, W", [(3, 5), (4, 4)])
def test_components_equal_scipy_on_every_small_mask(H, W):
    P = H * W
    masks = (np.arange(2 ** P)[:, None] >> np.arange(P) & 1).astype(bool)
    assert_components(masks.reshape(-1, H, W))


@pytest.mark.parametrize("n", [8, 14, 15, 28])
def test_components_of_long_winding_shapes(n):
    r, c = np.indices((n, n))
    serpentine = (r % 2 == 0) | (c == np.where(r % 4 == 1, n - 1, 0))
    comb = (c % 2 == 0) | (r == n - 1)
    zigzag = (r % 4 == np.abs((c + 2) % 4 - 2) + 1)
    shapes = [
        spiral(n),
        serpentine,
        comb,
        zigzag,
        r == c,
        (r + c) % 2 == 0,
        (r % 2 == 0) & (c % 2 == 0),
        r < 0,
        r >= 0,
    ]
    shapes = np.stack([flip for s in shapes for flip in (s, s[::-1], s[:, ::-1], s.T, ~s)])
    assert numbered(spiral(n)[None]).max() == 1 and spiral(n).sum() > n * n * 0.45
    assert_components(np.ascontiguousarray(shapes))


@pytest.mark.parametrize("grid", [(9, 7), (14, 14)])
@pytest.mark.parametrize("kinds", [2, 3, 8])
def test_components_of_groups_connect_equal_values_only(grid, kinds):
    groups = torch.randint(0, kinds + 1, (150, *grid))
    labels = numbered(groups)
    for b in range(150):
        first = {}
        expected = np.zeros(grid, int)
        for value in range(1, kinds + 1):
            parts, count = ndimage.label(groups[b].numpy() == value, EIGHT)
            first |= {int(np.flatnonzero(parts == k)[0]): parts == k for k in range(1, count + 1)}
        for number, start in enumerate(sorted(first), 1):
            expected[first[start]] = number
        np.testing.assert_array_equal(labels[b], expected)


# ---- discriminative regions

def test_three_blobs_by_hand():
    saliency = torch.zeros(10, 12)
    saliency[0:3, 0:4] = 0.8                              # 12 patches
    saliency[6:10, 0:4] = 1.0                             # 16 patches: the best
    saliency[0:3, 6:9] = 0.9                              # 9 patches: too few
    saliency[8:10, 6:11] = 0.4                            # 10 patches, below the first threshold
    expected = torch.full((10, 12), 5)
    expected[6:10, 0:4] = 1
    expected[0:3, 0:4] = 2
    assert torch.equal(discriminative_regions(saliency[None], 5, "otsu")[0], expected)
    expected[8:10, 6:11] = 3
    assert torch.equal(discriminative_regions(saliency[None], 5, "otsu-refill")[0], expected)
    rank = discriminative_regions(saliency[None], 5, "otsu", min_patches=9)[0]
    assert [rank[7, 1], rank[1, 7], rank[1, 1], rank[9, 9], rank[5, 5]] == [1, 2, 3, 5, 5]


@pytest.mark.parametrize("N, min_patches", [(5, 10), (3, 4), (7, 1)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", RULES)
def test_rank_maps_equal_the_slow_reading(rule, grid, N, min_patches):
    kinds = ("blurred", "noise", "spiky", "levels2", "levels5", "levels16")
    maps = torch.cat(
        [noise_maps(kind, 25, grid, seed=2) for kind in kinds] + [structured_maps(*grid)]
    )
    rank = discriminative_regions(maps, N, rule, min_patches)
    assert rank.dtype == torch.int64 and rank.shape == maps.shape
    for b in range(len(maps)):
        np.testing.assert_array_equal(
            rank[b], slow_regions(maps[b].numpy(), N, rule, min_patches, regions.ROUNDS)
        )


@pytest.mark.parametrize("grid, most, min_patches", [((14, 14), 39, 10), ((7, 9), 5, 1),
                                                     ((8, 8), 1, 1), ((5, 12), 60, 4)])
@pytest.mark.parametrize("rule", RULES)
def test_regions_too_large_are_cut_as_the_slow_reading_cuts_them(rule, grid, most, min_patches):
    kinds = ("blurred", "spiky", "levels5")
    maps = [noise_maps(kind, 20, grid, seed=7) for kind in kinds]
    maps = torch.cat([*maps, structured_maps(*grid)])
    rank = discriminative_regions(maps, 5, rule, min_patches, most)
    for b in range(len(maps)):
        expected = slow_regions(maps[b].numpy(), 5, rule, min_patches, regions.ROUNDS, most)
        np.testing.assert_array_equal(rank[b], expected)


def test_a_region_too_large_is_cut_to_its_most_salient_patches_by_hand():
    saliency = torch.zeros(8, 8)
    saliency[1:7, 1:7] = 0.8                                # 36 patches
    saliency[2:5, 2:5] = 1.0                                # of which these 9 are best
    rank = discriminative_regions(saliency[None], 3, "otsu", 4, 9)[0]
    assert (rank == 1).nonzero().tolist() == (saliency == 1).nonzero().tolist()
    assert (rank == 2).nonzero().tolist() == (saliency == 0.8).nonzero()[:9].tolist()
    assert (discriminative_regions(saliency[None], 3, "otsu", 4)[0] == 1).sum() == 36


@pytest.mark.parametrize("rule", RULES)
def test_no_region_exceeds_its_bound_and_each_is_connected(rule):
    maps = noise_maps("blurred", 150, (14, 14), seed=4)
    rank = discriminative_regions(maps, 5, rule, 10, 39)
    for k in range(1, 5):
        size = (rank == k).flatten(1).sum(1)
        assert ((size == 0) | (size >= 10) & (size <= 39)).all()
        assert all(ndimage.label((r == k).numpy(), EIGHT)[1] <= 1 for r in rank)
    steps = [len(image.unique()) for image in rank]
    unbounded = [len(image.unique()) for image in discriminative_regions(maps, 5, rule)]
    assert sum(steps) > sum(unbounded)


@pytest.mark.parametrize("grid, min_patches", [((14, 14), 10), ((8, 8), 4)])
def test_rank_maps_equal_the_slow_reading_on_many_blurred_maps(grid, min_patches):
    """Here the slow one refills without end: the fixed number of rounds is enough."""
    maps = noise_maps("blurred", 250, grid, seed=3)
    for rule in RULES:
        rank = discriminative_regions(maps, 5, rule, min_patches)
        for b in range(len(maps)):
            np.testing.assert_array_equal(
                rank[b], slow_regions(maps[b].numpy(), 5, rule, min_patches, 1000)
            )


@pytest.mark.parametrize("rule", RULES)
def test_what_every_rank_map_satisfies(rule):
    maps = noise_maps("blurred", 150, (14, 14), seed=4)
    rank = discriminative_regions(maps, 5, rule)
    assert rank.min() >= 1 and rank.max() <= 5 and (rank == 5).flatten(1).any(1).all()
    for b in range(150):
        present = [k for k in range(1, 5) if (rank[b] == k).any()]
        assert present == list(range(1, len(present) + 1))                    # none missing between
        scores = [maps[b][rank[b] == k].double().mean().item() for k in present]
        assert scores == sorted(scores, reverse=True)
        for k in present:
            assert (rank[b] == k).sum() >= 10 and ndimage.label((rank[b] == k).numpy(), EIGHT)[
                1
            ] == 1


def test_refill_keeps_what_the_literal_rule_finds_and_adds():
    maps = noise_maps("blurred", 500, (14, 14), seed=5)
    literal, refill = (discriminative_regions(maps, 5, rule) for rule in RULES)
    assert torch.equal(refill[literal < 5], literal[literal < 5])
    regions_of = lambda rank: sum(len(image.unique()) for image in rank)
    assert regions_of(refill) > 1.5 * regions_of(literal)


@pytest.mark.parametrize("rule", RULES)
def test_equal_scores_keep_raster_order(rule):
    saliency = torch.zeros(2, 14, 14)
    saliency[:, 0:4, 8:12] = saliency[:, 1:5, 0:4] = saliency[:, 8:12, 3:7] = 0.7
    saliency[1, 8:12, 3:7] = 0.71
    rank = discriminative_regions(saliency, 5, rule)
    assert [rank[0, 0, 8], rank[0, 1, 0], rank[0, 8, 3]] == [1, 2, 3]
    assert [rank[1, 0, 8], rank[1, 1, 0], rank[1, 8, 3]] == [2, 3, 1]


@pytest.mark.parametrize("rule", RULES)
def test_nan_neither_crashes_nor_counts(rule):
    saliency = noise_maps("blurred", 2, (14, 14))
    saliency[0] = float("nan")
    saliency[1, :3] = float("nan")
    rank = discriminative_regions(saliency, 5, rule)
    assert (rank[0] == 5).all() and torch.equal(
        rank, discriminative_regions(saliency.nan_to_num(0), 5, rule)
    )


def test_an_image_alone_gives_what_it_gives_in_a_batch():
    maps = noise_maps("blurred", 20, (14, 14), seed=6)
    level, group = (255 * maps).long().flatten(1), (4 * maps).long()
    everything = lambda m, label, g: (
        [discriminative_regions(m, 5, rule, 10, most) for rule in RULES for most in (None, 30)]
        + [otsu(label, 3), components(g), min_max(m.flatten(1))]
    )
    together = everything(maps, level, group)
    for b in range(20):
        for alone, batch in zip(
            everything(maps[b : b + 1], level[b : b + 1], group[b : b + 1]), together
        ):
            assert torch.equal(alone[0], batch[b])


def test_unknown_rule_raises():
    with pytest.raises(KeyError):
        discriminative_regions(torch.zeros(1, 4, 4), 5, "otsu-again")


# ---- random blocks

def slow_size(u, scale, aspect, H, W):
    """I-JEPA's sampler for one uniform number, in Python floats."""
    keep, ratio = (
        int(H * W * (scale[0] + u * (scale[1] - scale[0]))),
        aspect[0] + u * (aspect[1] - aspect[0]),
    )
    h, w = round(math.sqrt(keep * ratio)), round(math.sqrt(keep / ratio))
    while h >= H:
        h -= 1
    while w >= W:
        w -= 1
    return h, w


def target_sizes(H, W):
    return {slow_size(u, (0.15, 0.2), (0.75, 1.5), H, W) for u in np.linspace(0, 1, 2001)}


def box(mask):
    """Height and width of the bounding box, and whether the mask fills it."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
    return (h, w), mask.sum() == h * w


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (9, 15), (28, 28)])
def test_random_regions_are_blocks_less_earlier_blocks(grid):
    sizes, rank = target_sizes(*grid), random_regions(100, grid, 5)
    assert (
        rank.shape == (100, *grid)
        and rank.dtype == torch.int64
        and rank.min() == 1
        and rank.max() == 5
    )
    whole = np.zeros((100, 4), bool)
    for b in range(100):
        present = [k for k in range(1, 5) if (rank[b] == k).any()]
        assert present == list(range(1, len(present) + 1))
        for k in present:
            region = (rank[b] == k).numpy()
            (h, w), full = box(region)
            whole[b, k - 1] = full and (h, w) in sizes
            assert region.sum() >= 10 and any(h <= a and w <= c for a, c in sizes)
    # the block placed first is never cut
    assert whole.any(1).all() and whole.sum(1).mean() > 2.5
    # and is not always R_1: the order is random
    assert (whole.mean(0) < 0.97).all()


@pytest.mark.parametrize(
    "grid, N, min_patches", [((14, 14), 5, 10), ((8, 8), 5, 8), ((15, 9), 5, 10), ((28, 28), 7, 10)]
)
def test_random_regions_take_the_first_free_place_or_the_freest(grid, N, min_patches, monkeypatch):
    """The same places, gone through one by one; the order is random, so regions are compared as a
    set."""
    drawn, place = [], regions._place
    monkeypatch.setattr(regions, "_place", lambda *args: drawn.append(place(*args)) or drawn[-1])
    rank = random_regions(40, grid, N, min_patches).numpy()
    cut = 0
    for b, blocks in enumerate(drawn[0].numpy()):
        taken, expected = np.zeros(grid, bool), set()
        for places in blocks:
            best = min(places, key=lambda block: (block & taken).sum())
            cut += (best & taken).any()
            best = best & ~taken
            if best.sum() >= min_patches:
                taken |= best
                expected.add(best.tobytes())
        assert {(rank[b] == k).tobytes() for k in range(1, N) if (rank[b] == k).any()} == expected
    assert 0 < cut < 40 * (N - 1)


def test_random_blocks_lie_anywhere_with_equal_chance():
    rank = random_regions(8000, (6, 7), 2, min_patches=1).numpy() == 1
    rows, columns = rank.any(2), rank.any(1)
    for h, w in target_sizes(6, 7):
        of_size = (rows.sum(1) == h) & (columns.sum(1) == w)
        place = rows.argmax(1)[of_size] * (8 - w) + columns.argmax(1)[of_size]
        assert chisquare(np.bincount(place, minlength=(7 - h) * (8 - w))).pvalue > 1e-3


def test_random_regions_on_grids_too_small_for_them():
    # blocks of 2 to 4 patches, 10 needed
    assert (random_regions(4, (4, 4), 5) == 5).all()
    assert random_regions(3, (1, 1), 5, min_patches=1).shape == (3, 1, 1)


def test_same_generator_seed_same_blocks():
    draw = lambda seed: [
        random_regions(8, (14, 14), 5, generator=torch.Generator().manual_seed(seed)),
        *multi_block(8, (14, 14), generator=torch.Generator().manual_seed(seed)),
        reorder(
            torch.arange(1, 6).view(1, 1, 5).repeat(50, 1, 1),
            5,
            "random",
            torch.Generator().manual_seed(seed),
        ),
    ]
    torch.manual_seed(5)
    first, state = draw(1), torch.get_rng_state()
    torch.manual_seed(6)
    assert all(map(torch.equal, first, draw(1))) and not any(map(torch.equal, first, draw(2)))
    torch.manual_seed(5)
    # the global generator was not drawn from
    assert torch.equal(torch.get_rng_state(), state)


# ---- I-JEPA's masks

@pytest.mark.parametrize(
    "grid, B", [((14, 14), 16), ((8, 8), 16), ((9, 15), 16), ((14, 14), 1), ((8, 8), 1)]
)
def test_multi_block_masks_are_those_of_a_slow_sampler(grid, B):
    """Sizes by the slow sampler; contexts by trying every place: block less targets."""
    H, W = grid
    for seed in range(25):
        u = torch.rand(2, generator=torch.Generator().manual_seed(seed)).tolist()
        context, targets = (
            m.numpy() for m in multi_block(B, grid, generator=torch.Generator().manual_seed(seed))
        )
        assert context.shape == (B, H, W) and targets.shape == (B, 4, H, W)
        assert not (context & targets.any(1)).any()
        size = slow_size(u[0], (0.15, 0.2), (0.75, 1.5), H, W)
        assert all(box(t) == (size, True) for image in targets for t in image)
        h, w = slow_size(u[1], (0.85, 1.0), (1.0, 1.0), H, W)
        for b in range(B):
            places = itertools.product(range(H - h + 1), range(W - w + 1))
            blocks = [np.zeros(grid, bool) for _ in range((H - h + 1) * (W - w + 1))]
            for block, (top, left) in zip(blocks, places):
                block[top:top + h, left:left + w] = True
            assert context[b].sum() >= 10 and any(
                np.array_equal(block & ~targets[b].any(0), context[b]) for block in blocks
            )


def test_target_blocks_lie_anywhere_with_equal_chance():
    _, targets = multi_block(800, (14, 14))
    rows, columns = targets.any(3).flatten(0, 1), targets.any(2).flatten(0, 1)
    h, w = int(rows[0].sum()), int(columns[0].sum())
    place = rows.long().argmax(1) * (15 - w) + columns.long().argmax(1)
    assert chisquare(torch.bincount(place, minlength=(15 - h) * (15 - w)).numpy()).pvalue > 1e-3


def fewest_context(grid, min_patches):
    return min(
        multi_block(
            64, grid, generator=torch.Generator().manual_seed(seed), min_patches=min_patches
        )[0]
        .sum((1, 2))
        .min()
        for seed in range(20)
    )


def test_contexts_have_min_patches_where_chance_alone_would_not():
    assert fewest_context((8, 8), 1) < 10 <= fewest_context((8, 8), 10)


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (3, 3), (4, 4), (5, 2)])
def test_context_is_never_empty_while_a_patch_is_free(grid):
    for seed in range(100):
        context, targets = multi_block(16, grid, generator=torch.Generator().manual_seed(seed))
        free = ~targets.any(1)
        assert (
            torch.equal(context.flatten(1).any(1), free.flatten(1).any(1))
            and not (context & ~free).any()
        )


def test_context_falls_back_to_any_free_patch(monkeypatch):
    """One draw only, on 2x2 patches: the context block is a single patch, often a target; others
    may be free."""
    monkeypatch.setattr(regions, "TRIES", 1)
    context, targets = multi_block(500, (2, 2), min_patches=1)
    free = (~targets.any(1)).flatten(1).sum(1)
    assert (free == 0).any() and (free == 1).any()
    found = context.flatten(1).sum(1)
    assert ((found == free.clamp(max=1)) | (found == free)).all() and (found > 1).any()


# ---- orders

RANK = torch.tensor([[[4, 4, 5, 1, 1],
                      [5, 5, 5, 1, 1],
                      [2, 2, 5, 5, 5],
                      # centres (row, column): R1 (.5, 3.5), R2 (2.5, .5), R3 (3, 3), R4 (0, .5)
                      [2, 2, 5, 3, 5]]])


def renamed(rank, names):
    return torch.tensor([0, *names])[rank]


def test_discriminative_order_changes_nothing():
    assert torch.equal(reorder(RANK, 5, "discriminative"), RANK)


def test_truncated_keeps_the_first_three_that_exist():
    assert torch.equal(reorder(RANK, 5, "truncated"), renamed(RANK, [1, 2, 3, 0, 0]))
    assert torch.equal(reorder(RANK.clamp(max=3), 3, "truncated"), RANK.clamp(max=3))
    few = renamed(RANK, [1, 5, 5, 4, 5])                    # R_1, R_4 and the rest: three in all
    assert torch.equal(reorder(few, 5, "truncated"), few)


def test_spatial_order_by_hand():
    """Patches of the centres, halves up: R1 (1, 4), R2 (3, 1), R3 (3, 3), R4 (0, 1). So R4, R1, R2,
    R3."""
    assert torch.equal(reorder(RANK, 5, "spatial"), renamed(RANK, [2, 3, 4, 1, 5]))
    without_first = renamed(RANK, [5, 2, 3, 4, 5])        # R4, R2, R3 take ranks 1, 2, 3
    assert torch.equal(reorder(without_first, 5, "spatial"), renamed(RANK, [5, 2, 3, 1, 5]))
    # R1 (.5, 2) counts as row 1, as R2 (1, 0) does
    halves_go_up = torch.tensor([[[3, 3, 1], [2, 3, 1]]])
    assert reorder(halves_go_up, 3, "spatial").tolist() == [[[3, 3, 2], [1, 3, 2]]]
    same_row = torch.tensor([[[3, 2, 4, 1]]])
    assert reorder(same_row, 4, "spatial").tolist() == [[[1, 2, 4, 3]]]
    same_centre = torch.tensor([[[2, 1, 2], [3, 3, 3]]])  # a tie: the better score stays first
    assert torch.equal(reorder(same_centre, 3, "spatial"), same_centre)


def test_inverse_order_by_hand():
    assert torch.equal(reorder(RANK, 5, "inverse"), renamed(RANK, [4, 3, 2, 1, 5]))
    few = renamed(RANK, [1, 2, 5, 4, 5])                    # R_1, R_2, R_4 and the rest
    assert torch.equal(reorder(few, 5, "inverse"), renamed(RANK, [3, 2, 5, 1, 5]))


def test_random_order_permutes_the_present_regions_evenly():
    rank = renamed(RANK, [1, 2, 3, 5, 5]).repeat(6000, 1, 1)
    rank[::2] = renamed(rank[::2], [2, 4, 3, 5, 5])       # the same regions under names with a gap
    new = reorder(rank, 5, "random")
    assert torch.equal(new == 5, rank == 5)
    names = new[:, [0, 2, 3], [3, 0, 3]]                  # one patch of each region
    assert torch.equal(names.sort(1).values, torch.tensor([1, 2, 3]).repeat(6000, 1))
    for i, (r, c) in enumerate([(0, 3), (2, 0), (3, 3)]):
        assert torch.equal(new == names[:, i, None, None], rank == rank[:, r, c][:, None, None])
    counts = torch.bincount(names[:, 0] * 3 + names[:, 1], minlength=12)[[5, 6, 7, 9, 10, 11]]
    assert counts.sum() == 6000 and chisquare(counts.numpy()).pvalue > 1e-3


# ---- devices

def run_everything(device):
    """Each function once, on random input: what it returns."""
    saliency = min_max(
        cls_similarity(torch.randn(6, 32, device=device), torch.randn(6, 70, 32, device=device))
    ).view(6, 7, 10)
    ranks = [discriminative_regions(saliency, 5, rule, 3) for rule in RULES] + [
        discriminative_regions(saliency, 5, "otsu-refill", 3, 14),
        random_regions(6, (7, 10), 5, 3, device)
    ]
    orders = [reorder(rank, 5, order) for rank in ranks for order in regions.ORDERS]
    tokens = torch.randn(6, 70, 8, device=device)
    level = (255 * saliency).long().flatten(1)
    return [saliency, *ranks, *orders, *multi_block(6, (7, 10), device, min_patches=3),
            grad_cam(tokens, tokens), otsu(level, 3), components(saliency > 0.5)]


def test_nothing_depends_on_data_on_the_host():
    """Fake tensors hold no data: whatever reads a value, branches on it or shapes by it, raises."""
    real = run_everything(None)
    with FakeTensorMode():
        fake = run_everything(None)
        with pytest.raises(DataDependentOutputException):
            (fake[0] > 0.5).any().item()
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


def test_caller_s_tensors_are_not_modified():
    saliency = noise_maps("blurred", 3, (14, 14))
    rank = discriminative_regions(saliency, 5, "otsu-refill")
    copies = saliency.clone(), rank.clone()
    discriminative_regions(saliency, 5, "otsu")
    components(rank)
    for order in regions.ORDERS:
        reorder(rank, 5, order)
    assert torch.equal(saliency, copies[0]) and torch.equal(rank, copies[1])


# ---- the mode

@pytest.fixture
def views(make_config, make_split):
    def make(n=12, size=48, **changes):
        config = make_config(
            "folder",
            "regions",
            image_size=size,
            patch_size=8,
            encoder="vit-nano",
            min_patches=2,
            **changes,
        )
        return Crops(make_split(n, size), config, torch.device("cpu"))
    return make


def test_batch_is_one_normalised_crop_as_torchvision_makes_it(views, monkeypatch):
    sampler, drawn = views(), []
    original = augmentations.sample
    monkeypatch.setattr(
        "regions.sample",
        lambda *args, **kwargs: drawn.append(original(*args, **kwargs)) or drawn[-1],
    )
    batch = sampler(torch.tensor([3, 0, 7]))
    assert batch.views.shape == (3, 1, 3, 48, 48) and batch.labels.tolist() == [1, 0, 1]
    for view, i, crop in zip(batch.views[:, 0], [3, 0, 7], drawn[0].crop.long().tolist()):
        image = sampler.images[torch.tensor([i])][0].float() / 255
        expected = TF.resized_crop(
            image, *crop, size=[48, 48], interpolation=TF.InterpolationMode.BICUBIC, antialias=True
        ).clamp(0, 1)
        torch.testing.assert_close(
            view, TF.normalize(expected, sampler.mean, sampler.std), atol=1e-4, rtol=1e-4
        )


def test_crops_cover_at_least_the_share_asked_for(views):
    areas = []
    for scale in (0.3, 0.9):
        sampler = views(crop_scale=scale)
        drawn = augmentations.sample(4000, 48, sampler.ranges)
        areas.append(drawn.crop[:, 2] * drawn.crop[:, 3] / 48 ** 2)
        assert not drawn.flip.any()
    assert 0.27 < areas[0].min() < 0.33 and 0.84 < areas[1].min() < 0.92              # whole pixels


def test_blocks_of_each_method(views):
    ranks = views(method="dseq-jepa", region_count=4)(torch.arange(12)).actions
    assert ranks.shape == (12, 1, 36) and ranks.min() == 1 and ranks.max() == 4
    blocks = views(method="i-jepa")(torch.arange(12)).actions
    assert blocks.shape == (12, 5, 36) and set(blocks.unique().tolist()) == {0, 1}
    assert not (blocks[:, :1] & blocks[:, 1:]).any() and blocks.sum(2).min() > 0


def test_a_batch_is_a_function_of_the_seed(views):
    sampler = views()
    torch.manual_seed(5)
    one = sampler(torch.arange(6))
    torch.manual_seed(5)
    two = sampler(torch.arange(6))
    torch.manual_seed(6)
    other = sampler(torch.arange(6))
    for a, b, c in zip(one[:3], two[:3], other[:3]):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert one.params.shape == (6, 1) and 0 <= one.params.min() and one.params.max() < 1


def test_clean_is_the_image_itself(views):
    sampler = views()
    image = sampler.images[torch.tensor([4])].float() / 255
    torch.testing.assert_close(
        sampler.clean(torch.tensor([4])),
        TF.normalize(image, sampler.mean, sampler.std),
        atol=1e-5,
        rtol=1e-5,
    )


def test_augmented_is_a_crop_of_any_size_flipped_or_not(views, monkeypatch):
    sampler, drawn = views(), []
    original = augmentations.sample
    monkeypatch.setattr(
        "regions.sample",
        lambda *args, **kwargs: drawn.append(original(*args, **kwargs)) or drawn[-1],
    )
    index = torch.arange(12)
    images = sampler.augmented(index)
    for got, i in zip(images, index.tolist()):
        image = sampler.images[torch.tensor([i])][0].float() / 255
        expected = TF.resized_crop(
            image,
            *drawn[0].crop[i].long().tolist(),
            size=[48, 48],
            interpolation=TF.InterpolationMode.BICUBIC,
            antialias=True,
        ).clamp(0, 1)
        expected = TF.normalize(expected, sampler.mean, sampler.std)
        if drawn[0].flip[i]:
            expected = expected.flip(2)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert drawn[0].flip.any() and not drawn[0].flip.all()
    many = original(4000, 48, LABELLED)
    areas = many.crop[:, 2] * many.crop[:, 3] / 48 ** 2
    assert 0.05 < areas.min() < 0.11 and areas.max() > 0.9


# ---- the mode, on whole pictures

SIZES = [(60, 80), (80, 60), (48, 48), (50, 150), (300, 52), (30, 41)]


@pytest.fixture
def pictures(make_config):
    """(PictureCrops of smooth random pictures of SIZES, the pictures (3, H, W) in [0, 1])"""
    def make(resident="auto", **changes):
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (3, H, W), dtype=np.uint8) for H, W in SIZES]
        sizes = np.array(SIZES)
        flat = np.concatenate([image.ravel() for image in images]
                              + [np.zeros(canvas_side(sizes), np.uint8)])
        split = Split([Part(flat, "train", None, 6, sizes)], np.arange(6) % 2, ["even", "odd"],
                      (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), {})
        config = make_config("folder", "regions", image_size=48, patch_size=8, encoder="vit-nano",
                             min_patches=2, resident=resident, **changes)
        sampler = views_of(split, config, torch.device("cpu"))
        assert isinstance(sampler, PictureCrops)
        return sampler, [torch.from_numpy(image).float() / 255 for image in images]
    return make


def by_torchvision(image, crop, flip, sampler):
    expected = TF.resized_crop(image, *crop, size=[48, 48], antialias=True,
                               interpolation=TF.InterpolationMode.BICUBIC).clamp(0, 1)
    expected = TF.normalize(expected, sampler.mean, sampler.std)
    return expected.flip(2) if flip else expected


@pytest.mark.parametrize("call, flips", [("__call__", False), ("augmented", True)])
def test_crops_of_whole_pictures_are_torchvision_s(pictures, monkeypatch, call, flips):
    sampler, images = pictures()
    drawn = []
    original = augmentations.sample
    monkeypatch.setattr("regions.sample", lambda *args: drawn.append(original(*args)) or drawn[-1])
    index = torch.arange(6).repeat(20)
    got = getattr(sampler, call)(index)
    got = got if flips else got.views[:, 0]
    params, = drawn
    assert params.flip.any() == flips and not params.flip.all()
    for view, i, crop, flip in zip(got, index.tolist(), params.crop.long().tolist(), params.flip):
        expected = by_torchvision(images[i], crop, flip, sampler)
        torch.testing.assert_close(view, expected, atol=2e-4, rtol=1e-4)
    # Not of the middle square alone, which is columns 50 to 100 of the fourth picture.
    _, left, _, width = params.crop[3::6].unbind(1)
    assert (left < 40).any() and (left + width > 110).any()


def test_a_whole_picture_is_tested_on_the_middle_of_8_7_of_the_size(pictures):
    sampler, images = pictures()
    got = sampler.clean(torch.arange(6))
    for view, image in zip(got, images):
        resized = TF.resize(image, 55, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
        expected = TF.center_crop(resized, 48).clamp(0, 1)
        expected = TF.normalize(expected, sampler.mean, sampler.std)
        torch.testing.assert_close(view, expected, atol=2e-4, rtol=1e-4)


def test_crops_told_ahead_are_those_that_come(pictures):
    ahead, _ = pictures("no")
    plain, _ = pictures("yes")
    for step in range(3):
        torch.manual_seed(step)
        ahead.prefetch(torch.arange(6) % (step + 2), 0)
        (_, rows), = ahead.images.waiting
        rows.result()
        torch.manual_seed(step)
        got = ahead(torch.arange(6) % (step + 2))
        torch.manual_seed(step)
        expected = plain(torch.arange(6) % (step + 2))
        assert ahead.images.waiting == []
        for a, b in zip(got[:4], expected[:4]):
            assert torch.equal(a, b)


def test_the_digest_tells_whole_pictures_apart(pictures):
    one, _ = pictures()
    two, _ = pictures("no")
    assert one.digest() == two.digest()
    two.images.sizes[1] = torch.tensor([60, 80])                # as many pixels, another shape
    assert one.digest() != two.digest()
    three, _ = pictures()
    three.images.parts[0][3 * (60 * 80 + 80 * 60) + 1000] ^= 1  # a pixel of the third
    assert one.digest() != three.digest()
