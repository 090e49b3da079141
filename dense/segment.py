"""Semantic segmentation: what is at each pixel (DSeq-JEPA Table 2, 0.A.1.3).

    segment-linear      frozen tokens of the last norm -> BatchNorm, 1x1 convolution
    segment             all weights; maps of four blocks -> UPerNet, and an FCN beside it
    image uint8 (3, H, W), label uint8 (H, W), 255 ignored  ->  mIoU over the whole split

A network gives logits (B, C, h, w), coarser than its images, which are upsampled bilinearly. Images
larger than the crop are seen through windows that overlap by a third. Every score stands beside
that of naming the commonest label everywhere; where label 0 is "background", as in scenes, another
row tells it from all the rest.

The recipes are the authors' configuration; what they leave open is MAE's or ours: docs/dense.md.
Checked in tests/test_segment.py.
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from dense.loop import Recipe, from_files, shared, train
from dense.maps import FourMaps, last_map, patch_size
from dense.upernet import Linear, UPerNet, resize
from figures.canvas import spread
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


class Preset(NamedTuple):
    """How large things are."""
    crop: int                   # pixels, of a training crop and of a window
    stride: int                 # pixels between windows
    channels: int               # of UPerNet
    auxiliary: int              # of the FCN beside it


# The authors' newer configuration; layer decay, which is not said there, as MAE's followers
FULL = Preset(512, 341, channels=512, auxiliary=256)
FULL_RECIPES = {
    "segment": Recipe(steps=160_000, batch_size=16, lr=1e-4, warmup=1500, shape="linear",
                      weight_decay=0.05, layer_decay=0.65, drop_path=0.1),
    "segment-linear": Recipe(steps=40_000, batch_size=16, lr=1e-3, warmup=1500, weight_decay=1e-3),
}
# Ours: minutes on two CPU cores, for scenes and small folders
QUICK = Preset(128, 85, channels=64, auxiliary=32)
QUICK_RECIPES = {
    "segment": Recipe(steps=400, batch_size=8, lr=1e-3, warmup=40, shape="linear",
                      weight_decay=0.05, layer_decay=0.65),
    "segment-linear": Recipe(steps=400, batch_size=16, lr=1e-2, weight_decay=1e-3),
}


def preset(name, data, vit, setup):
    """(Preset, Recipe) of a probe for this data and ViT."""
    sizes, recipes = (QUICK, QUICK_RECIPES) if setup.quick else (FULL, FULL_RECIPES)
    recipe = recipes[name]
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
    """Maps of a ViT and a head on them.

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


def linear(vit, classes, sizes):
    """The network of `segment-linear`."""
    return Segmenter(Frozen(vit), Linear(vit.dim, classes))


def upernet(vit, classes, sizes):
    """The network of `segment`."""
    vit.requires_grad_(True)
    return Segmenter(FourMaps(vit), UPerNet(vit.dim, classes, sizes.channels, sizes.auxiliary))


def loss_of(logits, labels):
    """Cross-entropy of [logits, those of the auxiliary head] with labels (B, H, W).

    Mean over all pixels, to which those ignored give 0 (as MMSegmentation): so ranks' means are
    that of the batch."""
    total = 0.0
    for weight, each in zip((1.0, AUXILIARY), logits):
        each = resize(each.float(), labels.shape[1:])
        total += weight * F.cross_entropy(each, labels, ignore_index=IGNORED, reduction="sum")
    return total / labels.numel()


# ---------------------------------------------------------------- what is trained on

class Crops:
    """Training crops: [i] -> image (3, crop, crop) float32, normalised; label (crop, crop) int64.

    Resized by 0.5 to 2 of what fits (4 crop, crop), cropped so that no class takes more than three
    quarters of it if that is found in ten tries, mirrored, its colours changed (as MMSegmentation).
    Smaller images are padded: with the mean colour, and ignored."""

    def __init__(self, data, crop):
        self.data = data
        self.side = crop
        mean = [round(255 * channel) for channel in data.mean]
        fill = {tv_tensors.Image: mean, tv_tensors.Mask: IGNORED}
        self.crop = v2.RandomCrop(crop, pad_if_needed=True, fill=fill)
        some = [v2.ColorJitter(brightness=0.125), v2.ColorJitter(contrast=0.5),
                v2.ColorJitter(saturation=0.5), v2.ColorJitter(hue=0.1)]
        self.distort = v2.Compose([v2.RandomApply([change], p=0.5) for change in some])
        self.mirror = v2.RandomHorizontalFlip()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data.labelled(index)
        factor = (0.5 + 1.5 * torch.rand(()).item()) * fitting(image, self.side)
        image = tv_tensors.Image(scaled(image, factor))
        label = tv_tensors.Mask(scaled(label[None], factor, v2.InterpolationMode.NEAREST_EXACT))
        image, label = self.mirror(*self.cropped(self.distort(image), label))
        return prepared(image.as_subclass(torch.Tensor), self.data), label[0].long()

    def cropped(self, image, label):
        """image (3, crop, crop), label (1, crop, crop)"""
        for _ in range(TRIES):
            crops = self.crop(image, label)
            counts = crops[1].flatten().bincount(minlength=IGNORED + 1)[:IGNORED]
            if counts.max() <= COMMONEST * counts.sum():
                break
        return crops


