"""COCO's format: gaps, crowds, images without objects, and what is broken."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_masks import STAR, H, W, as_runs, compressed, random_mask

from plumbing.errors import BadInput
from sources.coco import Coco, load


def annotate(**changes):
    """Three images with ids in disorder; categories 2, 5 and 9."""
    cat = random_mask(3)
    crowd = random_mask(4)
    listed = dict(
        images=[dict(id=30, file_name="c.png", height=H, width=W),
                dict(id=7, file_name="a.png", height=H, width=W),
                dict(id=12, file_name="b.png", height=20, width=30)],
        categories=[dict(id=9, name="dog"), dict(id=2, name="cat"), dict(id=5, name="bird")],
        annotations=[
            dict(id=1, image_id=7, category_id=9, bbox=[8, 2, 44, 36], area=700.0, iscrowd=0,
                 segmentation=[STAR]),
            dict(id=2, image_id=30, category_id=2, bbox=[0, 0, 60, 40],
                 segmentation=dict(size=[H, W], counts=compressed(cat))),
            dict(id=3, image_id=7, category_id=2, bbox=[1, 2, 3, 4], area=50, iscrowd=1,
                 segmentation=dict(size=[H, W], counts=as_runs(crowd)))])
    return listed | changes


def write(root, listed=None, years="2017"):
    """A folder in COCO's layout; both splits hold the same."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        folder = root / f"{split}{years}"
        folder.mkdir()
        for name, (height, width) in dict(a=(H, W), b=(20, 30), c=(H, W)).items():
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}.png")
        text = json.dumps(listed or annotate())
        (root / "annotations" / f"instances_{split}{years}.json").write_text(text)
    return root


@pytest.fixture
def opened(make_config):
    """load(split) of the folder that `write` made."""
    def opened(root, split, **changes):
        return load(make_config("folder", "regions", data_dir=str(root), **changes), split)
    return opened


def test_a_folder_is_read(tmp_path):
    data = Coco(write(tmp_path), "val")
    assert data.classes == ["cat", "bird", "dog"] and len(data) == 3 and not data.nearly
    assert data.counts.tolist() == [1, 0, 1]                    # images 7, 12, 30; without crowds

    image, objects = data.objects(0)
    assert image.shape == (3, H, W) and image.dtype == torch.uint8
    stored = np.array(Image.open(tmp_path / "val2017" / "a.png"))
    assert np.array_equal(image.movedim(0, 2), stored)
    assert objects.classes.tolist() == [2, 0] and objects.crowd.tolist() == [False, True]
    assert objects.boxes.tolist() == [[8, 2, 52, 38], [1, 2, 4, 6]]
    assert objects.areas.tolist() == [700, 50]
    assert np.array_equal(objects.masks[1], random_mask(4))
    image, objects = data.objects(1)
    assert image.shape == (3, 20, 30) and objects.masks.shape == (0, 20, 30)
    assert objects.boxes.shape == (0, 4)
    image, objects = data.objects(2)
    assert np.array_equal(objects.masks[0], random_mask(3))
    assert objects.areas.tolist() == [random_mask(3).sum()]     # the JSON gives none
    assert not objects.crowd.any()


@pytest.mark.parametrize("years", ["2014", "", "_mine"])
def test_names_with_other_endings(tmp_path, years):
    assert len(Coco(write(tmp_path, years=years), "train")) == 3


def test_json_beside_the_images_and_images_in_a_folder_of_their_own(tmp_path):
    made = write(tmp_path / "coco")
    (made / "images").mkdir()
    (made / "train2017").rename(made / "images" / "train2017")
    assert Coco(made, "train").files[0].parent == made / "images" / "train2017"
    for split, name in (("train", "train"), ("val", "valid")):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for file in (made / "val2017").iterdir():
            (tmp_path / "flat" / name / file.name).write_bytes(file.read_bytes())
        listing = made / "annotations" / "instances_val2017.json"
        (tmp_path / "flat" / name / "_annotations.coco.json").write_bytes(listing.read_bytes())
    flat = tmp_path / "flat"
    assert [len(Coco(flat, split)) for split in ("train", "val")] == [3, 3]


def test_training_needs_objects_and_validation_sees_all(tmp_path, opened):
    root = write(tmp_path)
    train, val = opened(root, "train"), opened(root, "val")
    assert len(train) == 2 and len(val) == 3
    assert train.objects(1)[1].classes.tolist() == [0]          # image 30: image 12 has nothing
    assert val.objects(1)[1].classes.tolist() == []
    some = opened(root, "val", limit=2)
    assert len(some) == 2 and some.rows.tolist() == sorted(some.rows)
    assert some.rows.tolist() == opened(root, "val", limit=2).rows.tolist()


