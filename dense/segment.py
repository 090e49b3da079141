"""Semantic segmentation: what is at each pixel (DSeq-JEPA Table 2, 0.A.1.3).

    segment-linear      frozen tokens of the last norm -> BatchNorm, 1x1 convolution
    segment             all weights; maps of four blocks -> UPerNet, and an FCN beside it
    image uint8 (3, H, W), label uint8 (H, W), 255 ignored  ->  mIoU over the whole split

A network gives logits (B, C, h, w), coarser than its images, which are upsampled bilinearly. Images
larger than the crop are seen through windows that overlap by a third. Every score stands beside
that of naming the commonest label everywhere, and scenes also tell objects from background.

UPERNET and its recipe are the authors' configuration; what they leave open is MAE's or ours: see
docs/dense.md. Checked in tests/test_segment.py.
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torchvision.transforms import v2
from tqdm import tqdm

from dense.loop import Recipe, all_workers, digest, from_files, shared, train
from dense.maps import FourMaps, last_map, patch_size
from dense.upernet import Linear, UPerNet, resize
from figures.dense import draw_segmentation
from images import normalise
from plumbing import distributed
from plumbing.device import seed_all
from probes import row

IGNORED = 255
LONGEST = 4                     # long side over the crop's, at most: 2048 for 512
COMMONEST = 0.75                # the most of a crop that one class may take ...
TRIES = 10                      # ... or it is drawn again, so many times
AUXILIARY = 0.4                 # weight of the loss beside it
PICTURES = 8                    # of validation images, in the figure
HELD_BYTES = 2e9                # of frozen tokens, at most; more are made anew at each step


class Preset(NamedTuple):
    """Besides the Recipe: how large things are."""
    crop: int                   # pixels, of a training crop and of a window
    stride: int                 # pixels between windows
    channels: int = 0           # of UPerNet
    auxiliary: int = 0          # of the FCN beside it


# The authors' newer configuration; layer decay, which is not said there, as MAE's followers
UPERNET = Preset(512, 341, channels=512, auxiliary=256)
UPERNET_RECIPE = Recipe(steps=160_000, batch_size=16, lr=1e-4, warmup=1500, shape="linear",
                        weight_decay=0.05, layer_decay=0.65, drop_path=0.1)
LINEAR_RECIPE = Recipe(steps=40_000, batch_size=16, lr=1e-3, warmup=1500, weight_decay=1e-3)
# Ours: minutes on two CPU cores, for scenes and small folders
QUICK = Preset(128, 85, channels=64, auxiliary=32)
QUICK_UPERNET = Recipe(steps=400, batch_size=8, lr=1e-3, warmup=40, shape="linear",
                       weight_decay=0.05, layer_decay=0.65, save_every=100)
QUICK_LINEAR = Recipe(steps=600, batch_size=16, lr=1e-2, warmup=0, weight_decay=1e-3)


def preset(data, vit, full, quick, setup):
    """(Preset, Recipe) for this data and ViT: `full` = (Preset, Recipe), `quick` its small twin."""
    sizes, recipe = quick if setup.quick else full
    if data.in_memory:                          # scenes have one size, and are seen whole
        side = data[0][0].shape[1]
        sizes = sizes._replace(crop=side, stride=side)
    p = patch_size(vit)
    sizes = sizes._replace(crop=sizes.crop // p * p)
    if setup.probe_epochs:
        recipe = recipe.lasting(setup.probe_epochs, len(data))
    return sizes, recipe


# ---------------------------------------------------------------- the networks

class Segmenter(nn.Module):
    """A ViT, its maps and a head.

    scores(images (B, 3, H, W)) -> logits (B, C, H, W)
    forward(images, labels (B, H, W)) -> loss"""

    def __init__(self, maps, head):
        super().__init__()
        self.maps = maps
        self.head = head

    def scores(self, images):
        return resize(self.head(self.maps(images))[0].float(), images.shape[2:])

    def forward(self, images, labels):
        return loss_of(self.head(self.maps(images)), labels)


class Frozen(nn.Module):
    """The last map of a ViT that does not learn."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images):
        return last_map(self.vit, images)


