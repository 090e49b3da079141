"""Images as the code holds them: uint8 on disk or in memory, floats only on the device.

    Split      one split of a data set: uint8 arrays, labels, normalisation constants
    Store      store[index] is a batch of rows, on the device
    Batch      what a mode makes of a batch, for the model and for the probes

Images are (N, 3, S, S), or (N, V, 3, S, S) for sets with V renders of each object.
Checked in tests/test_images.py.
"""
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

from config import BadInput

SPLIT_SEED = 0      # which images --limit and a folder's 90/10 split choose; the same for every --seed


class Batch(NamedTuple):
    """A mode's answer to a batch of sample indices, all on the device."""
    views: torch.Tensor     # (B, M+1, 3, H, W) float32, normalised; the last is the prediction target
    actions: torch.Tensor   # (B, M, A): actions[:, i] takes view i to view i+1 and depends on these two alone
    params: torch.Tensor    # (B, M+1, P): each view's own parameters, for probes only
    labels: torch.Tensor    # (B,) int64, -1 where unknown


class Part(NamedTuple):
    """Images that lie in one file; only STL-10's `pretrain` has more than one part."""
    images: np.ndarray      # (n, 3, S, S) or (n, V, 3, S, S) uint8, in memory or memory-mapped
    name: str               # "train", "unlabeled", ...
    rows: np.ndarray = None # which images of the part these are, if --limit left some out
    total: int = 0          # how many the part has in all


class Split(NamedTuple):
    """One split of a data set."""
    parts: list             # read as one along axis 0
    labels: np.ndarray      # (N,) int64, -1 where unknown
    classes: list           # names, index = label
    mean: tuple
    std: tuple
    source: dict            # what the pixels were made from, JSON-able: the key of anything derived from them
    latents: np.ndarray = None   # (N, V, 7) float32, sets of rendered objects only


class Store:
    """Rows of equally shaped arrays, on the device: moved there whole if they fit, else fetched per batch."""

    def __init__(self, arrays, device):
        parts = [torch.from_numpy(a) for a in arrays]
        if fits(sum(p.numel() * p.element_size() for p in parts), device):
            parts = [torch.cat([p.to(device) for p in parts])]
        self.parts, self.device = parts, device
        self.first = torch.tensor([0] + [len(p) for p in parts]).cumsum(0)      # first row of each part

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, index):
        """index (B,) int64 on the CPU -> (B, ...) on the device."""
        if len(self.parts) == 1:
            part = self.parts[0]
            return part.index_select(0, index.to(part.device, non_blocking=True)).to(self.device, non_blocking=True)
        rows = torch.empty(len(index), *self.parts[0].shape[1:], dtype=self.parts[0].dtype)
        which = torch.bucketize(index, self.first[1:], right=True)
        for i, part in enumerate(self.parts):
            rows[which == i] = part[index[which == i] - self.first[i]]
        return rows.to(self.device, non_blocking=True)


def single_images(split, device):
    """Every image by itself, the renders of one object too: Store of (n, 3, S, S) and labels (n,) int64."""
    images = Store([part.images.reshape(-1, *part.images.shape[-3:]) for part in split.parts], device)
    return images, torch.from_numpy(split.labels).repeat_interleave(len(images) // len(split.labels))


def fits(size, device):
    """Whether `size` bytes may live on the device: at most half of a GPU's free memory; never copied on a CPU."""
    return device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2


def normalise(images, mean, std, channel_dim):
    """uint8 -> float32, (x/255 - mean) / std per channel."""
    shape = [1] * images.dim()
    shape[channel_dim] = 3
    return images.float().mul_((1 / (255 * std)).view(shape)).add_((-mean / std).view(shape))


def choose(labels, limit):
    """Indices of at most `limit` samples, as many of each class as possible, seeded.  0 = all."""
    if not limit or limit >= len(labels):
        return np.arange(len(labels))
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(first, counts)         # 0 for the first of each class, 1 for the second, ...
    return np.sort(by_class[np.argsort(turn, kind="stable")[:limit]])


def decode(path, size):
    """One image file as uint8 (3, size, size): shorter side resized (bicubic), centre cropped."""
    try:
        image = TF.pil_to_tensor(torchvision.datasets.folder.pil_loader(path))
    except (OSError, SyntaxError, ValueError) as error:         # Pillow's ways of saying that a file is no intact image
        raise BadInput(f"{path}: not a readable image ({str(error).splitlines()[0]}); mend or remove it") from None
    if image.shape[1:] != (size, size):
        image = TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
        image = TF.center_crop(image, size)
    return image.numpy()
