"""Bad data: every one ends in one line that says what is wrong, at once, and leaves no file behind.

CASES is the table: a row damages a small intact data set, and names words of the refusal. Each row
is run through train.main. Below, files of every kind that is read are damaged at random."""
import json
import os
import pickle
import shutil
import signal
import stat
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from build import build_views
from datasets import load
from images import Part
from plumbing.cache import cached
from plumbing.errors import BadInput, printable
from sources import threediebench
from sources.prepare import decode, picture_size
from sources.prepare import picture as decode_whole
from sources.saliency_files import published

SIDE = 24
VIEWS = 2
SMALL = ["--device", "cpu", "--batch-size", "2", "--epochs", "1", "--no-compile"]
SEQ = ["--width", "4", "--views", "1", *SMALL]
SACCADE = ["--mode", "saccade", "--image-size", str(SIDE), "--patch-size", "8", *SEQ]
REGIONS = ["--mode", "regions", "--encoder", "vit-nano", "--image-size", "16", "--patch-size", "4",
           *SMALL]
FLAGS = {
    "pictures": ["--dataset", "folder", *REGIONS],
    "folder": ["--dataset", "folder", *SACCADE],
    "maps": ["--dataset", "folder", "--saliency", "DATA/maps", *SACCADE],
    "stl10": ["--dataset", "stl10", "--mode", "augment", "--no-download", *SEQ],
    "tiny": ["--dataset", "tiny-imagenet", *SACCADE],
    "cifar10": ["--dataset", "cifar10", "--mode", "augment", "--no-download", *SEQ],
    "clevr": ["--dataset", "clevr-distance", "--mode", "regions", "--encoder", "vit-nano",
              "--image-size", "32", "--patch-size", "8", *SMALL],
    "3diebench": ["--dataset", "3diebench", "--mode", "rotation", "--image-size", "8", *SEQ],
}


# ---------------------------------------------------------------- small intact data sets

def picture(path, seed=0, side=SIDE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root):
    for i in range(4):
        picture(root / "train" / "ab"[i % 2] / f"{i}.png", i)
    for i in range(2):
        picture(root / "val" / "ab"[i % 2] / f"{i}.png", 10 + i)


def make_maps(root):
    make_folder(root)
    (root / "maps").mkdir()
    for name, count in (("train", 4), ("val", 2)):
        maps = np.random.default_rng(count).random((count, SIDE, SIDE), dtype=np.float32) + 0.01
        np.save(root / "maps" / f"saliency_{name}.npy", maps)


def make_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", 3), ("test", 2), ("unlabeled", 2)):
        images = np.random.default_rng(count).integers(0, 256, (count, 27648), dtype=np.uint8)
        images.tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))


def make_tiny(root):
    root = root / "tiny-imagenet-200"
    for k, wnid in enumerate(("n01", "n02")):
        for i in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 2 * k + i)
        picture(root / "val" / "images" / f"val_{k}.JPEG", 10 + k)
    (root / "wnids.txt").write_text("n01\nn02\n")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\nval_1.JPEG\tn02\t0\n")


def make_cifar10(root):
    """Not the published files: their checksums are wrong."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batch = dict(labels=[0, 1], data=np.zeros((2, 3072), np.uint8))
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=list("abcdefghij"))))


def make_clevr(root):
    root = root / "CLEVR_v1.0"
    (root / "scenes").mkdir(parents=True)
    for split in ("train", "val"):
        scenes = []
        for i in range(3):
            picture(root / "images" / split / f"{i}.png", i, side=32)
            things = [dict(pixel_coords=[1, 2, 8.1 + k]) for k in range(3 + i)]
            scenes.append(dict(image_filename=f"{i}.png", objects=things))
        scenes_file(root, split).write_text(json.dumps(dict(scenes=scenes)))


def scenes_file(root, split="train"):
    return root / "scenes" / f"CLEVR_{split}_scenes.json"


def make_3diebench(root):
    rng = np.random.default_rng(0)
    root = root / "3DIEBench"
    for split, count in (("train", 4), ("val", 2)):
        names = [f"/0{i % 2}/{split}{i}/" for i in range(count)]
        for name in names:
            for view in range(VIEWS):
                picture(root / name.strip("/") / f"image_{view}.jpg", view, side=12)
                np.save(root / name.strip("/") / f"latent_{view}.npy", rng.random(7))
        np.save(root / f"{split}_images.npy", names)
        np.save(root / f"{split}_labels.npy", [i % 2 for i in range(count)])


MAKERS = {"folder": make_folder, "pictures": make_folder, "maps": make_maps, "stl10": make_stl10,
          "tiny": make_tiny, "cifar10": make_cifar10, "clevr": make_clevr,
          "3diebench": make_3diebench}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Folder with an intact data set of each kind."""
    root = tmp_path_factory.mktemp("intact")
    for kind, make in MAKERS.items():
        (root / kind).mkdir()
        make(root / kind)
    return root


