"""datasets.py and prepare.py against torchvision, PIL and NumPy, on files in the published
formats."""
import json
import os
import pickle
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import datasets as D
import images as images_module
from plumbing.errors import BadInput
from sources import prepare

CPU = torch.device("cpu")


def pixels(split):
    """All images of a split, in order."""
    return np.concatenate([part.images for part in split.parts])


def left_in_cache(config):
    return sorted(f.name for f in (Path(config.data_dir) / ".cache").rglob("*") if f.is_file())


@pytest.fixture
def decodes(monkeypatch):
    """Paths of the images decoded so far."""
    seen, real = [], prepare.decode
    monkeypatch.setattr(
        prepare, "decode", lambda path, size, **how: seen.append(path) or real(path, size, **how)
    )
    return seen


def pil_resize(image, size):
    return np.asarray(
        Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), Image.BICUBIC)
    ).transpose(2, 0, 1)


def assert_close(ours, theirs):
    """Equal up to rounding between the two passes of a resize, in a few pixels."""
    difference = np.abs(ours.astype(int) - np.array(theirs))
    assert difference.max() <= 2 and difference.mean() < 0.05


def raiser(error):
    def fail(*_, **__):
        raise error
    return fail


# ---------------------------------------------------------------- what --limit keeps

@pytest.mark.parametrize("counts, limit, expected", [
    ([30, 30, 30], 9, [3, 3, 3]), ([2, 50, 10], 12, [2, 5, 5]), ([1, 1, 40], 30, [1, 1, 28]),
    ([5, 5], 3, None), ([4], 3, [3]),
])
def test_choice_is_balanced_as_far_as_the_classes_allow(counts, limit, expected):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    chosen = prepare.choose(labels, limit)
    taken = np.bincount(labels[chosen], minlength=len(counts))
    assert len(set(chosen)) == limit and (np.diff(chosen) > 0).all()
    assert taken.tolist() == expected if expected else taken.max() - taken.min() == 1


@pytest.mark.parametrize("limit", [0, 10, 11, 1000])
def test_no_limit_and_a_large_one_keep_everything(limit):
    np.testing.assert_array_equal(prepare.choose(np.arange(10) % 3, limit), np.arange(10))


def test_choice_is_random_but_always_the_same():
    labels = np.arange(1000) % 10
    chosen = prepare.choose(labels, 100)
    np.testing.assert_array_equal(chosen, prepare.choose(labels, 100))
    assert abs(chosen.mean() - 500) < 100       # not the first 100
    assert set(np.diff(chosen)) != {10}         # nor every tenth


def test_unlabelled_images_are_chosen_at_random():
    chosen = prepare.choose(np.full(1000, -1), 100)
    assert len(set(chosen)) == 100 and abs(chosen.mean() - 500) < 100


# ---------------------------------------------------------------- STL-10

COUNTS = dict(train=20, test=13, unlabeled=17)


def write_stl10(root, counts=COUNTS):
    """stl10_binary/ as published: random pixels, labels 1, 2, ..., 10, 1, 2, ...  -> {name: images
    (n, 3, 96, 96)}"""
    folder = Path(root) / "stl10_binary"
    folder.mkdir(parents=True)
    rng, images = np.random.default_rng(0), {}
    for name, n in counts.items():
        images[name] = rng.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
        images[name].transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(n) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(D.STL10_CLASSES) + "\n")
    (folder / "fold_indices.txt").write_text(
        "\n".join(" ".join(map(str, range(k, 20, 2))) + " " for k in range(10)) + "\n"
    )
    return images


@pytest.fixture
def stl10(make_config):
    config = make_config("stl10", download=False)
    write_stl10(config.data_dir)
    return config


@pytest.mark.parametrize(
    "split, theirs", [("train", ["train"]), ("val", ["test"]), ("pretrain", ["unlabeled", "train"])]
)
def test_stl10_is_what_torchvision_reads(stl10, monkeypatch, split, theirs):
    # it wants the real MD5s
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    ours, readers = (
        D.load(stl10, split),
        [torchvision.datasets.STL10(stl10.data_dir, split=name) for name in theirs],
    )
    np.testing.assert_array_equal(
        pixels(ours),
        np.concatenate([[np.asarray(image).transpose(2, 0, 1) for image, _ in r] for r in readers]),
    )
    np.testing.assert_array_equal(ours.labels, np.concatenate([r.labels for r in readers]))
    assert ours.labels.dtype == np.int64 and ours.classes == readers[0].classes
    assert [part.name for part in ours.parts] == theirs and [part.total for part in ours.parts] == [
        COUNTS[n] for n in theirs
    ]


def test_stl10_pretrain_is_the_unlabelled_images_then_the_training_images(stl10):
    labels = D.load(stl10, "pretrain").labels
    assert (labels[:17] == -1).all()
    np.testing.assert_array_equal(labels[17:], np.arange(20) % 10)


def test_stl10_planes_are_stored_by_columns(make_config):
    config = make_config("stl10")
    write_stl10(config.data_dir, dict(test=2))
    data = np.zeros(2 * 3 * 96 * 96, np.uint8)
    # second image, green, the 71st value of the sixth column
    data[27648 + 9216 + 96 * 5 + 70] = 200
    data.tofile(Path(config.data_dir) / "stl10_binary" / "test_X.bin")
    images = pixels(D.load(config, "val"))
    assert np.argwhere(images).tolist() == [[1, 1, 70, 5]]      # row 70, column 5