# ---------------------------------------------------------------- what is broken

def changed(number, **values):
    """annotate() with one annotation changed; None takes a field away."""
    listed = annotate()
    listed["annotations"][number] |= values
    kept = {name: v for name, v in listed["annotations"][number].items() if v is not None}
    listed["annotations"][number] = kept
    return listed


RUNS = dict(size=[H, W], counts=[H * W])
BROKEN = {
    "no annotations": (dict(images=[], categories=[dict(id=1, name="a")]), "annotations"),
    "a list": ([1, 2], "not COCO's list"),
    "no categories": (annotate(categories=[]), "annotation 1 is of an image or a category"),
    "an image twice": (annotate(images=[dict(id=7, file_name="a.png", height=H, width=W)] * 2),
                       "twice"),
    "no such image": (changed(0, image_id=8), "annotation 1 is of an image or a category"),
    "no such category": (changed(0, category_id=1), "annotation 1 is of an image or a category"),
    "no mask": (changed(1, segmentation=None), "annotation 2 has no segmentation"),
    "a mask of another size": (changed(1, segmentation=dict(RUNS, size=[W, H])), "mask of"),
    "a box of three": (changed(0, bbox=[1, 2, 3]), "not COCO's list"),
    "a box of NaN": (changed(0, bbox=[1, 2, float("nan"), 3]), "annotation 1 has a box"),
    "an image that leads out": (annotate(images=[dict(id=7, file_name="../a.png", height=H,
                                                      width=W)], annotations=[]), "inside"),
    "an image that is absent": (annotate(images=[dict(id=7, file_name="d.png", height=H, width=W)],
                                         annotations=[]), "d.png: not found; listed"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_a_line_when_it_is_opened(tmp_path, name):
    listed, words = BROKEN[name]
    write(tmp_path, listed)
    with pytest.raises(BadInput, match=words) as error:
        Coco(tmp_path, "train")
    assert "instances_train2017.json" in str(error.value) and "\n" not in str(error.value)


USED = {
    "another length": (dict(RUNS, counts=[H * W - 1]), "run lengths for 2,399 pixels"),
    "negative": (dict(RUNS, counts=[H * W + 1, -1]), "negative"),
    "no numbers": (dict(RUNS, counts=[None]), "unsupported"),
    "no whole numbers": (dict(RUNS, counts=[0.5, H * W - 0.5]), "cannot reshape"),
    "cut": (dict(RUNS, counts="o" * 3), "run lengths for 0 pixels"),
    "no text of theirs": (dict(RUNS, counts="a b"), "run lengths for 0 pixels"),
    "an odd polygon": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon"),
    "a polygon of points": ([[[1, 2], [3, 4]] * 3], "a polygon"),
    "a polygon to the moon": ([[1, 2, 3, 4, 5e9, 6]], "a polygon"),
    "a polygon of words": ([["a"] * 6], "could not convert"),
}


@pytest.mark.parametrize("name", USED)
def test_a_broken_mask_is_said_in_a_line_when_it_is_used(tmp_path, name):
    segmentation, words = USED[name]
    data = Coco(write(tmp_path, changed(1, segmentation=segmentation)), "train")
    with pytest.raises(BadInput, match=words) as error:
        data.objects(2)
    assert "annotation 2 of c.png" in str(error.value)


def test_broken_files(tmp_path):
    root = write(tmp_path / "data")
    listing = root / "annotations" / "instances_train2017.json"
    (root / "train2017" / "b.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="b.png: not a readable image"):
        Coco(root, "train").objects(1)
    Image.new("RGB", (30, 21)).save(root / "train2017" / "b.png")
    with pytest.raises(BadInput, match="b.png: 30 x 21 pixels, but 30 x 20 in"):
        Coco(root, "train").objects(1)
    listing.write_text(listing.read_text()[:-5])
    with pytest.raises(BadInput, match="instances_train2017.json: not COCO's list .*JSON"):
        Coco(root, "train")
    (root / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(BadInput, match="a second file of train annotations"):
        Coco(root, "train")
    for file in (root / "annotations").iterdir():
        file.unlink()
    with pytest.raises(BadInput, match="no annotations of train; expected"):
        Coco(root, "train")
    with pytest.raises(BadInput, match="nowhere: not found"):
        Coco(tmp_path / "nowhere", "train")


def test_without_any_object_there_is_nothing_to_do(tmp_path, opened):
    crowd = annotate()["annotations"][2]
    write(tmp_path, annotate(annotations=[crowd]))
    for split in ("train", "val"):
        with pytest.raises(BadInput, match=f"instances_{split}2017.json: not a single object"):
            opened(tmp_path, split)
