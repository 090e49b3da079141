"""CUB-200-2011, Stanford Cars and iNaturalist 2021 in small, in their published layouts."""
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from datasets import load
from plumbing.errors import BadInput

CUB = [("001.Albatross/a_1.jpg", 1, 1), ("001.Albatross/a_2.jpg", 1, 0),
       ("002.Auklet/b_1.jpg", 2, 0), ("002.Auklet/b_2.jpg", 2, 1), ("010.Oriole/c_1.jpg", 10, 1),
       ("010.Oriole/c_2.jpg", 10, 0)]
CARS = {"train": [("00001.jpg", 2), ("00002.jpg", 1), ("00003.jpg", 3)],
        "test": [("00001.jpg", 3), ("00002.jpg", 2)]}


def write(path, red, size=(30, 20)):
    """A one-colour JPEG, whose red tells which it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (red, 0, 0)).save(path, quality=100)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def read(make_config):
    """read(dataset, split): [(red / 10, class)], the classes"""
    def make(dataset, split):
        config = make_config(dataset, "regions", image_size=32, patch_size=8, encoder="vit-nano")
        split = load(config, split)
        part, = split.parts
        begin = np.concatenate([[0], (3 * part.sizes.prod(1)).cumsum()[:-1]])
        reds = part.images[begin].astype(int)
        labels = [split.classes[label] for label in split.labels]
        return list(zip((reds / 10).round().astype(int).tolist(), labels)), split.classes
    return make


# ---------------------------------------------------------------- CUB

def make_cub(root):
    for i, (name, _, _) in enumerate(CUB, 1):
        write(root / "images" / name, 10 * i)
    for file, column in (("images", 0), ("image_class_labels", 1), ("train_test_split", 2)):
        lines = [f"{i} {row[column]}\n" for i, row in enumerate(CUB, 1)]
        (root / f"{file}.txt").write_text("".join(lines))


@pytest.mark.parametrize("folder", ["", "CUB_200_2011"])
def test_cub_by_its_own_split(root, read, folder):
    make_cub(root / folder)
    train, classes = read("cub", "train")
    assert classes == ["001.Albatross", "002.Auklet", "010.Oriole"]
    assert train == [(1, "001.Albatross"), (4, "002.Auklet"), (5, "010.Oriole")]
    assert read("cub", "val") == ([(2, "001.Albatross"), (3, "002.Auklet"), (6, "010.Oriole")],
                                  classes)
    assert read("cub", "pretrain")[0] == train


@pytest.mark.parametrize("file, text, words", [
    ("images.txt", None, "images.txt: not found"),
    ("images.txt", "1 a b\n", "a number and a word"),
    ("images.txt", "", "a number and a word"),
    ("images.txt", "1 a/b.jpg\n1 a/c.jpg\n", "each number once"),
    ("images.txt", "".join(f"{i} ../x.jpg\n" for i in range(1, 7)), "expected a name inside"),
    ("images.txt", "".join(f"{i} a/{i}.jpg\n" for i in range(1, 7)), "1.jpg: not found"),
    ("image_class_labels.txt", "1 1\n", "other images than images.txt"),
    ("image_class_labels.txt", "".join(f"{i} x\n" for i in range(1, 7)), "'x' is no class number"),
    ("train_test_split.txt", "".join(f"{i} 2\n" for i in range(1, 7)), "'2' is no"),
    ("train_test_split.txt", "".join(f"{i} 0\n" for i in range(1, 7)), "no image is for train"),
])
def test_cub_damage_is_named(root, read, file, text, words):
    make_cub(root)
    (root / file).unlink()
    if text is not None:
        (root / file).write_text(text)
    with pytest.raises(BadInput, match=words) as caught:
        read("cub", "train")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- Cars

def make_cars(root, test_annotations="."):
    """As the archives unpack: annotations are MATLAB's arrays of structures."""
    (root / "devkit").mkdir(parents=True)
    for split, rows in CARS.items():
        for i, (name, _) in enumerate(rows, 1):
            write(root / f"cars_{split}" / name, 10 * i + (100 if split == "test" else 0))
    kind = [("bbox_x1", object), ("fname", object), ("class", object)]

    def annotations(rows):
        return np.array([(np.uint8(3), name, np.uint8(number)) for name, number in rows], kind)

    names = np.array(["AM General Hummer", "Acura RL", "Audi R8"], object)
    savemat(root / "devkit" / "cars_meta.mat", dict(class_names=names))
    savemat(root / "devkit" / "cars_train_annos.mat", dict(annotations=annotations(CARS["train"])))
    savemat(root / test_annotations / "cars_test_annos_withlabels.mat",
            dict(annotations=annotations(CARS["test"])))


