"""Detection and instance segmentation (DSeq-JEPA Table 2, 0.A.1.3): Mask R-CNN on a ViT, all
weights trained, average precision of boxes and of masks.

    images (B, 3, S, S), their objects  ->  loss                         Detector, for loop.py
    image (3, H, W)  ->  boxes (n, 4), labels, scores (n,), masks (n, H, W)            predict
    all validation images  ->  AP in per cent                                          measure

    ViT blocks 4, 6, 8, 12    (B, P, D) each
    rescaled                  (B, D, S/s, S/s) for strides s of 4, 8, 16, 32 pixels        maps.py
    FPN                       (B, 256, S/s, S/s), and one of stride 64
    torchvision's Mask R-CNN  region proposals, box head, mask head

Preset "coco" is the authors' released configuration, for the paper's text has lost its numerals:
these maps, torchvision's Mask R-CNN with its defaults ("otherwise adopt default Mask R-CNN
hyperparameters from the underlying detection framework"), 1024 pixels, 25 epochs of batch 16, no
decay of rates with depth. One difference: they attend within windows of 14 patches in all but the
four blocks, we everywhere, as in pre-training, for 1.4 times the multiplications (ViT-B). Preset
"quick", for embedded scenes and small folders of one's own, is ours.
Checked in tests/test_detect.py.
"""
import copy
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, masks_to_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from dense import average_precision as ap
from dense.loop import Recipe, from_files, shared, train
from dense.maps import FourMaps, patch_size
from figures.canvas import spread
from figures.dense_boxes import Shown, draw_detections, sure
from plumbing import distributed
from plumbing.device import seed_all
from plumbing.errors import BadInput
from probes import row

ASPECTS = (0.5, 1.0, 2.0)       # of anchors, height / width


class Preset(NamedTuple):
    """What sizes there are of detectors, besides the Recipe."""
    size: int                   # S, pixels: what images are scaled and padded to
    scales: tuple               # of training images, beside the largest that fits S
    anchors: tuple              # sides on the five maps, as shares of S
    light: bool                 # narrow heads and few proposals, for a CPU
    merge: bool = False         # all objects are one class: minutes do not suffice for many


FULL = Preset(1024, (0.1, 2.0), (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2), light=False)
LIGHT = Preset(96, (0.7, 1.4), (0.1, 0.2, 0.35, 0.55, 0.8), light=True)     # for scenes
SMALL = 256                     # S for folders with --quick
EPOCHS = 25
BATCH = 16
PICTURES = 5                    # in the figure


def preset(source, quick):
    """(Preset, Recipe) for training images, of a folder or embedded, and --quick or not."""
    samples = len(source)
    if not source.in_memory and not quick:
        epoch = max(1, samples // BATCH)
        recipe = Recipe(steps=EPOCHS * epoch, batch_size=BATCH, lr=1e-4, warmup=epoch,
                        weight_decay=0.1, drop_path=0.1, save_every=epoch)
        return FULL, recipe
    steps = 300 if quick else 4000
    recipe = Recipe(steps=steps, batch_size=8, lr=1e-3, warmup=steps // 10, weight_decay=0.05,
                    layer_decay=0.7, save_every=steps // 4)
    if source.in_memory:
        return LIGHT._replace(merge=quick), recipe
    return LIGHT._replace(size=SMALL), recipe


# ---------------------------------------------------------------- the network

class Pyramid(nn.Module):
    """What Mask R-CNN looks at: images -> {"0".."3", "pool": (B, width, S/s, S/s)}."""

    def __init__(self, vit, width):
        super().__init__()
        self.maps = FourMaps(vit)
        self.fpn = FeaturePyramidNetwork(4 * [vit.dim], width, extra_blocks=LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images):
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.maps(images))))


def light_heads(width, classes):
    """Arguments of MaskRCNN for a laptop: narrow heads, few proposals."""
    return dict(
        rpn_head=RPNHead(width, len(ASPECTS)),
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=50,
        box_head=TwoMLPHead(width * 7 * 7, 128), box_predictor=FastRCNNPredictor(128, classes),
        box_batch_size_per_image=64, box_detections_per_img=20,
        mask_head=MaskRCNNHeads(width, [width, width], 1),
        mask_predictor=MaskRCNNPredictor(width, width, classes))


