"""The fine-grained sets of DSeq-JEPA's Table 1, as they are published: CUB, Cars, iNat21.

    cub      DATA_DIR/[CUB_200_2011/]images/CLASS/*.jpg, images.txt, image_class_labels.txt,
             train_test_split.txt: 200 classes, 5,994 / 5,794 images        (Wah et al., 2011)
    cars     DATA_DIR/[stanford_cars/]{cars_train,cars_test}/*.jpg, devkit/cars_train_annos.mat and
             cars_meta.mat, cars_test_annos_withlabels.mat there or beside, which SciPy reads; or
             {train,test}/CLASS/*: 196 classes, 8,144 / 8,041 images        (Krause et al., 2013)
    inat21   DATA_DIR/2021_train_mini or else 2021_train, 2021_valid; or train_mini or else train,
             val; CLASS/* in each: 10,000 classes, 500,000 or 2,686,843 / 100,000 images

`val` is what is published to test on. Pictures are held whole (prepare.pictures).
Checked in tests/test_finegrained.py.
"""
from pathlib import Path

import numpy as np

from plumbing.errors import BadInput
from sources import prepare
from sources.folders import labelled, split_folders

# Of each, the first that is there.
INAT21_TRAIN = ("2021_train_mini", "2021_train", "train_mini", "train")
INAT21_VAL = ("2021_valid", "val")
MAT = "unpack Stanford Cars again, or sort its images into train/CLASS/ and test/CLASS/"


def _root(config, folder):
    """The data set's own folder in --data-dir, or --data-dir itself."""
    root = Path(config.data_dir)
    prepare.require(root, f"--dataset {config.dataset} reads images from --data-dir")
    return root / folder if (root / folder).is_dir() else root


# ---------------------------------------------------------------- CUB-200-2011

def read_cub(config, split):
    """CUB-200-2011 by its own split."""
    root = _root(config, "CUB_200_2011")
    paths = _table(root / "images.txt")
    numbers = _table(root / "image_class_labels.txt", paths)
    is_train = _table(root / "train_test_split.txt", paths)
    for name, column, expected in (("image_class_labels.txt", numbers, str.isdecimal),
                                   ("train_test_split.txt", is_train, ("0", "1").__contains__)):
        wrong = [value for value in column.values() if not expected(value)]
        if wrong:
            raise BadInput(f"{root / name}: {wrong[0]!r} is no class number or no 0 or 1; "
                           "unpack CUB_200_2011 again")
    listing = root / "images.txt"
    class_names = {int(numbers[i]): Path(path).parts[0] for i, path in paths.items()}
    order = sorted(class_names)                             # labels are 1 to 200
    wanted = "0" if split == "val" else "1"
    chosen = [i for i in paths if is_train[i] == wanted]
    if not chosen:
        raise BadInput(f"{root / 'train_test_split.txt'}: no image is for {split}; "
                       "unpack CUB_200_2011 again")
    files = [prepare.inside(root / "images", paths[i], listing) for i in chosen]
    labels = np.array([order.index(int(numbers[i])) for i in chosen])
    classes = [class_names[number] for number in order]
    return prepare.pictures(files, labels, classes, config, "val" if split == "val" else "train")


def _table(path, keys=None):
    """A file of "key value" lines as a dictionary, in their order.

    Raises: BadInput for other lines, or for other keys than these."""
    text = prepare.read_text(path, "unpack CUB_200_2011 into --data-dir")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    table = {line[0]: line[1] for line in lines if len(line) == 2}
    if not lines or len(table) != len(lines):
        raise BadInput(f"{path}: expected lines of a number and a word, each number once; "
                       "unpack CUB_200_2011 again")
    if keys is not None and table.keys() != keys.keys():
        raise BadInput(f"{path}: lists other images than images.txt; unpack CUB_200_2011 again")
    return table


# ---------------------------------------------------------------- Stanford Cars

def read_cars(config, split):
    """Stanford Cars: its devkit's annotations where they are, else folders of classes."""
    root = _root(config, "stanford_cars")
    name = "val" if split == "val" else "train"
    if not (root / "devkit").is_dir():
        found = split_folders(root)
        if not found:
            raise BadInput(f"{root}: neither devkit/ with Stanford Cars' annotations nor train/ "
                           f"and test/ with a folder per class; {MAT}")
        files, labels, classes = labelled(*found, name)
        return prepare.pictures(files, labels, classes, config, name)
    classes = [str(word) for word in _mat(root / "devkit" / "cars_meta.mat", "class_names")]
    listing = root / "devkit" / "cars_train_annos.mat"
    folder = root / "cars_train"
    if name == "val":
        listing = root / "cars_test_annos_withlabels.mat"
        if not listing.exists():
            listing = root / "devkit" / listing.name
        folder = root / "cars_test"
    cars = _mat(listing, "annotations")
    try:
        names = [str(word) for word in cars["fname"]]
        labels = np.array([int(number) for number in cars["class"]]) - 1
    except (ValueError, TypeError, IndexError):
        raise BadInput(f"{listing}: expected a name and a class of each car; {MAT}") from None
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise BadInput(f"{listing}: expected classes 1 to {len(classes)}; {MAT}")
    files = [prepare.inside(folder, word, listing) for word in names]
    prepare.require_listed(files, folder, listing)
    return prepare.pictures(files, labels, classes, config, name)


def _mat(path, variable):
    """A variable of a .mat file: a one-dimensional array.

    Raises: BadInput for a missing or damaged file, or where SciPy is missing."""
    prepare.require_file(path, MAT)
    try:
        from scipy.io import loadmat
    except ImportError:
        raise BadInput(f"{path}: only SciPy reads such annotations; pip install scipy, or sort the "
                       "images into train/CLASS/ and test/CLASS/, and put devkit/ away") from None
    try:
        return np.atleast_1d(loadmat(path, squeeze_me=True)[variable])
    except Exception:                   # what SciPy raises on damaged files has no common type
        raise BadInput(f"{path}: not Stanford Cars' {variable}; {MAT}") from None


# ---------------------------------------------------------------- iNaturalist 2021

def read_inat21(config, split):
    """iNaturalist 2021. Where both training sets are, the small one: the authors' settings name
    it."""
    root = _root(config, "inat21")
    name = "val" if split == "val" else "train"
    train = _first(root, INAT21_TRAIN)
    val = _first(root, INAT21_VAL)
    files, labels, classes = labelled(train, val, name)
    return prepare.pictures(files, labels, classes, config, f"{name}-{train.name}")


def _first(root, names):
    """The first of the folders that is there."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise BadInput(f"{root}: none of the folders {', '.join(names)}; unpack iNaturalist 2021 into "
                   "--data-dir")