def test_stl10_classes_are_named_by_its_own_file(stl10):
    path = Path(stl10.data_dir) / "stl10_binary" / "class_names.txt"
    path.write_text("\n".join("abcdefghij"))
    assert D.load(stl10, "val").classes == list("abcdefghij")
    path.unlink()
    assert D.load(stl10, "val").classes[:2] == ["airplane", "bird"]


def test_stl10_stays_on_the_disk(stl10):
    for part in D.load(stl10, "pretrain").parts:
        assert (
            isinstance(part.images, np.memmap)
            and part.images._mmap is not None
            and not part.images.flags.owndata
        )
    assert left_in_cache(stl10) == []


@pytest.mark.parametrize(
    "split, limit, classes",
    [("train", 10, [1] * 10), ("val", 10, [1] * 10), ("train", 5, None), ("val", 12, None)],
)
def test_stl10_limit_takes_as_many_of_each_class(stl10, split, limit, classes):
    everything, some = D.load(stl10, split), D.load(replace(stl10, limit=limit), split)
    rows, counts = some.parts[0].rows, np.bincount(some.labels, minlength=10)
    assert (
        len(some.labels) == limit
        and counts.max() - counts.min() <= 1
        and some.parts[0].total == len(everything.labels)
    )
    np.testing.assert_array_equal(pixels(some), pixels(everything)[rows])
    np.testing.assert_array_equal(some.labels, everything.labels[rows])
    assert classes is None or counts.tolist() == classes


@pytest.mark.parametrize("size", [48, 33, 120])
def test_stl10_resized_like_pil_and_cached(stl10, size, monkeypatch):
    original, config = pixels(D.load(stl10, "train")), replace(stl10, image_size=size)
    resized = pixels(D.load(config, "train"))
    assert_close(resized, [pil_resize(image, size) for image in original])
    monkeypatch.setattr(TF, "resize", raiser(AssertionError("resized again")))
    np.testing.assert_array_equal(pixels(D.load(config, "train")), resized)


def test_stl10_pretrain_and_train_share_one_cache(stl10, monkeypatch):
    config = replace(stl10, image_size=32)
    pretrain = D.load(config, "pretrain")
    monkeypatch.setattr(TF, "resize", raiser(AssertionError("resized again")))
    train = D.load(config, "train")
    np.testing.assert_array_equal(pixels(train), pretrain.parts[1].images)
    assert train.source == pretrain.source              # so that saliency maps are shared, too


def test_stl10_resized_again_when_its_file_changes(stl10):
    config, file = (
        replace(stl10, image_size=32),
        Path(stl10.data_dir) / "stl10_binary" / "test_X.bin",
    )
    assert pixels(D.load(config, "val")).any()
    np.zeros(file.stat().st_size, np.uint8).tofile(file)
    os.utime(file, ns=(1, 1))
    assert not pixels(D.load(config, "val")).any()


@pytest.mark.parametrize(
    "file, content, split",
    [
        ("train_X.bin", None, "train"),
        ("train_y.bin", None, "train"),
        ("test_X.bin", None, "val"),
        ("test_y.bin", None, "val"),
        ("unlabeled_X.bin", None, "pretrain"),
        ("train_X.bin", None, "pretrain"),
        ("train_X.bin", bytes(27648 * 20 - 1), "train"),
        ("unlabeled_X.bin", bytes(27649), "pretrain"),
        ("test_X.bin", b"", "val"),
        ("train_y.bin", bytes([1] * 19), "train"),
        ("train_y.bin", bytes([1] * 21), "train"),
        ("test_y.bin", b"", "val"),
        ("train_y.bin", bytes([0] + [1] * 19), "train"),
        ("test_y.bin", bytes([11] + [1] * 12), "val"),
    ],
    ids=[
        "no train_X",
        "no train_y",
        "no test_X",
        "no test_y",
        "no unlabeled_X",
        "no train_X for pretrain",
        "a byte short",
        "a byte too many",
        "empty test_X",
        "a label short",
        "a label too many",
        "empty test_y",
        "label 0",
        "label 11",
    ],
)
def test_stl10_damage_is_named(stl10, file, content, split):
    path = Path(stl10.data_dir) / "stl10_binary" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(BadInput, match=str(path)):
        D.load(stl10, split)


@pytest.mark.parametrize(
    "dataset, module", [("stl10", "stl10"), ("cifar10", "cifar"), ("cifar100", "cifar")]
)
def test_absent_and_the_download_fails(make_config, monkeypatch, dataset, module):
    module = getattr(torchvision.datasets, module)
    monkeypatch.setattr(
        module, "download_and_extract_archive", raiser(URLError("no route to host"))
    )
    config = make_config(dataset, "augment")
    with pytest.raises(BadInput, match=f"{config.data_dir}: could not download .*no route to host"):
        D.load(config, "train")


@pytest.mark.parametrize(
    "dataset, module", [("stl10", "stl10"), ("cifar10", "cifar"), ("cifar100", "cifar")]
)
def test_absent_and_no_download(make_config, monkeypatch, dataset, module):
    module = getattr(torchvision.datasets, module)
    monkeypatch.setattr(
        module, "download_and_extract_archive", raiser(AssertionError("it was told not to"))
    )
    config = make_config(dataset, "augment", download=False)
    for split in ("pretrain", "train", "val"):
        with pytest.raises(BadInput, match=f"{config.data_dir}.*--download"):
            D.load(config, split)