class OfMaps(nn.Module):
    """A head on maps that are there already: forward(maps, labels) -> loss."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, maps, labels):
        return loss_of(self.head(maps), labels)


def loss_of(logits, labels):
    """Cross-entropy of [logits, those of the auxiliary head] with labels (B, H, W).

    Mean over what is not ignored; 0, not NaN, where all is."""
    counted = (labels != IGNORED).sum().clamp(min=1)
    total = 0.0
    for weight, each in zip((1.0, AUXILIARY), logits):
        each = resize(each.float(), labels.shape[1:])
        total += weight * F.cross_entropy(each, labels, ignore_index=IGNORED, reduction="sum")
    return total / counted


# ---------------------------------------------------------------- what is trained on

class Crops:
    """Training crops: [i] -> image (3, crop, crop) float32, normalised; label (crop, crop) int64.

    Resized by 0.5 to 2 of what fits (4 crop, crop), cropped so that no class takes more than three
    quarters of it if that is found in ten tries, mirrored, its colours changed (as MMSegmentation).
    Smaller images are padded: with the mean colour, and ignored.  merge: objects are label 1."""

    def __init__(self, data, crop, merge=False):
        self.data = data
        self.crop = crop
        self.merge = merge
        some = [v2.ColorJitter(brightness=0.125), v2.ColorJitter(contrast=0.5),
                v2.ColorJitter(saturation=0.5), v2.ColorJitter(hue=0.1)]
        self.distort = v2.Compose([v2.RandomApply([change], p=0.5) for change in some])

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data.labelled(index)
        label = merged(label, self.merge)
        scale = 0.5 + 1.5 * torch.rand(()).item()
        image, label = scaled(image, label, scale * fitting(image, self.crop))
        image, label = self.cropped(image, label)
        if torch.rand(()) < 0.5:
            image, label = image.flip(2), label.flip(1)
        image = prepared(self.distort(image), self.data)
        right = self.crop - image.shape[2]
        below = self.crop - image.shape[1]
        return (F.pad(image, (0, right, 0, below)),
                F.pad(label.long(), (0, right, 0, below), value=IGNORED))

    def cropped(self, image, label):
        """At most crop x crop of both."""
        H, W = label.shape
        for _ in range(TRIES):
            top = torch.randint(max(1, H - self.crop + 1), ()).item()
            left = torch.randint(max(1, W - self.crop + 1), ()).item()
            window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
            counts = label[window].flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if counts.max() <= COMMONEST * counts.sum() or self.data.in_memory:
                break
        return image[window], label[window]


def fitting(image, crop):
    """By how much to resize an image so that it just fits (LONGEST * crop, crop)."""
    short, long = sorted(image.shape[1:])
    return min(crop / short, LONGEST * crop / long)


def scaled(image, label, factor):
    """Both resized: bilinear with antialias, and nearest."""
    size = [max(1, round(side * factor)) for side in label.shape]
    return (v2.functional.resize(image, size, antialias=True),
            v2.functional.resize(label[None], size, v2.InterpolationMode.NEAREST_EXACT)[0])


def prepared(image, data):
    """uint8 (..., 3, H, W) -> normalised float32."""
    mean = torch.tensor(data.mean, device=image.device)
    return normalise(image, mean, torch.tensor(data.std, device=image.device), image.dim() - 3)


class Held:
    """Frozen maps of a whole split in memory: [i] -> map (D, h, w) float32, label (S, S) int64.

    merge: every object is label 1."""

    def __init__(self, maps, data, merge):
        self.maps = maps
        self.data = data
        self.merge = merge

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        _, label = self.data.labelled(index)
        return self.maps[index].float(), merged(label, self.merge).long()


@torch.inference_mode()
def hold(vit, data, setup):
    """Maps (N, D, h, w) of all images, in half precision on the CPU; None if they are too many."""
    side = data[0][0].shape[1] // patch_size(vit)
    shape = (len(data), vit.dim, side, side)
    if 2 * torch.Size(shape).numel() > HELD_BYTES:
        return None
    maps = torch.empty(shape, dtype=torch.float16)
    bar = tqdm(torch.arange(len(data)).split(32), desc="frozen features", leave=False,
               disable=not distributed.is_main())
    for some in bar:
        images = torch.stack([data.labelled(int(i))[0] for i in some]).to(setup.device)
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.amp):
            maps[some] = last_map(vit, prepared(images, data)).half().cpu()
    return maps


def merged(label, merge):
    """Labels as they are, or 1 for all but background. Of scenes, where nothing is ignored."""
    return label.clamp(max=1) if merge else label


# ---------------------------------------------------------------- scores

def window_starts(length, window, stride):
    """Where windows begin along a side: 0, stride, ..., the last one pushed back inside."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


@torch.inference_mode()
def predict(net, image, data, sizes, setup):
    """Labels (H, W) of an image uint8 (3, H, W): resized to the crop's short side, seen through
    windows whose logits are averaged where they overlap, scored at the image's own size."""
    H, W = image.shape[1:]
    image, _ = scaled(image, image[0], fitting(image, sizes.crop))
    x = prepared(image, data).to(setup.device)[None]
    h, w = x.shape[2:]
    x = F.pad(x, (0, max(0, sizes.crop - w), 0, max(0, sizes.crop - h)))
    seen = x.new_zeros(x.shape[2:])
    total = x.new_zeros(1, 1, *x.shape[2:])         # grows to the number of labels
    for top in window_starts(x.shape[2], sizes.crop, sizes.stride):
        for left in window_starts(x.shape[3], sizes.crop, sizes.stride):
            window = x[:, :, top:top + sizes.crop, left:left + sizes.crop]
            with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.amp):
                logits = net.scores(window)
            margins = (left, x.shape[3] - left - sizes.crop, top, x.shape[2] - top - sizes.crop)
            total = total + F.pad(logits, margins)
            seen += F.pad(torch.ones_like(logits[0, 0]), margins)
    return resize((total / seen)[:, :, :h, :w], (H, W))[0].argmax(0).to(torch.uint8).cpu()


