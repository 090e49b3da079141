"""How users lay out folders of images: which folder is which split, and which class a file shows.

    DIR/train/<class>/*, DIR/val/<class>/*      two splits
    DIR/<class>/*                               one, of which datasets.read_folder holds out a tenth

Names of splits are understood in any case: train or training; val, valid or validation, else test
or testing. A folder that looks like half of such a pair is refused: taken for a class, it would let
the model train on test images.
Checked in tests/test_datasets.py; strange layouts in tests/test_hostile_data.py.
"""
import re
from pathlib import Path

import numpy as np

from plumbing.errors import BadInput
from sources.prepare import SUFFIXES, image_files

TRAIN = ("train", "training")
VAL = ("val", "valid", "validation")
TEST = ("test", "testing")
# train2017, val_images, test-set, dev, ...
LIKE_A_SPLIT = re.compile(r"(train|training|val|valid|validation|test|testing|dev|eval)"
                          r"([-_ .]?(set|split|data|images?|imgs?|\d+))?", re.IGNORECASE)
USUAL = "expected train and val (or valid, validation, test), or folders named by classes"


def split_folders(root):
    """Folders (train, val) of root, or None where its folders are classes.

    Raises: BadInput for what is neither."""
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")]
    train = _named(folders, TRAIN)
    val = _named(folders, VAL) or _named(folders, TEST)
    for twins in (train, val):
        if len(twins) > 1:
            raise BadInput(f"{root}: {twins[0].name} and {twins[1].name} both name one split; "
                           "remove or rename one")
    if train and val:
        if train[0].samefile(val[0]):
            raise BadInput(f"{val[0]}: the same folder as {train[0]}, so probes would be tested on "
                           "what they learn from; give other images for val")
        return train[0], val[0]
    suspects = [f for f in folders if LIKE_A_SPLIT.fullmatch(f.name)]
    others = len(folders) - len(suspects)
    for folder in suspects:
        # A class may be called "train", too: then images lie in it, and other classes beside it.
        if not others or not _holds_images(folder):
            raise BadInput(f"{folder}: looks like one split of several; {USUAL}; for a seeded "
                           f"90/10 split of it alone give --data-dir {folder}")
    if len(folders) == 1 and not _holds_images(root):
        within = [f.name for f in folders[0].iterdir() if f.is_dir()]
        if any(LIKE_A_SPLIT.fullmatch(name) for name in within):
            raise BadInput(f"{root}: holds only {folders[0].name}, and that holds splits; "
                           f"give --data-dir {folders[0]}")
    return None


def _named(folders, names):
    """Those of the folders that have one of the names, in any case."""
    return [folder for folder in folders if folder.name.lower() in names]


def _holds_images(folder):
    """Whether images lie directly in the folder."""
    return any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def class_of(file, root):
    """First folder below root; images that lie in root itself form one class, ""."""
    parts = Path(file).relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def classes_of(files, root):
    """Names of the classes of files, sorted."""
    return sorted({class_of(file, root) for file in files})


def labels_of(names, classes):
    """Names of classes -> labels (N,) int64."""
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[name] for name in names])


def labelled(train, val, name):
    """Images of one of two folders, `name` "train" or "val": files, labels (N,), names of classes.

    Raises: BadInput if val has a class that train has not."""
    of_train = image_files(train)
    of_val = image_files(val)
    classes = classes_of(of_train, train)
    unknown = sorted(set(classes_of(of_val, val)) - set(classes))
    if unknown:
        raise BadInput(f"{val / unknown[0]}: no such class in {train}; "
                       "both folders must name the same classes")
    files, top = (of_val, val) if name == "val" else (of_train, train)
    return files, labels_of([class_of(file, top) for file in files], classes), classes