# ---------------------------------------------------------------- CIFAR

def write_cifar(root, dataset):
    """The published pickles: rows of 3072 bytes, red plane first, each plane row by row.  ->
    {split: (images, labels)}"""
    rng = np.random.default_rng(0)
    layout = {
        "cifar10": (
            "cifar-10-batches-py",
            [f"data_batch_{k}" for k in range(1, 6)],
            "test_batch",
            "batches.meta",
        ),
        "cifar100": ("cifar-100-python", ["train"], "test", "meta"),
    }[dataset]
    folder, n_classes, made = Path(root) / layout[0], 10 if dataset == "cifar10" else 100, {}
    folder.mkdir(parents=True)
    for split, files in (("train", layout[1]), ("val", [layout[2]])):
        images = rng.integers(0, 256, (len(files), 12, 3, 32, 32), dtype=np.uint8)
        labels = rng.integers(0, n_classes, (len(files), 12))
        for file, x, y in zip(files, images, labels.tolist()):
            named = (
                dict(labels=y)
                if dataset == "cifar10"
                else dict(fine_labels=y, coarse_labels=[0] * 12)
            )
            (folder / file).write_bytes(
                pickle.dumps(
                    dict(named, data=x.reshape(12, 3072), batch_label="b", filenames=["f.png"] * 12)
                )
            )
        made[split] = images.reshape(-1, 3, 32, 32), labels.ravel()
    key = "label_names" if dataset == "cifar10" else "fine_label_names"
    (folder / layout[3]).write_bytes(pickle.dumps({key: [f"class {k}" for k in range(n_classes)]}))
    return made


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, make_config, monkeypatch):
    config = make_config(request.param, "augment", download=False)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    return config, write_cifar(config.data_dir, request.param)


@pytest.mark.parametrize("split", ["pretrain", "train", "val"])
def test_cifar_pixels_labels_and_names(cifar, split):
    config, made = cifar
    images, labels = made["val" if split == "val" else "train"]
    ours = D.load(config, split)
    np.testing.assert_array_equal(pixels(ours), images)
    np.testing.assert_array_equal(ours.labels, labels)
    assert (
        ours.labels.dtype == np.int64
        and ours.classes[3] == "class 3"
        and ours.parts[0].images.flags.c_contiguous
    )


def test_cifar_limit_and_another_size(cifar):
    config, made = cifar
    some = D.load(replace(config, limit=6, image_size=16), "train")
    rows = some.parts[0].rows
    assert pixels(some).shape == (6, 3, 16, 16) and len(set(some.labels)) == 6
    np.testing.assert_array_equal(some.labels, made["train"][1][rows])
    assert_close(pixels(some), [pil_resize(image, 16) for image in made["train"][0][rows]])


def test_cifar_with_wrong_checksums_is_refused(make_config):
    config = make_config("cifar10", "augment", download=False)
    write_cifar(config.data_dir, "cifar10")
    with pytest.raises(BadInput, match="no intact cifar10"):
        D.load(config, "train")


# ---------------------------------------------------------------- image files

SIZE = 24


