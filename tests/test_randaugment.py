"""Each operation against torchvision's on the same magnitude and against PIL's on 8-bit pixels, who
gets which, what is erased."""
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dense import randaugment
from dense.randaugment import NAMES, UNCHANGED, Drawn, draw, erase, rand_augment

FILL = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)
STRENGTHS = (-1.0, -0.9, -0.3, 0.0, 0.55, 0.9, 0.97)
SIZE = 24


@pytest.fixture
def pixels():
    """Smooth pictures, so that what is bright, dark or sharp is so in places; of 8-bit values."""
    coarse = torch.rand(len(STRENGTHS), 3, 6, 6)
    return tv.resize(coarse, [SIZE, SIZE]).mul(0.8).add(0.1).mul(255).round().div(255)


def ours(name, pixels, strength=STRENGTHS):
    """Only the first round does anything."""
    operation = torch.full((2, len(pixels)), UNCHANGED)
    operation[0] = NAMES.index(name)
    strength = torch.tensor(strength).expand(2, -1)
    return rand_augment(pixels, Drawn(operation, strength), FILL)


def affine(x, translate=(0, 0), shear=(0.0, 0.0)):
    return tv.affine(x, 0.0, list(translate), 1.0, list(shear), InterpolationMode.BILINEAR,
                     center=[0, 0])


def shear_angle(strength):
    return math.degrees(math.atan(0.3 * strength))


def factor(strength):
    return 1 + 0.9 * strength