class Detector(nn.Module):
    """Mask R-CNN on a copy of a ViT.

    classes: how many; torchvision counts the background as one more, number 0.
    mean, std (3,): of pixels in [0, 1], as the ViT was trained with."""

    def __init__(self, vit, classes, mean, std, preset):
        super().__init__()
        vit = copy.deepcopy(vit).requires_grad_(True)
        self.size = preset.size // patch_size(vit) * patch_size(vit)
        heads = dict(num_classes=classes + 1)
        width = 256
        if preset.light:
            width = 64
            heads = light_heads(width, classes + 1)
        anchors = tuple((round(self.size * share),) for share in preset.anchors)
        self.rcnn = MaskRCNN(
            Pyramid(vit, width), min_size=self.size, max_size=self.size,
            size_divisible=self.size,       # smaller images are padded, to the right and below
            image_mean=list(mean), image_std=list(std), _skip_resize=True,
            rpn_anchor_generator=AnchorGenerator(anchors, len(anchors) * (ASPECTS,)), **heads)

    @property
    def vit(self):
        """The ViT within."""
        return self.rcnn.backbone.maps.vit

    def forward(self, images, targets):
        """images (B, 3, S, S) uint8, targets: one dict(boxes, labels, masks) an image  ->  loss"""
        return sum(self.rcnn(list(images / 255), targets).values())


# ---------------------------------------------------------------- what it learns from

class Merged:
    """A split whose objects are all of one class."""
    classes = ["object"]
    in_memory = True

    def __init__(self, source):
        self.source = source
        self.mean = source.mean
        self.std = source.std

    def __len__(self):
        return len(self.source)

    def objects(self, i):
        image, objects = self.source.objects(i)
        return image, objects._replace(classes=np.zeros_like(objects.classes))


class Training:
    """Images as the detector learns from them; samples for dense.loop.from_files.

    source: a split with `objects`, as sources/coco.py has.  mean (3,): padding, in [0, 1].
    [i] -> image (3, S, S) uint8, dict(boxes (n, 4), labels (n,), masks (n, S, S) uint8).
    Scaled at random, cut to S x S or padded, mirrored or not; crowds are left out. Boxes are those
    of what is still seen, which a cut box is not."""

    def __init__(self, source, size, scales, mean):
        self.source = source
        grey = [round(255 * float(channel)) for channel in mean]
        fill = {tv_tensors.Image: grey, "others": 0}
        self.view = v2.Compose([v2.ScaleJitter((size, size), scales, antialias=True),
                                v2.RandomCrop(size, pad_if_needed=True, fill=fill),
                                v2.RandomHorizontalFlip()])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        image, objects = self.source.objects(i)
        single = ~objects.crowd
        image, masks = self.view(tv_tensors.Image(image), tv_tensors.Mask(objects.masks[single]))
        masks = masks.as_subclass(torch.Tensor)
        seen = masks.flatten(1).any(1)
        masks = masks[seen].to(torch.uint8)
        boxes = masks_to_boxes(masks)
        boxes[:, 2:] += 1                   # it names the last pixel, a box ends behind it
        labels = torch.as_tensor(objects.classes[single])[seen] + 1
        return image.as_subclass(torch.Tensor), dict(boxes=boxes, labels=labels, masks=masks)


def collate(samples):
    """List of samples -> (images (B, 3, S, S) uint8, list of targets)."""
    images, targets = zip(*samples)
    return torch.stack(images), list(targets)


# ---------------------------------------------------------------- what it finds

@torch.inference_mode()
def predict(net, image):
    """Objects that a Detector under eval() finds in an image (3, H, W) uint8 on its device.

    The longer side is scaled to S. ->  boxes (n, 4) in the image's pixels, labels (n,) from 0 up,
    scores (n,), masks (n, H, W) bool; NumPy, best first"""
    height, width = image.shape[1:]
    scale = net.size / max(height, width)
    size = [max(1, round(scale * side)) for side in (height, width)]
    rcnn = net.rcnn
    # As MaskRCNN.forward; but for scaling with antialiasing, and masks at the original size.
    scaled = TF.resize(image, size, antialias=True)
    images, _ = rcnn.transform([scaled / 255])
    features = rcnn.backbone(images.tensors)
    proposals, _ = rcnn.rpn(images, features)
    found, _ = rcnn.roi_heads(features, proposals, images.image_sizes)
    found = found[0]
    ratios = torch.tensor([width / size[1], height / size[0]], device=image.device)
    boxes = found["boxes"].float() * ratios.repeat(2)
    masks = []                              # a few at a time: as floats, all would take gigabytes
    for some, where in zip(found["masks"].float().split(8), boxes.split(8)):
        masks.append(paste_masks_in_image(some, where, (height, width))[:, 0] > 0.5)
    return (boxes.double().cpu().numpy(), found["labels"].cpu().numpy() - 1,
            found["scores"].double().cpu().numpy(), torch.cat(masks).cpu().numpy())


