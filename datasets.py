"""Data sets (seq-JEPA A.1): where images come from.

    load(config, split)  ->  images.Split

Splits: `pretrain` is what the model learns from, `train` and `val` are for the probes. They differ
only on STL-10, whose 100,000 unlabelled images join its training images in `pretrain`.
A data set is a reader, (config, split) -> prepare.Reading, and a row in the two tables at the end.
In mode regions photographs are kept whole (images.Pictures), elsewhere as squares.
Large files are memory-mapped. What must be decoded, resized or rendered is made once, and kept
under DATA_DIR/.cache (prepare.py). Each reader also looks, without decoding, at the validation
split, so that training says at its start what evaluation would stumble over.
torchvision is imported where it is used: it takes a second, and a mistyped flag is refused before.
Checked in tests/test_datasets.py; bad files in tests/test_hostile_data.py.
"""
import hashlib
from pathlib import Path

import numpy as np
import torch

from images import Part, Split
from plumbing.cache import cache_path, cached
from plumbing.errors import BadInput, printable
from sources import prepare, shapes, solids
from sources.clevr import CLASSES as CLEVR_CLASSES
from sources.clevr import clevr_files, vtab_train
from sources.finegrained import read_cars, read_cub, read_inat21
from sources.folders import class_of, classes_of, labelled, labels_of, split_folders
from sources.prepare import SPLIT_SEED, Reading
from sources.threediebench import read_3diebench


def load(config, split):
    """The images of one split at config.image_size.

    split: "pretrain", "train" or "val".
    Raises: BadInput, naming the file or folder, for anything missing, truncated or unreadable."""
    root = Path(config.data_dir)
    if root.exists() and not root.is_dir():
        raise BadInput(f"--data-dir {root}: not a folder")
    found = READERS[config.dataset](config, split)
    if len(found.classes) == 1 and split != "val":
        print(f"note: {printable(root)} has a single class: to tell classes apart means nothing")
    classes = [printable(name) for name in found.classes]
    mean, std = STATISTICS[config.dataset]
    return Split(found.parts, found.labels, classes, mean, std, found.source, found.latents,
                 found.masks)


def part_names(config, split):
    """Names of the parts that load(config, split) will return, before it is called."""
    if config.dataset == "stl10":
        return STL10_FILES[split]
    return ("val",) if split == "val" else ("train",)


# ---------------------------------------------------------------- STL-10

STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer",
                 "dog", "horse", "monkey", "ship", "truck"]
STL10_FILES = {"pretrain": ("unlabeled", "train"), "train": ("train",), "val": ("test",)}
STL10_SIDE = 96
STL10_BYTES = 3 * STL10_SIDE * STL10_SIDE


def read_stl10(config, split):
    """stl10_binary/{train,test,unlabeled}_X.bin: uint8 images, each plane stored by columns.

    --limit N takes N images of each file."""
    folder = Path(config.data_dir) / "stl10_binary"
    if not folder.exists() and config.download:
        import torchvision
        _download(torchvision.datasets.STL10, config.data_dir, split="train")
    # All files, not only those of this split: so `pretrain` and `train` share caches.
    stamps = {file.name: _stamp(file) for file in sorted(folder.glob("*.bin"))}
    source = dict(dataset="stl10", limit=config.limit, size=config.image_size, files=stamps)
    parts = []
    labels = []
    read = {name: _stl10_file(folder, name) for name in (*STL10_FILES[split], "test")}
    for name in STL10_FILES[split]:
        x, y = read[name]
        part, part_labels = prepare.limited(x, y, name, source, config)
        parts.append(part)
        labels.append(part_labels)
    return Reading(parts, np.concatenate(labels), _stl10_classes(folder), source)


def _stl10_classes(folder):
    path = folder / "class_names.txt"
    if not path.exists():
        return STL10_CLASSES
    classes = prepare.read_text(path, "fetch STL-10 again").split()
    if len(classes) != len(STL10_CLASSES):
        raise BadInput(f"{path}: {len(classes)} names, expected {len(STL10_CLASSES)}; delete it "
                       "or fetch STL-10 again")
    return classes


def _stl10_file(folder, name):
    """Images (n, 3, 96, 96) of one file, and their labels (n,), -1 where there are none."""
    x = _stl10_images(folder / f"{name}_X.bin")
    if name == "unlabeled":
        return x, np.full(len(x), -1)
    return x, _stl10_labels(folder / f"{name}_y.bin", len(x))


