"""What the readers of data sets share: files or arrays of any size become arrays of one size.

    image files, or an array (N, 3, s, s)  ->  images (n, 3, S, S) uint8
    image files, for crops of them         ->  pictures of their own shapes, and sizes (n, 2)
    n: what --limit leaves of N.  S: --image-size.  Made once, cached under DATA_DIR/.cache.

torchvision, and Pillow that comes with it, are imported where they are used: they take a second,
and a mistyped flag is refused before.
Checked in tests/test_datasets.py; bad files in tests/test_hostile_data.py.
"""
import contextlib
import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from images import Part, canvas_side
from plumbing.cache import cache_path, cached
from plumbing.errors import BadInput

SPLIT_SEED = 0      # which images --limit and a folder's 90/10 split choose, whatever --seed is
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
DECODED_AT_ONCE = 256
RESIZED_AT_ONCE = 1024
PICTURE_SIDE = 384 / 224    # shorter side of a stored picture, at most, over that of a crop. Three
                            # in four of ImageNet's files are no larger, and stay as they are
LARGE = 10 ** 10    # bytes of pictures, from which on an interrupted run's are kept
NARROWEST = 1000    # long side over short side: resized, such an image takes 150 MB for 224 pixels


class Reading(NamedTuple):
    """What a reader returns: an images.Split, but for its normalisation constants."""
    parts: list
    labels: np.ndarray
    classes: list
    source: dict
    latents: np.ndarray = None
    masks: Callable = None


def require(path, hint):
    """Raises: BadInput, with this hint, if there is no such file or folder."""
    if not path.exists():
        raise BadInput(f"{path}: not found; {hint}")


def require_file(path, hint):
    """Raises: BadInput if there is no such file, or if it is a folder, a named pipe or a device.

    A pipe is never opened: that would wait for ever."""
    require(path, hint)
    if not path.is_file():
        raise BadInput(f"{path}: not a regular file; {hint}")


def read_text(path, hint):
    """What stands in a text file. Raises: BadInput, with this hint, if it is absent or no text."""
    require_file(path, hint)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise BadInput(f"{path}: not a text file; {hint}")
    return text


def inside(folder, name, listing):
    """folder / name, for a `name` that stands in the file `listing`.

    Raises: BadInput if that leads out of the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise BadInput(f"{listing}: lists {name!r}, expected a name inside {folder}; "
                       "fetch the data set again")
    return folder / path


def require_listed(files, folder, listing):
    """Raises: BadInput, naming the first, if not all of the files lie in `folder`.

    One look into the folder, which for many files is quicker than a look at each."""
    require(folder, "expected a folder of images; fetch the data set again")
    there = set(os.listdir(folder))
    for file in files:
        if file.name not in there:
            raise BadInput(f"{file}: not found, but listed in {listing}; fetch the data set again")


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
    """Shorter side to `size`, or both to [height, width]: (..., H, W) -> (..., H', W')."""
    from torchvision.transforms.v2 import functional as TF
    bicubic = TF.InterpolationMode.BICUBIC
    return TF.resize(images, size, interpolation=bicubic, antialias=True)


# ---------------------------------------------------------------- image files

def image_files(folder):
    """All images below `folder`, sorted, through links too; hidden files and folders are skipped.

    A link to a folder that holds it leads nowhere new and is not followed.
    Raises: BadInput if there is no such folder, no image in it, or a folder is met twice."""
    require(folder, "expected a folder of images")
    files = []
    met = {}                                # {real folder: the way it was met first}
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_fail):
        where = Path(where)
        status = where.stat()
        first = met.setdefault((status.st_dev, status.st_ino), where)
        if first != where:
            raise BadInput(f"{where}: the same folder as {first}, its images would count twice; "
                           "remove one of the two")
        folders[:] = sorted(f for f in folders       # where os.walk goes next
                            if not f.startswith(".") and not _holds_itself(where / f))
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                files.append(where / name)
    files.sort()
    if not files:
        raise BadInput(f"{folder}: no image there "
                       f"(looked for {' '.join(sorted(SUFFIXES))} at any depth)")
    return files


def _fail(error):
    raise error                             # a folder that cannot be listed is not an empty one


def _holds_itself(folder):
    """Whether this is a link to a folder that it lies in."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def decoded(files, labels, classes, config, name, squash=False):
    """What --limit leaves of image files, at config.image_size.

    N files below config.data_dir, labels (N,), names of classes, name of the part  ->  Reading
    squash: see `decode`.
    Raises: BadInput, naming the file, for one that is absent, no intact image, or too small."""
    total = len(files)
    chosen = choose(labels, config.limit)
    files = [files[i] for i in chosen]
    size = config.image_size
    smallest = smallest_side(config)
    source = dict(source_of(files, config), size=size)
    if squash:
        source["squash"] = True

    def fill(array):
        decode_one = functools.partial(decode, size=size, smallest=smallest, squash=squash)
        for images, start, after in in_threads(decode_one, files, config):
            for i, image in enumerate(images, start):
                array[i] = image
            yield after

    path = cache_path(config, name)
    shape = (len(files), 3, size, size)
    images = cached(path, source, shape, np.uint8, fill, f"decoding {name} images")
    rows = None if len(chosen) == total else chosen
    return Reading([Part(images, name, rows, total)], labels[chosen], classes, source)


