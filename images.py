"""Images on their way into the model: uint8 on disk or in memory, floats only on the device.

What the model and the probes see of them:

    Batch      a batch of sequences of views, and the actions between these
    Views      a mode, which makes a Batch of sample indices: the contract, and what all modes share

How they are held:

    Split      one split of a data set: uint8 arrays, labels, normalisation constants
    Store      store[index] is a batch of rows, on the device
    Pictures   pictures[boxes] is a batch of boxes cut out of pictures of any height and width

Images are (N, 3, S, S), or (N, V, 3, S, S) for sets with V renders of each object. What crops are
taken from in mode regions may be kept as whole pictures, (3, H, W) each; how that is, and why,
stands over `Pictures`.
Checked in tests/test_images.py.
"""
import hashlib
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import numpy as np
import torch

DIGESTED = 64   # images that a resumed run looks at, to see whether they are those it began with
AHEAD = 2       # batches a Store may hold: the one at hand and the next

# --method: what learns from two views of one thing, without and with the action between them.
INVARIANT_METHODS = ("simclr", "byol", "vicreg")
PAIR_METHODS = (*INVARIANT_METHODS, "sen", "equimod", "sie", "cond-byol")


# ---------------------------------------------------------------- what a mode makes of images

class Batch(NamedTuple):
    """A mode's answer to a batch of sample indices, all on the device.

    In mode `regions`, whose samples are no sequences, `actions` are random blocks and `params` a
    coin: see regions.py."""
    views: torch.Tensor     # (B, M+1, 3, H, W) float32, normalised; the last is to be predicted
    actions: torch.Tensor   # (B, M, A): actions[:, i] takes view i to view i+1 and depends on
                            # these two alone
    params: torch.Tensor    # (B, M+1, P): each view's own parameters, for probes only
    labels: torch.Tensor    # (B,) int64, -1 where unknown
    progress: torch.Tensor = None   # scalar from 0 to 1, how much of the training is done; set by
                                    # plumbing.loop.next_batch, for DSeq-JEPA's curriculum


class Views:
    """A mode: what a view is, and what an action.

    `views = Views(split, config, device)` for each split: in the code `views` is such an object,
    `batch.views` are tensors, and `config.views` is M. A new mode writes `__call__` and `to_views`
    and overrides what differs; `normalise` and `labels_of` below help. Draw with torch's global
    generator and never seed it: the loop does, at every step.

        views(index, M) -> Batch    M+1 views of each sample; index (B,) int64 on the CPU
        to_views(pixels, ...)       the work on pixels alone, without randomness, which
                                    torch.compile takes
        relative(first, last)       action (..., A) between two views of a sequence, however far
                                    apart, given their params (..., P)
        clean(index)                what z is probed on for its class, (B, 3, S, S);
                                    None: the first view
        prefetch(index, M)          be told that views(index, M) comes soon, under the seed that it
                                    will come under: draw in the same order
        len(views), labels, classes, device, mean, std, images

    Probes and figures that only one mode has may ask it for more (Rotations.all_views).

    and, known before any image is read:"""

    conditions = ("none",)      # choices of --condition, what the model is told; the first: default
    methods = ("seq-jepa", *PAIR_METHODS)   # choices of --method, what can learn from such views;
                                            # likewise
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
        """The whole image, normalised: (B, 3, S, S).

        Encoders pool, so its size may differ from a view's."""
        return normalise(self.images[index], self.mean, self.std, channel_dim=1)

    def prefetch(self, index, M):
        """Say that self(index, M) comes soon."""
        self.images.prefetch(index)

    def digest(self):
        """A text that tells these images from others: of all labels and some images' pixels."""
        some = torch.linspace(0, len(self.images) - 1, min(DIGESTED, len(self.images))).long()
        pixels = self.images[some].cpu().numpy().tobytes()
        return hashlib.sha256(pixels + self.labels.numpy().tobytes()).hexdigest()

    def compile(self, **options):
        """torch.compile the work on pixels, in place; `run_eagerly` undoes it."""
        self.to_views = torch.compile(self.to_views, **options)

    def run_eagerly(self):
        """Forget the compiled work on pixels."""
        vars(self).pop("to_views", None)


