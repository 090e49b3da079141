"""Data sets (seq-JEPA A.1): where images come from.

    load(config, split)  ->  images.Split

Splits: `pretrain` is what the model learns from, `train` and `val` are for the probes. They differ only
on STL-10, whose 100,000 unlabelled images join its training images in `pretrain`.
Every reader returns (parts, labels, classes, source) and, for rendered objects, their latents. Large files
are memory-mapped; image files are decoded once, into an array cached under DATA_DIR/.cache.
Checked in tests/test_datasets.py.
"""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

from images import SPLIT_SEED, Part, Split, choose, decode
from plumbing.cache import cache_path, cached
from plumbing.errors import BadInput
from sources import shapes, solids
from sources.clevr import CLASSES as CLEVR_CLASSES
from sources.clevr import clevr_files
from sources.threediebench import read_3diebench

# Per data set: mean and standard deviation of pixels in [0, 1].  A.1; ImageNet's are the usual ones.
CIFAR_STATISTICS = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
IMAGENET_STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {
    "stl10": ((0.4467, 0.4398, 0.4066), (0.2241, 0.2215, 0.2239)),
    "cifar10": CIFAR_STATISTICS, "cifar100": CIFAR_STATISTICS, "tiny-imagenet": CIFAR_STATISTICS,
    "3diebench": ((0.5016, 0.5037, 0.5060), (0.1030, 0.0999, 0.0969)),
    "imagenet": IMAGENET_STATISTICS, "folder": IMAGENET_STATISTICS, "clevr-count": IMAGENET_STATISTICS, "clevr-distance": IMAGENET_STATISTICS,
    "solids": ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
}


def load(config, split):
    """The images of one split at config.image_size.

    split: "pretrain", "train" or "val".
    Raises: BadInput, naming the file or folder, for anything missing, truncated or unreadable."""
    parts, labels, classes, source, *latents = READERS[config.dataset](config, split)
    mean, std = STATISTICS[config.dataset]
    return Split(parts, labels, classes, mean, std, source, *latents)


# ---------------------------------------------------------------- STL-10

STL10_CLASSES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
STL10_SIDE, STL10_BYTES = 96, 3 * 96 * 96


def read_stl10(config, split):
    """stl10_binary/{train,test,unlabeled}_X.bin: uint8, one image after another, each plane by columns.

    --limit N takes N images of each file."""
    folder = Path(config.data_dir) / "stl10_binary"
    if not folder.exists() and config.download:
        _download(torchvision.datasets.STL10, config.data_dir, split="train")
    parts, labels = [], []
    stamps = {file.name: _stamp(file) for file in sorted(folder.glob("*.bin"))}      # all of them: `pretrain` and `train` share caches
    source = dict(dataset="stl10", limit=config.limit, size=config.image_size, files=stamps)
    for name in {"pretrain": ("unlabeled", "train"), "train": ("train",), "val": ("test",)}[split]:
        x = _stl10_images(folder / f"{name}_X.bin")
        y = np.full(len(x), -1) if name == "unlabeled" else _stl10_labels(folder / f"{name}_y.bin", len(x))
        parts.append(_part(x, y, name, source, config))
        labels.append(y if parts[-1].rows is None else y[parts[-1].rows])
    names = folder / "class_names.txt"
    classes = names.read_text().split() if names.exists() else STL10_CLASSES
    return parts, np.concatenate(labels), classes, source


def _stl10_images(path):
    _require(path, "STL-10's binary version lies in DATA_DIR/stl10_binary; fix --data-dir or allow --download")
    size = path.stat().st_size
    if size == 0 or size % STL10_BYTES:
        raise BadInput(f"{path}: {size:,} bytes is not a whole number of 96x96 images ({STL10_BYTES:,} bytes each); fetch it again")
    planes = np.memmap(path, np.uint8, mode="c").reshape(-1, 3, STL10_SIDE, STL10_SIDE)
    return planes.transpose(0, 1, 3, 2)                     # stored column by column


def _stl10_labels(path, count):
    _require(path, "it belongs beside the images of the same split; fetch STL-10 again")
    y = np.fromfile(path, np.uint8).astype(np.int64) - 1    # stored as 1 to 10
    if len(y) != count:
        raise BadInput(f"{path}: {len(y):,} labels for {count:,} images; fetch STL-10 again")
    if y.min() < 0 or y.max() >= len(STL10_CLASSES):
        raise BadInput(f"{path}: labels run from {y.min() + 1} to {y.max() + 1}, expected 1 to 10; fetch STL-10 again")
    return y


