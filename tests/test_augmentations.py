"""augmentations.py against torchvision.transforms.v2.functional, image by image, and against its
own promises."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

import augmentations as A

# float32 pixels in [0, 1], whose last bit is 6e-8; the largest difference seen is 1.5e-6
TOLERANCE = 3e-6
ALWAYS = A.Ranges(jitter=1.0, grey=0.3, solarise=0.5, sigma=(0.1, 2.0))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_images(n, H, W, seed=0):
    """Noise, smooth gradients, one-colour and grey images, black and white: every kind once in
    six."""
    images = torch.rand(n, 3, H, W, generator=seeded(seed))
    images[1::6] = torch.linspace(0, 1, W) * images[1::6, :, :1, :1]
    images[2::6] = images[2::6, :, :1, :1]
    images[3::6] = images[3::6, :1]
    images[4::6] = images[4::6].round()
    images[5::12], images[11::12] = 0, 1
    return images


def one_by_one(function, images, *parameters):
    return torch.stack([function(image, *values) for image, *values in zip(images, *parameters)])


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and ours.isfinite().all()
    assert (ours - theirs).abs().max() < TOLERANCE


# torchvision's side, one image and plain Python numbers at a time

def tv_crop(image, crop, flip, size):
    view = F.resized_crop(
        image, *map(int, crop.tolist()), [size, size], InterpolationMode.BICUBIC, antialias=True
    )
    return (F.horizontal_flip(view) if flip else view).clamp(0, 1)


def tv_jitter(image, jitter, order):
    operations = F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue
    for k in order.tolist():
        image = operations[k](image, jitter[k].item())
    return image


def tv_grey(image, grey):
    return F.rgb_to_grayscale(image, 3) if grey else image


def tv_blur(image, sigma, kernel_size):
    return F.gaussian_blur(image, [kernel_size] * 2, [sigma.item()] * 2) if sigma > 0 else image


def tv_solarise(image, solarised):
    return F.solarize(image, 0.5) if solarised else image


def tv_chain(image, crop, flip, jitter, order, grey, sigma, solarised, size):
    image = tv_jitter(tv_crop(image, crop, flip, size), jitter, order)
    return tv_solarise(tv_blur(tv_grey(image, grey), sigma, A.blur_kernel_size(size)), solarised)


# every operation

@pytest.mark.parametrize(
    "H, W, size", [(32, 32, 32), (64, 64, 64), (37, 53, 32), (96, 40, 21), (20, 33, 64)]
)
def test_crop_and_flip(H, W, size):
    images = random_images(60, H, W)
    p = A.sample(60, (H, W), generator=seeded(1))
    corner = torch.tensor([[0, 0, 9, 7], [0, W - 7, 9, 7], [H - 9, 0, 9, 7], [H - 9, W - 7, 9, 7],
                           [0, 0, H, W], [H - 1, W - 1, 1, 1], [3, 0, 1, W], [0, 5, H, 1]]).float()
    p.crop[:8] = corner
    p.crop[8:16] = corner
    p.flip[:16] = torch.arange(16) < 8
    ours = A.resized_crop_flip(images, p.crop, p.flip, size)
    assert_close(ours, one_by_one(lambda *a: tv_crop(*a, size), images, p.crop, p.flip))


def test_whole_image_is_the_identity_and_flip_mirrors():
    images = random_images(2, 32, 32)
    whole = torch.tensor([[0.0, 0, 32, 32]] * 2)
    views = A.resized_crop_flip(images, whole, torch.tensor([False, True]), 32)
    assert torch.equal(views[0], images[0]) and torch.equal(views[1], images[1].flip(-1))


@pytest.mark.parametrize("column, function, low, high", [
    (A.BRIGHTNESS, F.adjust_brightness, 0, 2), (A.CONTRAST, F.adjust_contrast, 0, 2),
    (A.SATURATION, F.adjust_saturation, 0, 2), (A.HUE, F.adjust_hue, -0.5, 0.5)])
def test_one_jitter_operation(column, function, low, high):
    images = random_images(60, 33, 32)
    values = torch.linspace(low, high, 60)
    jitter = torch.tensor([1.0, 1, 1, 0]).repeat(60, 1)
    jitter[:, column] = values
    ours = A.colour_jitter(images, jitter, torch.arange(4).repeat(60, 1))
    assert_close(
        ours, one_by_one(lambda image, value: function(image, value.item()), images, values)
    )


def test_jitter_in_all_24_orders():
    order = torch.tensor(list(itertools.permutations(range(4)))).repeat(5, 1)
    images = random_images(120, 32, 32)
    # wide, so that clamping takes place
    jitter = 1 + 0.8 * (2 * torch.rand(120, 4, generator=seeded(2)) - 1)
    jitter[:, A.HUE] = (jitter[:, A.HUE] - 1) / 2
    ours = A.colour_jitter(images, jitter, order)
    assert_close(ours, one_by_one(tv_jitter, images, jitter, order))
    same_images, same_jitter = images[:1].repeat(24, 1, 1, 1), jitter[:1].repeat(24, 1)
    by_order = A.colour_jitter(same_images, same_jitter, order[:24]).flatten(1)
    distance = torch.cdist(by_order, by_order).fill_diagonal_(1)
    assert (distance > 1e-3).sum() > 500, (
        "the order must matter, or the comparison above shows little"
    )


def test_saturation_zero_then_hue_stays_grey():
    images = torch.rand(8, 3, 16, 16, generator=seeded(3))
    jitter = torch.tensor([[1.0, 1, 0, 0.3]]).repeat(8, 1)
    grey = A.colour_jitter(images, jitter, torch.tensor([[2, 3, 0, 1]]).repeat(8, 1))
    assert_close(grey, A.luminance(images).expand_as(images))


def test_greyscale():
    images, grey = random_images(12, 32, 20), torch.arange(12) % 2 == 0
    ours = A.greyscale(images, grey)
    assert_close(ours, one_by_one(tv_grey, images, grey))
    assert torch.equal(ours[~grey], images[~grey])


@pytest.mark.parametrize("size, kernel_size", [(32, 3), (64, 7), (21, 9), (224, 23)])
def test_blur(size, kernel_size):
    n = 24 if size < 100 else 6
    images, sigma = random_images(n, size, size), torch.linspace(0, 2, n)
    sigma[1] = 0.1
    ours = A.gaussian_blur(images, sigma, kernel_size)
    assert_close(ours, one_by_one(lambda *a: tv_blur(*a, kernel_size), images, sigma))
    assert torch.equal(ours[0], images[0]), "sigma 0 must leave the image as it is"


def test_blur_kernel_size():
    assert [A.blur_kernel_size(size) for size in (16, 32, 64, 96, 224)] == [3, 3, 7, 9, 23]


def test_solarise():
    images, solarised = random_images(12, 32, 20), torch.arange(12) % 2 == 0
    images[0, 0, 0, 0] = 0.5
    assert torch.equal(A.solarise(images, solarised), one_by_one(tv_solarise, images, solarised))


# the whole chain

@pytest.mark.parametrize("H, W, size", [(32, 32, 32), (64, 64, 64), (45, 61, 32)])
@pytest.mark.parametrize("ranges", [A.CONTEXT, A.TARGET, ALWAYS])
def test_chain(H, W, size, ranges):
    images = random_images(48, H, W)
    p = A.sample(48, (H, W), ranges, generator=seeded(4))
    ours = A.apply(images, p, size)
    assert_close(ours, one_by_one(lambda *a: tv_chain(*a, size), images, *p))
    assert ours.min() >= 0 and ours.max() <= 1


def test_uint8_images_and_untouched_inputs():
    images = (random_images(16, 32, 32) * 255).byte()
    p = A.sample(16, 32, ALWAYS, generator=seeded(5))
    kept_images, kept = images.clone(), A.Params(*(field.clone() for field in p))
    as_float = images.float() / 255
    kept_float = as_float.clone()
    assert torch.equal(A.apply(images, p, 32), A.apply(as_float, p, 32))
    assert torch.equal(images, kept_images) and torch.equal(as_float, kept_float)
    assert all(torch.equal(a, b) for a, b in zip(p, kept))


def test_identity_parameters_leave_the_image():
    images = random_images(12, 32, 32)
    off = A.Ranges(scale=(1, 1), ratio=(1, 1), flip=0, jitter=0, grey=0, blur=0)
    p = A.sample(12, 32, off, generator=seeded(6))
    assert_close(A.apply(images, p, 32), images)
    assert torch.equal(
        A.parameters(p, 32), torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0, 0]] * 12).float()
    )


def test_replay_is_bit_equal_and_views_do_not_depend_on_their_neighbours():
    images = random_images(30, 32, 32)
    p = A.sample(30, 32, ALWAYS, generator=seeded(7))
    views = A.apply(images, p, 32)
    assert torch.equal(A.apply(images, p, 32), views)
    for i in (0, 13, 29):  # a batch of one; the matrix product may add in another order
        alone = A.apply(images[i:i + 1], A.Params(*(field[i:i + 1] for field in p)), 32)
        assert_close(alone, views[i:i + 1])


def test_autocast_does_not_reach_the_pixels():
    images, p = random_images(12, 32, 32), A.sample(12, 32, generator=seeded(8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = A.apply(images, p, 32)
    assert inside.dtype == torch.float32 and torch.equal(inside, A.apply(images, p, 32))


def test_apply_refuses_what_does_not_fit():
    p = A.sample(4, 32)
    with pytest.raises(AssertionError, match="RGB"):
        A.apply(torch.rand(4, 1, 32, 32), p, 32)
    with pytest.raises(AssertionError, match="5 images need 5 rows"):
        A.apply(torch.rand(5, 3, 32, 32), p, 32)


# actions

def test_parameters_are_scaled_by_constants():
    p = A.Params(
        crop=torch.tensor([[8.0, 12, 16, 48]]),
        flip=torch.tensor([True]),
        jitter=torch.tensor([[1.4, 0.8, 0.9, -0.1]]),
        order=torch.tensor([[3, 1, 0, 2]]),
        grey=torch.tensor([True]),
        sigma=torch.tensor([0.5]),
        solarise=torch.tensor([True]),
    )
    expected = torch.tensor([[0.25, 0.1875, 0.5, 0.75, 1, -0.5, -0.5, -1, 0.25]])
    torch.testing.assert_close(A.parameters(p, (32, 64)), expected)
    assert len(A.NAMES) == 9 and sorted(i for s in A.GROUPS.values() for i in range(9)[s]) == list(
        range(9)
    )


def test_parameter_ranges():
    p = A.sample(20000, (32, 48), generator=seeded(9))
    values = A.parameters(p, (32, 48))
    lower = torch.tensor([0.0, 0, 0, 0, -1, -1, -1, -1, 0])
    assert (values >= lower - 1e-6).all() and (values <= 1 + 1e-6).all()
    assert (values.amin(0) < lower + 0.21)[[0, 1, 4, 5, 6, 7, 8]].all() and (values.amax(0) > 0.79)[
        2:
    ].all()


def augmentations(make_split, make_config, **changes):
    return A.Augmentations(
        make_split(n=10, size=32),
        make_config(mode="augment", image_size=32, **changes),
        torch.device("cpu"),
    )


def test_mode_returns_the_views_of_apply_normalised_and_their_parameters(make_split, make_config):
    views, split, M = augmentations(make_split, make_config), make_split(n=10, size=32), 2
    index = torch.tensor([7, 1, 4])
    torch.manual_seed(5)
    batch = views(index, M)
    assert batch.views.shape == (3, 3, 3, 32, 32) and batch.labels.tolist() == [1, 1, 0]
    torch.manual_seed(5)
    images = torch.from_numpy(split.parts[0].images[index.numpy()])
    mean, std = torch.tensor(split.mean).view(3, 1, 1), torch.tensor(split.std).view(3, 1, 1)
    for v, ranges in enumerate([A.CONTEXT, A.CONTEXT, A.TARGET]):
        params = A.sample(3, 32, ranges)
        torch.testing.assert_close(
            batch.views[:, v], (A.apply(images, params, 32) - mean) / std, atol=1e-5, rtol=1e-5
        )
        assert torch.equal(batch.params[:, v], A.parameters(params, 32))
    assert torch.equal(batch.actions, batch.params.diff(dim=1))


def test_an_action_depends_on_its_own_two_views_only(make_split, make_config):
    """More views drawn after the second do not move the action between the first two, as it does in
    the authors' code."""
    views, drawn = augmentations(make_split, make_config), []
    for M in (2, 3, 5):
        torch.manual_seed(1)
        drawn.append(views(torch.arange(6), M).actions[:, 0])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