@pytest.fixture(autouse=True)
def few_views(monkeypatch):
    monkeypatch.setattr(threediebench, "VIEWS", VIEWS)


# ---------------------------------------------------------------- ways to damage them

def nothing(root):
    """For rows whose flags are wrong."""


def text(name, content):
    return lambda root: (root / name).write_text(content)


def data(name, content):
    return lambda root: (root / name).write_bytes(content)


def array(name, content, **options):
    return lambda root: np.save(root / name, content, **options)


def gone(name):
    def damage(root):
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return damage


def replaced_by(make, name):
    def damage(root):
        gone(name)(root)
        make(root / name)
    return damage


def copied(old, new):
    return lambda root: shutil.copytree(root / old, root / new)


def moved(old, new):
    return lambda root: (root / old).rename(root / new)


def link(name, target):
    return lambda root: (root / name).symlink_to(target)


def both(*damages):
    def damage(root):
        for one in damages:
            one(root)
    return damage


def pipe(path):
    os.mkfifo(path)


def a_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)


def endless(path):
    path.symlink_to("/dev/zero")


def claims(width, height, depth=8, colour=2, rows=1):
    """A PNG whose header claims this size."""
    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    content = zlib.compress(bytes((1 + width * 3) * rows))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content)
            + chunk(b"IEND", b""))


def npy(header, body=b""):
    """An .npy file with this header, whatever it says."""
    padded = header.encode("latin1").ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + body


def huge(shape, kind="<f4"):
    return npy(f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}", bytes(64))


def maps_with(value, row=2, dtype=np.float32, whole=False):
    def damage(root):
        path = root / "maps" / "saliency_train.npy"
        maps = np.load(path).astype(dtype)
        maps[row, slice(None) if whole else 3] = value
        np.save(path, maps)
    return damage


def log_maps(root):
    path = root / "maps" / "saliency_train.npy"
    maps = np.load(path)
    np.save(path, np.log(maps / maps.sum((1, 2), keepdims=True)))


def scene(**changes):
    """CLEVR's second training scene, changed."""
    def damage(root):
        path = scenes_file(root / "CLEVR_v1.0")
        scenes = json.loads(path.read_text())
        scenes["scenes"][1].update(changes)
        path.write_text(json.dumps(scenes))
    return damage


def at_distance(distance):
    return scene(objects=[dict(pixel_coords=[1, 2, distance])] * 3)


def renders(split="train", **changes):
    """Names or labels of 3DIEBench's objects, changed."""
    def damage(root):
        for what, content in changes.items():
            np.save(root / "3DIEBench" / f"{split}_{what}.npy", content)
    return damage


def named(name):
    """3DIEBench's list with this name in it."""
    return renders(images=np.array(["/00/train0/", name, "/00/train2/", "/01/train3/"]))


STL, TINY, CLEVR, SOLIDS = "stl10_binary", "tiny-imagenet-200", "CLEVR_v1.0", "3DIEBench"
ANNOTATIONS = f"{TINY}/val/val_annotations.txt"
SCENES = f"{CLEVR}/scenes/CLEVR_train_scenes.json"
VAL_SCENES = f"{CLEVR}/scenes/CLEVR_val_scenes.json"
LATENT = f"{SOLIDS}/01/train1/latent_1.npy"
JPG = f"{SOLIDS}/01/train1/image_1.jpg"
PNG = "train/b/1.png"
PEEK = ["--probe-every", "1"]
DENSITIES = "log densities? take exp"

