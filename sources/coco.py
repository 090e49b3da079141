"""Folders in COCO's format: images, and in a JSON file their objects with masks and boxes.

    DATA_DIR/annotations/instances_train2017.json       images in DATA_DIR/train2017/, or in
    DATA_DIR/annotations/instances_val2017.json         DATA_DIR/images/train2017/; any ending will
                                                        do for 2017, none too
    DATA_DIR/train/NAME.json, DATA_DIR/val/NAME.json    images beside; `valid` will do for `val`

    load(config, split).objects(i)      ->  image (3, H, W) uint8, Objects

Classes are the categories of the JSON, in the order of their ids, which may have gaps (COCO's 80
lie between 1 and 90): class k is the k-th. Crowds, regions of many objects in one, are marked.

Masks are stored as run lengths, compressed or not, and decoded here, or as polygons. Which pixels
a polygon holds only pycocotools knows exactly; if it is not installed, pixels whose centres lie
inside stand for them: an IoU of 0.97 with its masks for objects of 64 pixels, 0.993 for 1,105.
Checked in tests/test_coco.py against pycocotools.
"""
import hashlib
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.errors import BadInput
from sources.prepare import SPLIT_SEED, fingerprint, inside, read_text, require, rgb

try:
    from pycocotools import mask as official
except ImportError:
    official = None

# Of photographs, as ImageNet's: what a ViT that is probed on these was trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
AGAIN = "fetch the data set again, or mend the file"
FOLDERS = {"train": ("train",), "val": ("val", "valid")}


class Objects(NamedTuple):
    """The n objects of an image, NumPy."""
    masks: np.ndarray           # (n, H, W) bool
    classes: np.ndarray         # (n,) int64, from 0 up
    crowd: np.ndarray           # (n,) bool
    boxes: np.ndarray           # (n, 4) float64: x1 y1 x2 y2 in pixels, as annotated
    areas: np.ndarray           # (n,) float64: pixels, as annotated; COCO's sizes are made of these


class Coco:
    """One split: its length, classes (names), `objects`.

    rows (n,): indices of the images that are used, of all in the JSON; counts: how many objects
    each of all has, crowds left out.  nearly: whether masks are drawn without pycocotools.
    Raises: BadInput, naming file and annotation, for what is absent or not in COCO's format; of
    images and masks when they are asked for."""

    mean = MEAN
    std = STD
    in_memory = False

    def __init__(self, data_dir, split):
        self.path, self.folder = find(Path(data_dir), split)
        listed = _parse(self.path)
        try:
            self.classes, self.files, self.sizes, objects = _sorted_out(listed, self.path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{self.path}: not COCO's list of images, annotations and categories "
                           f"({type(error).__name__}: {error}); {AGAIN}") from None
        self.files = [inside(self.folder, name, self.path) for name in self.files]
        for file in self.files:
            if not file.is_file():
                raise BadInput(f"{file}: not found, but listed in {self.path}; {AGAIN}")
        drawn = [any(isinstance(o["mask"], list) for o in of_image) for of_image in objects]
        self.nearly = official is None and any(drawn)
        self.counts = np.array([sum(not o["crowd"] for o in of_image) for of_image in objects])
        self.rows = np.arange(len(objects))
        self._pack(objects)

    def _pack(self, objects):
        """Keep annotations as text: of Python objects every process that reads would make a copy,
        2 GB of COCO's, as soon as it looked at them."""
        texts = [json.dumps(of_image).encode() for of_image in objects]
        self.text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self.ends = np.cumsum([len(text) for text in texts])

    def __len__(self):
        return len(self.rows)

    def digest(self):
        """A text that tells these files, and which are used, from others."""
        files = [self.path, *self.files]
        used = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return fingerprint(files, Path(os.path.commonpath([file.parent for file in files]))) + used

    def annotations(self, i):
        """What the JSON says of image i: a list of dictionaries, see `_sorted_out`."""
        start = self.ends[i - 1] if i else 0
        return json.loads(self.text[start:self.ends[i]].tobytes())

    def objects(self, i):
        """image (3, H, W) uint8, Objects: of the i-th of the images that are used."""
        i = self.rows[i]
        height, width = self.sizes[i]
        image = _image(self.files[i], height, width, self.path)
        listed = self.annotations(i)
        masks = np.zeros((len(listed), height, width), dtype=bool)
        for mask, annotation in zip(masks, listed):
            try:
                mask[:] = decode(annotation["mask"], height, width)
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                raise BadInput(f"{self.path}: annotation {annotation['id']} of "
                               f"{self.files[i].name}: {error}; {AGAIN}") from None
        areas = [mask.sum() if a["area"] is None else a["area"] for a, mask in zip(listed, masks)]
        return image, Objects(
            masks, np.array([a["class"] for a in listed], dtype=np.int64),
            np.array([a["crowd"] for a in listed], dtype=bool),
            np.array([a["box"] for a in listed], dtype=np.float64).reshape(-1, 4),
            np.array(areas, dtype=np.float64))