def confusion(true, predicted, classes):
    """How many pixels of each true label (rows) got each label (columns): (C, C) int64."""
    counted = true != IGNORED
    pairs = true[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def mean_iou(matrix):
    """Mean over labels that occur, in truth or prediction, of intersection / union, in per cent."""
    hit = matrix.diag().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return 100 * (hit / union)[union > 0].mean().item()


def score(net, data, sizes, setup, merge=False):
    """Confusion matrix (C, C) of the whole split, over all ranks; each predicts its share."""
    matrix = 0
    bar = tqdm(shared(len(data)), desc="segmenting", leave=False,
               disable=not distributed.is_main())
    for index in bar:
        image, label = data.labelled(index)
        predicted = predict(net, image, data, sizes, setup)
        matrix = matrix + confusion(merged(label, merge), predicted, classes_of(data, merge))
    return sum(distributed.everyone(matrix))


def classes_of(data, merge):
    """How many labels there are."""
    return 2 if merge else len(data.label_names)


def rows_of(probe, what, source, head, epochs, matrix):
    """The score, and that of naming the commonest label at every pixel."""
    constant = torch.zeros_like(matrix)
    counts = matrix.sum(1)
    constant[:, counts.argmax()] = counts
    yield row(probe, what, source, head, epochs, "mIoU", mean_iou(matrix))
    yield row(probe, what, "nothing", "the commonest label", 0, "mIoU", mean_iou(constant))


# ---------------------------------------------------------------- the probes

def probe_segment_linear(model, _train, _val, setup):
    """mIoU of BatchNorm and a 1x1 convolution on frozen tokens; of scenes, also objects against
    background."""
    data = setup.views["train"]
    vit = copy.deepcopy(model.representation).eval()
    sizes, recipe = preset(data, vit, (UPERNET, LINEAR_RECIPE), (QUICK, QUICK_LINEAR), setup)
    maps = Frozen(vit)
    held = hold(vit, data, setup) if data.in_memory else None
    for merge in (False, True)[:1 + data.in_memory]:
        seed_all(setup.seed)
        net = Segmenter(maps, Linear(vit.dim, classes_of(data, merge)))
        name = "segment-linear-objects" if merge else "segment-linear"
        fit_linear(net, held, recipe, sizes, setup, merge, name)
        matrix = score(net, setup.views["val"], sizes, setup, merge)
        what = "objects, background" if merge else f"{len(matrix)} classes"
        yield from rows_of("segment-linear", what, "frozen patch tokens", "BatchNorm, 1x1",
                           recipe.epochs(len(data)), matrix)
        if not merge:
            picture(net, sizes, setup, name)


def fit_linear(net, held, recipe, sizes, setup, merge, name):
    """Train the head of `net`: on maps that are held, or on crops that pass through the ViT."""
    data = setup.views["train"]
    vit = net.maps.vit
    if held is None:
        fit(net, vit, Crops(data, sizes.crop, merge), recipe, setup, name)
    else:
        samples = Held(held, data, merge)
        # The ViT is not in what is trained, but what is kept is of its maps.
        fit(OfMaps(net.head), vit, samples, recipe, setup, name, digest(vit))
    net.to(setup.device).eval()


def probe_segment(model, _train, _val, setup):
    """mIoU of UPerNet on four blocks, all weights trained."""
    data = setup.views["train"]
    seed_all(setup.seed)
    vit = copy.deepcopy(model.representation).requires_grad_(True)
    sizes, recipe = preset(data, vit, (UPERNET, UPERNET_RECIPE), (QUICK, QUICK_UPERNET), setup)
    head = UPerNet(vit.dim, len(data.label_names), sizes.channels, sizes.auxiliary)
    net = Segmenter(FourMaps(vit), head)
    fit(net, vit, Crops(data, sizes.crop), recipe, setup, "segment")
    matrix = score(net, setup.views["val"], sizes, setup)
    yield from rows_of("segment", f"{len(matrix)} classes", "four blocks, all weights", "UPerNet",
                       recipe.epochs(len(data)), matrix)
    picture(net, sizes, setup, "segment")


def fit(net, vit, samples, recipe, setup, name, frozen=""):
    """loop.train; what takes minutes is not kept, it would only be in the way of the next try.

    frozen: the digest of a ViT that is not part of `net`."""
    workers = 0 if setup.views["train"].in_memory else all_workers()
    keep = None if setup.quick else setup.file(name, ".pt")
    batches = from_files(samples, recipe, setup, default_collate, workers)
    train(net, vit, recipe, batches, setup, keep,
          f"{name}, {setup.tag}, {len(samples):,} images", setup.views["train"].digest() + frozen)


def picture(net, sizes, setup, name):
    """Predictions for some validation images, drawn by rank 0."""
    path = setup.file(name, ".png")
    data = setup.views["val"]
    if path is None or not distributed.is_main():
        return
    shown = []
    for index in torch.linspace(0, len(data) - 1, min(PICTURES, len(data))).long().tolist():
        image, label = data.labelled(index)
        shown.append((image, label, predict(net, image, data, sizes, setup)))
    draw_segmentation(shown, data.label_names, path)
