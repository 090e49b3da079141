"""Folders in COCO's format: images, and in a JSON file their objects with masks and boxes.

    DATA_DIR/annotations/instances_train2017.json       images in DATA_DIR/train2017/, or in
    DATA_DIR/annotations/instances_val2017.json         DATA_DIR/images/train2017/; any ending will
                                                        do for 2017, none too
    DATA_DIR/train/NAME.json, DATA_DIR/val/NAME.json    images beside; `valid` will do for `val`

    load(config, split).objects(i)      ->  image uint8 (3, H, W), masks.Objects

Classes are the categories of the JSON, in the order of their ids, which may have gaps (COCO's 80
lie between 1 and 90): class k is the k-th. Checked in tests/test_coco.py.
"""
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from plumbing.errors import BadInput
from sources.masks import Objects, decode, nearly
from sources.prepare import SPLIT_SEED, fingerprint, inside, read_image, read_text, require

AGAIN = "fetch the data set again, or mend the file"
FOLDERS = {"train": ("train",), "val": ("val", "valid")}


class Coco:
    """One split: its length, classes (names), `objects`.

    rows (n,): indices of the images that are used, of all in the JSON; counts: how many objects
    each of all has, crowds left out.  nearly: whether masks are drawn without pycocotools.
    Raises: BadInput, naming file and annotation, for what is absent or not in COCO's format; of
    images and masks when they are asked for."""

    mean = (0.485, 0.456, 0.406)        # ImageNet's, whatever the ViT was trained with
    std = (0.229, 0.224, 0.225)
    in_memory = False

    def __init__(self, data_dir, split):
        self.path, folder = find(Path(data_dir), split)
        try:
            listed = json.loads(read_text(self.path, AGAIN))
            self.classes, names, self.sizes, objects = sorted_out(listed, self.path)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{self.path}: not COCO's list of images, annotations and categories "
                           f"({type(error).__name__}: {error}); {AGAIN}") from None
        self.files = [inside(folder, name, self.path) for name in names]
        for file in self.files:
            require(file, f"listed in {self.path}; {AGAIN}")
        self.nearly = any(nearly(each["mask"]) for of_image in objects for each in of_image)
        self.counts = np.array([sum(not o["crowd"] for o in of_image) for of_image in objects])
        self.rows = np.arange(len(objects))
        # Kept as text: of Python objects every process that reads would make a copy, 2 GB of
        # COCO's, as soon as it looked at them.
        texts = [json.dumps(of_image).encode() for of_image in objects]
        self.text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, texts)])

    def __len__(self):
        return len(self.rows)

    def digest(self):
        """A text that tells these files, and which are used, from others."""
        files = [self.path, *self.files]
        used = hashlib.sha256(self.rows.tobytes()).hexdigest()
        return fingerprint(files, Path(os.path.commonpath(files))) + used

    def objects(self, i):
        """image uint8 (3, H, W), Objects: of the i-th of the images that are used."""
        i = self.rows[i]
        height, width = self.sizes[i]
        image = read_image(self.files[i]).contiguous()
        if image.shape[1:] != (height, width):
            raise BadInput(f"{self.files[i]}: {image.shape[2]} x {image.shape[1]} pixels, but "
                           f"{width} x {height} in {self.path}; {AGAIN}")
        listed = json.loads(self.text[self.ends[i]:self.ends[i + 1]].tobytes())
        masks = np.zeros((len(listed), height, width), dtype=bool)
        for mask, each in zip(masks, listed):
            try:
                mask[:] = decode(each["mask"], height, width)
            except (TypeError, ValueError, KeyError, OverflowError) as error:
                raise BadInput(f"{self.path}: annotation {each['id']} of {self.files[i].name}: "
                               f"{error}; {AGAIN}") from None
        areas = [mask.sum() if o["area"] is None else o["area"] for o, mask in zip(listed, masks)]
        return image, Objects(
            masks,
            np.array([each["class"] for each in listed], dtype=np.int64),
            np.array([each["crowd"] for each in listed], dtype=bool),
            np.array([each["box"] for each in listed], dtype=np.float64).reshape(-1, 4),
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


def sorted_out(listed, path):
    """Names of classes, names of files, sizes (height, width), and the objects of each image.

    Images are in the order of their ids, as pycocotools takes them, which settles ties of scores.
    Objects: see `checked`."""
    categories = sorted(listed["categories"], key=lambda category: category["id"])
    images = sorted(listed["images"], key=lambda image: image["id"])
    number = {category["id"]: k for k, category in enumerate(categories)}
    place = {image["id"]: i for i, image in enumerate(images)}
    if len(number) < len(categories) or len(place) < len(images):
        raise BadInput(f"{path}: an id of images or categories stands there twice; {AGAIN}")
    sizes = [(int(image["height"]), int(image["width"])) for image in images]
    objects = [[] for _ in images]
    for annotation in listed["annotations"]:
        name = f"{path}: annotation {annotation.get('id')}"
        if annotation["image_id"] not in place or annotation["category_id"] not in number:
            raise BadInput(f"{name} is of an image or a category that is not listed; {AGAIN}")
        i = place[annotation["image_id"]]
        each = checked(annotation, sizes[i], name)
        each["class"] = number[annotation["category_id"]]
        objects[i].append(each)
    names = [str(category["name"]) for category in categories]
    return names, [str(image["file_name"]) for image in images], sizes, objects


def checked(annotation, size, name):
    """dict(id, crowd, area or None, mask as `decode` takes it, box), but for the class."""
    mask = annotation.get("segmentation")
    if not mask:
        raise BadInput(f"{name} has no segmentation, and Mask R-CNN learns masks; add it or remove "
                       "the annotation")
    if isinstance(mask, dict) and tuple(mask["size"]) != size:
        raise BadInput(f"{name} has a mask of {mask['size']} pixels, its image {list(size)}; "
                       f"{AGAIN}")
    x, y, width, height = map(float, annotation["bbox"])
    area = annotation.get("area")
    if not all(map(math.isfinite, (x, y, width, height, area or 0))) or min(width, height) < 0:
        raise BadInput(f"{name} has a box {annotation['bbox']} and an area {area}, expected x y "
                       f"width height and pixels; {AGAIN}")
    return dict(id=annotation.get("id"), crowd=bool(annotation.get("iscrowd")), area=area,
                mask=mask, box=(x, y, x + width, y + height))