def write_image(path, value, size=(SIZE, SIZE)):
    """One-colour image. A PNG of the configured size is not resized, so that its value identifies
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path)


def values(split):
    """What identifies the images of a split: the red of each."""
    return pixels(split)[:, 0, 0, 0].tolist()


@pytest.fixture
def folder(make_config):
    """make(files) writes {relative path: value} and returns the config; values become one-colour
    images."""
    def make(files, dataset="folder", **changes):
        config = make_config(dataset, image_size=SIZE, patch_size=8, **changes)
        Path(config.data_dir).mkdir(parents=True, exist_ok=True)
        for path, value in files.items():
            write_image(Path(config.data_dir) / path, value)
        return config
    return make


TWO_SPLITS = {
    "train/cat/1.png": 1,
    "train/cat/2.png": 2,
    "train/ant/3.png": 3,
    "train/dog/4.PNG": 4,
    "val/dog/5.png": 5,
    "val/ant/6.png": 6,
}
ONE_SPLIT = {f"{'abc'[i % 3]}/{i}.png": i for i in range(30)}


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_train_and_val_folders(folder, dataset):
    config = folder(TWO_SPLITS, dataset)
    train, val = D.load(config, "train"), D.load(config, "val")
    assert train.classes == val.classes == ["ant", "cat", "dog"]
    assert dict(zip(values(train), train.labels)) == {1: 1, 2: 1, 3: 0, 4: 2}
    assert dict(zip(values(val), val.labels)) == {5: 2, 6: 0}
    assert values(D.load(config, "pretrain")) == values(train)


def test_train_folder_is_what_torchvision_reads(folder):
    config = folder({})
    root, rng = Path(config.data_dir) / "train", np.random.default_rng(0)
    for i in range(12):
        path = (
            root
            / f"class {i % 3}"
            / f"{'sub' if i % 2 else '.'}"
            / f"{i}.{'png' if i < 6 else 'jpg'}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*rng.integers(SIZE, 80, 2)).save(path)
    write_image(Path(config.data_dir) / "val" / "class 1" / "x.png", 0)
    transforms = torchvision.transforms
    whole = transforms.Compose(
        [
            transforms.Resize(SIZE, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.PILToTensor(),
        ]
    )
    theirs = torchvision.datasets.ImageFolder(root, whole)
    ours = D.load(config, "train")
    assert ours.classes == theirs.classes
    rank = {path: i for i, (path, _) in enumerate(theirs.samples)}
    order = [rank[str(file)] for file in prepare.image_files(root)]
    assert ours.labels.tolist() == [theirs.targets[i] for i in order]
    assert_close(pixels(ours), np.stack([theirs[i][0] for i in order]))


def test_without_splits_a_tenth_is_held_out(folder):
    config = folder(ONE_SPLIT)
    train, val = D.load(config, "train"), D.load(config, "val")
    assert len(val.labels) == 3 and sorted(values(train) + values(val)) == list(range(30))
    for split in (train, val):
        assert split.classes == ["a", "b", "c"]
        np.testing.assert_array_equal(split.labels, np.array(values(split)) % 3)


def test_the_held_out_tenth_is_the_same_for_every_seed(folder):
    config = folder(ONE_SPLIT)
    assert values(D.load(config, "val")) == values(D.load(replace(config, seed=7), "val"))


def test_images_in_the_folder_itself_are_one_class(folder):
    config = folder({f"{i}.png": i for i in range(12)})
    train, val = D.load(config, "train"), D.load(config, "val")
    assert (
        len(train.classes) == 1
        and not train.labels.any()
        and len(train.labels) == 11
        and len(val.labels) == 1
    )


def test_images_may_lie_deeper_than_their_class(folder):
    config = folder(
        {"train/cat/x/y/1.png": 1, "train/cat/2.png": 2, "train/dog/z/3.png": 3, "val/dog/4.png": 4}
    )
    train = D.load(config, "train")
    assert train.classes == ["cat", "dog"] and dict(zip(values(train), train.labels)) == {
        1: 0,
        2: 0,
        3: 1,
    }


def test_hidden_and_other_files_are_skipped(folder):
    config = folder(TWO_SPLITS | {"train/cat/._1.png": 90, "train/.trash/9.png": 91})
    (Path(config.data_dir) / "train" / "cat" / "notes.txt").write_text("not an image")
    assert sorted(values(D.load(config, "train"))) == [1, 2, 3, 4] and D.load(
        config, "train"
    ).classes == ["ant", "cat", "dog"]


def test_limit_on_a_folder_is_balanced_and_decodes_no_more(folder, decodes):
    config = folder(
        {f"train/{'ab'[i < 3]}/{i}.png": i for i in range(20)} | {"val/a/99.png": 99}, limit=6
    )
    split = D.load(config, "train")
    assert (
        np.bincount(split.labels).tolist() == [3, 3]
        and len(decodes) == 6
        and split.parts[0].total == 20
    )
    assert {v for v, label in zip(values(split), split.labels) if label} == {0, 1, 2}
    assert [
        v
        for v in np.array(sorted(range(20), key=lambda i: ("ab"[i < 3], str(i))))[
            split.parts[0].rows
        ]
    ] == values(split)


@pytest.mark.parametrize(
    "train, val",
    [("train", "val"), ("Train", "Val"), ("training", "validation"), ("TRAIN", "valid"),
     ("train", "test"), ("train", "Testing")],
)
def test_the_usual_names_of_splits_are_understood(folder, train, val):
    config = folder({path.replace("train", train).replace("val", val): value
                     for path, value in TWO_SPLITS.items()})
    assert sorted(values(D.load(config, "pretrain"))) == [1, 2, 3, 4]
    assert sorted(values(D.load(config, "val"))) == [5, 6]
    assert D.load(config, "val").classes == ["ant", "cat", "dog"]


def test_test_is_left_alone_beside_val(folder):
    config = folder(TWO_SPLITS | {"test/cat/77.png": 77})
    assert sorted(values(D.load(config, "train"))) == [1, 2, 3, 4]
    assert sorted(values(D.load(config, "val"))) == [5, 6]


@pytest.mark.parametrize("name", ["train", "test", "valid", "dev"])
def test_a_class_may_be_called_like_a_split(folder, name):
    config = folder(ONE_SPLIT | {f"{name}/{i}.png": 100 + i for i in range(9)})
    assert name in D.load(config, "train").classes


def test_a_link_back_to_a_folder_above_is_not_followed(folder):
    config = folder(TWO_SPLITS)
    root = Path(config.data_dir)
    (root / "train" / "cat" / "up").symlink_to("..")
    (root / "train" / "all").symlink_to(root)               # val's images lie there, too
    (root / "val" / "here").symlink_to(".")
    assert D.load(config, "train").classes == ["ant", "cat", "dog"]
    assert sorted(values(D.load(config, "train"))) == [1, 2, 3, 4]
    assert sorted(values(D.load(config, "val"))) == [5, 6]


def test_folders_and_images_may_be_links(folder, tmp_path):
    config = folder(TWO_SPLITS)
    root = Path(config.data_dir)
    (root / "train" / "dog").rename(tmp_path / "elsewhere")
    (root / "train" / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "ant" / "8.png").symlink_to(root / "train" / "cat" / "1.png")
    assert sorted(values(D.load(config, "train"))) == [1, 1, 2, 3, 4]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(folder, monkeypatch):
    config = folder(TWO_SPLITS)
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(prepare.os, "scandir", scandir)
    with pytest.raises(PermissionError, match="train/cat"):
        D.load(config, "train")


def test_a_single_class_is_remarked_on_once(folder, capsys):
    config = folder({f"{i}.png": i for i in range(12)})
    D.load(config, "pretrain")
    assert "has a single class" in capsys.readouterr().out
    D.load(config, "val")
    D.load(folder(TWO_SPLITS, data_dir=str(Path(config.data_dir) / "two")), "pretrain")
    assert not capsys.readouterr().out


def test_names_of_classes_can_be_shown(folder):
    names = [os.fsdecode(b"a\xff"), "b\x1b[2J", "c\n", "d e", "é"]
    config = folder({f"{name}/{i}.png": i for name in names for i in range(3)})
    assert D.load(config, "train").classes == [r"a\udcff", r"b\x1b[2J", r"c\n", "d e", "é"]


# ---------------------------------------------------------------- decoding

def picture(height=20, width=30):
    """Smooth and coloured, so that JPEG and palettes keep it nearly as it is."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    return Image.fromarray(
        np.stack([255 * y, 255 * x, 128 + 60 * np.sin(6 * x)], 2).astype(np.uint8)
    )