# ---------------------------------------------------------------- CIFAR

def read_cifar(config, split):
    """CIFAR-10 and -100 through torchvision's readers, which verify checksums."""
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[config.dataset]
    try:
        data = reader(config.data_dir, train=split != "val")
    except RuntimeError:
        if not config.download:
            raise BadInput(f"{config.data_dir}: no intact {config.dataset} there and --no-download given; "
                           "fix --data-dir or allow --download") from None
        data = _download(reader, config.data_dir, train=split != "val")
    labels, name = np.asarray(data.targets, dtype=np.int64), "val" if split == "val" else "train"
    source = dict(dataset=config.dataset, part=name, limit=config.limit, size=config.image_size)
    part = _part(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), labels, name, source, config)
    return [part], labels if part.rows is None else labels[part.rows], data.classes, source


# ---------------------------------------------------------------- image files

def read_folder(config, split):
    """DIR/{train,val}/<class>/* or, without these two folders, DIR/<class>/* with a seeded 90/10 split."""
    root, name = Path(config.data_dir), "val" if split == "val" else "train"
    _require(root, f"--dataset {config.dataset} reads images from --data-dir")
    if (root / "train").is_dir() and (root / "val").is_dir():
        classes = sorted({_class_of(f, root / "train") for f in image_files(root / "train")})
        files, top = image_files(root / name), root / name
    else:
        files, top = image_files(root), root
        classes = sorted({_class_of(f, root) for f in files})
        held_out = np.random.default_rng(SPLIT_SEED).permutation(len(files)) < max(1, len(files) // 10)
        files = [f for f, out in zip(files, held_out) if out == (name == "val")]
        if not files:
            raise BadInput(f"{root}: a single image cannot be split into train and val; add more")
    index = {c: i for i, c in enumerate(classes)}
    names = [_class_of(f, top) for f in files]
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise BadInput(f"{top / unknown[0]}: no such class in {root / 'train'}; both folders must name the same classes")
    return decoded(files, np.array([index[n] for n in names]), classes, config, name)


def read_tiny_imagenet(config, split):
    """tiny-imagenet-200/train/<wnid>/images/* and val/images/* with val_annotations.txt."""
    root = Path(config.data_dir) / "tiny-imagenet-200"
    _require(root, "unpack tiny-imagenet-200.zip into --data-dir")
    _require(root / "wnids.txt", "Tiny ImageNet lists its 200 classes there; unpack it again")
    classes = sorted((root / "wnids.txt").read_text().split())
    if split == "val":
        _require(root / "val" / "val_annotations.txt", "it names the class of each validation image; unpack it again")
        lines = [line.split() for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
        if not lines or min(map(len, lines)) < 2:
            raise BadInput(f"{root / 'val' / 'val_annotations.txt'}: expected an image and its class on every line; unpack it again")
        files, names = [root / "val" / "images" / line[0] for line in lines], [line[1] for line in lines]
    else:
        files = [f for c in classes for f in image_files(root / "train" / c)]
        names = [f.relative_to(root / "train").parts[0] for f in files]
    index = {c: i for i, c in enumerate(classes)}
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise BadInput(f"{root}: class {unknown[0]} is not in wnids.txt; unpack Tiny ImageNet again")
    return decoded(files, np.array([index[n] for n in names]), classes, config, "val" if split == "val" else "train")


def read_clevr(config, split):
    """CLEVR's images with one of its two labellings; `val` is its validation split."""
    name = "val" if split == "val" else "train"
    files, labels = clevr_files(config.data_dir, config.dataset, name)
    return decoded(files, labels, CLEVR_CLASSES[config.dataset], config, name)


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}


def image_files(folder):
    """All images below `folder`, sorted, through links too; hidden files and folders are skipped."""
    _require(folder, "expected a folder of images")
    files = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        files += [Path(where) / n for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    files.sort()
    if not files:
        raise BadInput(f"{folder}: no image there (looked for {' '.join(sorted(SUFFIXES))} at any depth)")
    return files


def decoded(files, labels, classes, config, name):
    """Decode the files that --limit leaves, once, at config.image_size, into the cache."""
    chosen, total, size = choose(labels, config.limit), len(files), config.image_size
    files = [files[i] for i in chosen]
    source = dict(dataset=config.dataset, files=fingerprint(files, Path(config.data_dir)), size=size)
    smallest = config.patch_size if config.mode == "regions" else 1

    def fill(array):
        with ThreadPoolExecutor(config.workers or None) as pool:                 # decoding releases the interpreter lock
            for start in range(0, len(files), 256):
                chunk = files[start:start + 256]
                for i, image in enumerate(pool.map(lambda f: decode(f, size, smallest), chunk), start):
                    array[i] = image
                yield start + len(chunk)

    images = cached(cache_path(config, name), source, (len(files), 3, size, size), np.uint8, fill, f"decoding {name} images")
    rows = None if len(chosen) == total else chosen
    return [Part(images, name, rows, total)], labels[chosen], classes, source


def fingerprint(files, root):
    """Names below `root`, sizes and times of files, hashed: changes when one is added, removed or replaced."""
    digest = hashlib.sha256()
    for file in files:
        _require(file, "listed but absent; fetch the data set again")
        status = file.stat()
        digest.update(f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- embedded solids

SOLIDS_OBJECTS = 4800             # training objects when --limit is not given; a quarter as many for val


def read_solids(config, split):
    """Procedural renders of solids.py; --limit counts training objects."""
    part = "val" if split == "val" else "train"
    count = config.limit or SOLIDS_OBJECTS
    count = max(len(shapes.CLASSES), count // 4) if part == "val" else count
    views, size = config.object_views, config.image_size
    settings = dict(seed=SPLIT_SEED, rotation_range=config.rotation_range, hue_range=config.hue_range)
    source = dict(dataset="solids", part=part, code=[_digest(solids.__file__), _digest(shapes.__file__)], **settings)

    def fill(array):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for objects, images in solids.render_split(part, count, views, size, device=device, **settings):
            array[objects] = images
            yield objects.stop

    path = cache_path(config, f"{part}-{views}views")
    images = cached(path, source, (count, views, 3, size, size), np.uint8, fill, f"rendering {part} solids")
    latents = solids.sample_latents(count, views, split=part, **settings)
    labels = solids.sample_objects(count, SPLIT_SEED, part).labels
    return [Part(images, part, None, count)], labels.numpy(), list(shapes.CLASSES), dict(source, shape=images.shape), latents.numpy()


# ---------------------------------------------------------------- shared by the readers

def _require(path, hint):
    if not path.exists():
        raise BadInput(f"{path}: not found; {hint}")


def _stamp(path):
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _download(reader, root, **which):
    try:
        return reader(root, download=True, **which)
    except Exception as error:          # torchvision raises many kinds: no network, wrong checksum, no room
        raise BadInput(f"{root}: could not download {reader.__name__} ({error}); place the files there by hand") from None


def _part(images, labels, name, source, config):
    """What --limit leaves of `images` (N, 3, s, s), at config.image_size: as it is, or resized into the cache."""
    chosen, total, size = choose(labels, config.limit), len(images), config.image_size
    rows = None if len(chosen) == total else chosen
    images = images if rows is None else np.ascontiguousarray(images[rows])
    if images.shape[-1] == size:
        return Part(images, name, rows, total)

    def fill(array):
        for start in range(0, len(images), 1024):
            chunk = torch.from_numpy(np.ascontiguousarray(images[start:start + 1024]))
            array[start:start + len(chunk)] = TF.resize(chunk, size, interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
            yield start + len(chunk)

    shape = (len(images), 3, size, size)
    return Part(cached(cache_path(config, name), source, shape, np.uint8, fill, f"resizing {name} images"), name, rows, total)


def _class_of(file, root):
    """First folder below root; images that lie in root itself form one class."""
    parts = file.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


READERS = {
    "stl10": read_stl10, "cifar10": read_cifar, "cifar100": read_cifar, "tiny-imagenet": read_tiny_imagenet,
    "imagenet": read_folder, "folder": read_folder, "solids": read_solids, "3diebench": read_3diebench,
    "clevr-count": read_clevr, "clevr-distance": read_clevr,
}


def _digest(file):
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
