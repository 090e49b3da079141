"""CLEVR as two classification tasks (DSeq-JEPA 0.A.1.3, Table 3): how many objects, how near the nearest one.

    DATA_DIR/CLEVR_v1.0/images/{train,val}/*.png, scenes/CLEVR_{train,val}_scenes.json      (Johnson et al., 2017)

    clevr-count      8 classes, 3 to 10 objects
    clevr-distance   6 classes, the distance of the nearest object to the camera, cut at 8.0, 8.5, ..., 10.0: VTAB's bins

Checked in tests/test_clevr.py.
"""
import json
from pathlib import Path

import numpy as np

from plumbing.errors import BadInput

EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)          # VTAB's, in CLEVR's units; pixel_coords hold (x, y, distance)
CLASSES = {"clevr-count": [f"{n} objects" for n in range(3, 11)],
           "clevr-distance": ["below 8.0", *(f"{a} to {b}" for a, b in zip(EDGES, EDGES[1:])), "10.0 and more"]}


def clevr_files(data_dir, task, split):
    """Image files and labels of one split.  split: "train" or "val".  -> [paths], (N,) int64

    Raises: BadInput for a missing or damaged scene file."""
    root = Path(data_dir) / "CLEVR_v1.0"
    scenes = root / "scenes" / f"CLEVR_{split}_scenes.json"
    try:
        listed = json.loads(scenes.read_text())["scenes"]
        files = [root / "images" / split / Path(scene["image_filename"]).name for scene in listed]
        if task == "clevr-count":
            labels = [len(scene["objects"]) - 3 for scene in listed]
        else:
            labels = np.searchsorted(EDGES, [min(o["pixel_coords"][2] for o in scene["objects"]) for scene in listed], side="right")
    except FileNotFoundError:
        raise BadInput(f"{scenes}: not found; unpack CLEVR_v1.0 into --data-dir") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise BadInput(f"{scenes}: not CLEVR's list of scenes; unpack CLEVR_v1.0 again") from None
    labels = np.asarray(labels, dtype=np.int64)
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(CLASSES[task]):
        raise BadInput(f"{scenes}: expected scenes of 3 to 10 objects; unpack CLEVR_v1.0 again")
    return files, labels
