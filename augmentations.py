"""Hand-crafted augmentations as actions (seq-JEPA Sec. 2.3, A.1).

    sample(n, image_size, ranges, device)     -> Params, one row per view
    apply(images (n, 3, H, W), params, size)  -> views (n, 3, size, size), float in [0, 1]
    parameters(params, image_size)            -> (n, 9), the view's own parameters

Action: the difference of two consecutive views, a_i = parameters of view i+1 - those of view i.

One view is: random resized crop and flip -> colour jitter, its four operations in random order ->
greyscale -> Gaussian blur -> solarise. Every view of the batch has its own parameters. All
operations run on the whole batch on its own device, with fixed shapes and no host synchronisation.
A view that draws "no" gets an operation's identity (factor 1, hue shift 0, sigma 0) instead of
skipping it.

Agrees with torchvision.transforms.v2.functional image by image on float images. On uint8 images
torchvision rounds after every operation; we convert to float once and only clamp where it clamps.
With TF32 matrix products switched on, crop and blur are only as exact as its 10 bits (1e-3).

Ranges are EquiMod's (Devillers & Lefort 2022).
Differs from the authors' code: a parameter is divided by a fixed constant (crop by the image size,
jitter by its half-range, sigma by its maximum), not normalised over the views of a sequence, so
that an action depends on nothing but its own two views.
Checked in tests/test_augmentations.py.
"""
import math
from typing import NamedTuple

import torch

from images import Batch, Views

# Columns of Params.jitter and values of Params.order:
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
IDENTITY = (1.0, 1.0, 1.0, 0.0)     # the row of Params.jitter that changes nothing
LUMA = (0.2989, 0.587, 0.114)       # grey of an RGB pixel, ITU-R 601 as torchvision rounds it
NAMES = ("crop y", "crop x", "crop h", "crop w",
         "brightness", "contrast", "saturation", "hue", "blur sigma")
GROUPS = {"crop": slice(0, 4), "jitter": slice(4, 8), "blur": slice(8, 9)}


class Ranges(NamedTuple):
    """Of what is drawn, and how probable each operation is. Defaults: EquiMod's."""
    scale: tuple = (0.2, 1.0)       # crop area / image area
    ratio: tuple = (3 / 4, 4 / 3)   # crop width / crop height
    flip: float = 0.5
    jitter: float = 0.8
    half_range: tuple = (0.4, 0.4, 0.2, 0.1)    # of jitter, which is IDENTITY +- these
    grey: float = 0.2
    blur: float = 1.0
    sigma: tuple = (0.1, 2.0)       # of the blur, pixels of the view
    solarise: float = 0.0


CONTEXT = Ranges()
TARGET = Ranges(blur=0.1, solarise=0.2)


class Params(NamedTuple):
    """Everything random about B views; apply() with the same Params gives the same views."""
    crop: torch.Tensor      # (B, 4) top, left, height, width: whole source pixels, stored as float
    flip: torch.Tensor      # (B,) bool, True mirrors left and right
    jitter: torch.Tensor    # (B, 4) factors of brightness, contrast, saturation; hue shift in turns
    order: torch.Tensor     # (B, 4) permutation: order[:, k] is the jitter column applied k-th
    grey: torch.Tensor      # (B,) bool
    sigma: torch.Tensor     # (B,) pixels of the view, 0 = no blur
    solarise: torch.Tensor  # (B,) bool