def pictures(files, labels, classes, config, name):
    """What --limit leaves of image files, whole, each with its own height and width.

    The shorter side is made PICTURE_SIDE of config.image_size, where it is longer than that.
    Arguments, Raises: as `decoded`.  ->  Reading of one Part for images.Pictures"""
    total = len(files)
    chosen = choose(labels, config.limit)
    files = [files[i] for i in chosen]
    side = round(PICTURE_SIDE * config.image_size)
    smallest = smallest_side(config)
    source = dict(source_of(files, config), side=side)

    def fill_sizes(array):
        size_one = functools.partial(picture_size, side=side, smallest=smallest)
        for sizes, start, after in in_threads(size_one, files, config):
            array[start:after] = list(sizes)
            yield after

    path = cache_path(config, f"{name}-sizes")
    sizes = cached(path, source, (len(files), 2), np.int64, fill_sizes, f"measuring {name} images")
    ends = 3 * sizes.prod(1).cumsum()
    begin = np.concatenate([[0], ends])

    def fill(array, done=0):
        first = int(np.searchsorted(begin, done))
        decode_one = functools.partial(picture, side=side, smallest=smallest)
        for images, start, after in in_threads(decode_one, files, config, first):
            for i, image in enumerate(images, start):
                if image.shape[1:] != tuple(sizes[i]):
                    raise BadInput(f"{files[i]}: not the size that its head says; mend or remove "
                                   "it")
                array[begin[i]:begin[i + 1]] = image.reshape(-1)
            yield int(begin[after])

    path = cache_path(config, f"{name}-pictures")
    shape = (int(ends[-1]) + canvas_side(sizes),)       # more than the pictures: images.Pictures
    flat = cached(path, source, shape, np.uint8, fill, f"decoding {name} images",
                  resumable=shape[0] > LARGE, unit="B")
    rows = None if len(chosen) == total else chosen
    part = Part(flat, name, rows, total, np.asarray(sizes))
    return Reading([part], labels[chosen], classes, source)


def in_threads(work, files, config, first=0):
    """work(file) for the files from the first on, some at once: yields results, start, after."""
    with ThreadPoolExecutor(config.workers or None) as pool:    # decoding runs without the GIL
        for start in range(first, len(files), DECODED_AT_ONCE):
            chunk = files[start:start + DECODED_AT_ONCE]
            yield pool.map(work, chunk), start, start + len(chunk)


def smallest_side(config):
    """The shorter side that an image file must have, pixels: a ViT needs a patch."""
    return config.patch_size if config.mode == "regions" else 1


def source_of(files, config):
    """Which files images are made of, and how they are decoded: a part of a cache's key."""
    source = dict(dataset=config.dataset, files=fingerprint(files, Path(config.data_dir)))
    if config.dataset == "folder":
        # What was decoded before 16-bit greys were scaled and photographs turned upright is decoded
        # again. The published data sets hold neither.
        source["decoding"] = 2
    return source


def fingerprint(files, root):
    """Names below `root`, sizes and times of files, hashed.

    Changes when a file is added, removed or replaced."""
    digest = hashlib.sha256()
    for file in files:
        require_file(file, "listed as an image, but no file to read; mend or remove it")
        status = file.stat()
        line = f"{file.relative_to(root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        digest.update(line.encode("utf-8", "surrogatepass"))        # names need not be UTF-8
    return digest.hexdigest()