def _stl10_images(path):
    prepare.require_file(path, "STL-10's binary version lies in DATA_DIR/stl10_binary; "
                               "fix --data-dir or allow --download")
    size = path.stat().st_size
    if size == 0 or size % STL10_BYTES:
        raise BadInput(f"{path}: {size:,} bytes is not a whole number of 96x96 images "
                       f"({STL10_BYTES:,} bytes each); fetch it again")
    planes = np.memmap(path, np.uint8, mode="c").reshape(-1, 3, STL10_SIDE, STL10_SIDE)
    return planes.transpose(0, 1, 3, 2)                     # stored column by column


def _stl10_labels(path, count):
    prepare.require_file(path, "it belongs beside the images of the same split; fetch STL-10 again")
    y = np.fromfile(path, np.uint8).astype(np.int64) - 1    # stored as 1 to 10
    if len(y) != count:
        raise BadInput(f"{path}: {len(y):,} labels for {count:,} images; fetch STL-10 again")
    if y.min() < 0 or y.max() >= len(STL10_CLASSES):
        raise BadInput(f"{path}: labels run from {y.min() + 1} to {y.max() + 1}, "
                       "expected 1 to 10; fetch STL-10 again")
    return y


# ---------------------------------------------------------------- CIFAR

def read_cifar(config, split):
    """CIFAR-10 and -100 through torchvision's readers, which verify checksums."""
    import torchvision
    readers = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    reader = readers[config.dataset]
    name = "val" if split == "val" else "train"
    try:
        data = reader(config.data_dir, train=name == "train")
    except RuntimeError:
        if not config.download:
            raise BadInput(f"{config.data_dir}: no intact {config.dataset} there "
                           "and --no-download given; fix --data-dir or allow --download") from None
        data = _download(reader, config.data_dir, train=name == "train")
    images = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
    labels = np.asarray(data.targets, dtype=np.int64)
    source = dict(dataset=config.dataset, part=name, limit=config.limit, size=config.image_size)
    part, labels = prepare.limited(images, labels, name, source, config)
    return Reading([part], labels, data.classes, source)


# ---------------------------------------------------------------- image files

