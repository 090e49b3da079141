"""Detection and instance segmentation (DSeq-JEPA Table 2, 0.A.1.3): Mask R-CNN on a ViT, all
weights trained, average precision of boxes and of masks.

    images (B, 3, S, S), their objects  ->  loss                                        Detector
    image (3, H, W)  ->  boxes (n, 4), labels, scores (n,), masks (n, H, W)             predict
    all validation images  ->  average precision                                        measure

    ViT blocks 4, 6, 8, 12    (B, P, D) each
    rescaled                  (B, D, S/s, S/s) for strides s of 4, 8, 16, 32 pixels     maps.py
    FPN                       (B, 256, S/s, S/s), and one of stride 64
    torchvision's Mask R-CNN  region proposals, box head, mask head

FULL is the authors' released configuration, for the paper's text has lost its numerals; torchvision
gives the "default Mask R-CNN hyperparameters". One difference: they attend within windows of 14
patches in all but the four blocks, we everywhere, as in pre-training, for 1.4 times the
multiplications (ViT-B). LIGHT, for scenes and small folders of one's own, is ours.
Checked in tests/test_detect.py.
"""
import copy
from collections import ChainMap
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torchvision import ops, tv_tensors
from torchvision.models import detection
from torchvision.transforms import v2
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
PICTURES = 5                    # in the figure


class Preset(NamedTuple):
    """Sizes of a detector and its images; how it is trained says the Recipe."""
    size: int                   # S, pixels: what images are scaled and padded to
    scales: tuple               # of training images, beside the largest that fits S
    anchors: tuple              # sides on the five maps, as shares of S
    light: bool                 # narrow heads and few proposals, for a CPU
    merge: bool = False         # all objects are one class: minutes do not suffice for many


FULL = Preset(1024, (0.1, 2.0), (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2), light=False)
LIGHT = Preset(96, (0.7, 1.4), (0.1, 0.2, 0.35, 0.55, 0.8), light=True)
EPOCHS = Recipe(steps=25, batch_size=16, lr=1e-4, warmup=1, weight_decay=0.1, drop_path=0.1,
                save_every=1)                               # steps are counted in epochs here
LONG = Recipe(steps=4000, batch_size=8, lr=1e-3, warmup=400, weight_decay=0.05, layer_decay=0.7,
              save_every=1000)
QUICK = LONG._replace(steps=300, warmup=30, save_every=75)
PRESETS = {                     # by whether the data are scenes, and by --quick
    (False, False): (FULL, EPOCHS),
    (False, True): (LIGHT._replace(size=256), QUICK),
    (True, False): (LIGHT, LONG),
    (True, True): (LIGHT._replace(merge=True), QUICK),
}


