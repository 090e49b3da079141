"""The usual way, one image at a time: what bench.py measures the batched code against. Nothing else uses it.

    one_by_one(mode, ...)       finished views, made as a DataLoader's worker makes them
    PerImage, loader            a torch Dataset of such samples, and its DataLoader with worker processes
    regions_one_by_one          DSeq-JEPA's regions with OpenCV and SciPy, which are imported only here

The work charged is the images' alone: actions and random blocks, which the usual way would have to make too, come free.
"""
import numpy as np
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from augmentations import CONTEXT, blur_kernel_size
from plumbing.errors import BadInput


def saccades_one_by_one(image, saliency, split, config):
    """One sample: draw, inhibit, slice, for each fixation in turn.  image (3, S, S) uint8, saliency (S, S)."""
    p, S, patches = config.patch_size, config.image_size, []
    padded = TF.pad(TF.normalize(TF.to_dtype(image, torch.float32, scale=True), split.mean, split.std), p)
    saliency = saliency.clone()
    for _ in range(config.views + 1):
        row, column = divmod(int(torch.multinomial(saliency.flatten(), 1)), S)
        top, left = row - p // 2, column - p // 2
        saliency[max(0, top):top + p, max(0, left):left + p] = 0
        patches.append(padded[:, top + p:top + 2 * p, left + p:left + 2 * p])
    return torch.stack(patches)


def augmentations_one_by_one(split, size):
    """torchvision's chain with CONTEXT's ranges, for one uint8 image."""
    b, c, s, h = CONTEXT.half_range
    return v2.Compose([
        v2.RandomResizedCrop(size, CONTEXT.scale, CONTEXT.ratio, interpolation=TF.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(CONTEXT.flip), v2.RandomApply([v2.ColorJitter(b, c, s, h)], CONTEXT.jitter),
        v2.RandomGrayscale(CONTEXT.grey), v2.GaussianBlur(blur_kernel_size(size), CONTEXT.sigma),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(split.mean, split.std)])


class PerImage(torch.utils.data.Dataset):
    """Sample i: its views (M+1, 3, H, W). `length` may exceed the number of images: they come again.

    saliency (n, S, S): mode saccade only."""

    def __init__(self, mode, split, config, saliency=None, length=None):
        self.split, self.config, self.saliency = split, config, saliency
        self.images = torch.from_numpy(split.parts[0].images)
        self.length = length or len(self.images)
        self.make = dict(saccade=self._saccades, augment=self._augmentations, rotation=self._rotations, regions=self._crop)[mode]
        self.chain = augmentations_one_by_one(split, config.image_size)
        self.crop = v2.Compose([
            v2.RandomResizedCrop(config.image_size, (config.crop_scale, 1.0), interpolation=TF.InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(split.mean, split.std)])

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        return self.make(i % len(self.images))

    def _saccades(self, i):
        return saccades_one_by_one(self.images[i], self.saliency[i], self.split, self.config)

    def _augmentations(self, i):
        return torch.stack([self.chain(self.images[i]) for _ in range(self.config.views + 1)])

    def _rotations(self, i):
        chosen = torch.randperm(self.images.shape[1])[:self.config.views + 1]
        return torch.stack([TF.normalize(TF.to_dtype(self.images[i, v], torch.float32, scale=True), self.split.mean, self.split.std)
                            for v in chosen])

    def _crop(self, i):
        return self.crop(self.images[i])[None]


def loader(dataset, like, device, workers):
    """Batches of a DataLoader; all but their views is that of the Batch `like`."""
    batches = torch.utils.data.DataLoader(dataset, len(like.views), num_workers=workers, pin_memory=device.type == "cuda", drop_last=True)
    for views in batches:
        yield like._replace(views=views.to(device, non_blocking=True))


def regions_one_by_one(saliency, N, rounds, min_patches):
    """DSeq-JEPA Secs. 3.2, 3.3 for one map (H, W) in [0, 1], float32: ranks (H, W).  rounds: 1 = rule "otsu"."""
    try:
        import cv2
        import scipy.ndimage
    except ImportError as error:
        raise BadInput(f"section regions compares with OpenCV and SciPy, and {error.name} is missing: "
                       "pip install -r requirements-test.txt, or leave the section out") from None
    level, left, found = (255 * saliency).astype(np.uint8), np.ones(saliency.shape, bool), []
    for _ in range(rounds):
        if not left.any():
            break
        threshold, _ = cv2.threshold(level[left].reshape(1, -1), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
        above = left & (level > threshold)
        label, count = scipy.ndimage.label(above, np.ones((3, 3)))
        regions = [label == k for k in range(1, count + 1)]
        regions = [r for r in regions if r.sum() >= min_patches]
        found += sorted(regions, key=lambda r: -saliency[r].mean(dtype=np.float64))
        left &= ~above
    rank = np.full(saliency.shape, N)
    for k, region in enumerate(found[:N - 1], 1):
        rank[region] = k
    return rank