# (kind, what is done to it, words of the refusal, more flags)
CASES = {
    # images
    "empty image": ("folder", data(PNG, b""), "1.png: not a readable image"),
    "text named .png": ("folder", text(PNG, "I am text"), "1.png: not a readable image"),
    "30000 x 30000 pixels": ("folder", data(PNG, claims(30000, 30000)), "1.png: not a readable"),
    "2**31 pixels wide": ("folder", data(PNG, claims(2**31 - 1, 1, rows=0)), "1.png: not a read"),
    "no pixels": ("folder", data(PNG, claims(0, 0)), "1.png: not a readable image"),
    "a line of pixels": ("folder", data(PNG, claims(60000, 2, rows=2)), "1000 times as long"),
    "float image": ("folder", lambda root: Image.fromarray(np.ones((9, 9), np.float32)).save(
        root / PNG, format="TIFF"), "without a known white"),
    "image of 32-bit integers": ("folder", lambda root: Image.fromarray(
        np.ones((9, 9), np.int32)).save(root / PNG, format="TIFF"), "without a known white"),
    "PostScript": ("folder", text(PNG, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
                                       "%%EndComments\n{} loop\n"), "PostScript program"),
    "image is a pipe": ("folder", replaced_by(pipe, PNG), "1.png: not a regular file"),
    "image is a socket": ("folder", replaced_by(a_socket, PNG), "1.png: not a regular file"),
    "image is a device": ("folder", replaced_by(endless, PNG), "1.png: not a regular file"),
    "image is a broken link": ("folder", replaced_by(lambda p: p.symlink_to("no"), PNG), "1.png"),
    "image links to itself": ("folder", replaced_by(lambda p: p.symlink_to(p.name), PNG), "1.png"),
    "control characters": ("folder", data("train/b/\x1b[2J\x07\n.png", b""), r"\x1b[2J\x07\n.png"),
    "right to left": ("folder", data("train/b/\u202egnp.png", b""), r"\u202egnp.png"),
    "no UTF-8": ("folder", data(os.fsdecode(b"train/b/\xff.png"), b""), r"\udcff.png"),
    "bad validation image": ("folder", data("val/a/0.png", b"?"), "0.png: not a readable", *PEEK),
    # whole pictures
    "empty picture": ("pictures", data(PNG, b""), "1.png: not a readable image"),
    "picture cut short": ("pictures", lambda root: os.truncate(root / PNG, 400), "1.png: not a re"),
    "a line instead of a picture": ("pictures", data(PNG, claims(60000, 2, rows=2)), "1000 times"),
    "a picture of 2 pixels": ("pictures", lambda root: picture(root / PNG, side=2), "than a patch"),
    "PostScript picture": ("pictures", text(PNG, "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 "
                                                 "9\n%%EndComments\n{} loop\n"), "PostScript"),
    "picture of floats": ("pictures", lambda root: Image.fromarray(
        np.ones((9, 9), np.float32)).save(root / PNG, format="TIFF"), "without a known white"),
    "picture is a pipe": ("pictures", replaced_by(pipe, PNG), "1.png: not a regular file"),
    "a cache of pictures is a folder": ("pictures", lambda root: (
        root / ".cache" / "folder-train-pictures-16px.npy").mkdir(parents=True), "is a folder"),
    # folders
    "no such folder": ("folder", lambda root: shutil.rmtree(root), "not found"),
    "--data-dir is a file": ("folder", replaced_by(Path.touch, "."), "--data-dir", ),
    "train alone": ("folder", gone("val"), "train: looks like one split"),
    "val alone": ("folder", gone("train"), "val: looks like one split"),
    "test alone": ("folder", both(gone("train"), moved("val", "test")), "test: looks like"),
    "Train alone": ("folder", both(gone("val"), moved("train", "Train")), "Train: looks like"),
    "train2017, val2017": ("folder", both(moved("train", "train2017"), moved("val", "val2017")),
                           "looks like one split"),
    "train and val_images": ("folder", moved("val", "val_images"), "looks like one split"),
    "train and valid and val": ("folder", copied("val", "valid"), "both name one split"),
    "train and Train": ("folder", copied("train", "Train"), "both name one split"),
    "splits one deeper": ("folder", both(copied("train", "all/train"), copied("val", "all/val"),
                                         gone("train"), gone("val")), "give --data-dir"),
    "val is train": ("folder", both(gone("val"), link("val", "train")), "the same folder"),
    "empty val": ("folder", both(gone("val/a"), gone("val/b")), "val: no image there"),
    "val has another class": ("folder", moved("val/a", "val/zebra"), "zebra: no such class"),
    "val without classes": ("folder", both(moved("val/a/0.png", "val/0.png"), gone("val/a"),
                                           gone("val/b")), "no such class"),
    "a class twice": ("folder", link("train/c", "a"), "the same folder"),
    "links around": ("folder", both(link("train/a/x", "../b"), link("train/b/y", "../a")),
                     "the same folder"),
    "one image": ("folder", both(gone("val"), gone("train"), lambda root: picture(root / "1.png")),
                  "single image"),
    "too few for a batch": ("folder", nothing, "--batch-size", "--batch-size", "64"),
    ".cache is a file": ("folder", lambda root: (root / ".cache").touch(), "cannot keep prepared"),
    "cache is a folder": ("folder", lambda root: (
        root / ".cache" / f"folder-train-{SIDE}px.npy").mkdir(parents=True), "is a folder"),
    # published saliency maps
    "log densities": ("maps", log_maps, DENSITIES),
    "a NaN in a map": ("maps", maps_with(np.nan), "saliency_train.npy: map 2 has values"),
    "an infinity": ("maps", maps_with(np.inf), "map 2 has values"),
    "minus infinity": ("maps", maps_with(-np.inf), DENSITIES),
    "a negative number": ("maps", maps_with(-1e-3, row=3), "map 3 has values from -0.001"),
    "a map of zeros": ("maps", maps_with(0, row=0, whole=True), "map 0 has values from 0 to 0"),
    "negative halves": ("maps", maps_with(-1, dtype=np.float16), "map 2"),
    "zeros as halves": ("maps", maps_with(0, dtype=np.float16, whole=True), "map 2"),
    "NaN halves": ("maps", maps_with(np.nan, dtype=np.float16), "map 2"),
    "doubles beyond float32": ("maps", maps_with(1e300, dtype=np.float64), "map 2"),
    "next to nothing": ("maps", maps_with(1e-30, whole=True), "map 2"),
    "big-endian maps": ("maps", lambda root: array("maps/saliency_train.npy", np.ones(
        (4, SIDE, SIDE), ">f4"))(root), "expected floats"),
    "maps of another size": ("maps", array("maps/saliency_train.npy", np.ones((4, 9, 9))),
                             "expected floats"),
    "maps of integers": ("maps", array("maps/saliency_train.npy", np.ones((4, SIDE, SIDE), int)),
                         "expected floats"),
    "one map too few": ("maps", array("maps/saliency_train.npy", np.ones((3, SIDE, SIDE))),
                        "3 maps for 4 images"),
    "no maps": ("maps", array("maps/saliency_train.npy", np.ones((0, SIDE, SIDE))), "0 maps"),
    "maps are a pipe": ("maps", replaced_by(pipe, "maps/saliency_train.npy"), "not a regular file"),
    "maps cut short": ("maps", lambda root: os.truncate(root / "maps" / "saliency_train.npy", 999),
                       "not a readable .npy"),
    "a header that claims 10**12 maps": ("maps", data("maps/saliency_train.npy", huge(
        (10**12, SIDE, SIDE))), "not a readable .npy"),
    "a header of 10**30 maps": ("maps", data("maps/saliency_train.npy", huge((10**30, 1, 1))),
                                "not a readable .npy"),
    "a header of brackets": ("maps", data("maps/saliency_train.npy", npy("(" * 110)),
                             "not a readable .npy"),
    "a wrong folder": ("maps", gone("maps/saliency_train.npy"), "--saliency"),
    "no maps for val": ("maps", gone("maps/saliency_val.npy"), "saliency_val.npy", *PEEK),
    "a misspelt method": ("folder", nothing, "expected signature", "--saliency", "signat"),
    "a method that is not there": ("folder", nothing, "_pytorch", "--saliency", "deepgaze"),
    # STL-10
    "nine class names": ("stl10", text(f"{STL}/class_names.txt", "a b c d e f g h i"), "9 names"),
    "no class names in the file": ("stl10", text(f"{STL}/class_names.txt", ""), "0 names"),
    "binary class names": ("stl10", data(f"{STL}/class_names.txt", b"\xff\x00"), "not a text file"),
    "images are a pipe": ("stl10", replaced_by(pipe, f"{STL}/train_X.bin"), "not a regular file"),
    "images are a folder": ("stl10", replaced_by(Path.mkdir, f"{STL}/train_X.bin"), "not a re"),
    "labels are a pipe": ("stl10", replaced_by(pipe, f"{STL}/train_y.bin"), "not a regular file"),
    "label 0": ("stl10", data(f"{STL}/train_y.bin", bytes([1, 0, 2])), "labels run from 0 to 2"),
    "a label short": ("stl10", data(f"{STL}/train_y.bin", bytes([1, 1])), "2 labels for 3 images"),
    "half an image": ("stl10", data(f"{STL}/unlabeled_X.bin", bytes(27648 + 9)), "whole number"),
    "no test images": ("stl10", gone(f"{STL}/test_X.bin"), "test_X.bin: not found"),
    "test labels of another count": ("stl10", data(f"{STL}/test_y.bin", b"\1"), "1 labels for 2"),
    "STL-10 is a file": ("stl10", replaced_by(Path.touch, STL), "not found"),
    # Tiny ImageNet
    "no wnids": ("tiny", text(f"{TINY}/wnids.txt", "\n"), "wnids.txt: empty"),
    "binary wnids": ("tiny", data(f"{TINY}/wnids.txt", b"\xff\xfe\x00n"), "wnids.txt: not a text"),
    "wnids are a pipe": ("tiny", replaced_by(pipe, f"{TINY}/wnids.txt"), "not a regular file"),
    "a wnid that leads out": ("tiny", text(f"{TINY}/wnids.txt", "n01 n02 ../val"), "'../val'"),
    "an absolute wnid": ("tiny", text(f"{TINY}/wnids.txt", "n01 n02 /etc"), "'/etc'"),
    "a wnid without folder": ("tiny", text(f"{TINY}/wnids.txt", "n01 n02 n99"), "n99"),
    "binary annotations": ("tiny", data(ANNOTATIONS, bytes(range(256))), "not a text file"),
    "empty annotations": ("tiny", text(ANNOTATIONS, ""), "val_annotations.txt"),
    "an annotation that leads out": ("tiny", text(ANNOTATIONS, "../../wnids.txt n01"), "lists"),
    "an absolute annotation": ("tiny", text(ANNOTATIONS, "/etc/passwd n01"), "'/etc/passwd'"),
    "annotated image absent": ("tiny", text(ANNOTATIONS, "val_9.JPEG n01"), "val_9.JPEG: not"),
    "annotated class unknown": ("tiny", text(ANNOTATIONS, "val_0.JPEG n77"), "n77"),
    "annotations of nothing": ("tiny", text(ANNOTATIONS, "val_0.JPEG"), "on every line"),
    "no val": ("tiny", gone(f"{TINY}/val"), "val_annotations.txt: not found"),
    "escapes in a wnid": ("tiny", text(f"{TINY}/wnids.txt", "n01 n02 \x1b[31m"), r"\x1b[31m"),
    # CIFAR
    "wrong checksums": ("cifar10", nothing, "no intact cifar10"),
    "a batch is a pipe": ("cifar10", replaced_by(pipe, "cifar-10-batches-py/data_batch_1"),
                          "no intact cifar10"),
    # CLEVR
    "scenes cut short": ("clevr", text(SCENES, '{"scenes": [{"image'), "not CLEVR's list"),
    "scenes are binary": ("clevr", data(SCENES, bytes(range(256))), "not a text file"),
    "scenes are a pipe": ("clevr", replaced_by(pipe, SCENES), "not a regular file"),
    "no scenes": ("clevr", text(SCENES, '{"scenes": []}'), "3 to 10 objects"),
    "scenes are a number": ("clevr", text(SCENES, '{"scenes": 3}'), "not CLEVR's list"),
    "scenes are a list": ("clevr", text(SCENES, "[1, 2]"), "not CLEVR's list"),
    "brackets": ("clevr", text(SCENES, "[" * 100_000), "not CLEVR's list"),
    "distance NaN": ("clevr", at_distance(float("nan")), "not CLEVR's list"),
    "infinite distance": ("clevr", at_distance(float("inf")), "not CLEVR's list"),
    "a distance in words": ("clevr", at_distance("far"), "not CLEVR's list"),
    "an enormous distance": ("clevr", at_distance(10**400), "not CLEVR's list"),
    "negative distance": ("clevr", at_distance(-8.1), "not CLEVR's list"),
    "objects are a word": ("clevr", scene(objects="abc"), "not CLEVR's list"),
    "a scene without objects": ("clevr", scene(objects=[]), "not CLEVR's list"),
    "an image without a name": ("clevr", scene(image_filename=""), "train: not a regular file"),
    "an image named ..": ("clevr", scene(image_filename="a/.."), "not a regular file"),
    "a name with a zero byte": ("clevr", scene(image_filename="0\0.png"), r"0\x00.png: not found"),
    "a number as name": ("clevr", scene(image_filename=7), "not CLEVR's list"),
    "no validation scenes": ("clevr", gone(VAL_SCENES), "CLEVR_val_scenes.json: not found"),
    "no validation image": ("clevr", gone(f"{CLEVR}/images/val/1.png"), "1.png: not found"),
    # 3DIEBench
    "labels NaN": ("3diebench", renders(labels=[0, 1, np.nan, 1]), "label of object 2 is nan"),
    "labels infinite": ("3diebench", renders(labels=[0, 1, 0, np.inf]), "object 3 is inf"),
    "labels of val NaN": ("3diebench", renders("val", labels=[0, np.nan]), "object 1 is nan"),
    "labels of dates": ("3diebench", renders(labels=np.zeros(4, "M8[s]")), "expected one label"),
    "an object that leads out": ("3diebench", named("/../../x/"), "'../../x'"),
    "an object in the middle": ("3diebench", named("/00/../../x/"), "expected a name inside"),
    "an object without name": ("3diebench", named("/"), "expected a name inside"),
    "an object with a zero byte": ("3diebench", named("0\0x"), "expected a name inside"),
    "an object that is not there": ("3diebench", named("/77/x/"), "not found"),
    "half a surrogate": ("3diebench", named("/01/\ud800/"), r"\ud800"),
    "a list of pickles": ("3diebench", array(f"{SOLIDS}/train_images.npy", np.array([{}] * 4),
                                             allow_pickle=True), "pickled objects"),
    "an .npz": ("3diebench", lambda root: np.savez((root / SOLIDS / "train_images.npy").open("wb"),
                                                   ["a"]), "not a readable .npy"),
    "a list of 10**15 names": ("3diebench", data(f"{SOLIDS}/train_images.npy", huge(
        (10**15,), "<U8")), "not a readable .npy"),
    "names are a pipe": ("3diebench", replaced_by(pipe, f"{SOLIDS}/train_images.npy"), "not a re"),
    "unknown validation label": ("3diebench", renders("val", labels=[0, 9]), "label 9"),
    "no validation objects": ("3diebench", gone(f"{SOLIDS}/00/val0"), "val0: not found"),
    "latents NaN": ("3diebench", array(LATENT, np.full(7, np.nan)), "latent_1.npy"),
    "latents beyond float32": ("3diebench", array(LATENT, np.full(7, 1e300)), "latent_1.npy"),
    "latents are integers": ("3diebench", array(LATENT, np.zeros(7, int)), "latent_1.npy"),
    "latents are a pipe": ("3diebench", replaced_by(pipe, LATENT), "not a regular file"),
    "a header of 10**15 latents": ("3diebench", data(LATENT, huge((10**15,))), "latent_1.npy"),
    "a render is a pipe": ("3diebench", replaced_by(pipe, JPG), "not a regular file"),
    "a render is absent": ("3diebench", gone(JPG), "image_1.jpg: not found"),
}


