"""CLEVR as two classification tasks (DSeq-JEPA 0.A.1.3, Table 3): how many objects, how near.

    DATA_DIR/CLEVR_v1.0/images/{train,val}/*.png                    (Johnson et al., 2017)
    DATA_DIR/CLEVR_v1.0/scenes/CLEVR_{train,val}_scenes.json

    clevr-count      8 classes, 3 to 10 objects
    clevr-distance   6 classes, the distance of the nearest object to the camera, cut at
                     8.0, 8.5, ..., 10.0: VTAB's bins

As in VTAB-1k, files are sorted by name; probes learn from the first 800 of the first nine tenths of
the training split (of fewer images, from all of these), and are tested on the whole validation
split, 15,000. VTAB's 200 for choosing settings, the first of the last tenth, are not used: nothing
is chosen here. The whole image is squashed to a square: a middle square would lose a third of the
width, and with it objects that the labels count.

Checked in tests/test_clevr.py.
"""
import json
import math
from pathlib import Path

import numpy as np

from plumbing.errors import BadInput
from sources.prepare import read_text

TRAIN_IMAGES = 800
EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)          # VTAB's, in CLEVR's units
BINS = [f"{low} to {high}" for low, high in zip(EDGES, EDGES[1:])]
CLASSES = {"clevr-count": [f"{n} objects" for n in range(3, 11)],
           "clevr-distance": ["below 8.0", *BINS, "10.0 and more"]}


def clevr_files(data_dir, task, split):
    """Image files, sorted, and labels of one split.  split: "train" or "val".  -> [paths], (N,)

    Raises: BadInput for a missing or damaged scene file."""
    root = Path(data_dir) / "CLEVR_v1.0"
    scenes = root / "scenes" / f"CLEVR_{split}_scenes.json"
    label_of = _count if task == "clevr-count" else _nearest
    text = read_text(scenes, "unpack CLEVR_v1.0 into --data-dir")
    try:
        listed = json.loads(text)["scenes"]
        listed = sorted(listed, key=lambda scene: scene["image_filename"])
        files = [root / "images" / split / Path(scene["image_filename"]).name for scene in listed]
        labels = np.array([label_of(scene) for scene in listed], dtype=np.int64)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ArithmeticError,
            RecursionError):
        raise BadInput(f"{scenes}: not CLEVR's list of scenes; unpack CLEVR_v1.0 again") from None
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(CLASSES[task]):
        raise BadInput(f"{scenes}: expected scenes of 3 to 10 objects; unpack CLEVR_v1.0 again")
    return files, labels


def vtab_train(count):
    """How many images, the first of `count` in the training split, VTAB-1k trains on."""
    return max(1, min(TRAIN_IMAGES, 9 * count // 10))


def _count(scene):
    """Label of clevr-count: 0 for three objects."""
    return len(_objects(scene)) - 3


def _nearest(scene):
    """Label of clevr-distance: the bin of the nearest object."""
    distances = [float(thing["pixel_coords"][2]) for thing in _objects(scene)]  # (x, y, distance)
    if not all(0 < distance < math.inf for distance in distances):              # nor NaN
        raise ValueError("an object is nowhere")
    return np.searchsorted(EDGES, min(distances), side="right")


def _objects(scene):
    """The objects of a scene: dictionaries."""
    things = scene["objects"]
    if not isinstance(things, list) or not all(isinstance(thing, dict) for thing in things):
        raise TypeError("expected a list of objects")
    return things