def read_folder(config, split):
    """DIR/train/<class>/* and DIR/val/<class>/*, or DIR/<class>/* with a seeded 90/10 split.

    `val` may also be called valid, validation or, where there is none of these, test."""
    root = Path(config.data_dir)
    name = "val" if split == "val" else "train"
    prepare.require(root, f"--dataset {config.dataset} reads images from --data-dir")
    found = split_folders(root)
    if found:
        files, labels, classes = labelled(*found, name)
    else:
        everything = prepare.image_files(root)
        classes = classes_of(everything, root)
        if len(everything) < 2:
            raise BadInput(f"{root}: a single image cannot be split into train and val; add more")
        # A tenth is held out for val, at least one image, and always the same ones.
        order = np.random.default_rng(SPLIT_SEED).permutation(len(everything))
        held_out = order < max(1, len(everything) // 10)
        wanted = held_out if name == "val" else ~held_out
        files = [file for file, keep in zip(everything, wanted) if keep]
        labels = labels_of([class_of(file, root) for file in files], classes)
    # Mode regions crops the file's whole picture; other modes the middle square.
    keep = prepare.pictures if config.mode == "regions" else prepare.decoded
    return keep(files, labels, classes, config, name)


def read_tiny_imagenet(config, split):
    """tiny-imagenet-200/train/<wnid>/images/* and val/images/* with val_annotations.txt."""
    root = Path(config.data_dir) / "tiny-imagenet-200"
    prepare.require(root, "unpack tiny-imagenet-200.zip into --data-dir")
    listing = root / "wnids.txt"
    classes = sorted(set(prepare.read_text(listing, "Tiny ImageNet lists its 200 classes there; "
                                                    "unpack it again").split()))
    if not classes:
        raise BadInput(f"{listing}: empty, expected 200 classes; unpack Tiny ImageNet again")
    files, names = _tiny_imagenet_val(root / "val", classes)
    if split != "val":
        files = []
        names = []
        for wnid in classes:
            of_class = prepare.image_files(prepare.inside(root / "train", wnid, listing))
            files += of_class
            names += [wnid] * len(of_class)
    name = "val" if split == "val" else "train"
    return prepare.decoded(files, labels_of(names, classes), classes, config, name)


def _tiny_imagenet_val(folder, classes):
    """Validation images and, for each, the wnid of its class."""
    listing = folder / "val_annotations.txt"
    text = prepare.read_text(listing, "it names the class of each validation image; "
                                      "unpack Tiny ImageNet again")
    lines = [line.split() for line in text.splitlines()]
    if not lines or min(map(len, lines)) < 2:
        raise BadInput(f"{listing}: expected an image and its class on every line; unpack it again")
    unknown = sorted({line[1] for line in lines} - set(classes))
    if unknown:
        raise BadInput(f"{listing}: class {unknown[0]} is not in wnids.txt; "
                       "unpack Tiny ImageNet again")
    files = [prepare.inside(folder / "images", line[0], listing) for line in lines]
    prepare.require_listed(files, folder / "images", listing)
    return files, [line[1] for line in lines]


def read_clevr(config, split):
    """CLEVR's images, squashed to squares, with one of its two labellings.

    `val` is its validation split, `train` VTAB-1k's 800 of its training split, and `pretrain`, for
    which labels do not count, all of that."""
    name = "val" if split == "val" else "train"
    files, labels = clevr_files(config.data_dir, config.dataset, "val")
    prepare.require_listed(files, files[0].parent, "CLEVR_val_scenes.json")
    if name == "train":
        files, labels = clevr_files(config.data_dir, config.dataset, name)
    if split == "train":
        few = vtab_train(len(files))
        files = files[:few]
        labels = labels[:few]
        name = f"train{few}"
    classes = CLEVR_CLASSES[config.dataset]
    return prepare.decoded(files, labels, classes, config, name, squash=True)


# ---------------------------------------------------------------- embedded solids

SOLIDS_OBJECTS = 4800             # training objects without --limit; a quarter as many for val


def read_solids(config, split):
    """Procedural renders of solids.py; --limit counts training objects."""
    name = "val" if split == "val" else "train"
    count = config.limit or SOLIDS_OBJECTS
    if name == "val":
        count = max(len(shapes.CLASSES), count // 4)
    views = config.object_views
    size = config.image_size
    latents_of = dict(seed=SPLIT_SEED, rotation_range=config.rotation_range,
                      hue_range=config.hue_range)
    settings = dict(latents_of, material=config.material)
    code = [_digest(solids.__file__), _digest(shapes.__file__)]
    source = dict(dataset="solids", part=name, code=code, **settings)

    def fill(array):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for objects, images in solids.render_split(name, count, views, size, device=device,
                                                   **settings):
            array[objects] = images
            yield objects.stop

    path = cache_path(config, f"{name}-{views}views")
    shape = (count, views, 3, size, size)
    images = cached(path, source, shape, np.uint8, fill, f"rendering {name} solids")
    objects = solids.sample_objects(count, SPLIT_SEED, name, config.material)
    latents = solids.sample_latents(count, views, split=name, **latents_of)

    def masks(index):
        return solids.object_masks(objects, index // views, latents.flatten(0, 1)[index], size)

    return Reading([Part(images, name, None, count)], objects.labels.numpy(), list(shapes.CLASSES),
                   dict(source, shape=images.shape), latents.numpy(), masks)


# ---------------------------------------------------------------- shared by the readers

def _download(reader, root, **which):
    try:
        return reader(root, download=True, **which)
    except Exception as error:      # torchvision raises many: no network, wrong checksum, no room
        raise BadInput(f"{root}: could not download {reader.__name__} ({error}); "
                       "place the files there by hand") from None


def _stamp(path):
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------- what there is

READERS = {
    "stl10": read_stl10,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "tiny-imagenet": read_tiny_imagenet,
    "3diebench": read_3diebench,
    "imagenet": read_folder,
    "folder": read_folder,
    "clevr-count": read_clevr,
    "clevr-distance": read_clevr,
    "cub": read_cub,
    "cars": read_cars,
    "inat21": read_inat21,
    "solids": read_solids,
}

# Mean and standard deviation of pixels in [0, 1].  A.1; ImageNet's are the usual ones.
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2241, 0.2215, 0.2239)),
    "cifar10": CIFAR_STATISTICS,
    "cifar100": CIFAR_STATISTICS,
    "tiny-imagenet": CIFAR_STATISTICS,
    "3diebench": ((0.5016, 0.5037, 0.5060), (0.1030, 0.0999, 0.0969)),
    "imagenet": IMAGENET_STATISTICS,
    "folder": IMAGENET_STATISTICS,
    "clevr-count": IMAGENET_STATISTICS,
    "clevr-distance": IMAGENET_STATISTICS,
    "cub": IMAGENET_STATISTICS,
    "cars": IMAGENET_STATISTICS,
    "inat21": IMAGENET_STATISTICS,
    "solids": ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
}