def pil_decode(path, size):
    """Shorter side to `size`, bicubic, centre crop: by PIL."""
    image = Image.open(path).convert("RGB")
    short, (w, h) = min(image.size), image.size
    if short != size or max(image.size) != size:
        image = image.resize((int(size * w / short), int(size * h / short)), Image.BICUBIC)
    left, top = int(round((image.width - size) / 2)), int(round((image.height - size) / 2))
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "mode, ending, tolerance",
    [
        ("RGB", "png", 0),
        ("L", "png", 0),
        ("LA", "png", 0),
        ("RGBA", "png", 0),
        ("P", "png", 0),
        ("1", "png", 0),
        ("RGB", "webp", 0),
        ("P", "gif", 0),
        ("RGB", "jpg", 6),
        ("RGB", "JPEG", 6),
        ("L", "jpg", 6),
        ("CMYK", "jpg", 6),
    ],
)
def test_every_kind_of_file_becomes_rgb(tmp_path, mode, ending, tolerance):
    path, image = tmp_path / f"x.{ending}", picture(SIZE, SIZE).convert(mode)
    image.save(
        path, **(dict(lossless=True) if ending == "webp" else dict(quality=98, subsampling=0))
    )
    ours, expected = (
        prepare.decode(path, SIZE),
        np.asarray(image.convert("RGB")).transpose(2, 0, 1).astype(int),
    )
    assert ours.dtype == np.uint8 and ours.shape == (3, SIZE, SIZE)
    assert np.abs(ours - expected).max() <= tolerance


def write_png_16(path, pixels):
    """pixels (H, W, 1 to 4) uint16: grey, grey and alpha, colours, colours and alpha."""
    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc
    height, width, channels = pixels.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_keep_the_upper_8(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 1), dtype=np.uint16)
    write_png_16(tmp_path / "x.png", values.repeat(channels, 2))
    expected = (values >> 8).astype(np.uint8).transpose(2, 0, 1).repeat(3, 0)
    np.testing.assert_array_equal(prepare.decode(tmp_path / "x.png", SIZE), expected)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = dict(lossless=True) if ending == "webp" else {}
    path = tmp_path / f"x.{ending}"
    picture(SIZE, SIZE).save(path, exif=exif, **lossless)
    stored = np.asarray(Image.open(path).convert("RGB"))
    turned = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1],
              5: stored.swapaxes(0, 1), 6: np.rot90(stored, -1),
              7: stored[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(stored)}[orientation]
    np.testing.assert_array_equal(prepare.decode(path, SIZE), turned.transpose(2, 0, 1))


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\xff", b"nonsense"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_data_change_nothing(tmp_path, exif):
    picture(SIZE, SIZE).save(tmp_path / "x.png", exif=exif)
    expected = np.asarray(picture(SIZE, SIZE)).transpose(2, 0, 1)
    np.testing.assert_array_equal(prepare.decode(tmp_path / "x.png", SIZE), expected)


