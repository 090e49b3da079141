"""Pairs of image and label: layouts, numbers, names, and what is refused."""
import numpy as np
import pytest
from PIL import Image

from plumbing.errors import BadInput
from sources import ade20k

RNG = np.random.default_rng(0)


def write(root, name, label, split="training", size=(7, 5)):
    """An image and its label, both of this width and height."""
    for folder, array, suffix in (
        ("images", RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8), ".jpg"),
        ("annotations", np.asarray(label), ".png"),
    ):
        path = root / folder / split / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def ade(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    for i, split in enumerate(("training", "training", "validation")):
        label = np.zeros((5, 7), np.uint8)
        label[1] = 1
        label[2] = 150
        write(root, f"ADE_{i}", label, split)
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{i}\t0.1\t10\t1\t1\tthing {i}, item {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def config(make_config):
    return lambda root, **changes: make_config("solids", "regions", data_dir=str(root), **changes)


def test_ade20k(ade, config):
    train, val = (ade20k.load(config(ade), split) for split in ("train", "val"))
    assert len(train) == 2 and len(val) == 1
    image, label = train.labelled(0)
    assert image.shape == (3, 5, 7) and label.shape == (5, 7)
    assert label[:3, 0].tolist() == [255, 0, 149]
    assert train.label_names[0] == "thing 1" and train.label_names[149] == "thing 150"
    assert len(ade20k.load(config(ade, limit=1), "train")) == 1
    (ade / "ADEChallengeData2016" / "objectInfo150.txt").unlink()
    assert ade20k.load(config(ade), "train").label_names[149] == "150"


def test_own_pairs_without_splits(tmp_path, config):
    (tmp_path / "classes.txt").write_text("ground\nroof\n")
    for i in range(20):
        write(tmp_path, f"{i:02}", np.full((5, 7), i % 2, np.uint8), ".")
    (tmp_path / "annotations").rename(tmp_path / "labels")
    train, val = (ade20k.load(config(tmp_path), split) for split in ("train", "val"))
    assert len(train) == 18 and len(val) == 2 and not set(train.images) & set(val.images)
    assert train.label_names == ["ground", "roof"]
    for i in range(18):
        assert train.labelled(i)[1].unique().tolist() == [int(train.images[i].stem) % 2]


def test_a_palette_s_numbers_are_the_labels(tmp_path, config):
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    for i in range(2):
        write(tmp_path, str(i), np.zeros((5, 7), np.uint8), ".")
        coloured = Image.fromarray(np.full((5, 7), 2, np.uint8))
        coloured.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
        coloured.save(tmp_path / "annotations" / f"{i}.png")
    assert ade20k.load(config(tmp_path), "train").labelled(0)[1].unique().tolist() == [2]


def remove(name):
    return lambda root: (root / name).unlink()


def relabel(array, split="validation"):
    return lambda root: Image.fromarray(array).save(root / f"annotations/{split}/ADE_2.png")


@pytest.mark.parametrize(
    "words, damage",
    [
        ("no images and annotations there", lambda root: (root / "images").rename(root / "x")),
        ("ADE_0.png: not found; the label of", remove("annotations/training/ADE_0.png")),
        ("only one split", lambda root: (root / "images/training").rename(root / "x")),
        ("has label 151, expected 1 to 150", relabel(np.full((5, 7), 151, np.uint8))),
        ("kind RGB, expected one number a pixel", relabel(np.zeros((5, 7, 3), np.uint8))),
        ("not a single labelled pixel in 1 images of val", relabel(np.zeros((5, 7), np.uint8))),
        ("objectInfo150.txt: 1 classes", lambda r: (r / "objectInfo150.txt").write_text("\na\tb")),
        ("classes.txt: 1 names", lambda root: (root / "classes.txt").write_text("one\n")),
        ("ADE_2.png: not a readable image",
         lambda root: (root / "annotations/validation/ADE_2.png").write_bytes(b"no")),
    ],
)
def test_what_is_refused_at_once(ade, config, words, damage):
    damage(ade / "ADEChallengeData2016")
    with pytest.raises(BadInput, match=words):
        for split in ("train", "val"):
            ade20k.load(config(ade), split)


def test_a_label_of_another_size_is_refused(ade, config):
    relabel(np.ones((4, 7), np.uint8))(ade / "ADEChallengeData2016")
    with pytest.raises(BadInput, match="ADE_2.png: 7 x 4 pixels, its image has 7 x 5"):
        ade20k.load(config(ade), "val").labelled(0)
