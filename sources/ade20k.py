"""Images with a label for each pixel: ADE20K's folders, or pairs of one's own.

    DIR/images/training/NAME.jpg            DIR/annotations/training/NAME.png
    DIR/images/validation/NAME.jpg          DIR/annotations/validation/NAME.png

    load(config, split).labelled(i)     ->  image uint8 (3, H, W), label uint8 (H, W), 255 ignored

DIR is --data-dir, or ADEChallengeData2016 in it. `train` and `val` will do as well, and `labels`
for `annotations`. Without such folders the images themselves lie in DIR/images, and a tenth of them
is held out.

A label image has one number a pixel. In ADE20K 0 is unlabelled and ignored, and 1 to 150 become 0
to 149, whose names stand in DIR/objectInfo150.txt. With a file DIR/classes.txt, a name a line,
number k is the class on its line k + 1. Images are turned upright by their EXIF data: labels must
fit them as they are seen. Checked in tests/test_ade20k.py.
"""
import os
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import BadInput
from sources import prepare

ADE_CLASSES = 150
IGNORED = 255
FOLDERS = {"train": ("training", "train"), "val": ("validation", "val", "valid")}
PAIRS = "expected images/NAME.jpg and its label annotations/NAME.png, or labels/NAME.png"
MEND = "mend or remove it"


class Pairs:
    """One split: image files and, for each, its label file."""

    mean = (0.485, 0.456, 0.406)        # ImageNet's, whatever the ViT was trained with
    std = (0.229, 0.224, 0.225)
    in_memory = False

    def __init__(self, images, labels, names, first):
        self.images = images
        self.labels = labels
        self.label_names = self.classes = names
        self.first = first              # number in the file of label 0; smaller ones are ignored

    def __len__(self):
        return len(self.images)

    def digest(self):
        """A text that tells these files from others."""
        files = [*self.images, *self.labels]
        return prepare.fingerprint(files, Path(os.path.commonpath(files)))

    def labelled(self, index):
        """image uint8 (3, H, W), label uint8 (H, W). Raises: BadInput, naming the file."""
        image = prepare.read_image(self.images[index]).contiguous()
        label = self.label(index)
        if label.shape != image.shape[1:]:
            raise BadInput(f"{self.labels[index]}: {label.shape[1]} x {label.shape[0]} pixels, its "
                           f"image has {image.shape[2]} x {image.shape[1]}; {MEND}")
        return image, label

    def label(self, index):
        """uint8 (H, W)"""
        path = self.labels[index]
        with prepare.open_image(path) as image:
            if image.mode not in ("L", "P", "I", "I;16"):
                raise ValueError(f"kind {image.mode}, expected one number a pixel")
            label = np.array(image, dtype=np.int64) - self.first
        ignored = (label < 0) | (label == IGNORED - self.first)
        highest = label.max(initial=0, where=~ignored)
        if highest >= len(self.label_names):
            raise BadInput(f"{path}: has label {highest + self.first}, expected {self.first} to "
                           f"{len(self.label_names) + self.first - 1}, or {IGNORED} to be ignored; "
                           "mend it or classes.txt")
        return torch.from_numpy(np.where(ignored, IGNORED, label).astype(np.uint8))


def load(config, split):
    """The split "train" or "val", --limit of its images, evenly spread.

    Every label of `val` is read here, so that a bad file is found before days of training."""
    root = Path(config.data_dir)
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    pairs = find_pairs(root, split)
    if 0 < config.limit < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, config.limit).astype(int)]
    found = Pairs(*zip(*pairs), *label_names(root))
    if split == "val":
        labelled = [bool((found.label(index) != IGNORED).any()) for index in range(len(found))]
        if not any(labelled):
            raise BadInput(f"{found.labels[0].parent}: not a single labelled pixel in "
                           f"{len(found):,} images of val; mend them")
    return found


def label_names(root):
    """Names of the labels, and the number that stands for the first of them in the files."""
    own = root / "classes.txt"
    ade = root / "objectInfo150.txt"
    if own.exists():
        lines = prepare.read_text(own, MEND).splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not 2 <= len(names) <= IGNORED:
            raise BadInput(f"{own}: {len(names)} names, expected 2 to {IGNORED}, one a line")
        return names, 0
    if not ade.exists():
        return [str(number) for number in range(1, ADE_CLASSES + 1)], 1
    rows = [line.split("\t") for line in prepare.read_text(ade, MEND).splitlines()[1:]]
    names = [row[-1].split(",")[0].strip() for row in rows if len(row) > 1]
    if len(names) != ADE_CLASSES:
        raise BadInput(f"{ade}: {len(names)} classes, expected {ADE_CLASSES}; fetch ADE20K again")
    return names, 1


def find_pairs(root, split):
    """[(image file, label file)] of a split."""
    images = root / "images"
    labels = root / ("labels" if (root / "labels").is_dir() else "annotations")
    if not images.is_dir() or not labels.is_dir():
        raise BadInput(f"{root}: no images and annotations there; {PAIRS}")
    there = {kind: [name for name in names if (images / name).is_dir()]
             for kind, names in FOLDERS.items()}
    if all(there.values()):
        return matched(images / there[split][0], labels / there[split][0])
    if any(there.values()):
        raise BadInput(f"{images}: only one split there; expected training and validation")
    pairs = matched(images, labels)
    if len(pairs) < 2:
        raise BadInput(f"{images}: a single image cannot be split into train and val; add more")
    order = np.random.default_rng(prepare.SPLIT_SEED).permutation(len(pairs))
    held_out = order < max(1, len(pairs) // 10)
    return [pair for pair, out in zip(pairs, held_out) if out == (split == "val")]


def matched(images, labels):
    """Each image below a folder with its label, which lies in the other at the same place."""
    pairs = []
    for image in prepare.image_files(images):
        label = labels / image.relative_to(images).with_suffix(".png")
        prepare.require(label, f"the label of {image}; {PAIRS}")
        pairs.append((image, label))
    return pairs
