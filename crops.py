"""Mode `regions` (DSeq-JEPA 0.A.1.2): one random resized crop of each image, and the step's random blocks.

    index (B,)  ->  Batch.views   (B, 1, 3, S, S), normalised: crop of area 0.3 to 1 and nothing else
                    Batch.actions random blocks over the P patches, int64:
                                  (B, 1, P) ranks 1..N of the curriculum's regions, or
                                  (B, 5, P) 0 or 1: I-JEPA's context, then its four targets
                    Batch.params  (B, 1) uniform in [0, 1): below the curriculum's probability, salient regions are used

A step's randomness is drawn here, so that the model is a function of its batch (but for --order random). Images are cropped from the stored
S x S ones, not from the files. Checked in tests/test_crops.py.
"""
import torch

from augmentations import Recipe, resized_crop_flip, sample
from images import Batch, normalise, single_images
from regions import multi_block, random_regions


class Crops:
    """Sample indices -> Batch of one crop each.  split: images.Split; renders of one object count as separate images."""

    groups = param_groups = {}

    def __init__(self, split, config, device):
        self.images, self.labels = single_images(split, device, config.resident)
        self.mean, self.std = (torch.tensor(v, device=device) for v in (split.mean, split.std))
        self.classes, self.size, self.device = split.classes, config.image_size, device
        self.grid = (config.image_size // config.patch_size,) * 2
        self.recipe = Recipe(scale=(config.crop_scale, 1.0), flip=0.0, jitter=0.0, grey=0.0, blur=0.0)
        self.blocks, self.N, self.min_patches = config.method in ("i-jepa", "c-jepa"), config.region_count, config.min_patches

    def __len__(self):
        return len(self.labels)

    def __call__(self, index, M=0):
        """index (B,) int64 on the CPU -> Batch.  M: not used, an image is one view."""
        B, drawn = len(index), sample(len(index), self.size, self.recipe, self.device)
        images = self.to_views(self.images[index], drawn.crop, drawn.flip)
        if self.blocks:
            context, targets = multi_block(B, self.grid, device=self.device, min_patches=self.min_patches)
            blocks = torch.cat([context[:, None], targets], dim=1).flatten(2).long()
        else:
            blocks = random_regions(B, self.grid, self.N, min_patches=self.min_patches, device=self.device).flatten(1)[:, None]
        coin = torch.rand(B, 1, device=self.device)
        return Batch(images[:, None], blocks, coin, self.labels[index].to(self.device, non_blocking=True))

    def to_views(self, images, crop, flip):
        """uint8 images (B, 3, S, S), crop (B, 4), flip (B,) -> crops (B, 3, S, S) float, normalised."""
        with torch.autocast(self.device.type, enabled=False):       # pixels need more than bfloat16's 8 bits
            crops = resized_crop_flip(images.float().div_(255), crop, flip, self.size)
        return crops.sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1))

    def prefetch(self, index, M):
        """Say that self(index, M) comes soon."""
        self.images.prefetch(index)

    def clean(self, index):
        """The images themselves, (B, 3, S, S)."""
        return normalise(self.images[index], self.mean, self.std, channel_dim=1)