def decode(path, size, smallest=1, squash=False):
    """One image file as uint8 (3, size, size): shorter side resized (bicubic), centre cropped.

    smallest: side that the image in the file must have, pixels.
    squash: resize both sides instead, whatever that does to shapes, and lose nothing.
    Raises: BadInput, naming the file, for what is no intact image, too small, large or narrow."""
    from torchvision.transforms.v2 import functional as TF
    image = read_image(path, smallest)
    if image.shape[1:] == (size, size):
        return image.numpy()
    if squash:
        return _resize(image, [size, size]).numpy()
    return TF.center_crop(_resize(image, size), size).numpy()


def picture(path, side, smallest=1):
    """One image file as uint8 (3, H, W): the shorter side resized (bicubic) to `side`, if longer.

    smallest, Raises: as `decode`."""
    image = read_image(path, smallest)
    if min(image.shape[1:]) > side:
        image = _resize(image, side)
    return image.numpy()


def picture_size(path, side, smallest=1):
    """Height and width that `picture` will give, mostly without decoding.

    smallest, Raises: as `decode`."""
    with open_image(path) as image:
        refuse_strange(image)
        if image.format not in ("JPEG", "MPO"):     # others may say how they were held at their end
            image.load()
        width, height = image.size
        if turned(image.info):
            width, height = height, width
    check_size(path, height, width, smallest)
    shorter = min(height, width)
    if shorter <= side:
        return height, width
    return side * height // shorter, side * width // shorter


def turned(about):
    """Whether EXIF's word, among a PIL image's `info`, makes its rows columns."""
    from PIL import Image, ImageOps
    upright = Image.new("L", (1, 2))
    upright.info = about
    try:
        ImageOps.exif_transpose(upright, in_place=True)
    except Exception:
        pass                                            # damaged EXIF data say nothing
    return upright.size == (2, 1)


@contextlib.contextmanager
def open_image(path):
    """An image file, open. Raises: BadInput, naming it, for what goes wrong with it meanwhile."""
    from PIL import Image
    require_file(path, "expected an image there; fetch the data set again")
    try:
        with open(path, "rb") as file:
            yield Image.open(file)
    except Exception as error:          # what Pillow raises on damaged files has no common type
        reason = str(error) or type(error).__name__
        raise BadInput(f"{path}: not a readable image ({reason}); mend or remove it") from None


def read_image(path, smallest=1):
    """An image file as uint8 (3, H, W).  smallest, Raises: as `decode`."""
    from torchvision.transforms.v2 import functional as TF
    with open_image(path) as image:
        pixels = TF.pil_to_tensor(rgb(image))
    check_size(path, *pixels.shape[1:], smallest)
    return pixels


def check_size(path, height, width, smallest):
    """Raises: BadInput, naming the file, if a side is under `smallest` pixels."""
    if min(height, width) < smallest:
        raise BadInput(f"{path}: {width} x {height} pixels, "
                       f"smaller than a patch (--patch-size {smallest}); remove it")


def rgb(image):
    """A PIL image of any kind as RGB, 8 bits, upright: what a person would be shown.

    Grey of 16 bits keeps its upper 8, as Pillow does with colours of 16 bits. Transparency is
    dropped, CMYK converted without a profile, both as torchvision does. EXIF's word on how the
    camera was held is followed, which torchvision does not.
    Raises: ValueError for numbers without a known white, for a mere line of pixels."""
    from PIL import Image, ImageOps
    refuse_strange(image)
    if image.mode == "F" or image.mode == "I" and image.format != "PNG":
        raise ValueError("pixels of 32 bits without a known white; convert it to 8 bits")
    about = image.info
    if image.mode.startswith("I"):                      # of PNG: "I;16", "I" in older versions
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    about.pop("transparency", None)                     # or Pillow warns that it is dropped
    image = image.convert("RGB")
    image.info = about
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:
        pass                                            # damaged EXIF data say nothing
    return image


def refuse_strange(image):
    """Raises: ValueError if a PIL image, not loaded yet, is a mere line of pixels, or a program."""
    width, height = image.size
    if max(width, height) > NARROWEST * min(width, height):
        raise ValueError(f"{width} x {height} pixels, more than {NARROWEST} times as long as wide")
    if image.format == "EPS":
        raise ValueError("a PostScript program, which is not run")