def files_in(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


@pytest.fixture
def alarm():
    """Whatever hangs is interrupted."""
    def ring(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("case", CASES)
def test_bad_data_end_in_one_line(case, intact, tmp_path, capsys, alarm, monkeypatch):
    kind, damage, words, *flags = CASES[case]
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "DATA"
    shutil.copytree(intact / kind, root)
    damage(root)
    before = files_in(tmp_path)
    started = time.monotonic()
    status = train.main([*FLAGS[kind], "--data-dir", str(root), *flags])
    said = capsys.readouterr().err
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and words in lines[0], said
    assert said.endswith(lines[0] + "\n") and printable(lines[0]) == lines[0]
    # Arrays that are whole stay for the next time, and so does an unfinished pack.
    new = [f for f in files_in(tmp_path) if f not in before and not f.startswith("DATA/.cache/")]
    left = [f for f in files_in(tmp_path) if f.endswith(".part") and kind != "3diebench"]
    assert not new and not left and time.monotonic() - started < 5


@pytest.mark.parametrize("kind", sorted(MAKERS.keys() - {"cifar10"}))
def test_what_the_table_damages_is_accepted_intact(kind, intact, tmp_path, monkeypatch):
    config = config_of(kind, intact, tmp_path, monkeypatch)
    for split in ("pretrain", "train", "val"):
        assert len(build_views(config, split, torch.device("cpu")))


def config_of(kind, intact, tmp_path, monkeypatch, *flags):
    """The Config of a table's row, on a copy of the intact data."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(intact / kind, tmp_path / "DATA")
    return train.settings.from_command_line([*FLAGS[kind], "--data-dir", "DATA", *flags])


# ---------------------------------------------------------------- damage at random

DAMAGES = 100


def at_random(content, rng):
    """The bytes of a file, a little damaged; more often near the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        size = len(content) + 1
        at = int(rng.integers(min(size, 128) if rng.random() < 0.5 else size))
        after = at + int(rng.integers(1, 40))
        kind = rng.integers(5)
        if kind == 0:
            content[at:at + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            content[at:after] = b""
        elif kind == 2:
            content[at:at] = content[at:after]
        elif kind == 3:
            content[at:at] = rng.bytes(after - at)
        else:
            del content[at:]
    return bytes(content)


def fuzz(path, use, seed=0):
    """use() with a hundred damaged versions of a file. -> how many were refused in one line."""
    rng = np.random.default_rng(seed)
    intact = path.read_bytes()
    refused = 0
    for _ in range(DAMAGES):
        path.write_bytes(at_random(intact, rng))
        try:
            use()
        except BadInput as error:
            assert path.name in str(error) and str(error).isprintable()
            refused += 1
    path.write_bytes(intact)
    use()
    return refused


def greys(path):
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 99).save(path)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(path, exif=exif)


@pytest.mark.filterwarnings("ignore")           # Pillow warns of damaged EXIF data
@pytest.mark.parametrize("name, make", [
    ("x.png", picture), ("x.jpg", picture), ("x.gif", picture), ("x.webp", picture),
    ("grey.png", greys), ("turned.jpg", turned), ("turned.webp", turned),
])
def test_fuzzed_images(tmp_path, alarm, name, make):
    path = tmp_path / name
    make(path)

    def use():
        image = decode(path, SIDE)
        assert image.dtype == np.uint8 and image.shape == (3, SIDE, SIDE)

    assert fuzz(path, use)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, make", [
    ("x.png", picture), ("x.jpg", picture), ("turned.jpg", turned), ("turned.webp", turned),
])
def test_fuzzed_pictures(tmp_path, alarm, name, make):
    """What can be decoded has the size that its head says, or is refused too when it has not."""
    path = tmp_path / name
    make(path)

    def use():
        size = picture_size(path, 20)
        assert decode_whole(path, 20).shape == (3, *size)

    assert fuzz(path, use)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_fuzzed_saliency_maps(tmp_path, alarm, dtype):
    path = tmp_path / "saliency_train.npy"
    np.save(path, np.random.default_rng(0).random((5, 8, 8)).astype(dtype) + 0.01)

    def use():
        maps = published(tmp_path, Part(None, "train", None, 5), 8)
        assert np.isfinite(maps).all() and (maps >= 0).all() and (maps.max((1, 2)) > 0).all()
        torch.from_numpy(maps)

    assert fuzz(path, use)