def load(config, split):
    """The images of "train" that have objects, or all of "val"; --limit of them, a seeded choice.

    Raises: BadInput if there is nothing to learn or to find."""
    coco = Coco(config.data_dir, split)
    if split == "train":
        coco.rows = np.flatnonzero(coco.counts)
    if config.limit and config.limit < len(coco.rows):
        order = np.random.default_rng(SPLIT_SEED).permutation(len(coco.rows))
        coco.rows = coco.rows[np.sort(order[:config.limit])]
    if not coco.counts[coco.rows].any():
        raise BadInput(f"{coco.path}: not a single object in {len(coco.rows):,} images of {split}; "
                       f"{AGAIN}, or raise --limit")
    return coco


# ---------------------------------------------------------------- the files

def find(root, split):
    """(JSON file, folder of its images).  Raises: BadInput if there is none, or a choice."""
    require(root, "--dataset coco reads images from --data-dir")
    found = []
    for path in sorted((root / "annotations").glob(f"instances_{split}*.json")):
        name = path.stem.removeprefix("instances_")
        nested = root / "images" / name
        found.append((path, nested if nested.is_dir() else root / name))
    for name in FOLDERS[split]:
        found += [(path, root / name) for path in sorted((root / name).glob("*.json"))]
    if not found:
        raise BadInput(f"{root}: no annotations of {split}; expected annotations/"
                       f"instances_{split}2017.json with images in {split}2017, or {split}/*.json "
                       "beside its images")
    if len(found) > 1:
        raise BadInput(f"{found[1][0]}: a second file of {split} annotations beside "
                       f"{found[0][0]}; move one away")
    return found[0]


def _parse(path):
    """What stands in a JSON file."""
    text = read_text(path, AGAIN)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON ({str(error):.100}); {AGAIN}") from None


def _sorted_out(listed, path):
    """names of classes, files, sizes (height, width), and the objects of each image.

    Images in the order of their ids, as pycocotools takes them, which settles ties of scores. An
    object: dict(id, class, crowd, box, area, mask); area None where the JSON has none."""
    categories = sorted(listed["categories"], key=lambda category: category["id"])
    if not categories:
        raise BadInput(f"{path}: no categories, so nothing to tell apart; {AGAIN}")
    number = {category["id"]: k for k, category in enumerate(categories)}
    images = sorted(listed["images"], key=lambda image: image["id"])
    place = {image["id"]: i for i, image in enumerate(images)}
    if len(number) < len(categories) or len(place) < len(images):
        raise BadInput(f"{path}: an id of images or categories stands there twice; {AGAIN}")
    sizes = [(int(image["height"]), int(image["width"])) for image in images]
    objects = [[] for _ in images]
    for i, annotation in enumerate(listed["annotations"]):
        name = annotation.get("id", f"number {i}")
        if annotation["image_id"] not in place or annotation["category_id"] not in number:
            raise BadInput(f"{path}: annotation {name} is of an image or a category that is not "
                           f"listed; {AGAIN}")
        where = place[annotation["image_id"]]
        entry = _checked(annotation, name, sizes[where], path)
        objects[where].append(dict(entry, **{"class": number[annotation["category_id"]]}))
    names = [str(category["name"]) for category in categories]
    return names, [str(image["file_name"]) for image in images], sizes, objects