def sample(n, image_size, ranges=CONTEXT, device="cpu", generator=None):
    """Draw the Params of n views of images of size (H, W), or H = W given as one int.

    H and W may be float tensors (n, 1): then every image has its own size."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, device=device, generator=generator)

    def chance(probability):
        return uniform(0, 1) < probability

    jittered = chance(ranges.jitter)
    jitter = [identity + torch.where(jittered, uniform(-half, half), 0.0)
              for identity, half in zip(IDENTITY, ranges.half_range)]
    return Params(crop=_sample_crop(image_size, ranges, uniform),
                  flip=chance(ranges.flip),
                  jitter=torch.stack(jitter, 1),
                  order=uniform(0, 1, 4).argsort(1),
                  grey=chance(ranges.grey),
                  sigma=torch.where(chance(ranges.blur), uniform(*ranges.sigma), 0.0),
                  solarise=chance(ranges.solarise))


def _sample_crop(image_size, ranges, uniform, tries=10):
    """(n, 4) crops as torchvision's RandomResizedCrop.get_params draws them.

    The first of ten random shapes that fits into the image, else the largest central crop of an
    allowed ratio."""
    H, W = _height_width(image_size)
    share = uniform(*ranges.scale, tries)
    H = H * torch.ones_like(share[:, :1])                                   # (n, 1)
    W = W * torch.ones_like(share[:, :1])
    area = H * W * share
    ratio = uniform(*map(math.log, ranges.ratio), tries).exp()
    height = (area / ratio).sqrt().round()
    width = (area * ratio).sqrt().round()
    fits = (height > 0) & (height <= H) & (width > 0) & (width <= W)
    first = fits.int().argmax(1, keepdim=True)
    found = fits.any(1, keepdim=True)
    tallest = torch.minimum(H, (W / ranges.ratio[0]).round())
    widest = torch.minimum(W, (H * ranges.ratio[1]).round())
    height = torch.where(found, height.gather(1, first), tallest)
    width = torch.where(found, width.gather(1, first), widest)

    def place(free):
        """Pixels before the crop along an axis, of the `free` ones that it leaves."""
        return torch.where(found, (uniform(0, 1, 1) * (free + 1)).floor(), (free / 2).floor())

    top = place(H - height)
    left = place(W - width)
    return torch.cat([top, left, height, width], dim=1)


def _height_width(image_size):
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def parameters(params, image_size):
    """Params -> (B, 9) float in the order of NAMES.

    Crop y, x, h, w in image sizes, in [0, 1]; jitter in CONTEXT's half-ranges away from the
    identity, in [-1, 1]; sigma / CONTEXT's maximum, in [0, 1]. Flip, grey and solarise are no
    actions (Sec. A.1)."""
    H, W = _height_width(image_size)
    top, left, height, width = params.crop.unbind(1)
    crop = [top / H, left / W, height / H, width / W]
    columns = zip(params.jitter.unbind(1), IDENTITY, CONTEXT.half_range)
    jitter = [(column - identity) / half for column, identity, half in columns]
    return torch.stack([*crop, *jitter, params.sigma / CONTEXT.sigma[1]], 1)


@torch.no_grad()
def apply(images, params, size):
    """images (B, 3, H, W), uint8 or float in [0, 1], a row of Params each -> (B, 3, size, size)."""
    B, C, H, W = images.shape
    assert C == 3, f"augmentations need RGB images, got {C} channels"
    assert len(params.crop) == B, f"{B} images need {B} rows of Params, got {len(params.crop)}"
    if not images.is_floating_point():
        images = images.float().div_(255)
    with torch.autocast(images.device.type, enabled=False):     # pixels need more than 8 bits
        views = resized_crop_flip(images.float(), params.crop, params.flip, size)
        views = colour_jitter(views, params.jitter, params.order)
        views = greyscale(views, params.grey)
        views = gaussian_blur(views, params.sigma, blur_kernel_size(size))
        return solarise(views, params.solarise).clamp_(0, 1)    # rounding can leave it by 1e-7


def resized_crop_flip(images, crop, flip, size):
    """Cut crop (B, 4) out of images (B, 3, H, W), resize to (B, 3, size, size), mirror if flip.

    Antialiased bicubic; its overshoot is clamped to [0, 1], as torchvision clamps uint8 images."""
    B, C, H, W = images.shape
    top, left, height, width = crop.unbind(1)
    rows = _bicubic(top, height, H, size, torch.zeros_like(flip))
    columns = _bicubic(left, width, W, size, flip)
    return _resampled(images, rows, columns)


def resized_middle(images, rows, columns, size):
    """What resizing an image and cutting (size, size) out of the result leaves, from a part of it.

    images (B, 3, H, W), of which image b holds lines of a whole one.  rows, columns (B, 4), of each
    axis: where the whole image begins (negative, before the part), its length, the length it is
    resized to, and the first of the `size` pixels of that which are wanted.  ->  (B, 3, size, size)

    Antialiased bicubic and clamped, as resized_crop_flip."""
    B, C, H, W = images.shape
    upright = torch.zeros(B, dtype=torch.bool, device=images.device)
    start, length, whole, first = rows.unbind(1)
    rows = _bicubic(start, length, H, size, upright, whole, first)
    start, length, whole, first = columns.unbind(1)
    columns = _bicubic(start, length, W, size, upright, whole, first)
    return _resampled(images, rows, columns)


def _resampled(images, rows, columns):
    """Images (B, C, H, W) under the matrices (B, size, H) and (B, size, W), in [0, 1]."""
    B, C, H, W = images.shape
    size = columns.shape[1]
    views = torch.bmm(images.reshape(B, C * H, W), columns.transpose(1, 2)).view(B, C, H, size)
    return torch.matmul(rows[:, None], views).clamp_(0, 1)


def _bicubic(start, length, extent, size, mirror, whole=None, first=None):
    """Matrices (B, size, extent): [start, start + length) of `extent` pixels, resampled to `size`.

    whole, first (B,), if given: resampled to `whole`, of which only `size` pixels are wanted, from
    the `first` on.

    Keys' cubic (a = -0.5), stretched by the scale when shrinking, cut at the crop's borders and
    renormalised: the filter of PIL and torchvision. Only the taps under it are computed, then
    scattered into the matrix."""
    B = len(start)
    start = start[:, None, None]
    length = length[:, None, None]
    mirror = mirror[:, None, None]
    out = torch.arange(size, device=start.device)[:, None]
    out = torch.where(mirror, size - 1 - out, out)
    scale = length / size
    if whole is not None:
        out = first[:, None, None] + out
        scale = length / whole[:, None, None]
    stretch = scale.clamp(min=1)
    centre = scale * (out + 0.5)            # in pixels from the crop's edge
    count = math.ceil(4 * max(extent / size, 1)) + 1        # a crop is no larger than the image
    taps = torch.arange(count, device=start.device)
    source = (centre - 2 * stretch + 0.5).floor() + taps    # (B, size, count), pixels of the crop
    x = ((source + 0.5 - centre) / stretch).abs()
    # Both pieces of Keys' cubic at once.
    outer = (2 - x).clamp(min=0)
    inner = (1 - x).clamp(min=0)
    weight = outer ** 2 * (outer - 1) / 2 + inner ** 2 * (1 - 2 * inner)
    weight = weight * ((source >= 0) & (source < length))
    weight = weight / weight.sum(2, keepdim=True)
    column = (start + source).clamp(0, extent - 1).long()
    matrix = torch.zeros(B, size, extent, device=start.device)
    return matrix.scatter_add_(2, column, weight)


def colour_jitter(images, jitter, order):
    """Brightness, contrast, saturation (factors) and hue (turns) of jitter (B, 4).

    order (B, 4): each sample's own. Hue costs as much as several of the others, so all samples take
    it together: three slots for what precedes it in a sample's order, hue, three slots for what
    follows. A slot that is not the sample's own has factor 1."""
    hue_at = (order == HUE).int().argmax(1)
    slots = torch.arange(3, device=images.device)
    before = slots < hue_at[:, None]                        # (B, 3)
    blends = order.gather(1, slots + (~before).long())      # the order without hue
    factors = jitter.gather(1, blends)
    images = images.clone()     # in place from here: new memory costs a CPU more than arithmetic
    for k in range(3):
        _blend_(images, blends[:, k], torch.where(before[:, k], factors[:, k], 1.0))
    _shift_hue_(images, jitter[:, HUE])
    for k in range(3):
        _blend_(images, blends[:, k], torch.where(before[:, k], 1.0, factors[:, k]))
    return images


