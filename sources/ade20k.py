"""Images with a label for each pixel: ADE20K's folders, or pairs of one's own.

    DIR/images/training/NAME.jpg            DIR/annotations/training/NAME.png
    DIR/images/validation/NAME.jpg          DIR/annotations/validation/NAME.png

    load(config, split).labelled(i)     ->  image uint8 (3, H, W), label uint8 (H, W), 255 ignored

DIR is --data-dir, or ADEChallengeData2016 in it. `train` and `val` will do as well, and `labels`
for `annotations`. Without such folders the images themselves lie in DIR/images, and a tenth of them
is held out.

A label image has one number a pixel. In ADE20K 0 is nobody's, and 1 to 150 become 0 to 149, whose
names stand in DIR/objectInfo150.txt. Who has a file DIR/classes.txt, a name a line, means by the
numbers its lines, from 0 up. Checked in tests/test_ade20k.py.
"""
import os
from pathlib import Path

import numpy as np
import torch

from plumbing.errors import BadInput
from sources.prepare import SPLIT_SEED, fingerprint, image_files, read_text, rgb

ADE_CLASSES = 150
IGNORED = 255
FOLDERS = {"train": ("training", "train"), "val": ("validation", "val", "valid")}
PAIRS = "expected images/NAME.jpg and its label annotations/NAME.png, or labels/NAME.png"
MEND = "mend or remove it"


class Pairs:
    """One split: image files and, for each, its label file."""

    mean = (0.485, 0.456, 0.406)        # ImageNet's, with which a ViT probed here was trained
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
        return fingerprint(files, Path(os.path.commonpath(files)))

    def labelled(self, index):
        """image uint8 (3, H, W), label uint8 (H, W). Raises: BadInput, naming the file."""
        image = torch.from_numpy(np.array(opened(self.images[index], rgb))).movedim(2, 0)
        label = self.label(index)
        if label.shape != image.shape[1:]:
            raise BadInput(f"{self.labels[index]}: {label.shape[1]} x {label.shape[0]} pixels, its "
                           f"image has {image.shape[2]} x {image.shape[1]}; {MEND}")
        return image.contiguous(), label

    def label(self, index):
        """uint8 (H, W)"""
        path = self.labels[index]
        number = opened(path, one_number).astype(np.int64)
        highest = self.first + len(self.label_names) - 1
        wrong = (number > highest) & (number != IGNORED) | (number < 0)
        if wrong.any():
            raise BadInput(f"{path}: has label {number[wrong][0]}, expected {self.first} to "
                           f"{highest}, or {IGNORED} to be ignored; mend it or classes.txt")
        nobody = (number < self.first) | (number == IGNORED)
        return torch.from_numpy(np.where(nobody, IGNORED, number - self.first).astype(np.uint8))


def load(config, split):
    """The split "train" or "val", --limit of its images, evenly spread.

    Every label of `val` is read once: its score comes after days of training."""
    root = Path(config.data_dir)
    if (root / "ADEChallengeData2016").is_dir():
        root = root / "ADEChallengeData2016"
    names, first = label_names(root)
    pairs = find_pairs(root, split)
    if 0 < config.limit < len(pairs):
        pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, config.limit).astype(int)]
    images, labels = zip(*pairs)
    found = Pairs(images, labels, names, first)
    if split == "val":
        for index in range(len(found)):
            found.label(index)
    return found


def label_names(root):
    """Names of the labels, and the number that stands for the first of them in the files."""
    own = root / "classes.txt"
    ade = root / "objectInfo150.txt"
    if own.exists():
        names = [line.strip() for line in read_text(own, MEND).splitlines() if line.strip()]
        if not 2 <= len(names) <= IGNORED:
            raise BadInput(f"{own}: {len(names)} names, expected 2 to {IGNORED}, one a line")
        return names, 0
    names = [str(number) for number in range(1, ADE_CLASSES + 1)]
    if ade.exists():
        rows = [line.split("\t") for line in read_text(ade, MEND).splitlines()[1:]]
        names = [row[-1].split(",")[0].strip() for row in rows if len(row) > 1]
        if len(names) != ADE_CLASSES:
            raise BadInput(f"{ade}: {len(names)} classes, expected {ADE_CLASSES} below a line of "
                           "titles; fetch ADE20K again")
    return names, 1


def find_pairs(root, split):
    """[(image file, label file)] of a split."""
    images = root / "images"
    labels = root / ("labels" if (root / "labels").is_dir() else "annotations")
    if not images.is_dir() or not labels.is_dir():
        raise BadInput(f"{root}: no images and annotations there; {PAIRS}")
    kinds = {name: [f for f in folders if (images / f).is_dir()]
             for name, folders in FOLDERS.items()}
    if any(kinds.values()):
        if not all(kinds.values()):
            raise BadInput(f"{images}: only one split there; expected training and validation")
        return matched(images / kinds[split][0], labels / kinds[split][0])
    pairs = matched(images, labels)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pairs))
    held_out = order < max(1, len(pairs) // 10)
    if len(pairs) < 2:
        raise BadInput(f"{images}: a single image cannot be split into train and val; add more")
    return [pair for pair, out in zip(pairs, held_out) if out == (split == "val")]


def matched(images, labels):
    """Each image below a folder with its label, which lies in the other at the same place."""
    pairs = []
    for image in image_files(images):
        label = labels / image.relative_to(images).with_suffix(".png")
        if not label.is_file():
            raise BadInput(f"{label}: not found, the label of {image}; {PAIRS}")
        pairs.append((image, label))
    return pairs


def opened(path, convert):
    """convert(the image in a file) as an array. Raises: BadInput, naming the file."""
    from PIL import Image
    try:
        with open(path, "rb") as file:
            return np.asarray(convert(Image.open(file)))
    except Exception as error:          # what Pillow raises on damaged files has no common type
        reason = str(error) or type(error).__name__
        raise BadInput(f"{path}: not readable ({reason}); {MEND}") from None


def one_number(image):
    """A PIL image with one number a pixel: grey or a palette's."""
    if image.mode not in ("L", "P", "I", "I;16"):
        raise ValueError(f"kind {image.mode}, expected one number a pixel")
    return image