def test_a_palette_with_transparent_colours_gives_its_colours_without_a_warning(tmp_path):
    image = picture(SIZE, SIZE).quantize(200)
    image.save(tmp_path / "x.png", transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = prepare.decode(tmp_path / "x.png", SIZE)
    np.testing.assert_array_equal(ours.transpose(1, 2, 0), np.asarray(image.convert("RGB")))


def test_what_older_code_decoded_of_a_users_folder_is_decoded_again(folder, decodes):
    for dataset, again in (("folder", 4), ("imagenet", 0)):
        config = folder(TWO_SPLITS, dataset)
        D.load(config, "train")
        key = Path(config.data_dir) / ".cache" / f"{dataset}-train-{SIZE}px.json"
        key_values = json.loads(key.read_text())
        key_values.pop("decoding", None)
        key.write_text(json.dumps(key_values))
        decodes.clear()
        D.load(config, "train")
        assert len(decodes) == again


# torchvision's decoders will move to another package
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_png_of_the_right_size_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    ours = prepare.decode(tmp_path / "x.png", SIZE)
    np.testing.assert_array_equal(ours.transpose(1, 2, 0), pixels)
    np.testing.assert_array_equal(ours, torchvision.io.decode_image(str(tmp_path / "x.png")))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    first, second = (picture(SIZE, SIZE).rotate(angle).quantize(256) for angle in (0, 180))
    first.save(tmp_path / "x.gif", save_all=True, append_images=[second])
    np.testing.assert_array_equal(
        prepare.decode(tmp_path / "x.gif", SIZE).transpose(1, 2, 0),
        np.asarray(first.convert("RGB")),
    )


@pytest.mark.parametrize(
    "height, width",
    [(61, 37), (37, 61), (9, 15), (24, 80), (25, 24), (200, 31), (1, 1), (1, 7), (23, 24)],
)
def test_odd_sizes_are_resized_and_cropped_as_pil_does(tmp_path, height, width):
    picture(height, width).save(tmp_path / "x.png")
    image = prepare.decode(tmp_path / "x.png", SIZE)
    assert image.shape == (3, SIZE, SIZE)
    assert_close(image, pil_decode(tmp_path / "x.png", SIZE))


def cut_short(path, source):
    write_image(source, 9, (64, 64))
    path.write_bytes(source.read_bytes()[:-200])


@pytest.mark.parametrize(
    "name, write",
    [
        ("bad.jpg", lambda path: cut_short(path, path.parents[3] / "whole.jpg")),
        ("bad.png", lambda path: cut_short(path, path.parents[3] / "whole.png")),
        ("bad.jpg", lambda path: path.write_text("I am text")),
        ("bad.png", lambda path: path.touch()),
    ],
    ids=["truncated jpeg", "truncated png", "text named .jpg", "empty"],
)
def test_unreadable_image_is_named_and_nothing_is_left(folder, name, write):
    config = folder(TWO_SPLITS)
    path = Path(config.data_dir) / "train" / "cat" / name
    write(path)
    with pytest.raises(BadInput, match=str(path)) as caught:
        D.load(config, "train")
    assert "\n" not in str(caught.value)
    assert left_in_cache(config) == []
    path.unlink()
    assert sorted(values(D.load(config, "train"))) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "files, split, message",
    [
        ({}, "train", "no image there"),
        ({"a/1.png": 1}, "train", "single image"),
        ({"train/cat/1.png": 1, "val/dog/2.png": 2}, "val", "val/dog"),
        ({"train/cat/1.png": 1, "val/2.png": 2}, "val", "no such class"),
    ],
    ids=["empty", "one image", "val has another class", "val without classes"],
)
def test_folders_that_make_no_data_set(folder, files, split, message):
    config = folder(files)
    with pytest.raises(BadInput, match=f"{config.data_dir}.*{message}"):
        D.load(config, split)


@pytest.mark.parametrize("sub", ["", "train", "val"])
def test_folder_without_images(folder, sub):
    config = folder({f"{other}/a/1.png": 1 for other in ("train", "val") if sub and other != sub})
    (Path(config.data_dir) / sub).mkdir(exist_ok=True)
    (Path(config.data_dir) / sub / "readme.txt").write_text("no images")
    with pytest.raises(BadInput, match=f"{Path(config.data_dir) / sub}: no image there"):
        D.load(config, "val" if sub == "val" else "train")


def test_missing_folder(make_config):
    with pytest.raises(BadInput, match="--data-dir"):
        D.load(make_config("folder"), "train")


# ---------------------------------------------------------------- the cache of decoded images

def test_unchanged_folder_is_decoded_once(folder, decodes):
    config = folder(TWO_SPLITS)
    first = pixels(D.load(config, "train")).copy()
    assert len(decodes) == 4
    np.testing.assert_array_equal(pixels(D.load(replace(config, seed=3), "train")), first)
    assert len(decodes) == 4


def test_pretrain_and_train_share_a_cache_and_val_has_its_own(folder, decodes):
    config = folder(TWO_SPLITS)
    for split in ("pretrain", "train", "val", "pretrain", "val"):
        D.load(config, split)
    assert len(decodes) == 6 and left_in_cache(config) == [
        f"folder-{s}-{SIZE}px.{e}" for s in ("train", "val") for e in ("json", "npy")
    ]


def added(root):
    write_image(root / "train" / "bee" / "9.png", 9)


def removed(root):
    (root / "train" / "cat" / "1.png").unlink()


def replaced(root):
    write_image(root / "train" / "cat" / "1.png", 50)
    os.utime(root / "train" / "cat" / "1.png", ns=(5, 5))


def renamed(root):
    (root / "train" / "cat" / "1.png").rename(root / "train" / "dog" / "1.png")


@pytest.mark.parametrize(
    "change, expected",
    [
        (added, {1: "cat", 2: "cat", 3: "ant", 4: "dog", 9: "bee"}),
        (removed, {2: "cat", 3: "ant", 4: "dog"}),
        (replaced, {50: "cat", 2: "cat", 3: "ant", 4: "dog"}),
        (renamed, {1: "dog", 2: "cat", 3: "ant", 4: "dog"}),
    ],
)
def test_changed_folder_is_noticed(folder, change, expected):
    config = folder(TWO_SPLITS)
    before = D.load(config, "train")
    change(Path(config.data_dir))
    after = D.load(config, "train")
    assert {v: after.classes[label] for v, label in zip(values(after), after.labels)} == expected
    assert after.source != before.source                # so that saliency maps are made again, too


def test_limits_do_not_clash(folder, decodes):
    config = folder({f"train/a/{i}.png": i for i in range(10)} | {"val/a/99.png": 99})
    expected = {limit: values(D.load(replace(config, limit=limit), "train")) for limit in (4, 0, 7)}
    assert len(decodes) == 4 + 10 + 7
    for limit in (7, 4, 0):
        assert values(D.load(replace(config, limit=limit), "train")) == expected[limit]
    assert len(decodes) == 21