@pytest.mark.parametrize("kind, name", [
    ("stl10", f"{STL}/train_X.bin"), ("stl10", f"{STL}/train_y.bin"),
    ("stl10", f"{STL}/class_names.txt"),
    ("tiny", f"{TINY}/wnids.txt"), ("tiny", ANNOTATIONS),
    ("clevr", SCENES), ("clevr", VAL_SCENES),
    ("cifar10", "cifar-10-batches-py/data_batch_2"),
    ("3diebench", f"{SOLIDS}/train_images.npy"), ("3diebench", f"{SOLIDS}/train_labels.npy"),
    ("3diebench", f"{SOLIDS}/val_labels.npy"), ("3diebench", LATENT), ("3diebench", JPG),
])
def test_fuzzed_data_sets(kind, name, intact, tmp_path, monkeypatch, alarm):
    config = config_of(kind, intact, tmp_path, monkeypatch)
    rng = np.random.default_rng(0)
    path = tmp_path / "DATA" / name
    whole = path.read_bytes()
    refused = 0
    for _ in range(DAMAGES):
        path.write_bytes(at_random(whole, rng))
        shutil.rmtree(tmp_path / "DATA" / ".cache", ignore_errors=True)
        try:
            split = load(config, "train")
            assert len(split.labels) == sum(len(part.images) for part in split.parts)
            assert 0 <= split.labels.min() and split.labels.max() < len(split.classes)
        except BadInput as error:
            assert str(error).isprintable()
            refused += 1
    assert refused or name.endswith("wnids.txt")


