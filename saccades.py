"""Saccades (seq-JEPA Secs. 2.3, A.1): where the eye lands, what it sees there, how it moved.

    saliency (B, H, W)  ->  fixations (B, K, 2) as (row, column), pixels
    images (B, 3, H, W) uint8, fixations  ->  patches (B, K, 3, p, p), normalised

Fixations are drawn from the saliency map. Inhibition of return (IoR) then zeroes the probability
in a square of side p, the patch width, around each earlier fixation. The patch of fixation (r, c)
holds rows r - p//2 ... r - p//2 + p - 1 of the image and the same columns: an exact crop, with
zeros where it reaches beyond the border. The inhibited square is the patch's own footprint.

Action: (x, y) displacement of the patch centre in units of the image side, x to the right, y down.

Nothing here loops over samples or waits for the device. Differs: the paper inhibits "an area with a
diameter equal to the patch width", which may be a disc; the authors' code crops at the transposed
place, resamples the patch, and drops IoR when saliency is off.
Checked in tests/test_saccades.py.
"""
import torch

from images import Batch, Store, Views, normalise
from saliency import saliency_maps

FLOOR = 1e-30    # mass of a pixel the map calls impossible: never drawn while any real mass is left


def _draw(weights, generator=None):
    """One index per row, in proportion to weights (B, n) >= 0.  -> (B, 1)

    Inverse CDF. u is in (0, total]; the first entry whose running sum reaches u has weight > 0."""
    cdf = weights.cumsum(1)
    u = 1 - torch.rand(len(weights), 1, device=weights.device, generator=generator)
    return torch.searchsorted(cdf, u * cdf[:, -1:])


def sample_fixations(saliency, count, patch_size, ior=True, generator=None):
    """Draw `count` fixations per image.  saliency (B, H, W) >= 0, any scale -> (B, count, 2) int64.

    Two draws make a fixation: a row from the row sums, then a column from that row. IoR edits only
    the p rows it touches, so only their sums are computed again: this is what makes it fast.
    Fall-backs: where no mass is left, uniform over what is not inhibited (that is what FLOOR does);
    where everything is inhibited, uniform over the image."""
    B, H, W = saliency.shape
    batch = torch.arange(B, device=saliency.device)[:, None]
    offsets = torch.arange(patch_size, device=saliency.device) - patch_size // 2
    columns = torch.arange(W, device=saliency.device)
    mass = saliency.float() + FLOOR
    row_mass = mass.sum(2)
    fixations = []
    for k in range(count):
        any_left = row_mass.sum(1, keepdim=True) > 0
        row = _draw(torch.where(any_left, row_mass, 1.0), generator)                     # (B, 1)
        column = _draw(torch.where(any_left, mass[batch, row][:, 0], 1.0), generator)
        fixations.append(torch.cat([row, column], dim=1))
        if ior and k + 1 < count:
            # Rows beyond the border become the border's own, which lies in the square anyway.
            rows = (row + offsets).clamp(0, H - 1)                                       # (B, p)
            from_left = columns - (column + offsets[0])                                  # (B, W)
            outside = (from_left < 0) | (from_left >= patch_size)
            kept = mass[batch, rows] * outside[:, None]
            mass[batch, rows] = kept
            row_mass[batch, rows] = kept.sum(2)
    return torch.stack(fixations, dim=1)


def sample_inside(saliency, count, patch_size, ior=True, generator=None):
    """sample_fixations, but only where the whole patch lies inside the image (--inside, ours)."""
    H, W = saliency.shape[1:]
    first = patch_size // 2                                 # row or column with the patch inside
    interior = saliency[:, first:H - patch_size + first + 1, first:W - patch_size + first + 1]
    return sample_fixations(interior, count, patch_size, ior, generator) + first


def crop_patches(images, fixations, patch_size, mean, std):
    """Integer crops around fixations, normalised; zero, that is mean grey, beyond the border.

    images (B, 3, H, W) uint8, fixations (B, K, 2), mean and std (3,) of pixels in [0, 1]
    ->  (B, K, 3, p, p) float32.  Rows are copied whole, then columns are picked from them."""
    B, C, H, W = images.shape
    K = fixations.shape[1]
    p = patch_size
    window = fixations[..., None] + torch.arange(p, device=images.device) - p // 2
    rows, columns = window.unbind(2)                    # (B, K, p) each, may lie outside
    # The rows of all images and channels as one list: a plane's first row, plus a row within it.
    plane = torch.arange(B * C, device=images.device).view(B, C, 1, 1) * H
    picked = (plane + rows.clamp(0, H - 1).view(B, 1, K, p)).flatten()
    strips = images.reshape(B * C * H, W).index_select(0, picked).view(B, C, K, p, W)
    pick = columns.clamp(0, W - 1)[:, None, :, None, :].expand(B, C, K, p, p)
    row_inside = (rows >= 0) & (rows < H)
    column_inside = (columns >= 0) & (columns < W)
    inside = row_inside[..., :, None] & column_inside[..., None, :]     # (B, K, p, p)
    patches = normalise(strips.gather(4, pick), mean, std, channel_dim=1).mul_(inside[:, None])
    return patches.transpose(1, 2)


class Saccades(Views):
    """Mode `saccade`: sample indices -> Batch of foveal patches along a scanpath.

    split: images.Split; renders of one object count as separate images.
    actions (B, M, 2): relative (x, y).
    params (B, M+1, 2): the fixation's own (x, y), image sides."""

    conditions = ("position", "none")
    methods = ("seq-jepa", "conv-jepa")
    reads = ("patch_size", "saliency", "ior", "inside")
    groups = {"position": slice(0, 2)}
    param_groups = {"position": slice(0, 2)}
    maps = {"x of fixation, image sides": 0, "y of fixation, image sides": 1}

    def __init__(self, split, config, device):
        super().__init__(split, config, device)
        maps = saliency_maps(config.saliency, split, config, device)
        self.saliency = Store(maps, device, config.resident)
        self.patch_size = config.patch_size
        self.ior = config.ior
        self.inside = config.inside

    def __call__(self, index, M):
        """index (B,) int64 on the CPU -> Batch of M observed views and the one after."""
        fixations, patches = self.scanpaths(index, M + 1)
        position = fixations.flip(2) / self.image_size                  # (row, column) -> (x, y)
        actions = self.relative(position[:, :-1], position[:, 1:])
        return Batch(patches, actions, position, self.labels_of(index))

    def prefetch(self, index, M):
        """Say that self(index, M) comes soon."""
        self.images.prefetch(index)
        self.saliency.prefetch(index)

    def scanpaths(self, index, count):
        """Look at each image `count` times.

        ->  fixations (B, count, 2), patches (B, count, 3, p, p)"""
        sample = sample_inside if self.inside else sample_fixations
        fixations = sample(self.saliency[index], count, self.patch_size, self.ior)
        return fixations, self.to_views(self.images[index], fixations)

    def to_views(self, images, fixations):
        """images (B, 3, H, W) uint8, fixations (B, K, 2) -> patches (B, K, 3, p, p), normalised."""
        return crop_patches(images, fixations, self.patch_size, self.mean, self.std)