def _blend_(images, operation, factor):
    """Move images (B, 3, H, W) in place towards (factor < 1) or away from a reference, in [0, 1].

    operation (B,) says which: BRIGHTNESS black, CONTRAST the image's mean grey, SATURATION each
    pixel's own grey."""
    operation = operation[:, None, None, None]
    factor = factor[:, None, None, None]
    reference = luminance(images)
    mean = reference.mean((2, 3), keepdim=True)
    reference.mul_((operation == SATURATION).float()).add_(mean * (operation == CONTRAST))
    images.lerp_(reference, 1 - factor).clamp_(0, 1)


def luminance(images):
    """(B, 3, H, W) -> (B, 1, H, W) grey values."""
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _shift_hue_(images, shift):
    """Turn the hue of images (B, 3, H, W) in place by shift (B,) turns; HSV's V and S stay.

    The HSV round trip, written out: with low and high the least and greatest channel, each channel
    is low + (high - low) * a trapezoid of the hue, which is 1 for a third of the circle around the
    channel's own hue. Conversely, with R, G, B the channels scaled to low = 0 and high = 1, the hue
    is +-(1 + G + B - R) sixths of a turn from red, + on green's side: one formula for all six
    sectors, several times faster than selecting."""
    red, green, blue = images.unbind(1)
    low = torch.minimum(red, green)
    high = torch.maximum(red, green)
    torch.minimum(low, blue, out=low)
    torch.maximum(high, blue, out=high)
    chroma = high - low
    hue = (green - red).add_(blue).sub_(low).add_(chroma)
    # A grey pixel has chroma 0, and any hue will do.
    hue.div_(chroma.clamp(min=torch.finfo(chroma.dtype).tiny))
    hue.copysign_(green - blue).add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)
    red.copy_(low).addcmul_(chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1))
    green.copy_(low).addcmul_(chroma, (hue - 2).abs_().neg_().add_(2).clamp_(0, 1))
    blue.copy_(low).addcmul_(chroma, (hue - 4).abs_().neg_().add_(2).clamp_(0, 1))


