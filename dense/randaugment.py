"""RandAugment (Cubuk et al., 2020) and random erasing (Zhong et al., 2020), a batch at a time: what
MAE's fine-tuning adds to crop and flip.

    pixels (B, 3, S, S) in [0, 1]  --rand_augment-->  the same shape, in [0, 1]
    images (B, 3, S, S) normalised  --erase-->        a quarter of them with a box of noise

RandAugment is timm's "rand-m9-mstd0.5-inc1", which MAE names: two rounds; in each an image takes,
with probability 0.5, one of 15 operations, at level 9 of 10, jittered. "inc": every operation
changes more at a higher level. What a level means for an operation is written at the operation;
levels are divided by 10 here and carry the random direction as their sign ("strength").

Every image draws its own operation, level and direction, yet Python loops over the 15 operations
only: images are sorted by operation, each operation takes its share as one tensor, and the shares
are put back. All draws that decide shapes are made on the CPU, so nothing waits for the device.

Differs from timm: pixels stay floats. timm works on 8-bit images and rounds after every operation,
so an operation here is off by up to one and a half of 255 grey levels; equalise, which is defined
by 8-bit histograms, rounds as there. Warps are bilinear (MAE asks for bicubic); what a warp
uncovers gets the mean colour, as there, but fades in over a pixel. Checked in
tests/test_randaugment.py.
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

import augmentations

ROUNDS = 2
PROBABILITY = 0.5               # with which an image takes a round's operation
LEVEL = 9.0                     # of 10: mean and standard deviation of what is drawn
LEVEL_STD = 0.5
HIGHEST = 10.0
ERASED = 0.25                   # share of images
# A box's area as a share of the image's, and its width / height: timm's
BOX = augmentations.Recipe(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))


class Drawn(NamedTuple):
    """What B images go through, on the CPU; rand_augment() of the same Drawn does the same."""
    operation: torch.Tensor     # (ROUNDS, B) int64, the place of its name in NAMES
    strength: torch.Tensor      # (ROUNDS, B) in [-1, 1]: a tenth of the level; its sign says which
                                # way, where there are two


def draw(B):
    """Draw what happens to B images, from torch's global generator of the CPU."""
    shape = (ROUNDS, B)
    operation = torch.randint(len(NAMES) - 1, shape)
    taken = torch.rand(shape) < PROBABILITY
    level = (LEVEL + LEVEL_STD * torch.randn(shape)).clamp(0, HIGHEST)
    sign = 1 - 2 * torch.randint(2, shape)
    return Drawn(torch.where(taken, operation, UNCHANGED), sign * level / HIGHEST)


@torch.no_grad()
def rand_augment(pixels, drawn, fill):
    """pixels (B, 3, S, S) in [0, 1], Drawn for as many -> (B, 3, S, S) in [0, 1].

    fill (3, 1, 1): the colour of what a warp uncovers.
    Not for use under autocast: pixels need more than 8 bits."""
    warps = {name: functools.partial(warp, matrix_of=matrix_of, fill=fill)
             for name, matrix_of in MATRICES.items()}
    operations = [*warps.values(), *COLOURS.values()]
    for operation, strength in zip(*drawn):
        pixels = one_round(pixels, operation, strength, operations)
    return pixels


def one_round(pixels, operation, strength, operations):
    """Each image through its own one of the operations: functions of (pixels, strength)."""
    order = operation.argsort(stable=True)
    sizes = operation.bincount(minlength=len(operations)).tolist()
    there = functools.partial(torch.Tensor.to, device=pixels.device, non_blocking=True)
    parts = pixels[there(order)].split(sizes)
    strengths = there(strength[order]).view(-1, 1, 1, 1).split(sizes)
    done = []
    for apply, part, its_strength in zip(operations, parts, strengths):
        if len(part):
            done.append(apply(part, its_strength))
    return torch.cat(done)[there(order.argsort())]


# ---------------------------------------------------------------- warps
#
# Matrices (n, 2, 3) of where a pixel is taken from, in halves of the image's side from its centre.

def warp(pixels, strength, matrix_of, fill):
    """pixels (n, 3, S, S), strength (n, 1, 1, 1) -> (n, 3, S, S), bilinear."""
    grid = F.affine_grid(matrix_of(strength.flatten()), pixels.shape, align_corners=False)
    return F.grid_sample(pixels - fill, grid, align_corners=False).add_(fill)   # 0 outside


def matrices(strength, *numbers):
    """(n, 2, 3) of six numbers, row by row, each a float or (n,)."""
    columns = [torch.zeros_like(strength) + number for number in numbers]
    return torch.stack(columns, dim=1).view(-1, 2, 3)