def fitting(image, crop):
    """By how much to resize an image so that it just fits (LONGEST * crop, crop)."""
    short, long = sorted(image.shape[1:])
    return min(crop / short, LONGEST * crop / long)


def scaled(image, factor, how=v2.InterpolationMode.BILINEAR):
    """(C, H, W) resized."""
    size = [max(1, round(side * factor)) for side in image.shape[1:]]
    return v2.functional.resize(image, size, how, antialias=True)


def prepared(image, data):
    """uint8 (3, H, W) -> normalised float32."""
    return normalise(image, torch.tensor(data.mean), torch.tensor(data.std), channel_dim=0)


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
    x = prepared(scaled(image, fitting(image, sizes.crop)), data).to(setup.device)[None]
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
    return labels_at((total / seen)[:, :, :h, :w], (H, W))


def labels_at(logits, size):
    """The highest of logits (1, C, h, w), resized to `size`: (*size,) uint8 on the CPU.

    Ten classes at a time: of a photo at its own size all of ADE20K's would take gigabytes."""
    best = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    highest = torch.full(size, -torch.inf, device=logits.device)
    for first in range(0, logits.shape[1], 10):
        value, label = resize(logits[:, first:first + 10], size)[0].max(0)
        best = torch.where(value > highest, (label + first).to(torch.uint8), best)
        highest = torch.maximum(value, highest)
    return best.cpu()


def confusion(true, predicted, classes):
    """How many pixels of each true label (rows) got each label (columns): (C, C) int64."""
    counted = true != IGNORED
    pairs = true[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes ** 2).view(classes, classes)


def score(net, data, sizes, setup):
    """Confusion matrix (C, C) of the whole split, over all ranks; each predicts its share."""
    matrix = 0
    bar = tqdm(shared(len(data)), desc="segmenting", leave=False,
               disable=not distributed.is_main())
    for index in bar:
        image, label = data.labelled(index)
        predicted = predict(net, image, data, sizes, setup)
        matrix = matrix + confusion(label, predicted, len(data.label_names))
    return sum(distributed.everyone(matrix))


def mean_iou(matrix):
    """Mean over labels that occur, in truth or prediction, of intersection / union, in per cent."""
    hit = matrix.diag().double()
    union = matrix.sum(0) + matrix.sum(1) - matrix.diag()
    return 100 * (hit / union)[union > 0].mean().item()


def commonest(matrix):
    """The confusion matrix of who names the commonest label at every pixel."""
    counts = matrix.sum(1)
    constant = torch.zeros_like(matrix)
    constant[:, counts.argmax()] = counts
    return constant


def against_background(matrix):
    """The confusion matrix (2, 2) of label 0 and all others together."""
    rows = torch.stack([matrix[0], matrix[1:].sum(0)])
    return torch.stack([rows[:, 0], rows[:, 1:].sum(1)], dim=1)


# ---------------------------------------------------------------- the probes

def probe_segment_linear(model, _train, _val, setup):
    """mIoU of BatchNorm and a 1x1 convolution on frozen tokens."""
    return probe("segment-linear", linear, "frozen patch tokens", "BatchNorm, 1x1", model, setup)


def probe_segment(model, _train, _val, setup):
    """mIoU of UPerNet on four blocks, all weights trained."""
    return probe("segment", upernet, "four blocks, all weights", "UPerNet", model, setup)


def probe(name, build, source, head, model, setup):
    """Train, score, draw.  -> rows of the table"""
    data = setup.views["train"]
    unseen = setup.views["val"]
    seed_all(setup.seed)
    vit = copy.deepcopy(model.representation).eval()
    sizes, recipe = preset(name, data, vit, setup)
    net = build(vit, len(data.label_names), sizes)
    batches = from_files(Crops(data, sizes.crop), recipe, setup, default_collate)
    train(net, vit, recipe, batches, setup, name)
    matrix = score(net, unseen, sizes, setup)
    if distributed.is_main() and setup.folder:
        draw(net, unseen, sizes, setup, setup.file(name, ".png"))
    scores = {f"{len(matrix)} classes": matrix}
    if data.label_names[0] == "background" and len(matrix) > 2:
        scores["objects, background"] = against_background(matrix)
    epochs = recipe.epochs(len(data))
    for what, matrix in scores.items():
        yield row(name, what, source, head, epochs, "mIoU", mean_iou(matrix))
        yield row(name, what, "nothing", "the commonest label", 0, "mIoU",
                  mean_iou(commonest(matrix)))


def draw(net, data, sizes, setup, path):
    """Predictions for some images."""
    shown = []
    for index in spread(data, min(PICTURES, len(data))).tolist():
        image, label = data.labelled(index)
        shown.append((image, label, predict(net, image, data, sizes, setup)))
    draw_segmentation(shown, data.label_names, path)
