"""Fixations against their exact law, patches against slow slicing, actions by hand."""
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from saccades import Saccades, crop_patches, sample_fixations, sample_inside

DRAWS = 60_000


def fixation_counts(saliency, count, patch, ior, size):
    fixations = sample_fixations(saliency.expand(DRAWS, *saliency.shape), count, patch, ior)
    return fixations, [
        torch.bincount(f[:, 0] * size + f[:, 1], minlength=size * size).numpy()
        for f in fixations.unbind(1)
    ]


def peaked_map(size):
    """Uneven, with zeros in places."""
    saliency = torch.rand(size, size, generator=torch.Generator().manual_seed(1)) ** 3
    saliency[2] = 0
    saliency[:, 4] = 0
    return saliency


def assert_follows(counts, probability):
    possible = probability > 0
    assert counts[~possible].sum() == 0
    expected = probability[possible].astype(np.float64)
    assert chisquare(counts[possible], expected / expected.sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("ior", [True, False])
def test_first_fixation_follows_the_map(ior):
    saliency = peaked_map(7)
    _, (counts,) = fixation_counts(saliency, 1, 3, ior, 7)
    assert_follows(counts, (saliency / saliency.sum()).flatten().numpy())


@pytest.mark.parametrize("ior", [True, False])
@pytest.mark.parametrize("patch", [2, 3])
def test_second_fixation_follows_the_exact_law(patch, ior):
    """P(second = v) = sum over u of P(first = u) * P(v | u's square is gone), by enumeration."""
    saliency, size = peaked_map(6), 6
    flat = saliency.flatten().double().numpy()
    exact = np.zeros(size * size)
    for u in np.flatnonzero(flat):
        left = saliency.double().numpy().copy()
        if ior:
            r, c = divmod(u, size)
            top, start = max(0, r - patch // 2), max(0, c - patch // 2)
            left[top:r - patch // 2 + patch, start:c - patch // 2 + patch] = 0
        exact += flat[u] / flat.sum() * left.flatten() / left.sum()
    _, (_, counts) = fixation_counts(saliency, 2, patch, ior, size)
    assert_follows(counts, exact)


@pytest.mark.parametrize("kind", ["map", "uniform"])
@pytest.mark.parametrize("patch", [8, 9])
def test_ior_never_returns_into_an_earlier_square(kind, patch):
    saliency = torch.rand(400, 40, 40) ** 4 if kind == "map" else torch.ones(400, 40, 40)
    fixations = sample_fixations(saliency, 5, patch, ior=True)
    for later in range(1, 5):
        for earlier in range(later):
            from_corner = fixations[:, later] - (fixations[:, earlier] - patch // 2)
            assert not ((from_corner >= 0) & (from_corner < patch)).all(1).any()


def test_without_ior_it_does_return():
    """Saliency off must not switch IoR off, nor the other way round, as it does in the authors'
    code."""
    fixations = sample_fixations(torch.ones(2000, 24, 24), 2, 8, ior=False)
    offset = fixations[:, 1] - fixations[:, 0] + 4
    share = ((offset >= 0) & (offset < 8)).all(1).float().mean()
    # about (8/24)^2, a little less near the border
    assert 0.07 < share < 0.13


def test_no_mass_left_falls_back_to_what_is_not_inhibited():
    saliency = torch.zeros(6, 6)
    saliency[1, 1] = 1.0
    fixations, (_, counts) = fixation_counts(saliency, 2, 3, True, 6)
    assert (fixations[:, 0] == 1).all()
    free = np.ones((6, 6))
    free[0:3, 0:3] = 0
    assert_follows(counts, free.flatten() / free.sum())


def test_empty_map_is_uniform():
    _, (counts,) = fixation_counts(torch.zeros(5, 5), 1, 3, True, 5)
    assert_follows(counts, np.full(25, 1 / 25))


def test_everything_inhibited_falls_back_to_uniform():
    _, (_, counts) = fixation_counts(torch.ones(4, 4), 2, 9, True, 4)
    assert_follows(counts, np.full(16, 1 / 16))


def test_impossible_pixels_are_never_drawn_at_any_scale():
    for scale in (1e-12, 1.0, 1e12):
        saliency = torch.zeros(50_000, 3, 3)
        saliency[:, 1, 2] = scale
        assert (sample_fixations(saliency, 1, 1) == torch.tensor([1, 2])).all()


def test_caller_s_map_is_not_modified():
    saliency = torch.rand(3, 12, 12)
    copy = saliency.clone()
    sample_fixations(saliency, 4, 4)
    assert torch.equal(saliency, copy)


@pytest.mark.parametrize("patch", [8, 9])
def test_marker_pixel_at_the_fixation_is_the_patch_centre(patch):
    """Row is row, column is column (the authors' code crops at the transposed place)."""
    images = torch.zeros(2, 3, 20, 30, dtype=torch.uint8)
    fixations = torch.tensor([[[5, 21]], [[13, 7]]])
    images[0, :, 5, 21] = 255
    images[1, :, 13, 7] = 255
    patches = crop_patches(images, fixations, patch, torch.zeros(3), torch.ones(3))
    for b in range(2):
        bright = (patches[b, 0, 0] > 0.5).nonzero()
        assert bright.tolist() == [[patch // 2, patch // 2]]


@pytest.mark.parametrize("patch, size", [(8, (24, 24)), (7, (19, 26)), (24, (24, 24)), (1, (5, 5))])
def test_patches_equal_slices_of_the_normalised_zero_padded_image(patch, size):
    H, W = size
    images = torch.randint(0, 256, (4, 3, H, W), dtype=torch.uint8)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    fixations = torch.stack([torch.randint(0, H, (4, 6)), torch.randint(0, W, (4, 6))], dim=2)
    fixations[:, 0] = 0
    fixations[:, 1] = torch.tensor([H - 1, W - 1])
    patches = crop_patches(images, fixations, patch, mean, std)
    for b in range(4):
        image = (images[b] / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        padded = torch.nn.functional.pad(image, (patch, patch, patch, patch))
        for k, (r, c) in enumerate(fixations[b].tolist()):
            top, left = r - patch // 2 + patch, c - patch // 2 + patch
            torch.testing.assert_close(
                patches[b, k],
                padded[:, top : top + patch, left : left + patch],
                atol=1e-5,
                rtol=1e-5,
            )


def saccades(make_config, make_split, **changes):
    config = make_config(image_size=24, patch_size=8, **changes)
    return Saccades(make_split(), config, torch.device("cpu"))


def test_actions_are_relative_x_y_in_image_sides(make_config, make_split):
    views = saccades(make_config, make_split)
    index = torch.arange(5)
    torch.manual_seed(4)
    fixations, patches = views.scanpaths(index, 4)
    torch.manual_seed(4)
    batch = views(index, 3)
    assert torch.equal(batch.views, patches) and batch.views.shape == (5, 4, 3, 8, 8)
    for b in range(5):
        for i in range(3):
            (r0, c0), (r1, c1) = fixations[b, i].tolist(), fixations[b, i + 1].tolist()
            assert batch.actions[b, i].tolist() == pytest.approx([(c1 - c0) / 24, (r1 - r0) / 24])
            assert batch.params[b, i].tolist() == pytest.approx([c0 / 24, r0 / 24])
    assert batch.labels.tolist() == [0, 1, 0, 1, 0]


def test_one_view_and_batch_of_one(make_config, make_split):
    batch = saccades(make_config, make_split)(torch.tensor([3]), 1)
    assert batch.views.shape == (1, 2, 3, 8, 8) and batch.actions.shape == (1, 1, 2)


def test_same_seed_same_views_other_seed_others(make_config, make_split):
    views, drawn = saccades(make_config, make_split), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(views(torch.arange(6), 3).views)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_switches_are_independent(make_config, make_split):
    for saliency in ("signature", "uniform"):
        for ior in (True, False):
            views = saccades(make_config, make_split, saliency=saliency, ior=ior)
            fixations, _ = views.scanpaths(torch.arange(12).repeat(50), 2)
            offset = fixations[:, 1] - fixations[:, 0] + 4
            assert ((offset >= 0) & (offset < 8)).all(1).any() == (not ior)


def test_clean_is_the_whole_normalised_image(make_config, make_split):
    views, split = saccades(make_config, make_split), make_split()
    expected = (split.parts[0].images[2] / 255 - np.reshape(split.mean, (3, 1, 1))) / np.reshape(
        split.std, (3, 1, 1)
    )
    np.testing.assert_allclose(views.clean(torch.tensor([2]))[0], expected, atol=1e-5)


@pytest.mark.parametrize("patch, size", [(5, (12, 9)), (4, (12, 9)), (9, (12, 9)), (1, (3, 3))])
def test_inside_every_patch_lies_whole_in_the_image(patch, size):
    """With all mass on the border, with none, and when more is looked at than there is room for."""
    H, W = size
    border = torch.zeros(300, H, W)
    border[:, 0] = 1
    for saliency in (border, torch.ones(300, H, W), torch.zeros(300, H, W)):
        first = sample_inside(saliency, 6, patch) - patch // 2
        assert (first >= 0).all()
        assert (first + patch <= torch.tensor(size)).all()
        reached = {tuple(place) for place in first.flatten(0, 1).tolist()}
        assert len(reached) == (H - patch + 1) * (W - patch + 1)        # and every place is reached


def test_inside_follows_the_map_there():
    saliency = torch.zeros(5000, 6, 6)
    saliency[:, 0, 0] = 100                 # a patch of 3 there would reach beyond the border
    saliency[:, 2, 3] = 3
    saliency[:, 4, 1] = 1
    places = sample_inside(saliency, 1, 3)[:, 0].tolist()
    assert {tuple(place) for place in places} == {(2, 3), (4, 1)}
    counts = [places.count([2, 3]), places.count([4, 1])]
    assert chisquare(counts, [3750, 1250]).pvalue > 1e-4


def test_inside_is_a_switch_of_the_mode(make_config, make_split):
    views = Saccades(make_split(n=8, size=16), make_config(patch_size=8, inside=True),
                     torch.device("cpu"))
    fixations, _ = views.scanpaths(torch.arange(8), 4)
    assert fixations.min() >= 4 and fixations.max() <= 12


def test_renders_of_an_object_count_as_images(make_config, make_split):
    split = make_split(n=3, views=4)
    views = Saccades(split, make_config(image_size=24, patch_size=8), torch.device("cpu"))
    assert len(views) == 12 and views.labels.tolist() == [0] * 4 + [1] * 4 + [0] * 4
    np.testing.assert_allclose(views.images[torch.tensor([6])][0], split.parts[0].images[1, 2])
