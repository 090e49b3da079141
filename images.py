"""Images as the code holds them: uint8 on disk or in memory, floats only on the device.

    Split      one split of a data set: uint8 arrays, labels, normalisation constants
    Store      store[index] is a batch of rows, on the device
    Batch      what a mode makes of a batch of samples, for the model and for the probes
    Views      what a mode is: the contract, and what all modes share

Images are (N, 3, S, S), or (N, V, 3, S, S) for sets with V renders of each object.
Checked in tests/test_images.py.
"""
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

from plumbing.errors import BadInput

AHEAD = 2           # batches a Store may hold: the one at hand and the next
SPLIT_SEED = 0      # which images --limit and a folder's 90/10 split choose; the same for every --seed


class Batch(NamedTuple):
    """A mode's answer to a batch of sample indices, all on the device. (Mode `regions` has other actions and params: crops.py.)"""
    views: torch.Tensor     # (B, M+1, 3, H, W) float32, normalised; the last is the prediction target
    actions: torch.Tensor   # (B, M, A): actions[:, i] takes view i to view i+1 and depends on these two alone
    params: torch.Tensor    # (B, M+1, P): each view's own parameters, for probes only
    labels: torch.Tensor    # (B,) int64, -1 where unknown
    progress: torch.Tensor = None   # scalar, how much of the training is done, from 0 to 1: for curricula


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
    """Rows of equally shaped arrays, on the device.

    resident: "yes", moved there whole; "no", fetched batch by batch, and ahead of need where `prefetch` was told; "auto", "yes" if
    they fit, else "no". On a CPU "auto" leaves arrays where they are: in memory, or mapped from the disk."""

    def __init__(self, arrays, device, resident="auto"):
        parts = [torch.from_numpy(a) for a in arrays]
        if resident == "yes" or resident == "auto" and fits(sum(p.numel() * p.element_size() for p in parts), device):
            parts = [p.to(device) for p in parts]
            parts = parts if len(parts) == 1 else [torch.cat(parts)]            # a copy of a single part would take its memory twice
        self.parts, self.device = parts, device
        self.first = torch.tensor([0] + [len(p) for p in parts]).cumsum(0)      # first row of each part
        self.ahead = resident == "no" or parts[0].device.type != device.type
        self.reader, self.waiting = None, []                                    # one thread; [(index, its future rows)], oldest first

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, index):
        """index (B,) int64 on the CPU -> (B, ...) on the device."""
        if len(self.parts) == 1 and not self.ahead:
            return self.parts[0].index_select(0, index.to(self.device, non_blocking=True))
        known = next((i for i, (told, _) in enumerate(self.waiting) if torch.equal(told, index)), None)
        rows = self._gather(index) if known is None else self.waiting.pop(known)[1].result()
        return rows.to(self.device, non_blocking=True)

    def prefetch(self, index):
        """Say that store[index] will be asked for soon: a thread gathers its rows while the device works. Changes no result.

        An exception of the thread is raised where the rows are asked for. The thread ends with the Store."""
        if not self.ahead:
            return
        if self.reader is None:
            self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="Store")
        self.waiting = self.waiting[1 - AHEAD:] + [(index, self.reader.submit(self._gather, index))]

    def _gather(self, index):
        """Rows on the CPU: in pinned memory if a GPU waits for them, so that the copy to it does not hold up the host."""
        shape, dtype = (len(index), *self.parts[0].shape[1:]), self.parts[0].dtype
        rows = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        if len(self.parts) == 1:
            return torch.index_select(self.parts[0], 0, index, out=rows)
        which = torch.bucketize(index, self.first[1:], right=True)
        for i, part in enumerate(self.parts):
            mine = (which == i).nonzero()[:, 0]
            rows.index_copy_(0, mine, part.index_select(0, index[mine] - self.first[i]))      # much faster than rows[...] = part[...]
        return rows


class Views:
    """A mode: what a view is, and what an action. `Views(split, config, device)`, one for each split.

    All that the rest of the code asks of a mode; a new one fills in the first two and what differs.

        views(index, M) -> Batch    M+1 views of each sample; index (B,) int64 on the CPU
        to_views(pixels, ...)       the work on pixels alone, without randomness: torch.compile takes it
        relative(first, last)       action between views with these params, (..., P) each, however far
                                    apart in a sequence: (..., A)
        clean(index)                what z is probed on for its class, (B, 3, S, S); None: the first view
        prefetch(index, M)          be told, under the same seed, that views(index, M) comes soon
        len(views), labels, classes, device, mean, std

    and, known before any image is read:"""

    conditions = ("none",)      # choices of --condition: what the model is told; the first is the default
    methods = ("seq-jepa",)     # choices of --method: what can learn from such views; likewise
    reads = ()                  # fields of Config that this mode reads and others may not
    groups = {}                 # {name: slice} of the columns of Batch.actions
    param_groups = {}           # {name: slice} of the columns of Batch.params
    maps = {}                   # {words: column of Batch.params}: what maps of z are coloured by

    def __init__(self, split, config, device):
        self.images, self.labels = single_images(split, device, config.resident)
        self.mean = torch.tensor(split.mean, device=device)
        self.std = torch.tensor(split.std, device=device)
        self.image_size = config.image_size
        self.classes = split.classes
        self.device = device

    def __len__(self):
        return len(self.labels)

    def labels_of(self, index):
        """Labels (B,) of samples, on the device."""
        return self.labels[index].to(self.device, non_blocking=True)

    def relative(self, first, last):
        """The action that takes a view with params `first` to one with `last`."""
        return last - first

    def clean(self, index):
        """The whole image, normalised: (B, 3, S, S). Encoders pool, so its size may differ from a view's."""
        return normalise(self.images[index], self.mean, self.std, channel_dim=1)

    def prefetch(self, index, M):
        """Say that self(index, M) comes soon."""
        self.images.prefetch(index)

    def compile(self, **options):
        """torch.compile the work on pixels, in place; `run_eagerly` undoes it."""
        self.to_views = torch.compile(self.to_views, **options)

    def run_eagerly(self):
        """Forget the compiled work on pixels."""
        vars(self).pop("to_views", None)


def single_images(split, device, resident="auto"):
    """Every image by itself, the renders of one object too: Store of (n, 3, S, S) and labels (n,) int64."""
    images = Store([part.images.reshape(-1, *part.images.shape[-3:]) for part in split.parts], device, resident)
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


def decode(path, size, smallest=1):
    """One image file as uint8 (3, size, size): shorter side resized (bicubic), centre cropped.  smallest: side it must have, pixels"""
    try:
        image = TF.pil_to_tensor(torchvision.datasets.folder.pil_loader(path))
    except (OSError, SyntaxError, ValueError) as error:         # Pillow's ways of saying that a file is no intact image
        raise BadInput(f"{path}: not a readable image ({str(error).splitlines()[0]}); mend or remove it") from None
    if min(image.shape[1:]) < smallest:
        raise BadInput(f"{path}: {image.shape[2]} x {image.shape[1]} pixels, smaller than a patch (--patch-size {smallest}); remove it")
    if image.shape[1:] != (size, size):
        image = TF.resize(image, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
        image = TF.center_crop(image, size)
    return image.numpy()