TORCHVISION = {
    "rotate": lambda x, s: tv.rotate(x, 30 * s, InterpolationMode.BILINEAR),
    "shear x": lambda x, s: affine(x, shear=(shear_angle(s), 0.0)),
    "shear y": lambda x, s: affine(x, shear=(0.0, shear_angle(s))),
    "translate x": lambda x, s: affine(x, translate=(-0.45 * s * SIZE, 0)),
    "translate y": lambda x, s: affine(x, translate=(0, -0.45 * s * SIZE)),
    "autocontrast": lambda x, s: tv.autocontrast(x),
    "equalise": lambda x, s: tv.equalize(x),
    "invert": lambda x, s: tv.invert(x),
    "posterise": lambda x, s: tv.posterize(x, 4 - int(4 * abs(s))),
    "colour": lambda x, s: tv.adjust_saturation(x, factor(s)),
    "contrast": lambda x, s: tv.adjust_contrast(x, factor(s)),
    "brightness": lambda x, s: tv.adjust_brightness(x, factor(s)),
    "sharpness": lambda x, s: tv.adjust_sharpness(x, factor(s)),
    "unchanged": lambda x, s: x,
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_an_operation_is_torchvision_s_image_by_image(name, pixels):
    found = ours(name, pixels)
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    for image, strength, x in zip(found, STRENGTHS, pixels):
        theirs = TORCHVISION[name](x, strength)
        if name in randaugment.MATRICES:
            # Where a pixel is partly uncovered torchvision weighs it twice, so that it is darker.
            covered = TORCHVISION[name](torch.ones_like(x), strength)
            whole = (covered == 0) | (covered > 1 - 1e-6)
            assert whole.float().mean() > 0.8
            uncovered = (covered == 0) * FILL
            theirs = torch.where(whole, theirs + uncovered, image)
        torch.testing.assert_close(image, theirs, atol=2e-5, rtol=0)


def test_what_a_warp_uncovers_has_the_mean_colour():
    plain = FILL.expand(len(STRENGTHS), 3, SIZE, SIZE)
    for name in randaugment.MATRICES:
        torch.testing.assert_close(ours(name, plain), plain)
    half = ours("translate x", torch.ones_like(plain), len(STRENGTHS) * [1 / 0.45 * 0.5 / SIZE])
    expected = torch.ones_like(plain).clone()       # half a pixel to the left: the last one is half
    expected[..., -1] = (1 + FILL[:, :, 0]) / 2
    torch.testing.assert_close(half, expected)


def transform(x, *numbers):
    return x.transform(x.size, Image.AFFINE, numbers, Image.BILINEAR,
                       fillcolor=tuple(int(255 * c) for c in FILL.flatten()))


def posterise(x, s):
    bits = 4 - int(4 * abs(s))
    return x.point(lambda value: value & (0xFF00 >> bits))          # ImageOps refuses 0 bits


def solarise_add(x, s):
    return x.point([min(255, i + int(110 * abs(s))) if i < 128 else i for i in range(256)] * 3)


# as timm calls PIL, at the same level and direction
PIL = {
    "rotate": lambda x, s: x.rotate(30 * s, Image.BILINEAR),
    "shear x": lambda x, s: transform(x, 1, 0.3 * s, 0, 0, 1, 0),
    "shear y": lambda x, s: transform(x, 1, 0, 0, 0.3 * s, 1, 0),
    "translate x": lambda x, s: transform(x, 1, 0, 0.45 * s * SIZE, 0, 1, 0),
    "translate y": lambda x, s: transform(x, 1, 0, 0, 0, 1, 0.45 * s * SIZE),
    "autocontrast": lambda x, s: ImageOps.autocontrast(x),
    "equalise": lambda x, s: ImageOps.equalize(x),
    "invert": lambda x, s: ImageOps.invert(x),
    "posterise": posterise,
    "solarise": lambda x, s: ImageOps.solarize(x, 256 - int(256 * abs(s))),
    "solarise add": solarise_add,
    "colour": lambda x, s: ImageEnhance.Color(x).enhance(factor(s)),
    "contrast": lambda x, s: ImageEnhance.Contrast(x).enhance(factor(s)),
    "brightness": lambda x, s: ImageEnhance.Brightness(x).enhance(factor(s)),
    "sharpness": lambda x, s: ImageEnhance.Sharpness(x).enhance(factor(s)),
}


@pytest.mark.parametrize("name", PIL)
def test_an_operation_is_pil_s_to_one_and_a_half_grey_levels(name, pixels):
    """But where a warp uncovers something: there PIL cuts sharply, and bilinear fades."""
    for image, strength, x in zip(ours(name, pixels), STRENGTHS, pixels):
        theirs = PIL[name](tv.to_pil_image((255 * x).round().byte()), strength)
        theirs = torch.from_numpy(np.array(theirs)).permute(2, 0, 1).float()
        off = (255 * image - theirs).abs()
        if name in randaugment.MATRICES:
            off = off[:, 10:14, 10:14] if abs(strength) < 0.6 else off[:, 12, 12]
        assert off.max() <= 1.5, f"{name} at {strength}: off by {off.max():.1f} of 255"


def test_everything_is_drawn_as_often_as_it_should_be():
    """15 operations alike, half the images pass a round, levels of N(9, 0.5), either direction."""
    operation, strength = draw(60_000)
    share = torch.stack([row.bincount(minlength=len(NAMES)) for row in operation]) / 60_000
    assert len(NAMES) == 16
    torch.testing.assert_close(share[:, UNCHANGED], torch.full((2,), 0.5), atol=0.01, rtol=0)
    torch.testing.assert_close(share[:, :UNCHANGED], torch.full((2, 15), 0.5 / 15), atol=0.005,
                               rtol=0)
    level = 10 * strength.abs()
    assert level.mean().item() == pytest.approx(9.0, abs=0.02)
    assert level.std().item() == pytest.approx(0.5, abs=0.02) and level.max() == 10
    assert (strength > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    both = (operation[0] < UNCHANGED) & (operation[1] < UNCHANGED)
    assert both.float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_a_batch_is_its_images_one_by_one_in_both_rounds():
    """Sorting and putting back mixes nobody up."""
    pixels = torch.rand(40, 3, SIZE, SIZE)
    before = pixels.clone()
    drawn = draw(40)
    together = rand_augment(pixels, drawn, FILL)
    for i in range(40):
        alone = Drawn(drawn.operation[:, i:i + 1], drawn.strength[:, i:i + 1])
        torch.testing.assert_close(together[i:i + 1], rand_augment(pixels[i:i + 1], alone, FILL),
                                   atol=1e-5, rtol=0)
    assert torch.equal(pixels, before)
    torch.manual_seed(3)
    first = rand_augment(pixels, draw(40), FILL)
    torch.manual_seed(3)
    assert torch.equal(first, rand_augment(pixels, draw(40), FILL))
    assert not torch.equal(first, together)


def test_a_quarter_is_erased_by_a_box_of_noise():
    images = torch.full((2000, 3, 20, 20), 9.0)
    erased = erase(images)
    changed = erased != 9
    some = changed.flatten(1).any(1)
    assert some.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert (images == 9).all()
    areas = []
    for mask in changed[some]:
        assert torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2])
        rows = mask[0].any(1).nonzero()
        columns = mask[0].any(0).nonzero()
        height = int(rows.max() - rows.min()) + 1
        width = int(columns.max() - columns.min()) + 1
        assert mask[0].sum() == height * width                              # one filled box
        areas.append(height * width / 400)
    assert 0.005 <= min(areas) and max(areas) <= 0.38                       # sides are rounded
    assert np.mean(areas) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    noise = erased[changed]
    assert noise.mean().abs() < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    torch.manual_seed(0)
    assert torch.equal(erase(images[:1]), images[:1])                       # nobody chosen: 0.50


def test_nothing_asks_the_device_for_a_value():
    """On PyTorch's device "meta", whose tensors have none."""
    pixels = torch.empty(200, 3, SIZE, SIZE, device="meta")
    fill = torch.empty(3, 1, 1, device="meta")
    drawn = draw(200)
    assert len(drawn.operation.unique()) == len(NAMES)
    assert erase(rand_augment(pixels, drawn, fill)).shape == pixels.shape