@pytest.mark.parametrize("folder, beside", [("", "."), ("", "devkit"), ("stanford_cars", ".")])
def test_cars_by_the_devkit(root, read, folder, beside):
    make_cars(root / folder, beside)
    train, classes = read("cars", "train")
    assert classes == ["AM General Hummer", "Acura RL", "Audi R8"]
    assert train == [(1, "Acura RL"), (2, "AM General Hummer"), (3, "Audi R8")]
    assert read("cars", "val")[0] == [(11, "Audi R8"), (12, "Acura RL")]


def test_cars_by_folders(root, read):
    for split, shift in (("train", 0), ("test", 10)):
        for i, name in enumerate(["Acura RL", "Audi R8"], 1):
            write(root / split / name / f"{i}.jpg", 10 * (i + shift))
    assert read("cars", "train") == ([(1, "Acura RL"), (2, "Audi R8")], ["Acura RL", "Audi R8"])
    assert read("cars", "val")[0] == [(11, "Acura RL"), (12, "Audi R8")]


def test_annotations_without_scipy_are_one_line(root, read, monkeypatch):
    make_cars(root)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(BadInput, match="only SciPy reads.*pip install scipy, or sort"):
        read("cars", "train")


def test_a_single_car_is_a_list_of_one(root, read, monkeypatch):
    monkeypatch.setitem(CARS, "test", [("00001.jpg", 2)])
    make_cars(root)
    assert read("cars", "val")[0] == [(11, "Acura RL")]


@pytest.mark.parametrize("file, content, words", [
    ("devkit/cars_meta.mat", None, "cars_meta.mat: not found"),
    ("devkit/cars_meta.mat", b"MATLAB 5.0" + bytes(300), "not Stanford Cars' class_names"),
    ("devkit/cars_train_annos.mat", b"", "not Stanford Cars' annotations"),
    ("devkit/cars_train_annos.mat", dict(annotations=np.zeros(3)), "a name and a class"),
    ("devkit/cars_train_annos.mat", dict(other=np.zeros(3)), "not Stanford Cars' annotations"),
    ("devkit/cars_train_annos.mat", dict(annotations=np.array(
        [("../x.jpg", 1)], [("fname", object), ("class", object)])), "expected a name inside"),
    ("devkit/cars_train_annos.mat", dict(annotations=np.array(
        [("00001.jpg", 4)], [("fname", object), ("class", object)])), "expected classes 1 to 3"),
    ("cars_train/00002.jpg", None, "00002.jpg: not found"),
])
def test_cars_damage_is_named(root, read, file, content, words):
    make_cars(root)
    (root / file).unlink()
    if isinstance(content, bytes):
        (root / file).write_bytes(content)
    elif content:
        savemat(root / file, content)
    with pytest.raises(BadInput, match=words) as caught:
        read("cars", "train")
    assert "\n" not in str(caught.value)


def test_a_folder_that_holds_no_cars(root, read):
    write(root / "Acura RL" / "1.jpg", 10)
    with pytest.raises(BadInput, match="neither devkit/ .* nor train/ and test/"):
        read("cars", "train")


# ---------------------------------------------------------------- iNat21

SPECIES = ["00000_Animalia_Annelida_Clitellata", "00001_Plantae_Tracheophyta_Liliopsida"]


def make_inat21(root, **folders):
    for folder, red in folders.items():
        for i, name in enumerate(SPECIES, 1):
            write(root / folder.lstrip("_") / name / f"{i}.jpg", red + 10 * i)


@pytest.mark.parametrize("train, val", [("_2021_train_mini", "_2021_valid"),
                                        ("_2021_train", "_2021_valid"), ("train_mini", "val"),
                                        ("train", "val")])
def test_inat21_under_either_name(root, read, train, val):
    make_inat21(root, **{train: 0, val: 100})
    assert read("inat21", "train") == ([(1, SPECIES[0]), (2, SPECIES[1])], SPECIES)
    assert read("inat21", "val")[0] == [(11, SPECIES[0]), (12, SPECIES[1])]


def test_of_two_training_sets_of_inat21_the_small_one(root, read):
    make_inat21(root, _2021_train=50, _2021_valid=100)
    assert [red for red, _ in read("inat21", "train")[0]] == [6, 7]
    make_inat21(root, _2021_train_mini=0)
    assert [red for red, _ in read("inat21", "train")[0]] == [1, 2]


def test_inat21_without_a_split_is_one_line(root, read):
    make_inat21(root, train=0)
    with pytest.raises(BadInput, match="none of the folders 2021_valid, val; unpack"):
        read("inat21", "train")


@pytest.mark.parametrize("dataset", ["cub", "cars", "inat21"])
def test_a_folder_that_is_not_there(root, read, dataset):
    root.rmdir()
    with pytest.raises(BadInput, match=f"not found; --dataset {dataset} reads"):
        read(dataset, "train")