def matches_of(found, objects):
    """What `predict` found in an image, held against its Objects.

    ->  {class: (Matches of boxes, Matches of masks)}, for classes that are there or were found"""
    boxes, labels, scores, masks = found
    matches = {}
    for k in np.union1d(labels, objects.classes).tolist():
        ours = labels == k
        theirs = objects.classes == k
        crowd = objects.crowd[theirs]
        areas = objects.areas[theirs]
        of_boxes = ap.box_ious(boxes[ours], objects.boxes[theirs], crowd)
        of_masks = ap.mask_ious(masks[ours], objects.masks[theirs], crowd)
        matches[k] = (
            ap.match(scores[ours], ap.box_areas(boxes[ours]), of_boxes, areas, crowd),
            ap.match(scores[ours], ap.mask_areas(masks[ours]), of_masks, areas, crowd))
    return matches


def measure(net, source, setup, what="finding objects"):
    """Average precision over all images of a source.

    ->  (of boxes, of masks), each {"AP": ..., "AP50": ..., ...} in per cent; on every rank, of all
    images. Each rank looks at its own and sends what came of them, not the masks."""
    mine = {}
    for i in tqdm(shared(len(source)), desc=what, leave=False, disable=not distributed.is_main()):
        image, objects = source.objects(i)
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.amp):
            found = predict(net, torch.as_tensor(image).to(setup.device))
        mine[i] = matches_of(found, objects)
    everything = {}
    for part in distributed.everyone(mine):
        everything |= part
    of_boxes = {}                   # class: [Matches, in the order of images]
    of_masks = {}
    for i in sorted(everything):
        for k, (boxes, masks) in everything[i].items():
            of_boxes.setdefault(k, []).append(boxes)
            of_masks.setdefault(k, []).append(masks)
    return in_per_cent(of_boxes), in_per_cent(of_masks)


def in_per_cent(matches):
    """{class: [Matches]} -> {"AP": ..., ...}"""
    found = ap.average_precision(list(matches.values()))
    return {name: 100 * value for name, value in found.items()}


def draw(net, source, setup, path):
    """Objects of a few images, and what is found there.  -> path"""
    pictures = []
    for i in spread(source, min(PICTURES, len(source))).tolist():
        image, objects = source.objects(i)
        found = predict(net, torch.as_tensor(image).to(setup.device))
        there = Shown(objects.boxes, objects.classes, objects.masks)
        pictures.append((np.asarray(image), there, sure(*found)))
    return draw_detections(pictures, source.classes, path)


def probe_detect(model, _train, _val, setup):
    """AP of boxes and of masks after training everything (Table 2)."""
    source = setup.views["train"]
    unseen = setup.views["val"]
    if source.classes != unseen.classes:
        raise BadInput("--dataset coco: the training annotations name other categories than the "
                       "validation annotations; give both files the same")
    sizes, recipe = preset(source, setup.quick)
    if setup.probe_epochs:
        recipe = recipe.lasting(setup.probe_epochs, len(source))
    if sizes.merge:
        source = Merged(source)
        unseen = Merged(unseen)
    seed_all(setup.seed)
    net = Detector(model.representation, len(source.classes), source.mean, source.std, sizes)
    samples = Training(source, net.size, sizes.scales, source.mean)
    batches = from_files(samples, recipe, setup, collate)
    train(net, net.vit, recipe, batches, setup, "detect")
    found = measure(net, unseen, setup)
    if distributed.is_main() and setup.folder:
        draw(net, unseen, setup, setup.file("detect", ".png"))
    told = "all one class" if sizes.merge else f"{len(source.classes)} classes"
    for shape, values in zip(("boxes", "masks"), found):
        for name, which in (("AP", shape), ("AP50", f"{shape} at IoU 0.5")):
            yield row("detect", f"{which}, {told}",
                      "four blocks, all weights", head_words(sizes, source, unseen),
                      recipe.epochs(len(source)), "AP", values[name])


def head_words(sizes, *splits):
    """Which heads, and whether masks of the data were drawn without pycocotools."""
    words = "Mask R-CNN, light" if sizes.light else "Mask R-CNN"
    if any(getattr(split, "nearly", False) for split in splits):
        words += "; polygons nearly"
    return words