def greyscale(images, grey):
    """images (B, 3, H, W) with all three channels set to the grey value where grey (B,)."""
    weight = grey[:, None, None, None].float()              # 0 or 1: lerp is exact
    return torch.lerp(images, luminance(images), weight)


def blur_kernel_size(size):
    """Odd, about a tenth of the view: 3 at 32 pixels, 7 at 64, 23 at 224 (SimCLR's rule)."""
    return 2 * max(size // 20, 1) + 1


def gaussian_blur(images, sigma, kernel_size):
    """Blur images (B, 3, S, S) with sigma (B,) pixels, 0 = not at all.

    Borders are reflected without repeating the edge pixel. The blur along a line, borders included,
    is one (S, S) matrix per sample."""
    B, C, S, _ = images.shape
    reach = kernel_size // 2
    offset = torch.arange(-reach, reach + 1, device=images.device)
    sigma = sigma.clamp(min=1e-3)[:, None]                  # 1e-3 is exactly the identity
    kernel = (-0.5 * (offset / sigma) ** 2).softmax(1)      # (B, kernel)
    pixel = torch.arange(S, device=images.device)
    source = (S - 1) - ((S - 1) - (pixel[:, None] + offset).abs()).abs()
    # taps (kernel, S, S): which pixel an offset reads
    taps = (source[:, :, None] == pixel).float().transpose(0, 1)
    matrix = (kernel @ taps.flatten(1)).view(B, S, S)
    views = torch.bmm(images.reshape(B, C * S, S), matrix.transpose(1, 2)).view(B, C, S, S)
    return torch.matmul(matrix[:, None], views)


def solarise(images, solarised):
    """Invert what is brighter than 0.5 where solarised (B,): that is min(x, 1 - x)."""
    ceiling = 2.0 - solarised.float()[:, None, None, None]      # 2 - x >= x: unchanged
    return torch.minimum(images, ceiling - images)


class Augmentations(Views):
    """Mode `augment`: sample indices -> Batch of augmented versions of the same image.

    M observed views from the ranges CONTEXT, the one to predict from TARGET.
    split: images.Split; renders of one object count as separate images.
    actions (B, M, 9): differences of parameters().  params (B, M+1, 9): parameters()."""

    conditions = ("all", "crop", "jitter", "blur", "none")
    groups = GROUPS
    param_groups = GROUPS
    maps = {"crop y": 0, "crop x": 1, "brightness": 4, "blur sigma": 8}

    def __call__(self, index, M):
        """index (B,) int64 on the CPU -> Batch of M observed views and the one after."""
        images = self.images[index].float().div_(255)
        views = []
        params = []
        for ranges in [CONTEXT] * M + [TARGET]:     # a view at a time fits a CPU's caches
            drawn = sample(len(index), self.image_size, ranges, self.device)
            views.append(self.to_views(images, drawn))
            params.append(parameters(drawn, self.image_size))
        params = torch.stack(params, dim=1)
        actions = self.relative(params[:, :-1], params[:, 1:])
        return Batch(torch.stack(views, dim=1), actions, params, self.labels_of(index))

    def to_views(self, images, drawn):
        """images (B, 3, S, S) float in [0, 1], Params -> views (B, 3, S, S), normalised."""
        views = apply(images, drawn, self.image_size)
        return views.sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1))