def rotation(strength):
    """By 30 degrees at level 10, about the centre."""
    angle = math.radians(30) * strength
    return matrices(strength, angle.cos(), -angle.sin(), 0, angle.sin(), angle.cos(), 0)


def shear_x(strength):
    """By 0.3 of a pixel a row at level 10; the upper border stays."""
    shear = 0.3 * strength
    return matrices(strength, 1, shear, shear, 0, 1, 0)


def shear_y(strength):
    """By 0.3 of a pixel a column at level 10; the left border stays."""
    shear = 0.3 * strength
    return matrices(strength, 1, 0, 0, shear, 1, shear)


def translation_x(strength):
    """By 0.45 of the image's width at level 10."""
    return matrices(strength, 1, 0, 2 * 0.45 * strength, 0, 1, 0)


def translation_y(strength):
    """By 0.45 of the image's height at level 10."""
    return matrices(strength, 1, 0, 0, 0, 1, 2 * 0.45 * strength)


# ---------------------------------------------------------------- colours

def autocontrast(pixels, strength):
    """Each channel stretched to [0, 1]; knows no level."""
    return tv.autocontrast(pixels)


def equalise(pixels, strength):
    """Each channel's histogram made flat; knows no level."""
    return tv.equalize(pixels)


def invert(pixels, strength):
    """The negative; knows no level."""
    return 1 - pixels


def posterise(pixels, strength):
    """Keep the upper bits: 4, one less with each quarter of the level, none at level 10."""
    levels = (4 - (4 * strength.abs()).floor()).exp2()
    return (levels * pixels).floor().minimum(levels - 1).div_(levels)


def solarise(pixels, strength):
    """Invert what is bright: 8-bit values from 256 on at level 0, from 0 on at level 10."""
    threshold = 256 - (256 * strength.abs()).floor()
    return torch.where(pixels >= (threshold - 0.5) / 255, 1 - pixels, pixels)


def solarise_add(pixels, strength):
    """Brighten the darker half: by 110 of 255 at level 10."""
    brighter = (pixels + 110 / 255 * strength.abs()).clamp_(max=1)
    return torch.where(pixels < 0.5, brighter, pixels)


def blend(pixels, reference, strength):
    """From a reference to the image or beyond it: by a factor of 1 +- 0.9 at level 10."""
    return torch.lerp(reference, pixels, 1 + 0.9 * strength).clamp_(0, 1)


def colour(pixels, strength):
    """From each pixel's own grey."""
    return blend(pixels, augmentations.luminance(pixels), strength)


def contrast(pixels, strength):
    """From the image's mean grey."""
    grey = augmentations.luminance(pixels).mean((2, 3), keepdim=True)
    return blend(pixels, grey, strength)


def brightness(pixels, strength):
    """From black."""
    return blend(pixels, torch.zeros_like(pixels), strength)


def sharpness(pixels, strength):
    """From the image smoothed by PIL's 3 x 3 filter; the border is left as it is."""
    kernel = pixels.new_full((3, 1, 3, 3), 1 / 13)
    kernel[:, :, 1, 1] = 5 / 13
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels, kernel, groups=3)
    return blend(pixels, smooth, strength)


def unchanged(pixels, strength):
    """What a round does to an image that it passes by."""
    return pixels


MATRICES = {"rotate": rotation, "shear x": shear_x, "shear y": shear_y,
            "translate x": translation_x, "translate y": translation_y}
COLOURS = {"autocontrast": autocontrast, "equalise": equalise, "invert": invert,
           "posterise": posterise, "solarise": solarise, "solarise add": solarise_add,
           "colour": colour, "contrast": contrast, "brightness": brightness,
           "sharpness": sharpness, "unchanged": unchanged}
NAMES = (*MATRICES, *COLOURS)
UNCHANGED = NAMES.index("unchanged")            # the last: `draw` draws from those before it


# ---------------------------------------------------------------- erasing

@torch.no_grad()
def erase(images):
    """images (B, 3, S, S), normalised -> a quarter of them with a box of standard normal noise.

    Each pixel and channel has noise of its own."""
    B, _, S, _ = images.shape
    chosen = (torch.rand(B) < ERASED).nonzero()[:, 0]
    box = augmentations.sample(len(chosen), S, BOX).crop        # on the CPU, as `chosen`
    top, left, height, width = box.to(images.device, non_blocking=True).T[:, :, None]
    pixel = torch.arange(S, device=images.device)
    in_rows = (pixel >= top) & (pixel < top + height)           # (n, S)
    in_columns = (pixel >= left) & (pixel < left + width)
    inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    chosen = chosen.to(images.device, non_blocking=True)
    noise = torch.randn(len(chosen), *images.shape[1:], device=images.device)
    return images.index_copy(0, chosen, torch.where(inside, noise, images[chosen]))