WANTED = np.arange(48, dtype=np.float32).reshape(6, 8)


@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_fuzzed_cached_arrays_are_made_again(tmp_path, alarm, capsys, ending):
    """Numbers in a cached array are trusted, its header and its key are not."""
    def fill(array):
        array[:] = WANTED
        yield len(array)

    def get():
        return cached(tmp_path / "x.npy", dict(of="x"), WANTED.shape, np.float32, fill, "filling")

    get()
    rng = np.random.default_rng(0)
    path = tmp_path / f"x{ending}"
    whole = path.read_bytes()
    for _ in range(DAMAGES):
        path.write_bytes(at_random(whole[:128], rng) + whole[128:])
        array = get()
        assert array.shape == WANTED.shape and array.dtype == np.float32
        if ending == ".json":
            np.testing.assert_array_equal(array, WANTED)


def test_fuzzed_progress_of_a_pack(tmp_path, alarm, capsys):
    """What cannot be trusted is packed again, from the first row."""
    def fill(array, start):
        for i in range(start, len(array)):
            array[i] = WANTED[i]
            yield i + 1
            if stop and i == 2:
                raise KeyboardInterrupt

    def get():
        return cached(tmp_path / "x.npy", dict(of="x"), WANTED.shape, np.float32, fill, "packing",
                      resumable=True)

    rng = np.random.default_rng(0)
    for i in range(DAMAGES):
        stop = True
        with pytest.raises(KeyboardInterrupt):
            get()
        progress = tmp_path / "x.npy.progress"
        content = progress.read_bytes()
        if i == 0:
            damaged = content.replace(b'"rows": 3', b'"rows": "three"')
        elif i == 1:
            damaged = content.replace(b'"rows": 3', b'"rows": 99')
        else:
            # All but the number of rows: a smaller one would do no harm, a larger one is believed.
            rows = content.index(b'"rows"')
            damaged = at_random(content[:rows], rng) + content[rows:]
        progress.write_bytes(damaged)
        stop = False
        np.testing.assert_array_equal(get(), WANTED)
        (tmp_path / "x.npy").unlink()