def preset(source, quick):
    """(Preset, Recipe) for training images and --quick or not."""
    sizes, recipe = PRESETS[source.in_memory, quick]
    if recipe is EPOCHS:
        epoch = max(1, len(source) // recipe.batch_size)
        recipe = recipe._replace(steps=recipe.steps * epoch, warmup=epoch, save_every=epoch)
    return sizes, recipe


# ---------------------------------------------------------------- the network

class Pyramid(nn.Module):
    """What Mask R-CNN looks at: images -> {"0".."3", "pool": (B, width, S/s, S/s)}."""

    def __init__(self, vit, width):
        super().__init__()
        self.maps = FourMaps(vit)
        coarsest = ops.feature_pyramid_network.LastLevelMaxPool()
        self.fpn = ops.FeaturePyramidNetwork(4 * [vit.dim], width, extra_blocks=coarsest)
        self.out_channels = width

    def forward(self, images):
        return self.fpn(dict(zip("0123", self.maps(images))))


def light_heads(width, classes):
    """Arguments of MaskRCNN for a laptop: narrow heads, few proposals."""
    return dict(
        rpn_head=detection.rpn.RPNHead(width, len(ASPECTS)),
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100,
        rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=50,
        box_head=detection.faster_rcnn.TwoMLPHead(width * 7 * 7, 128),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(128, classes),
        box_batch_size_per_image=64, box_detections_per_img=20,
        mask_head=detection.mask_rcnn.MaskRCNNHeads(width, [width, width], 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(width, width, classes))


class Detector(nn.Module):
    """Mask R-CNN on a copy of a ViT.

    classes: how many; torchvision counts the background as one more, number 0.
    mean, std (3,): of pixels in [0, 1], as the ViT was trained with."""

    def __init__(self, vit, classes, mean, std, preset):
        super().__init__()
        vit = copy.deepcopy(vit).requires_grad_(True)
        self.size = preset.size // patch_size(vit) * patch_size(vit)
        width = 64 if preset.light else 256
        heads = light_heads(width, classes + 1) if preset.light else dict(num_classes=classes + 1)
        sides = tuple((round(self.size * share),) for share in preset.anchors)
        anchors = detection.anchor_utils.AnchorGenerator(sides, len(sides) * (ASPECTS,))
        self.rcnn = detection.MaskRCNN(
            Pyramid(vit, width), min_size=self.size, max_size=self.size,
            size_divisible=self.size,       # smaller images are padded, to the right and below
            image_mean=list(mean), image_std=list(std), _skip_resize=True,
            rpn_anchor_generator=anchors, **heads)

    @property
    def vit(self):
        """The ViT within."""
        return self.rcnn.backbone.maps.vit

    def forward(self, images, targets):
        """images (B, 3, S, S) uint8, targets: one dict(boxes, labels, masks) an image  ->  loss"""
        return sum(self.rcnn(list(images / 255), targets).values())


# ---------------------------------------------------------------- what it learns from

class Training:
    """Images as the detector learns from them; samples for dense.loop.from_files.

    [i] -> image (3, S, S) uint8, dict(boxes (n, 4), labels (n,), masks (n, S, S) uint8).
    Scaled at random, cut to S x S or padded, mirrored or not; crowds are left out. Boxes are those
    of what is still seen, which a cut box is not."""

    def __init__(self, source, size, scales):
        self.source = source
        grey = [round(255 * float(channel)) for channel in source.mean]
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
        seen = masks.flatten(1).any(1)
        masks = masks.as_subclass(torch.Tensor)[seen].to(torch.uint8)
        boxes = ops.masks_to_boxes(masks)
        boxes[:, 2:] += 1                   # of the last pixel; a box ends behind it
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
    shape = image.shape[1:]
    scale = net.size / max(shape)
    size = [max(1, round(scale * side)) for side in shape]
    rcnn = net.rcnn
    # As MaskRCNN.forward; but for scaling with antialiasing, and masks at the original size.
    images, _ = rcnn.transform([v2.functional.resize(image, size, antialias=True) / 255])
    features = rcnn.backbone(images.tensors)
    proposals, _ = rcnn.rpn(images, features)
    (found,), _ = rcnn.roi_heads(features, proposals, images.image_sizes)
    boxes = detection.transform.resize_boxes(found["boxes"].float(), size, shape)
    # Masks are drawn a few at a time: as floats, all of them would take gigabytes.
    some = zip(found["masks"].float().split(8), boxes.split(8))
    masks = [detection.roi_heads.paste_masks_in_image(*few, shape)[:, 0] > 0.5 for few in some]
    return (boxes.double().cpu().numpy(), found["labels"].cpu().numpy() - 1,
            found["scores"].double().cpu().numpy(), torch.cat(masks).cpu().numpy())


def matches_of(found, objects):
    """What `predict` found in an image, held against its Objects.

    ->  {("boxes" or "masks", class): Matches}, for classes that are there or were found"""
    boxes, labels, scores, masks = found
    pairs = dict(boxes=(boxes, objects.boxes), masks=(masks, objects.masks))
    matches = {}
    for k in np.union1d(labels, objects.classes).tolist():
        ours = labels == k
        theirs = objects.classes == k
        for shape, (mine, truths) in pairs.items():
            matches[shape, k] = ap.match(scores[ours], mine[ours], truths[theirs],
                                         objects.areas[theirs], objects.crowd[theirs])
    return matches


def measure(net, source, setup):
    """Average precision over all images of a source, in [0, 1]; on every rank, of all images.

    ->  {"boxes": {"AP": ..., "AP50": ..., ...}, "masks": the same}
    Each rank looks at its own images and sends what came of them, not the masks."""
    mine = {}
    for i in tqdm(shared(len(source)), desc="finding objects", leave=False,
                  disable=not distributed.is_main()):
        image, objects = source.objects(i)
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.amp):
            found = predict(net, image.to(setup.device))
        mine[i] = matches_of(found, objects)
    everything = ChainMap(*distributed.everyone(mine))
    of_class = dict(boxes={}, masks={})         # {class: [Matches, in the order of images]}
    for i in sorted(everything):
        for (shape, k), matches in everything[i].items():
            of_class[shape].setdefault(k, []).append(matches)
    return {shape: ap.average_precision(list(of_class[shape].values())) for shape in of_class}


def draw(net, source, setup, path):
    """Objects of a few images, and what is found there.  -> path"""
    pictures = []
    for i in spread(source, min(PICTURES, len(source))).tolist():
        image, objects = source.objects(i)
        found = predict(net, image.to(setup.device))
        there = Shown(objects.boxes, objects.classes, objects.masks)
        pictures.append((image.numpy(), there, sure(*found)))
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
        source = source.merged()
        unseen = unseen.merged()
    seed_all(setup.seed)
    net = Detector(model.representation, len(source.classes), source.mean, source.std, sizes)
    batches = from_files(Training(source, net.size, sizes.scales), recipe, setup, collate)
    train(net, net.vit, recipe, batches, setup, "detect")
    found = measure(net, unseen, setup)
    if distributed.is_main() and setup.folder:
        draw(net, unseen, setup, setup.file("detect", ".png"))
    head = "Mask R-CNN, light" if sizes.light else "Mask R-CNN"
    if getattr(source, "nearly", False) or getattr(unseen, "nearly", False):
        head += "; polygons nearly"         # masks were drawn without pycocotools
    told = "all one class" if sizes.merge else f"{len(source.classes)} classes"
    for shape, values in found.items():
        for name, which in (("AP", shape), ("AP50", f"{shape} at IoU 0.5")):
            yield row("detect", f"{which}, {told}", "four blocks, all weights", head,
                      recipe.epochs(len(source)), "AP", 100 * values[name])
