"""Write an STL-10-format set of real photos from Tiny ImageNet, to try the STL-10 path offline.

    python results/make_stl10_from_tiny.py TINY_IMAGENET_PARENT OUT

Ten classes, photos enlarged from 64 to 96 px (bicubic): 350 training and 200 test images a class,
and 16,500 unlabelled images of the other classes, in OUT/stl10_binary/*.bin exactly as STL-10
stores them (uint8, planes column by column, labels from 1).  It is not STL-10: numbers from it
compare with each other only.
"""
import sys
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.v2 import functional as TF

CLASSES = {
    "goldfish": "n01443537", "elephant": "n02504458", "cat": "n02124075", "retriever": "n02099601",
    "school bus": "n04146614", "sports car": "n04285008", "lifeboat": "n03662601",
    "butterfly": "n02281406", "pizza": "n07873807", "beacon": "n02814860",
}
TRAINING = 350              # images a class; the rest and those of `val` are for the test
UNLABELLED = 16_500


def pixels(files):
    """(n, 3, 96, 96) uint8, each plane stored column by column."""
    images = torch.stack([TF.pil_to_tensor(pil_loader(f)) for f in files])
    images = TF.resize(images, 96, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return np.ascontiguousarray(images.numpy().transpose(0, 1, 3, 2))


def write_labelled(rows, out, name):
    """Shuffle rows (file, label) and write them as split `name`, "train" or "test"."""
    order = np.random.default_rng(0).permutation(len(rows))
    files, labels = zip(*[rows[i] for i in order])
    pixels(files).tofile(out / f"{name}_X.bin")
    np.array(labels, dtype=np.uint8).tofile(out / f"{name}_y.bin")


def main(source, out):
    """Write OUT/stl10_binary from SOURCE/tiny-imagenet-200."""
    root = Path(source) / "tiny-imagenet-200"
    out = Path(out) / "stl10_binary"
    out.mkdir(parents=True)
    annotations = (root / "val" / "val_annotations.txt").read_text().splitlines()
    val = [line.split("\t")[:2] for line in annotations]            # (file name, class)
    train = []
    test = []
    for label, wnid in enumerate(CLASSES.values(), 1):
        files = sorted((root / "train" / wnid / "images").iterdir())
        held_out = [root / "val" / "images" / name for name, w in val if w == wnid]
        train += [(f, label) for f in files[:TRAINING]]
        test += [(f, label) for f in files[TRAINING:] + held_out]
    write_labelled(train, out, "train")
    write_labelled(test, out, "test")
    (out / "class_names.txt").write_text("\n".join(name.replace(" ", "-") for name in CLASSES))

    others = []
    for folder in sorted((root / "train").iterdir()):
        if folder.name not in CLASSES.values():
            others += sorted((folder / "images").iterdir())
    chosen = np.random.default_rng(0).choice(len(others), UNLABELLED, replace=False)
    pixels([others[i] for i in chosen]).tofile(out / "unlabeled_X.bin")


if __name__ == "__main__":
    main(*sys.argv[1:])