def normalise(images, mean, std, channel_dim):
    """uint8 -> float32, (x/255 - mean) / std per channel."""
    shape = [1] * images.dim()
    shape[channel_dim] = 3
    return images.float().mul_((1 / (255 * std)).view(shape)).add_((-mean / std).view(shape))


# ---------------------------------------------------------------- how images are held

class Part(NamedTuple):
    """Images that lie in one file; only STL-10's `pretrain` has more than one part."""
    images: np.ndarray      # (n, 3, S, S) or (n, V, 3, S, S) uint8, in memory or memory-mapped
    name: str               # "train", "unlabeled", ...
    rows: np.ndarray = None # which images of the part these are, if --limit left some out
    total: int = 0          # how many the part has in all
    sizes: np.ndarray = None    # (n, 2) heights and widths, if `images` are n Pictures, flat


class Split(NamedTuple):
    """One split of a data set."""
    parts: list             # read as one along axis 0
    labels: np.ndarray      # (N,) int64, -1 where unknown
    classes: list           # names, index = label
    mean: tuple             # per channel, of pixels in [0, 1]
    std: tuple              # likewise
    source: dict            # what the pixels come from, JSON-able: the key of maps made of them
    latents: np.ndarray = None  # (N, V, 7) float32, sets of rendered objects only
    masks: Callable = None      # indices of single images (n,) -> (n, S, S) float32, the share of a
                                # pixel that shows the object; None where nobody knows


class Store:
    """Rows of equally shaped arrays, which are read as one: store[index] is a batch, on the device.

    resident: "yes"   moved there whole
              "no"    fetched batch by batch, and ahead of need where `prefetch` was told
              "auto"  "yes" if they fit, else "no"; on a CPU arrays stay where they are, in memory
                      or mapped from the disk"""

    def __init__(self, arrays, device, resident="auto"):
        parts = [_wrapped(array) for array in arrays]
        total = sum(part.numel() * part.element_size() for part in parts)
        if resident == "yes" or (resident == "auto" and fits(total, device)):
            parts = [part.to(device) for part in parts]
            if len(parts) > 1:          # a copy of a single part would take its memory twice
                parts = [torch.cat(parts)]
        self.parts = parts
        self.device = device
        sizes = [len(part) for part in parts]
        self.first = torch.tensor([0] + sizes).cumsum(0)        # first row of each part
        self.ahead = resident == "no" or parts[0].device.type != device.type
        self.reader = None              # one thread, started by the first prefetch
        self.waiting = []               # [(index, its future rows)], oldest first

    def __len__(self):
        return sum(map(len, self.parts))

    def __getitem__(self, index):
        """index (B,) int64 on the CPU -> (B, ...) on the device."""
        if len(self.parts) == 1 and not self.ahead:
            return self._rows(index)
        for i, (told, rows) in enumerate(self.waiting):
            if torch.equal(told, index):
                del self.waiting[i]
                return rows.result().to(self.device, non_blocking=True)
        return self._gather(index).to(self.device, non_blocking=True)

    def prefetch(self, index):
        """Say that store[index] will be asked for soon: a thread gathers its rows meanwhile.

        Changes no result. An exception of the thread is raised where the rows are asked for. The
        thread ends with the Store."""
        if not self.ahead:
            return
        if self.reader is None:
            self.reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="Store")
        rows = self.reader.submit(self._gather, index)
        self.waiting = self.waiting[-(AHEAD - 1):] + [(index, rows)]

    def _rows(self, index):
        """Rows (B, ...) of the one part, where it lies."""
        return self.parts[0].index_select(0, index.to(self.device, non_blocking=True))

    def _gather(self, index):
        """Rows (B, ...) on the CPU.

        In pinned memory if a GPU waits for them: then the copy to it does not hold up the host."""
        rows = torch.empty(len(index), *self.parts[0].shape[1:], dtype=self.parts[0].dtype,
                           pin_memory=self.device.type == "cuda")
        if len(self.parts) == 1:
            return torch.index_select(self.parts[0], 0, index, out=rows)
        which = torch.bucketize(index, self.first[1:], right=True)      # the part of each
        for i, part in enumerate(self.parts):
            mine = (which == i).nonzero()[:, 0]
            # much faster than rows[mine] = part[...]
            rows.index_copy_(0, mine, part.index_select(0, index[mine] - self.first[i]))
        return rows


