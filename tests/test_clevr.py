"""CLEVR's published layout, in small; labels by hand."""
import json

import numpy as np
import pytest
from PIL import Image

from datasets import load
from plumbing.errors import BadInput
from sources.clevr import CLASSES, clevr_files, vtab_train


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


def small(make_config, clevr, task="clevr-count"):
    return make_config(task, "regions", data_dir=str(clevr), image_size=32, patch_size=8)


def test_images_and_labels_go_together(clevr, make_config):
    split = load(small(make_config, clevr), "val")
    assert split.labels.tolist() == [0, 2, 7]
    assert split.parts[0].images[:, 0, 0, 0].tolist() == [0, 40, 80]


def test_files_are_sorted_by_name(clevr, make_config):
    path = clevr / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json"
    scenes = json.loads(path.read_text())["scenes"]
    path.write_text(json.dumps(dict(scenes=scenes[::-1])))
    split = load(small(make_config, clevr), "val")
    assert split.labels.tolist() == [0, 2, 7]
    assert split.parts[0].images[:, 0, 0, 0].tolist() == [0, 40, 80]


def test_probes_learn_from_vtab_s_800_and_pre_training_from_all(clevr, make_config):
    config = small(make_config, clevr)
    assert [len(load(config, split).labels) for split in ("pretrain", "train", "val")] == [3, 2, 3]
    assert load(config, "train").parts[0].images[:, 0, 0, 0].tolist() == [0, 40]
    assert [vtab_train(n) for n in (70_000, 889, 888, 10, 1)] == [800, 800, 799, 9, 1]


def test_the_whole_image_is_squashed(clevr, make_config):
    """What lies at the edges, which a middle square would lose, stays."""
    file = clevr / "CLEVR_v1.0" / "images" / "val" / "CLEVR_val_000000.png"
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, :6] = 255
    pixels[:4, 60:] = 255
    Image.fromarray(pixels).save(file)
    image = load(small(make_config, clevr), "val").parts[0].images[0]
    squashed = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.BICUBIC))
    difference = image.astype(int) - squashed.transpose(2, 0, 1).astype(int)
    assert abs(difference).max() <= 1 and image[:, 16, :2].min() > 230


@pytest.mark.parametrize("distance, label", [(7.99, 0), (8.0, 1), (8.49, 1), (8.5, 2), (9.0, 3),
                                             (9.5, 4), (9.99, 4), (10.0, 5), (30.0, 5)])
def test_distances_are_cut_where_vtab_cuts_them(clevr, distance, label):
    path = clevr / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json"
    things = [dict(pixel_coords=[1, 2, distance + k]) for k in range(3)]
    scenes = [dict(image_filename="CLEVR_val_000000.png", objects=things)]
    path.write_text(json.dumps(dict(scenes=scenes)))
    assert clevr_files(clevr, "clevr-distance", "val")[1].tolist() == [label]


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