def test_sizes_do_not_clash(folder):
    config = folder(TWO_SPLITS)
    for size in (16, 24, 16):
        assert pixels(D.load(replace(config, image_size=size), "train")).shape == (4, 3, size, size)


# ---------------------------------------------------------------- whole pictures

LONG = {"train/a/0.png": (90, 30), "train/a/1.png": (31, 200), "train/b/2.png": (24, 24),
        "train/b/3.png": (60, 60), "val/a/4.png": (50, 70)}             # width, height


@pytest.fixture
def whole(make_config):
    """A folder of noisy pictures of the sizes of LONG, for mode regions; stored with sides of up to
    41 pixels, 12/7 of 24."""
    def make(**changes):
        config = make_config("folder", "regions", image_size=24, patch_size=6, encoder="vit-nano",
                             **changes)
        for i, (name, (width, height)) in enumerate(LONG.items()):
            path = Path(config.data_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
        return config
    return make


def held(split):
    """The pictures (3, H, W) of a split."""
    part, = split.parts
    ends = (3 * part.sizes.prod(1)).cumsum()
    return [flat.reshape(3, *size) for flat, size in zip(np.split(part.images, ends), part.sizes)]


def test_in_mode_regions_pictures_are_held_whole(whole):
    config = whole()
    split = D.load(config, "train")
    assert split.parts[0].sizes.tolist() == [[30, 90], [200, 31], [24, 24], [41, 41]]
    assert split.labels.tolist() == [0, 0, 1, 1] and split.classes == ["a", "b"]
    for got, name in zip(held(split), LONG):
        image = Image.open(Path(config.data_dir) / name)
        if min(image.size) > 41:
            image = image.resize((41, 41), Image.BICUBIC)
        difference = got.astype(int) - np.asarray(image).transpose(2, 0, 1).astype(int)
        assert abs(difference).max() <= 1                       # of a value that lies between two
    assert D.load(config, "val").parts[0].sizes.tolist() == [[57, 41]]
    square = D.load(replace(config, mode="saccade"), "train")
    assert square.parts[0].sizes is None and square.parts[0].images.shape == (4, 3, 24, 24)


def test_whole_pictures_are_decoded_once_and_again_when_they_change(whole, monkeypatch):
    config = whole()
    decodes = []
    original = prepare.picture
    monkeypatch.setattr(prepare, "picture",
                        lambda path, **how: decodes.append(path.name) or original(path, **how))
    for split in ("pretrain", "train", "train"):
        D.load(config, split)
    assert sorted(decodes) == ["0.png", "1.png", "2.png", "3.png"]
    Image.new("RGB", (30, 26)).save(Path(config.data_dir) / "train/a/0.png")
    assert D.load(config, "train").parts[0].sizes[0].tolist() == [26, 30] and len(decodes) == 8
    limited = D.load(replace(config, limit=2), "train")
    full = held(D.load(config, "train"))
    assert sorted(limited.labels) == [0, 1] and len(decodes) == 10
    for got, row in zip(held(limited), limited.parts[0].rows):
        np.testing.assert_array_equal(got, full[row])
    assert D.load(replace(config, image_size=12), "train").parts[0].sizes.min() == 21


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_that_were_held_sideways_are_measured_upright(tmp_path, ending, orientation):
    path = tmp_path / f"x.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(30, 70).save(path, exif=exif)
    for side in (100, 20):
        assert prepare.picture(path, side).shape[1:] == prepare.picture_size(path, side)


def test_a_long_decoding_goes_on_where_it_was_interrupted(whole, monkeypatch):
    config = whole()
    expected = held(D.load(replace(config, data_dir=str(config.data_dir)), "train"))
    for file in (Path(config.data_dir) / ".cache").glob("*pictures*"):
        file.unlink()
    monkeypatch.setattr(prepare, "LARGE", 0)
    monkeypatch.setattr(prepare, "DECODED_AT_ONCE", 1)
    original = prepare.picture
    decodes = []

    def until_the_third(path, **how):
        if len(decodes) == 2:
            raise KeyboardInterrupt
        decodes.append(path.name)
        return original(path, **how)

    monkeypatch.setattr(prepare, "picture", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        D.load(config, "train")
    monkeypatch.setattr(prepare, "picture",
                        lambda path, **how: decodes.append(path.name) or original(path, **how))
    for got, wanted in zip(held(D.load(config, "train")), expected):
        np.testing.assert_array_equal(got, wanted)
    assert decodes == ["0.png", "1.png", "2.png", "3.png"]


# ---------------------------------------------------------------- Tiny ImageNet

@pytest.fixture
def tiny(make_config):
    """tiny-imagenet-200/ as published, with three classes whose order in wnids.txt is not the
    sorted one."""
    config = make_config("tiny-imagenet", "augment", image_size=SIZE)
    root, wnids = Path(config.data_dir) / "tiny-imagenet-200", ["n03", "n01", "n02"]
    for k, w in enumerate(wnids):
        for i in range(4):
            write_image(root / "train" / w / "images" / f"{w}_{i}.JPEG", 40 * k + 10 * i)
        (root / "train" / w / f"{w}_boxes.txt").write_text(f"{w}_0.JPEG\t0\t62\t0\t63\n")
    for i in range(6):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", 20 * i)
    (root / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t32\t44\t62\n" for i in range(6))
    )
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n01\tant\nn02\tbee\n")
    return config, root


def near(value):
    return pytest.approx(value, abs=3)                  # JPEG


def test_tiny_imagenet_layout(tiny):
    train, val = (D.load(tiny[0], split) for split in ("train", "val"))
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # n01 was written second
    assert values(train) == near([40, 50, 60, 70, 80, 90, 100, 110, 0, 10, 20, 30])
    assert val.labels.tolist() == [2, 0, 1, 2, 0, 1] and values(val) == near(
        [0, 20, 40, 60, 80, 100]
    )
    assert values(D.load(tiny[0], "pretrain")) == values(train)


def test_tiny_imagenet_limit(tiny):
    split = D.load(replace(tiny[0], limit=6), "train")
    assert np.bincount(split.labels).tolist() == [2, 2, 2]


def edit(old, new):
    def apply(path):
        path.write_text(path.read_text().replace(old, new))
    return apply


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "file, change, split, named",
    [
        ("val/val_annotations.txt", remove, "val", "val_annotations.txt"),
        ("wnids.txt", remove, "train", "wnids.txt"),
        ("val/images/val_2.JPEG", remove, "val", "val_2.JPEG"),
        ("val/val_annotations.txt", edit("n02", "n77"), "val", "n77"),
        ("val/val_annotations.txt", edit("val_3.JPEG", "val_9.JPEG"), "val", "val_9.JPEG"),
        ("val/val_annotations.txt", edit("\tn01\t0\t32\t44\t62", ""), "val", "val_annotations.txt"),
        ("val/val_annotations.txt", lambda path: path.write_text(""), "val", "val_annotations.txt"),
        ("wnids.txt", edit("n01\n", "n01\nn99\n"), "train", "n99"),
        ("wnids.txt", edit("n01\n", ""), "val", "n01"),
    ],
    ids=[
        "no annotations",
        "no wnids",
        "image absent",
        "class unknown",
        "annotated image absent",
        "no class on a line",
        "empty annotations",
        "class without folder",
        "class missing from wnids",
    ],
)
def test_tiny_imagenet_damage_is_named(tiny, file, change, split, named):
    change(tiny[1] / file)
    with pytest.raises(BadInput, match=named):
        D.load(tiny[0], split)
    assert left_in_cache(tiny[0]) == []


def test_tiny_imagenet_not_unpacked(make_config):
    with pytest.raises(BadInput, match="tiny-imagenet-200"):
        D.load(make_config("tiny-imagenet", "augment"), "train")


# ---------------------------------------------------------------- embedded solids

def test_solids_are_rendered_once_with_their_labels_and_latents(make_config, monkeypatch):
    config = make_config("solids", "rotation", image_size=16, views=1, object_views=3, limit=32)
    split, val = D.load(config, "train"), D.load(config, "val")
    assert (
        split.parts[0].images.shape == (32, 3, 3, 16, 16)
        and split.latents.shape == (32, 3, 7)
        and split.latents.dtype == np.float32
    )
    assert (
        np.bincount(split.labels).tolist() == [2] * 16
        and len(val.labels) == 16
        and split.classes == val.classes
    )
    assert not np.array_equal(val.parts[0].images, split.parts[0].images[:16])
    monkeypatch.setattr(D.solids, "render_split", raiser(AssertionError("rendered again")))
    np.testing.assert_array_equal(D.load(config, "pretrain").parts[0].images, split.parts[0].images)


# ---------------------------------------------------------------- on the way to the device

def test_store_on_a_cpu_copies_nothing_and_does_not_warn(stl10):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = D.load(stl10, "pretrain")
        store = images_module.Store([part.images for part in split.parts], CPU)
    assert [p.data_ptr() for p in store.parts] == [part.images.ctypes.data for part in split.parts]


PAPER = {  # A.1; ImageNet's are the usual ones
    "stl10": ([0.4467, 0.4398, 0.4066], [0.2241, 0.2215, 0.2239]),
    "3diebench": ([0.5016, 0.5037, 0.5060], [0.1030, 0.0999, 0.0969]),
    "cifar100": ([0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]),
    "tiny-imagenet": ([0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_images_are_normalised_with_the_papers_constants(make_config, monkeypatch, dataset):
    monkeypatch.setitem(D.READERS, dataset, lambda *_: prepare.Reading([], np.zeros(0), [], {}))
    split = D.load(make_config(dataset), "train")
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    ours = images_module.normalise(
        torch.from_numpy(images), torch.tensor(split.mean), torch.tensor(split.std), channel_dim=1
    )
    mean, std = (np.array(v).reshape(3, 1, 1) for v in PAPER[dataset])
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours, (images / 255 - mean) / std, atol=2e-6)


def test_images_smaller_than_a_vit_s_patch_are_named(tmp_path, make_config):
    folder = tmp_path / "data" / "train" / "a"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (40, 40) if i else (12, 4)).save(folder / f"{i}.png")
    config = make_config(
        "folder", "regions", image_size=32, patch_size=8, encoder="vit-nano", data_dir=str(folder)
    )
    with pytest.raises(
        BadInput, match=r"0.png: 12 x 4 pixels, smaller than a patch \(--patch-size 8\); remove it"
    ):
        for split in ("train", "val"):
            D.load(config, split)
    assert (
        len(
            D.load(
                make_config("folder", "saccade", image_size=32, patch_size=8, data_dir=str(folder)),
                "train",
            ).labels
        )
        == 18
    )