# Pictures of any height and width are kept as they come from their files, decoded, but no larger
# than needed (sources.prepare.PICTURE_SIDE). The other way, to decode the files at every step,
# needs no disk beside them, but 4 to 6 cores for a GPU that takes 2,500 images/s, in as many
# threads of one process. Cutting from what is kept takes a seventh of a core and, for ImageNet, 635
# GB; and a damaged file is found before training. Measured: results/README.md, "Crops from whole
# pictures".
#
# All lie in one flat array, one after the other, each as (3, H, W). To cut boxes of different sizes
# out of it at once, one looks at the array as overlapping rows of C bytes, one starting at every
# byte: a line of a box is the beginning of such a row. So a batch of boxes is one index_select of
# B * 3 * C rows, a (B, 3, C, C) array with each box in its upper left corner, of fixed shape
# whatever the boxes are. What lies beside and below a box is not of it; who reads the array, a
# product with matrices that are zero there, gives it no weight.

class Pictures(Store):
    """Pictures of different sizes: pictures[boxes] is a batch of boxes.

    part: a Part whose images are flat uint8, at least C bytes longer than the pictures, and whose
    `sizes` are given.  device, resident: as of a Store.

    boxes (B, 5) int64 on the CPU: picture, top, left, height, width, inside the picture and at most
    C on a side  ->  (B, 3, C, C) uint8 on the device, a box in the upper left corner."""

    def __init__(self, part, device, resident="auto"):
        super().__init__([part.images], device, resident)
        self.sizes = torch.from_numpy(part.sizes).long()
        self.side = canvas_side(part.sizes)
        counts = 3 * self.sizes.prod(1)
        self.begin = counts.cumsum(0) - counts          # of each picture, bytes
        flat, = self.parts
        assert len(flat) >= counts.sum() + self.side, "a row that starts at the last byte is cut"
        self.windows = flat.as_strided((len(flat) - self.side + 1, self.side), (1, 1))

    def __len__(self):
        return len(self.sizes)

    def _rows(self, boxes):
        rows = self.windows.index_select(0, self._starts(boxes, self.windows.device))
        return rows.view(len(boxes), 3, self.side, self.side)

    def _gather(self, boxes):
        shape = (len(boxes), 3, self.side, self.side)
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        starts = self._starts(boxes, torch.device("cpu"))
        torch.index_select(self.windows, 0, starts, out=rows.view(-1, self.side))
        return rows

    def _starts(self, boxes, device):
        """Where the lines of boxes begin, bytes: (B * 3 * C,) int64. Below a box its last line is
        repeated, so that nothing is read that is not needed."""
        picture, top, left, height, _ = boxes.unbind(1)
        H, W = self.sizes[picture].unbind(1)
        # A few numbers a box travel, and the host does not wait for that.
        table = torch.stack([self.begin[picture], top, left, height, H, W])
        begin, top, left, height, H, W = table.to(device, non_blocking=True)[:, :, None, None]
        line = torch.arange(self.side, device=device)
        channel = torch.arange(3, device=device)[:, None]
        row = top + torch.minimum(line, height - 1)                         # (B, 1, C)
        return (begin + (channel * H + row) * W + left).flatten()


def canvas_side(sizes):
    """C, the side of a square that takes every box of pictures of `sizes` (n, 2), whose sides are
    as 3 to 4 at most.

    A random crop lies in the picture, so its shorter side is at most the picture's, and the longer
    a third more. Rounded up to a multiple of 8, which suits a GPU's matrix products."""
    shorter = int(sizes.min(1).max())
    return 8 * math.ceil((4 / 3 * (shorter + 1) + 1) / 8)


def _wrapped(array):
    """A tensor of an array's memory. Nothing writes to it, so it may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def fits(size, device):
    """Whether `size` bytes may live on the device.

    At most half of a GPU's free memory may be taken; on a CPU nothing is ever copied."""
    return device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 2


def single_images(split, device, resident="auto"):
    """Every image by itself, the renders of one object too.

    ->  Store of (n, 3, S, S), or Pictures, and labels (n,) int64"""
    labels = torch.from_numpy(split.labels)
    if split.parts[0].sizes is not None:
        return Pictures(split.parts[0], device, resident), labels
    arrays = [part.images.reshape(-1, *part.images.shape[-3:]) for part in split.parts]
    images = Store(arrays, device, resident)
    renders = len(images) // len(split.labels)
    return images, labels.repeat_interleave(renders)