# sampling

def test_recipes_are_equimods():
    shared = dict(
        scale=(0.2, 1),
        ratio=(3 / 4, 4 / 3),
        flip=0.5,
        jitter=0.8,
        half_range=(0.4, 0.4, 0.2, 0.1),
        grey=0.2,
        sigma=(0.1, 2),
    )
    assert A.CONTEXT._asdict() == dict(shared, blur=1, solarise=0)
    assert A.TARGET._asdict() == dict(shared, blur=0.1, solarise=0.2)


@pytest.mark.parametrize("ranges", [A.CONTEXT, A.TARGET])
def test_probabilities(ranges):
    n = 20000
    p = A.sample(n, 32, ranges, generator=seeded(10))
    jittered = (p.jitter != torch.tensor([1.0, 1, 1, 0])).any(1)
    happened = dict(
        flip=p.flip, jitter=jittered, grey=p.grey, blur=p.sigma > 0, solarise=p.solarise
    )
    for name, flags in happened.items():
        probability = getattr(ranges, name)
        assert binomtest(int(flags.sum()), n, probability).pvalue > 1e-3, (
            name,
            flags.float().mean(),
        )
    pairs = np.corrcoef(torch.stack([p.flip, jittered, p.grey]).double().numpy())
    assert np.abs(pairs - np.eye(3)).max() < 4 / math.sqrt(n), "the draws must be independent"