def _checked(annotation, name, size, path):
    """One annotation as `_sorted_out` says. Masks are decoded later."""
    mask = annotation.get("segmentation")
    if not mask:
        raise BadInput(f"{path}: annotation {name} has no segmentation, and Mask R-CNN learns "
                       "masks; add it or remove the annotation")
    if isinstance(mask, dict) and tuple(mask["size"]) != size:
        raise BadInput(f"{path}: annotation {name} has a mask of {mask['size']} pixels, its image "
                       f"{list(size)}; {AGAIN}")
    x, y, width, height = map(float, annotation["bbox"])
    area = annotation.get("area")
    if not all(map(math.isfinite, (x, y, width, height, area or 0))) or min(width, height) < 0:
        raise BadInput(f"{path}: annotation {name} has a box {annotation['bbox']} and an area "
                       f"{area}, expected x y width height and pixels; {AGAIN}")
    return dict(id=name, crowd=bool(annotation.get("iscrowd", 0)), area=area, mask=mask,
                box=(x, y, x + width, y + height))


def _image(path, height, width, listing):
    """(3, H, W) uint8."""
    from PIL import Image
    try:
        with open(path, "rb") as file:
            image = np.asarray(rgb(Image.open(file)))
    except Exception as error:          # what Pillow raises on damaged files has no common type
        reason = str(error) or type(error).__name__
        raise BadInput(f"{path}: not a readable image ({reason}); mend or remove it") from None
    if image.shape[:2] != (height, width):
        raise BadInput(f"{path}: {image.shape[1]} x {image.shape[0]} pixels, but {width} x "
                       f"{height} in {listing}; {AGAIN}")
    return np.ascontiguousarray(image.transpose(2, 0, 1))


# ---------------------------------------------------------------- masks

def decode(segmentation, height, width):
    """A mask as COCO writes it: run lengths {"counts"} or polygons [[x, y, x, y, ...], ...].

    ->  (H, W) bool.  Raises: ValueError and its like for what is neither."""
    if isinstance(segmentation, dict):
        return decode_runs(segmentation["counts"], height, width)
    polygons = [np.array(p, dtype=np.float64) for p in segmentation if len(p) >= 6]
    for polygon in polygons:
        reach = 2 * max(height, width)      # pycocotools walks along edges, however long
        if polygon.ndim > 1 or len(polygon) % 2 or not (np.abs(polygon) <= reach).all():
            raise ValueError("a polygon that is no list of x, y, x, y, ... in the image")
    if official:
        return _exactly(polygons, height, width)
    return _nearly(polygons, height, width)


def _exactly(polygons, height, width):
    """Pixels of polygons (2n,), x y x y ..., by pycocotools.  ->  (H, W) bool"""
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    runs = official.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    return official.decode(official.merge(runs)).astype(bool)


def _nearly(polygons, height, width):
    """Pixels whose centres lie inside any of the polygons.  ->  (H, W) bool"""
    from matplotlib.path import Path as Outline
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        corners = polygon.reshape(-1, 2)
        left, top = np.floor(corners.min(0)).clip(0).astype(int)
        right, bottom = np.ceil(corners.max(0)).clip(0, (width, height)).astype(int)
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        centres = np.stack([x.ravel(), y.ravel()], axis=1)
        mask[top:bottom, left:right] |= Outline(corners).contains_points(centres).reshape(x.shape)
    return mask


def enclosing(mask):
    """The box x1 y1 x2 y2 around the pixels of a mask (H, W); zeros if there are none."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return 0, 0, 0, 0
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def decode_runs(counts, height, width):
    """Run lengths of 0, 1, 0, 1, ... down one column after another  ->  (H, W) bool"""
    counts = uncompressed(counts) if isinstance(counts, str) else counts
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("broken run lengths")
    if sum(counts) != height * width:
        raise ValueError(f"run lengths for {sum(counts):,} pixels, expected {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def uncompressed(text):
    """COCO's text of run lengths -> a list of them.

    Each is written in groups of five bits, the lowest first, in characters from "0" up; the sixth
    bit says that another group follows, the highest of the last group is the sign. From the fourth
    on, what stands there is the difference from the last but one."""
    counts = []
    value = 0
    shift = 0
    for byte in text.encode("ascii"):
        bits = byte - ord("0")
        if not 0 <= bits < 64:
            raise ValueError(f"a character {chr(byte)!r} among compressed run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = 0
        shift = 0
    if shift:
        raise ValueError("compressed run lengths that end in the middle of one")
    return counts
