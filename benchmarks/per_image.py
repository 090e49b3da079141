"""The usual way, one image at a time: what bench.py measures the batched code against.

    saccades_one_by_one(...)    one sample's views, made as a DataLoader's worker makes them
    augmentations_one_by_one    the same for mode augment, with torchvision's transforms
    PerImage, loader            a torch Dataset of such samples, and its DataLoader with workers
    regions_one_by_one          DSeq-JEPA's regions with OpenCV and SciPy, imported only here

Nothing else uses it. The work charged is the images' alone: actions and random blocks, which the
usual way would have to make too, come free.
"""
import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from augmentations import CONTEXT, blur_kernel_size
from plumbing.errors import BadInput

BICUBIC = TF.InterpolationMode.BICUBIC


def saccades_one_by_one(image, saliency, split, config):
    """One sample: draw, inhibit, slice, for each fixation in turn -> views (M+1, 3, p, p).

    image (3, S, S) uint8, saliency (S, S)."""
    p = config.patch_size
    S = config.image_size
    padded = TF.pad(normalised(image, split), p)
    saliency = saliency.clone()
    patches = []
    for _ in range(config.views + 1):
        row, column = divmod(int(torch.multinomial(saliency.flatten(), 1)), S)
        top = row - p // 2
        left = column - p // 2
        saliency[max(0, top):top + p, max(0, left):left + p] = 0
        patches.append(padded[:, top + p:top + 2 * p, left + p:left + 2 * p])
    return torch.stack(patches)


def normalised(image, split):
    """uint8 (3, H, W) -> float32, standardised with the constants of the data set."""
    return TF.normalize(TF.to_dtype(image, torch.float32, scale=True), split.mean, split.std)


def augmentations_one_by_one(split, size):
    """torchvision's chain with CONTEXT's ranges, for one uint8 image."""
    return v2.Compose([
        v2.RandomResizedCrop(size, CONTEXT.scale, CONTEXT.ratio, BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(CONTEXT.flip),
        v2.RandomApply([v2.ColorJitter(*CONTEXT.half_range)], CONTEXT.jitter),
        v2.RandomGrayscale(CONTEXT.grey),
        v2.GaussianBlur(blur_kernel_size(size), CONTEXT.sigma),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(split.mean, split.std)])


def crops_one_by_one(split, config):
    """torchvision's chain of mode `regions`, for one uint8 image."""
    scale = (config.crop_scale, 1.0)
    return v2.Compose([
        v2.RandomResizedCrop(config.image_size, scale, interpolation=BICUBIC, antialias=True),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(split.mean, split.std)])


class PerImage(torch.utils.data.Dataset):
    """Sample i: its views (M+1, 3, H, W), made as config.mode makes them.

    saliency (n, S, S) on the CPU: mode saccade only.
    length: may exceed the number of images, which then come again."""

    def __init__(self, split, config, saliency=None, length=None):
        self.split = split
        self.config = config
        self.saliency = saliency
        self.images = torch.from_numpy(split.parts[0].images)
        self.length = length or len(self.images)
        self.augment = augmentations_one_by_one(split, config.image_size)
        self.crop = crops_one_by_one(split, config)
        self.make = dict(saccade=self._saccades, rotation=self._rotations,
                         augment=self._augmentations, regions=self._crop)[config.mode]

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.make(i % len(self.images))

    def _saccades(self, i):
        return saccades_one_by_one(self.images[i], self.saliency[i], self.split, self.config)

    def _rotations(self, i):
        chosen = torch.randperm(self.images.shape[1])[:self.config.views + 1]
        return torch.stack([normalised(self.images[i, v], self.split) for v in chosen])

    def _augmentations(self, i):
        return torch.stack([self.augment(self.images[i]) for _ in range(self.config.views + 1)])

    def _crop(self, i):
        return self.crop(self.images[i])[None]


def loader(dataset, like, device, workers):
    """Batches of a DataLoader; all but their views is that of the Batch `like`."""
    batches = torch.utils.data.DataLoader(dataset, len(like.views), num_workers=workers,
                                          pin_memory=device.type == "cuda", drop_last=True)
    for views in batches:
        yield like._replace(views=views.to(device, non_blocking=True))


def regions_one_by_one(saliency, N, rounds, min_patches, max_patches=None):
    """DSeq-JEPA Secs. 3.2, 3.3 for one map (H, W) in [0, 1], float32: ranks (H, W).

    rounds: 1 = rule "otsu".  max_patches: larger regions are cut into layers, None = not.
    Raises: BadInput where OpenCV or SciPy is missing."""
    try:
        import cv2
        import scipy.ndimage
    except ImportError as error:
        raise BadInput("section regions compares with OpenCV and SciPy, and "
                       f"{error.name} is missing: pip install -r requirements-test.txt, "
                       "or leave the section out") from None
    level = (255 * saliency).astype(np.uint8)
    left = np.ones(saliency.shape, bool)
    found = []
    for _ in range(rounds):
        if not left.any():
            break
        values = level[left].reshape(1, -1)
        threshold, _ = cv2.threshold(values, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        above = left & (level > threshold)
        label, count = scipy.ndimage.label(above, np.ones((3, 3)))
        regions = [label == k for k in range(1, count + 1)]
        if max_patches:
            pieces = []
            for region in regions:
                for layer in layers_one_by_one(region, saliency, max_patches):
                    label, count = scipy.ndimage.label(layer, np.ones((3, 3)))
                    pieces += [label == k for k in range(1, count + 1)]
            regions = sorted(pieces, key=np.argmax)             # in raster order
        regions = [r for r in regions if r.sum() >= min_patches]
        found += sorted(regions, key=lambda r: -saliency[r].mean(dtype=np.float64))
        left &= ~above
    rank = np.full(saliency.shape, N)
    for k, region in enumerate(found[:N - 1], 1):
        rank[region] = k
    return rank


def layers_one_by_one(region, saliency, most):
    """Of a region (H, W) bool, its `most` most salient patches, the next `most`, and so on."""
    patches = np.flatnonzero(region)
    patches = patches[np.argsort(-saliency.ravel()[patches], kind="stable")]
    for start in range(0, len(patches), most):
        layer = np.zeros(region.shape, bool)
        layer.ravel()[patches[start:start + most]] = True
        yield layer
