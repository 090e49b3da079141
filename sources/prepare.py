"""What the readers of data sets share: files or arrays of any size become arrays of one size.

    image files, or an array (N, 3, s, s)  ->  images (n, 3, S, S) uint8
    n: what --limit leaves of N.  S: --image-size.  Made once, cached under DATA_DIR/.cache.

Checked in tests/test_datasets.py.
"""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torchvision.transforms.v2 import functional as TF

from images import Part
from plumbing.cache import cache_path, cached
from plumbing.errors import BadInput

SPLIT_SEED = 0      # which images --limit and a folder's 90/10 split choose, whatever --seed is
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
DECODED_AT_ONCE = 256
RESIZED_AT_ONCE = 1024


class Reading(NamedTuple):
    """What a reader returns: an images.Split, but for its normalisation constants."""
    parts: list
    labels: np.ndarray
    classes: list
    source: dict
    latents: np.ndarray = None


def require(path, hint):
    """Raises: BadInput, with this hint, if there is no such file or folder."""
    if not path.exists():
        raise BadInput(f"{path}: not found; {hint}")


def choose(labels, limit):
    """Indices of at most `limit` samples, as many of each class as possible, seeded.  0 = all."""
    if not limit or limit >= len(labels):
        return np.arange(len(labels))
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # Classes take turns: 0 is the turn of the first sample of each class, 1 of the second, ...
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    turn = np.arange(len(labels)) - np.repeat(first, counts)
    return np.sort(by_class[np.argsort(turn, kind="stable")[:limit]])


# ---------------------------------------------------------------- arrays

def limited(images, labels, name, source, config):
    """What --limit leaves of an array, at config.image_size.

    images (N, 3, s, s) uint8, labels (N,), name of the part, source  ->  Part, its labels (n,)"""
    total = len(images)
    chosen = choose(labels, config.limit)
    rows = None
    if len(chosen) < total:
        rows = chosen
        images = np.ascontiguousarray(images[rows])
    if images.shape[-1] != config.image_size:
        images = _resized(images, name, source, config)
    return Part(images, name, rows, total), labels[chosen]


def _resized(images, name, source, config):
    """images (n, 3, s, s) at config.image_size, bicubic, in the cache."""
    size = config.image_size

    def fill(array):
        for start in range(0, len(images), RESIZED_AT_ONCE):
            chunk = np.ascontiguousarray(images[start:start + RESIZED_AT_ONCE])
            after = start + len(chunk)
            array[start:after] = _resize(torch.from_numpy(chunk), size)
            yield after

    path = cache_path(config, name)
    shape = (len(images), 3, size, size)
    return cached(path, source, shape, np.uint8, fill, f"resizing {name} images")


def _resize(images, size):
    """Shorter side to `size`: (..., H, W) -> (..., H', W')."""
    bicubic = TF.InterpolationMode.BICUBIC
    return TF.resize(images, size, interpolation=bicubic, antialias=True)


# ---------------------------------------------------------------- image files

def image_files(folder):
    """All images below `folder`, sorted, through links too; hidden files and folders are skipped.

    Raises: BadInput if there is no such folder, or no image in it."""
    require(folder, "expected a folder of images")
    files = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]      # where os.walk goes next
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                files.append(Path(where) / name)
    files.sort()
    if not files:
        raise BadInput(f"{folder}: no image there "
                       f"(looked for {' '.join(sorted(SUFFIXES))} at any depth)")
    return files


def decoded(files, labels, classes, config, name):
    """What --limit leaves of image files, at config.image_size.

    N files below config.data_dir, labels (N,), names of classes, name of the part  ->  Reading
    Raises: BadInput, naming the file, for one that is absent, no intact image, or too small."""
    total = len(files)
    chosen = choose(labels, config.limit)
    files = [files[i] for i in chosen]
    size = config.image_size
    smallest = config.patch_size if config.mode == "regions" else 1
    digest = fingerprint(files, Path(config.data_dir))
    source = dict(dataset=config.dataset, files=digest, size=size)

    def fill(array):
        with ThreadPoolExecutor(config.workers or None) as pool:    # decoding runs without the GIL
            for start in range(0, len(files), DECODED_AT_ONCE):
                chunk = files[start:start + DECODED_AT_ONCE]
                images = pool.map(lambda file: decode(file, size, smallest), chunk)
                for i, image in enumerate(images, start):
                    array[i] = image
                yield start + len(chunk)

    path = cache_path(config, name)
    shape = (len(files), 3, size, size)
    images = cached(path, source, shape, np.uint8, fill, f"decoding {name} images")
    rows = None if len(chosen) == total else chosen
    return Reading([Part(images, name, rows, total)], labels[chosen], classes, source)


def fingerprint(files, root):
    """Names below `root`, sizes and times of files, hashed.

    Changes when a file is added, removed or replaced."""
    digest = hashlib.sha256()
    for file in files:
        require(file, "listed but absent; fetch the data set again")
        status = file.stat()
        line = f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode())
    return digest.hexdigest()


def decode(path, size, smallest=1):
    """One image file as uint8 (3, size, size): shorter side resized (bicubic), centre cropped.

    smallest: side that the image in the file must have, pixels."""
    try:
        image = TF.pil_to_tensor(torchvision.datasets.folder.pil_loader(path))
    except (OSError, SyntaxError, ValueError) as error:     # Pillow's words for "no intact image"
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: not a readable image ({reason}); mend or remove it") from None
    height, width = image.shape[1:]
    if min(height, width) < smallest:
        raise BadInput(f"{path}: {width} x {height} pixels, "
                       f"smaller than a patch (--patch-size {smallest}); remove it")
    if (height, width) != (size, size):
        image = TF.center_crop(_resize(image, size), size)
    return image.numpy()