def test_values_are_uniform_in_their_ranges():
    p = A.sample(20000, 32, generator=seeded(11))
    jitter = p.jitter[(p.jitter != torch.tensor([1.0, 1, 1, 0])).any(1)].double()
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        assert kstest(jitter[:, column].numpy(), "uniform", (low, high - low)).pvalue > 1e-3
    assert np.abs(np.corrcoef(jitter.T.numpy()) - np.eye(4)).max() < 4 / math.sqrt(len(jitter))
    assert kstest(p.sigma.double().numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-3
    counts = torch.unique(p.order, dim=0, return_counts=True)[1].double()
    assert len(counts) == 24
    # chi-square, 23 degrees of freedom, p = 0.001
    assert ((counts - 20000 / 24) ** 2 / (20000 / 24)).sum() < 49.7


@pytest.mark.parametrize("H, W", [(32, 32), (64, 64), (40, 90), (20, 100)])
def test_crops_are_distributed_as_torchvisions(H, W):
    n = 4000
    ours = A.sample(n, (H, W), generator=seeded(12)).crop
    assert torch.equal(ours, ours.round()) and (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= H).all() and (ours[:, 1] + ours[:, 3] <= W).all()
    with torch.random.fork_rng():
        torch.manual_seed(13)
        image = torch.empty(3, H, W)
        theirs = torch.tensor(
            [
                RandomResizedCrop.get_params(image, A.CONTEXT.scale, A.CONTEXT.ratio)
                for _ in range(n)
            ]
        )
    statistics = lambda c: torch.cat(
        [c, c[:, 2:3] * c[:, 3:], c[:, 2:3] / c[:, 3:], c[:, :2] + c[:, 2:] / 2], 1
    )
    for a, b in zip(statistics(ours.double()).T, statistics(theirs.double()).T):
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3


def test_crop_fallback_is_torchvisions():
    for H, W in [(10, 100), (100, 10), (32, 32)]:
        never = A.Ranges(scale=(5, 5))  # no shape fits
        ours = A.sample(3, (H, W), never, generator=seeded(14)).crop
        theirs = RandomResizedCrop.get_params(torch.empty(3, H, W), never.scale, never.ratio)
        assert (ours == torch.tensor(theirs)).all(), (ours, theirs)


def test_each_image_may_have_its_own_size():
    sizes = torch.tensor([[30, 40], [50, 50], [20, 90], [64, 33]]).repeat(1500, 1)
    height, width = sizes.float().split(1, dim=1)
    ranges = A.Ranges(scale=(0.3, 1.0))
    ours = A.sample(6000, (height, width), ranges, generator=seeded(15)).crop.double()
    for i, (H, W) in enumerate(sizes[:4].tolist()):
        mine = ours[i::4]
        assert (mine[:, 0] + mine[:, 2] <= H).all() and (mine[:, 1] + mine[:, 3] <= W).all()
        with torch.random.fork_rng():
            torch.manual_seed(16 + i)
            image = torch.empty(3, H, W)
            theirs = torch.tensor([RandomResizedCrop.get_params(image, ranges.scale, ranges.ratio)
                                   for _ in range(1500)]).double()
        for a, b in zip(mine.T, theirs.T):
            assert ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3
    never = A.Ranges(scale=(5, 5))
    ours = A.sample(4, (height[:4], width[:4]), never).crop
    theirs = [RandomResizedCrop.get_params(torch.empty(3, H, W), never.scale, never.ratio)
              for H, W in sizes[:4].tolist()]
    assert (ours == torch.tensor(theirs)).all()


def test_sizes_as_tensors_and_as_numbers_draw_alike():
    size = torch.full((500, 1), 37.0), torch.full((500, 1), 53.0)
    one = A.sample(500, (37, 53), generator=seeded(17))
    two = A.sample(500, size, generator=seeded(17))
    for a, b in zip(one, two):
        assert torch.equal(a, b)


@pytest.mark.parametrize("H, W", [(40, 40), (30, 47), (47, 30), (21, 100), (90, 61), (32, 33)])
def test_the_middle_is_that_of_the_whole_image_resized(H, W):
    shorter, size, margin = 32, 28, 3
    image = random_images(1, H, W)
    whole = [shorter * n // min(H, W) for n in (H, W)]
    resized = F.resize(image, shorter, interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert list(resized.shape[2:]) == whole
    expected = F.center_crop(resized, size).clamp(0, 1)
    first = [round((n - size) / 2) for n in whole]
    # Only what is needed of the image, beginning at another pixel on each axis.
    starts = [max(0, int(n / w * f - 3 * max(1, n / w)) - margin)
              for n, w, f in zip((H, W), whole, first)]
    part = torch.full((1, 3, 100, 100), 9.0)                    # what is beside it weighs nothing
    seen = image[:, :, starts[0]:, starts[1]:]
    part[:, :, :seen.shape[2], :seen.shape[3]] = seen
    rows, columns = (torch.tensor([[-s, n, w, f]]).float()
                     for s, n, w, f in zip(starts, (H, W), whole, first))
    assert_close(A.resized_middle(part, rows, columns, size), expected)


def test_seeds():
    a, same, other = (A.sample(50, 32, A.TARGET, generator=seeded(s)) for s in (1, 1, 2))
    for name, x, y, z in zip(A.Params._fields, a, same, other):
        assert torch.equal(x, y), name
        assert not torch.equal(x, z), name
