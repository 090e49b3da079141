"""CLEVR's published layout, in small; labels by hand."""
import json

import numpy as np
import pytest
from PIL import Image

from datasets import load
from plumbing.errors import BadInput
from sources.clevr import CLASSES, clevr_files


@pytest.fixture
def clevr(tmp_path):
    """Three scenes a split, with 3, 5 and 10 objects, the nearest at 7.9, 8.5 and 12.0."""
    root = tmp_path / "data" / "CLEVR_v1.0"
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        scenes = []
        for i, (count, nearest) in enumerate([(3, 7.9), (5, 8.5), (10, 12.0)]):
            name = f"CLEVR_{split}_{i:06}.png"
            Image.fromarray(np.full((32, 48, 3), 40 * i, np.uint8)).save(
                root / "images" / split / name
            )
            objects = [dict(pixel_coords=[10, 20, nearest + k], shape="cube") for k in range(count)]
            scenes.append(dict(image_filename=name, objects=objects[::-1], split=split))
        (root / "scenes").mkdir(exist_ok=True)
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(
            json.dumps(dict(info={}, scenes=scenes))
        )
    return tmp_path / "data"


def test_labels_by_hand(clevr):
    files, count = clevr_files(clevr, "clevr-count", "train")
    assert count.tolist() == [0, 2, 7] and files[1].name == "CLEVR_train_000001.png"
    # below 8.0; 8.5 opens the third bin; 10.0 and more
    assert clevr_files(clevr, "clevr-distance", "val")[1].tolist() == [0, 2, 5]
    assert len(CLASSES["clevr-count"]) == 8 and len(CLASSES["clevr-distance"]) == 6


def test_images_and_labels_go_together(clevr, make_config):
    split = load(
        make_config("clevr-count", "regions", data_dir=str(clevr), image_size=32, patch_size=8),
        "val",
    )
    assert split.labels.tolist() == [0, 2, 7] and split.parts[0].images[:, 0, 0, 0].tolist() == [
        0,
        40,
        80,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"scenes": []}',
        '{"scenes": [{"image_filename": "a.png"}]}',
        '{"scenes": [{"image_filename": "a.png", "objects": []}]}',
    ],
)
@pytest.mark.parametrize("task", CLASSES)
def test_damaged_scenes_are_named(clevr, text, task):
    (clevr / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json").write_text(text)
    with pytest.raises(BadInput, match="CLEVR_val_scenes.json"):
        clevr_files(clevr, task, "val")


def test_absent_data_are_named(tmp_path):
    with pytest.raises(BadInput, match="CLEVR_train_scenes.json: not found"):
        clevr_files(tmp_path, "clevr-count", "train")
