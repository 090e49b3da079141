"""Whatever is typed after evaluate.py, compare.py, figures/regions.py or the benchmarks, and
whatever lies in a run's folder: a correct result, or one line that says what is wrong, at once, and
no new file.

CASES is the table; a row is a command, perhaps a damage done before it, and words of the refusal.
RUN stands for a run's folder. Each row goes through the real `main`. Below: files of every kind
that is read here damaged at random, and what is not bad input but must not look like a result."""
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import evaluate
import probes
import train
from benchmarks import bench, smoke
from figures import canvas, regions, runs, sequences
from plumbing.errors import BadInput
from plumbing.report import write_report
from plumbing.runs import load_checkpoint
from probes import row

ROOT = Path(__file__).resolve().parents[1]
BILLION = str(10 ** 9)
TINY = "--epochs 1 --warmup-epochs 0 --batch-size 4 --device cpu".split()
SEQ = "--width 2 --action-dim 4 --agg-hidden 8 --views 2".split()
MODES = {
    "saccade": ["--dataset", "folder", "--mode", "saccade", "--image-size", "20",
                "--patch-size", "8", *SEQ],
    "rotation": ["--dataset", "solids", "--mode", "rotation", "--image-size", "16",
                 "--limit", "16", "--object-views", "4", *SEQ],
    "regions": ["--dataset", "folder", "--mode", "regions", "--encoder", "vit-nano",
                "--image-size", "32", "--patch-size", "8", "--min-patches", "2"],
}
MAINS = {"evaluate": evaluate.main, "compare": compare.main, "figures.regions": regions.main,
         "bench": bench.main, "smoke": smoke.main}


# ---------------------------------------------------------------- tiny runs, made once

@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of images and, by name, the runs of MODES; made when first asked for."""
    root = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for i in range(12):
        for split in ("train", "val"):
            path = root / "photos" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)

    def run(mode):
        if not (root / mode).exists():
            data = root / ("data" if mode == "rotation" else "photos")
            flags = ["--data-dir", str(data), "--out", str(root), "--name", mode]
            assert train.main([*MODES[mode], *TINY, *flags]) == 0
        return root / mode

    return run


@pytest.fixture
def copied(made, tmp_path):
    """A copy of a run that a test may damage."""
    def copy(mode="saccade"):
        return Path(shutil.copytree(made(mode), tmp_path / mode))

    return copy


def changed(**parts):
    """Damage: parts of the checkpoint replaced by others, written as a whole file."""
    def damage(run):
        torch.save(load_checkpoint(run / "last.pt") | parts, run / "last.pt")

    return damage


def with_weights(value, name=""):
    """Damage: one number in each weight whose name has `name` in it becomes `value`."""
    def damage(run):
        checkpoint = load_checkpoint(run / "last.pt")
        for key, weight in checkpoint["model"].items():
            if name in key and weight.is_floating_point() and weight.numel():
                weight[(0,) * weight.dim()] = value
        torch.save(checkpoint, run / "last.pt")

    return damage


def content(name, data=b""):
    """Damage: this file holds these bytes."""
    return lambda run: (run / name).write_bytes(data)


def instead(name, make):
    """Damage: in place of this file there is what make(path) makes."""
    def damage(run):
        (run / name).unlink(missing_ok=True)
        make(run / name)

    return damage


def cut(run):
    whole = (run / "last.pt").read_bytes()
    (run / "last.pt").write_bytes(whole[:len(whole) // 2])


def empty_zip(run):
    with zipfile.ZipFile(run / "last.pt", "w") as file:
        file.writestr("nothing", "")


def without_cls(run):
    config = load_checkpoint(run / "last.pt")["config"]
    changed(config=config | dict(cls=False, regions="random"))(run)


class Trap:
    """Loading this would run code."""

    def __reduce__(self):
        return print, ("sprung",)


def link_to(target):
    return lambda path: path.symlink_to(target)


# ---------------------------------------------------------------- the table

def case(words, command, *flags, damage=None, mode="saccade", data=False):
    """A row.  data: whether the refusal may come after images have been read."""
    name = f"{command} {' '.join(flags)}"[:70] + (f" {words}" if damage else "")
    values = SimpleNamespace(words=words, main=MAINS[command], flags=flags, damage=damage,
                             mode=mode, data=data)
    return pytest.param(values, id=name)


def flag(words, *flags, **more):
    """A row of evaluate.py on an intact run."""
    return case(words, "evaluate", "RUN/last.pt", *flags, **more)


def path(words, name, damage=None):
    """A row of evaluate.py on something else than an intact last.pt."""
    return case(words, "evaluate", name, damage=damage)


def damaged(words, damage, *flags, **more):
    """A row of evaluate.py on a damaged run."""
    return case(words, "evaluate", "RUN/last.pt", *flags, damage=damage, **more)


TRANSFER = ("--probe", "transfer", "--dataset", "folder")
FLAGS = [
    case("required: CHECKPOINT", "evaluate"),
    case("unrecognized arguments: --nope", "evaluate", "x.pt", "--nope"),
    case("unrecognized arguments: y.pt", "evaluate", "x.pt", "y.pt"),
    flag("invalid choice: 'nope'", "--probe", "nope"),
    flag("expected at least one argument", "--probe"),
    flag("--probe invariance: does not apply to mode saccade", "--probe", "invariance"),
    flag("--probe linear: does not apply to mode saccade", "--probe", "knn", "linear"),
    flag("does not apply to mode regions", "--probe", "classify", mode="regions"),
    flag("invalid int value: 'x'", "--views", "x"),
    flag("invalid int value: '2.5'", "--views", "2.5"),
    flag("--views 0: M_val must be at least 1", "--views", "0"),
    flag("--views -3: M_val must be at least 1", "--views", "1", "-3"),
    flag(f"--views {BILLION}: M_val must be at least 1 and at most 100", "--views", BILLION),
    flag("at most 100", "--views", str(10 ** 30)),
    flag("an object has 4", "--views", "4", mode="rotation"),
    flag("--samplings 0: must be at least 1", "--samplings", "0"),
    flag("--samplings -1: must be at least 1", "--samplings", "-1"),
    flag(f"--samplings {BILLION}: must be at least 1 and at most 300", "--samplings", BILLION),
    flag("invalid int value: 'nan'", "--samplings", "nan"),
    flag("--probe-epochs -1: must be at least 0", "--probe-epochs", "-1"),
    flag("and at most 10,000", "--probe-epochs", str(10 ** 12)),
    flag("invalid int value: '1e3'", "--probe-epochs", "1e3"),
    flag("--limit -1: must be at least 0", "--limit", "-1"),
    flag("invalid int value: ''", "--limit", ""),
    flag("--device abacus", "--device", "abacus"),
    flag("--device ", "--device", ""),
    flag("--image-size: only with --probe transfer", "--image-size", "0"),
    flag("--patch-size: only with --probe transfer", "--patch-size", "8"),
    flag("--saliency: only with --probe transfer", "--saliency", "uniform"),
    flag("--probe transfer: stands alone and needs --dataset", "--probe", "transfer"),
    flag("--probe transfer: stands alone", *TRANSFER[2:], "--probe", "transfer", "knn"),
    flag("--probe transfer: stands alone", *TRANSFER[2:], "--probe", "knn"),
    flag("invalid choice: 'mars'", "--probe", "transfer", "--dataset", "mars"),
    flag("does not apply to --dataset clevr-count", "--dataset", "clevr-count"),
    flag("--figures: shows the run's own data", *TRANSFER, "--figures"),
    flag("--image-size 0: must be at least 8", *TRANSFER, "--image-size", "0"),
    flag("--image-size -96: must be at least 8", *TRANSFER, "--image-size", "-96"),
    flag("--patch-size 0: must be at least 4", *TRANSFER, "--patch-size", "0"),
    flag("--patch-size 97 is larger than the image", *TRANSFER, "--patch-size", "97"),
    flag("--patch-size: in mode regions", "--dataset", "folder", "--patch-size", "4",
         mode="regions"),
    flag("--saliency: in mode regions", "--dataset", "folder", "--saliency", "uniform",
         mode="regions"),
    flag("nowhere: ", "--data-dir", "nowhere", data=True),
    flag("last.pt: ", "--data-dir", "RUN/last.pt", data=True),
    flag("nowhere: ", *TRANSFER, "--data-dir", "nowhere", data=True),
]
OUTPUTS = [
    flag(".: is no plain file", "--json", ""),
    flag("/: is no plain file", "--json", "/"),
    flag("RUN: is no plain file", "--json", "RUN"),
    flag("its folder does not exist", "--json", "nowhere/x.json"),
    flag("its folder does not exist", "--json", "RUN/last.pt/x.json"),
    flag("/dev/full: is no plain file", "--json", "/dev/full"),
    flag("/dev/null: is no plain file", "--json", "/dev/null"),
    flag("/dev/stdout: is no plain file", "--json", "/dev/stdout"),
    flag("last.pt: holds something else", "--json", "RUN/last.pt"),
    flag("metrics.csv: holds something else", "--json", "RUN/metrics.csv"),
    flag("config.json: holds something else", "--json", "RUN/config.json"),
    flag("cannot be written", "--json", f"RUN/{'x' * 300}.json"),
    flag("cannot be written", "--json", f"RUN/{'x' * 245}.json"),
    damaged("x.json: is no plain file", instead("x.json", os.mkfifo), "--json", "RUN/x.json"),
    damaged("x.json: is no plain file", instead("x.json", link_to("last.pt")),
            "--json", "RUN/x.json"),
    damaged("x.json: is no plain file", instead("x.json", link_to("x.json")),
            "--json", "RUN/x.json"),
    damaged("probes.json: is no plain file", instead("probes.json", os.mkdir)),
    damaged("probes.json: is no plain file", instead("probes.json", os.mkfifo)),
    damaged("probes-knn.json: is no plain file", instead("probes-knn.json", os.mkdir),
            "--probe", "knn"),
    damaged("probes.json: holds something else", content("probes.json", b"my notes")),
    damaged("report.html: is no plain file", instead("report.html", os.mkdir), "--figures"),
]
CHECKPOINTS = [
    path("no checkpoint there", ""),
    path("no checkpoint there", "."),
    path("no checkpoint there", "RUN"),
    path("no checkpoint there", "RUN/nothing.pt"),
    path("no checkpoint there", "nowhere/last.pt"),
    path("no checkpoint there", "/dev/zero"),
    path("no checkpoint there", "/dev/full"),
    path("RUN/", f"RUN/{'x' * 300}.pt"),
    path("config.json", "RUN/config.json"),
    path("metrics.csv", "RUN/metrics.csv"),
    path("curves.png", "RUN/curves.png"),
    path("not a checkpoint of this project", "RUN/encoder.pt"),
    path("no checkpoint there", "RUN/x.pt", damage=instead("x.pt", os.mkfifo)),
    path("x.pt", "RUN/x.pt", damage=instead("x.pt", link_to("x.pt"))),
    path(r"a\x1b[2Jb", "RUN/a\x1b[2Jb"),
    path(r"a\nb", "RUN/a\nb"),
    path(r"a\udcff", "RUN/a\udcff"),
    damaged("was not loaded", content("last.pt")),
    damaged("was not loaded", content("last.pt", b"\0" * 999)),
    damaged("was not loaded", content("last.pt", b"weights = torch.zeros(3)\n")),
    damaged("was not loaded", cut),
    damaged("was not loaded", empty_zip),
    damaged("contains more than tensors", changed(model=Trap())),
    damaged("not a checkpoint of this project", changed(format="another")),
    damaged("checkpoint version 99", changed(version=99)),
    damaged("not a checkpoint of this project",
            lambda run: torch.save([1, 2], run / "last.pt")),
    damaged("--probe cls: the run was trained without [CLS]", without_cls, "--probe", "cls",
            mode="regions"),
    damaged("finite", with_weights(math.nan), data=True),
    damaged("finite", with_weights(math.inf), "--probe", "knn", data=True),
    damaged("finite", with_weights(1e38), "--probe", "classify", data=True),
    damaged("finite", with_weights(math.nan, "encoder.conv1"), "--probe", "parameters", data=True),
    damaged("finite", with_weights(math.nan), mode="regions", data=True),
]


def foreign(words, *flags, make=None, mode="regions", name="x.pth"):
    """A row of --weights: RUN/x.pth, a file that `make` writes there."""
    damage = instead(name, make) if make else None
    return case(words, "evaluate", "--weights", f"RUN/{name}", *flags, damage=damage, mode=mode)


def torch_save(value, **options):
    return lambda path: torch.save(value, path, **options)


def target_encoder(change):
    """Damage: x.pth is the encoder of the run, as I-JEPA would keep it, after `change`."""
    def make(path):
        state = torch.load(path.with_name("encoder.pt"), weights_only=True)
        state = {f"module.{name}": value for name, value in state.items()}
        change(state)
        torch.save(dict(target_encoder=state, epoch=3), path)

    return make


def nothing(state):
    """Leave it as it is."""


def blank(state):
    state["module.norm.weight"][0] = math.nan


ON_PHOTOS = ("--dataset", "folder", "--data-dir", "nowhere", "--image-size", "32")
WEIGHTS = [
    flag("--weights: stands in the place of CHECKPOINT", "--weights", "x.pth"),
    flag("--encoder: only with --weights", "--encoder", "vit-base"),
    flag("--mode: only with --weights", "--mode", "regions"),
    case("expected one argument", "evaluate", "--weights"),
    case("no file there", "evaluate", "--weights", "", *ON_PHOTOS),
    case("no file there", "evaluate", "--weights", "/dev/zero", *ON_PHOTOS),
    case("no file there", "evaluate", "--weights", "nowhere/x.pth", *ON_PHOTOS),
    foreign("no file there", *ON_PHOTOS),
    foreign("no file there", *ON_PHOTOS, make=os.mkdir),
    foreign("no file there", *ON_PHOTOS, make=os.mkfifo),
    foreign("was not loaded; expected a file of torch.save", *ON_PHOTOS,
            make=lambda path: path.write_text("weights = torch.zeros(3)\n")),
    foreign("was not loaded", *ON_PHOTOS, make=lambda path: path.write_bytes(b"")),
    foreign("was not loaded", *ON_PHOTOS, make=lambda path: path.write_bytes(b"\0" * 999)),
    foreign("was not loaded", *ON_PHOTOS, name="x.safetensors",
            make=lambda path: path.write_bytes(b"\0" * 999)),
    foreign("contains more than tensors", *ON_PHOTOS, make=torch_save(dict(model=Trap()))),
    foreign("contains more than tensors", *ON_PHOTOS,
            make=torch_save(dict(model=Trap()), _use_new_zipfile_serialization=False)),
    foreign("contains more than tensors", *ON_PHOTOS, make=torch_save(SimpleNamespace(a=1))),
    foreign("holds a list", *ON_PHOTOS, make=torch_save([1, 2])),
    foreign("holds a Tensor", *ON_PHOTOS, make=torch_save(torch.zeros(2))),
    foreign("holds no ViT", *ON_PHOTOS, make=torch_save({})),
    foreign("tensors in it: none", *ON_PHOTOS, make=torch_save({"model": {1: 2, "a": None}})),
    foreign("tensors in it: fc", *ON_PHOTOS, make=torch_save({"fc": torch.zeros(2)})),
    foreign("patch_embed.proj.weight has shape (), expected", *ON_PHOTOS,
            make=torch_save({"patch_embed.proj.weight": torch.tensor(3)})),
    foreign("holds a ViT of width 0 and 0 blocks", *ON_PHOTOS,
            make=torch_save({"patch_embed.proj.weight": torch.zeros(0, 3, 0, 0)})),
    foreign("conv1.weight has shape none", *ON_PHOTOS,
            make=torch_save({"layer1.0.conv1.weight": torch.zeros(2)})),
    foreign("several encoders", *ON_PHOTOS,
            make=torch_save({f"{name}.patch_embed.proj.weight": torch.zeros(2) for name in "ab"})),
    case("a checkpoint of this project; leave out --weights", "evaluate", "--weights",
         "RUN/last.pt", *ON_PHOTOS),
    case("of a --quick run probe the last.pt", "evaluate", "--weights", "RUN/encoder.pt",
         *ON_PHOTOS),
    foreign("module.norm.weight is not finite", *ON_PHOTOS, make=target_encoder(blank)),
    foreign("--weights: needs --dataset", make=target_encoder(nothing)),
    foreign("say --encoder vit-nano", *ON_PHOTOS, "--encoder", "vit-large",
            make=target_encoder(nothing)),
    foreign("--image-size 33: not a multiple of --patch-size 8", "--dataset", "folder",
            "--image-size", "33", make=target_encoder(nothing)),
    foreign("--mode saccade: RUN/x.pth holds a ViT", *ON_PHOTOS, "--mode", "saccade",
            make=target_encoder(nothing)),
    foreign("--figures: shows a run", *ON_PHOTOS, "--figures", make=target_encoder(nothing)),
    foreign("--probe path: does not apply to mode regions", *ON_PHOTOS, "--probe", "path",
            make=target_encoder(nothing)),
    foreign("last.pt: holds something else", *ON_PHOTOS, "--json", "RUN/last.pt",
            make=target_encoder(nothing)),
]
FIGURES_REGIONS = [
    case("required: CHECKPOINT", "figures.regions"),
    case("unrecognized arguments", "figures.regions", "x.pt", "--nope"),
    case("no checkpoint there", "figures.regions", "RUN"),
    case("no checkpoint there", "figures.regions", "/dev/zero"),
    case("not a checkpoint of this project", "figures.regions", "RUN/encoder.pt"),
    case("was trained in mode saccade", "figures.regions", "RUN/last.pt"),
    case("no such folder", "figures.regions", "RUN/last.pt", "--out", "nowhere", mode="regions"),
    case("no such folder", "figures.regions", "RUN/last.pt", "--out", "RUN/last.pt",
         mode="regions"),
    case("clusters.png: is no plain file", "figures.regions", "RUN/last.pt", "--out", "RUN",
         damage=instead("clusters.png", os.mkdir), mode="regions"),
    case("nowhere: ", "figures.regions", "RUN/last.pt", "--data-dir", "nowhere", mode="regions",
         data=True),
    case("finite", "figures.regions", "RUN/last.pt", "--out", "RUN", mode="regions",
         damage=with_weights(math.nan), data=True),
]


def probed(*names, **changes):
    """Damage: results with these values stand under these names; probes.json if there are none."""
    def damage(run):
        for name in names or ["probes.json"]:
            data = json.dumps(measured()).encode()
            for where, value in changes.items():
                data = with_value(where.replace("_", "."), value)
            (run / name).write_bytes(data)

    return damage


def two_modes(run):
    probed("probes.json")(run)
    probed("other.json", config_mode="rotation")(run)


def also(first, name, make):
    """Damage: `first`, and in place of this file there is what make(path) makes."""
    def damage(run):
        first(run)
        instead(name, make)(run)

    return damage


HEATMAP = ("--figure", "heatmap", "--out", "RUN")
COMPARE = [
    case("arguments are required:", "compare"),
    case("unrecognized arguments: --nope", "compare", "x", "--nope"),
    case("nowhere: not found", "compare", "nowhere"),
    case("RUN: has no probes.json; run evaluate.py", "compare", "RUN"),
    case(".: has no probes.json", "compare", "."),
    case(".: has no probes.json", "compare", ""),
    case("config.json: not what evaluate.py writes", "compare", "RUN/config.json"),
    case("last.pt: not what evaluate.py writes", "compare", "RUN/last.pt"),
    case("/dev/zero: not found", "compare", "/dev/zero"),
    case("not found", "compare", f"RUN/{'x' * 200}.json"),
    case(r"a\nb: not found", "compare", "a\nb"),
    case("not what evaluate.py writes", "compare", "RUN", damage=content("probes.json")),
    case("not what evaluate.py writes", "compare", "RUN", damage=content("probes.json", b"{")),
    case("probes.json: not found", "compare", "RUN", damage=instead("probes.json", os.mkfifo)),
    case("probes.json: not found", "compare", "RUN", damage=instead("probes.json", os.mkdir)),
    case("not what", "compare", "RUN", damage=probed(rows_value=math.nan)),
    case("not what", "compare", "RUN", damage=probed(rows_untrained=math.inf)),
    case("not what", "compare", "RUN", damage=probed(rows_paper="high")),
    case("not what", "compare", "RUN", damage=probed(rows_head=None)),
    case("not what", "compare", "RUN", damage=probed(rows_epochs="many")),
    case("not what", "compare", "RUN", damage=probed(config_lr=math.nan)),
    case("not what", "compare", "RUN", damage=probed(config_seed=[])),
    case("no row of --probe classify or", "compare", "RUN", damage=probed(rows_probe="knn")),
    case("RUN/probes.json: is given twice", "compare", "RUN", "RUN", damage=probed()),
    case("is given twice", "compare", "RUN", "RUN/../saccade/probes.json", damage=probed()),
    case("copy.json: has the settings and seed 0 of RUN/probes.json; leave one out", "compare",
         "RUN", "RUN/copy.json", damage=probed("probes.json", "copy.json")),
    case("nowhere/compare.md: its folder does not exist", "compare", "RUN", "--out", "nowhere",
         damage=probed()),
    case("its folder does not exist", "compare", "RUN", "--out", "RUN/last.pt", damage=probed()),
    case("compare.md: is no plain file", "compare", "RUN", "--out", "RUN",
         damage=also(probed(), "compare.md", os.mkdir)),
    case("compare.csv: holds something else", "compare", "RUN", "--out", "RUN",
         damage=also(probed(), "compare.csv", lambda path: path.write_text("mine"))),
    case("compare.png: is no plain file", "compare", "RUN", "--out", "RUN",
         damage=also(probed(), "compare.png", os.mkfifo)),
    case("invalid choice: 'nope'", "compare", "RUN", "--figure", "nope"),
    case("--figure sweep: goes into a folder", "compare", "RUN", "--figure", "sweep"),
    case("RUN: has no probes-transfer-*.json", "compare", "RUN", "--figure", "transfer", "--out",
         "RUN", damage=probed()),
    case("no row of --probe transfer", "compare", "RUN/probes.json", "--figure", "transfer",
         "--out", "RUN", damage=probed(rows_probe="knn")),
    case("no row of --probe classify", "compare", "RUN", *HEATMAP,
         damage=probed(rows_probe="knn")),
    case("a heatmap shows one setting, these are 2", "compare", "RUN", "RUN/other.json", *HEATMAP,
         damage=two_modes),
    case("heatmap.png: holds something else", "compare", "RUN", *HEATMAP,
         damage=also(probed(), "heatmap.png", lambda path: path.write_text("mine"))),
]
BENCHMARKS = [
    case("everything: no such section", "bench", "everything"),
    case("unrecognized arguments: --nope", "bench", "--nope"),
    case("--threads 0: must be at least 1", "bench", "--threads", "0"),
    case("--threads 1000000000: must be", "bench", "--threads", BILLION),
    case("--repeats 0: must be at least 1", "bench", "--repeats", "0"),
    case("--repeats 1000000000: must be", "bench", "--repeats", BILLION),
    case("--batch-size 1: must be at least 2", "bench", "--batch-size", "1"),
    case("--batch-size -4: must be", "bench", "--batch-size", "-4"),
    case("and at most 100,000", "bench", "--batch-size", str(10 ** 12)),
    case("--images 0: must be at least 1", "bench", "--images", "0"),
    case("--workers -1: must be", "bench", "--workers", "-1"),
    case("--device abacus", "bench", "--device", "abacus"),
    case("invalid choice: 'mars'", "bench", "--only", "mars"),
    case("/dev/full: is no plain file", "bench", "--json", "/dev/full"),
    case("last.pt: holds something else", "bench", "--json", "RUN/last.pt"),
    case("--batch-size 1: must be at least 2", "smoke", "--batch-size", "1"),
    case("and at most 100,000", "smoke", "--batch-size", str(10 ** 12)),
    case("--device abacus", "smoke", "--device", "abacus"),
    case("invalid choice: 'mars'", "smoke", "--only", "mars"),
    case("last.pt", "smoke", "--out", "RUN/last.pt"),
    case("/dev/null", "smoke", "--out", "/dev/null"),
]


def listing(folder):
    """Every path below a folder, and what kind of thing is there."""
    return {(str(path), path.lstat().st_mode, path.lstat().st_mtime_ns)
            for path in folder.rglob("*") if not path.is_dir()}


def ended(main, arguments):
    """Exit status, argparse's way of leaving included."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize("case", FLAGS + OUTPUTS + CHECKPOINTS + WEIGHTS + COMPARE
                         + FIGURES_REGIONS + BENCHMARKS)
def test_bad_input_is_one_line_at_once_and_no_file(case, made, copied, tmp_path, monkeypatch,
                                                   capsys):
    run = copied(case.mode) if case.damage else made(case.mode)
    if case.damage:
        case.damage(run)
    if not case.data:
        for module in (evaluate, regions):
            monkeypatch.setattr(module, "build_views", lambda *_: pytest.fail("data was read"))
    monkeypatch.chdir(tmp_path)
    before = listing(run) | listing(tmp_path)
    capsys.readouterr()
    started = time.monotonic()
    status = ended(case.main, [part.replace("RUN", str(run)) for part in case.flags])
    taken = time.monotonic() - started
    captured = capsys.readouterr()
    last_line = captured.err.split("\r")[-1]        # after progress bars, which clear themselves
    assert status == 2
    assert last_line.startswith("error: ") and last_line.count("\n") == 1, captured.err
    assert case.words.replace("RUN", str(run)) in last_line
    assert "Traceback" not in captured.err
    assert listing(run) | listing(tmp_path) == before
    assert taken < 10


# ---------------------------------------------------------------- files damaged at random

def scarred(data, rng):
    """Bytes with one to three damages: flipped, cut, doubled, inserted, blanked."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 2, 9, 99)), len(data) - at)
        kind = rng.randrange(5)
        if kind == 0:
            for i in range(at, at + size):
                data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:at + size]
        elif kind == 2:
            data[at:at] = data[at:at + size]
        elif kind == 3:
            data[at:at] = rng.randbytes(size)
        else:
            data[at:at + size] = bytes(size)
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def mostly_refused(main, arguments, capsys):
    """Run it: True if one line refused it, False if it ran.  Anything else fails the test."""
    capsys.readouterr()
    status = ended(main, arguments)
    error = capsys.readouterr().err.split("\r")[-1]
    if status == 0:
        return False
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return True


def test_damaged_checkpoints_are_refused_or_run(copied, capsys):
    run = copied()
    rng = random.Random(12)
    whole = (run / "last.pt").read_bytes()
    flags = [str(run / "last.pt"), "--probe", "knn", "--views", "1", "--samplings", "1"]
    assert not mostly_refused(evaluate.main, flags, capsys)
    refused = 0
    for _ in range(100):
        (run / "last.pt").write_bytes(scarred(whole, rng))
        refused += mostly_refused(evaluate.main, flags, capsys)
    assert refused > 90


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_weights_of_others_are_refused_or_run(zipped, copied, capsys):
    run = copied("regions")
    rng = random.Random(12)
    state = torch.load(run / "encoder.pt", weights_only=True)
    torch.save(dict(model=state), run / "x.pth", _use_new_zipfile_serialization=zipped)
    whole = (run / "x.pth").read_bytes()
    flags = ["--weights", str(run / "x.pth"), "--dataset", "folder", "--image-size", "32",
             "--data-dir", str(run.parent), "--json", str(run / "x.json")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "open_data", lambda *_: sys.exit(0))        # far enough
        patch.setattr(evaluate, "refuse_unwritable", lambda *_, **__: None)
        refused = 0
        for _ in range(40):
            (run / "x.pth").write_bytes(scarred(whole, rng))
            refused += mostly_refused(lambda flags: ended(evaluate.main, flags), flags, capsys)
    assert refused > (35 if zipped else 15)


ODD = (None, True, -1, 0, 2.5, 10 ** 9, 10 ** 30, math.nan, math.inf, "x", "", "\x1b[2J", [], {},
       [None], {"a": 1}, "z_agg M=" + "9" * 5000)


def test_edited_settings_of_a_checkpoint_are_refused_or_run(copied, capsys):
    run = copied()
    rng = random.Random(12)
    whole = load_checkpoint(run / "last.pt")
    flags = [str(run / "last.pt"), "--probe", "knn", "--views", "1", "--samplings", "1"]
    refused = 0
    for _ in range(70):
        config = dict(whole["config"])
        config[rng.choice(list(config))] = rng.choice(ODD)
        torch.save(whole | dict(config=config), run / "last.pt")
        refused += mostly_refused(evaluate.main, flags, capsys)
    assert refused > 30


# ---------------------------------------------------------------- figures of several runs

def measured():
    """What evaluate.py writes, as short as can be."""
    config = dict(dataset="folder", mode="saccade", method="seq-jepa", condition="position",
                  views=2, name="a")
    rows = [row("classify", "class", "z_agg M=1", "linear classifier", 3, "top-1 %", 50.0),
            row("classify", "class", "z_agg M=3", "linear classifier", 3, "top-1 %", 60.0),
            row("action", "position", "z_1, z_2", "linear", 3, "R2", 0.5),
            row("transfer", "class", "z_agg M=1, 1e9 MAC an image", "", 3, "top-1 %", 50.0)
            | dict(gmac=1.0, patch_size=8)]
    rows = [each | dict(untrained=1.0, paper=None) for each in rows]
    return dict(checkpoint="x/last.pt", step=3, config=config, dataset="folder", rows=rows)


def compared(files, path):
    """compare.py --out, without its command line."""
    results = {file: runs.read_result(file) for file in files}
    rows, columns = compare.gather(results)
    assert compare.markdown(rows, columns).count("\n") > 2
    assert all("\n" not in text for text in compare.warnings(results) + compare.notes(rows))
    compare.keep("| method\n", rows, columns, path.parent)
    return path


DRAWERS = (runs.draw_heatmap, runs.draw_sweep, runs.draw_transfer, compared)
WRONG_JSON = [
    b"", b"{", b"null", b"[]", b"3", b'"rows"', b"\xff\xfe\0", b"{}", b'{"rows": []}',
    b"[" * 100_000, b'{"rows": ' + b"9" * 5000 + b"}", b"\x89PNG\r\n",
]


def with_value(where, value):
    """measured() as JSON, with another value at config.KEY, rows.KEY or KEY."""
    result = measured()
    place, _, key = where.rpartition(".")
    if place == "rows":
        for each in result["rows"]:
            each[key] = value
    elif place:
        result[place][key] = value
    else:
        result[key] = value
    return json.dumps(result).encode()


for where, value in [("rows", 3), ("rows", "abc"), ("rows", {"a": 1}), ("rows", [1]),
                     ("rows", [{}]), ("config", None), ("config", []), ("config.views", "two"),
                     ("config.views", None), ("config.views", math.nan), ("config.mode", 3),
                     ("config.name", None), ("rows.value", "high"), ("rows.value", None),
                     ("rows.value", math.nan), ("rows.value", 1e300), ("rows.from", 3),
                     ("rows.probe", "another")]:
    WRONG_JSON.append(with_value(where, value))


@pytest.mark.parametrize("draw", DRAWERS)
@pytest.mark.parametrize("number", range(len(WRONG_JSON)))
def test_what_is_no_result_is_refused_with_its_name(number, draw, tmp_path):
    (tmp_path / "probes.json").write_bytes(WRONG_JSON[number])
    with pytest.raises(BadInput) as caught:
        draw([tmp_path / "probes.json"], tmp_path / "x.png")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["probes.json"]


@pytest.mark.parametrize("draw", DRAWERS)
def test_what_is_no_file_is_refused_too(draw, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for file in (tmp_path, tmp_path / "absent.json", tmp_path / "pipe.json", "/dev/zero"):
        with pytest.raises(BadInput, match="not found"):
            draw([file], tmp_path / "x.png")
    with pytest.raises(BadInput, match="no row"):
        draw([], tmp_path / "x.png")


def test_damaged_results_are_drawn_or_refused(tmp_path):
    """Half of the damages are to bytes, half to values, most of which are JSON still."""
    rng = random.Random(12)
    whole = json.dumps(measured())
    drawn = 0
    for i in range(140):
        damaged = scarred(whole.encode(), rng)
        if rng.randrange(2):
            keys = ["rows", "config", "dataset", *(f"rows.{key}" for key in measured()["rows"][0]),
                    *(f"config.{key}" for key in measured()["config"])]
            damaged = with_value(rng.choice(keys), rng.choice(ODD))
        (tmp_path / "probes.json").write_bytes(damaged)
        try:
            drawn += bool(DRAWERS[i % 4]([tmp_path / "probes.json"], tmp_path / "x.png"))
        except BadInput:
            pass
    assert drawn > 0


# ---------------------------------------------------------------- names in figures, in the report

NAMES = ["$x^2$", "$", "$$", r"\$", r"$\frac{1}{", "cost: 5$ to 9$", "_hidden", "__", "a\x1b[2Jb",
         "a\nb", "\0", "\udcff", "\t", "", " ", "x" * 500, "\u202eabc", "^_{}%#&~", "100 %"]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_of_a_class_is_drawn_as_it_is_spelt(tmp_path):
    n = len(NAMES)
    views = SimpleNamespace(classes=NAMES, maps={})
    gallery = sequences.Gallery(torch.rand(n, 4, 4, 3), torch.randn(n, 4), torch.randn(n, 4),
                              torch.rand(n, 2), torch.arange(n))
    config = SimpleNamespace(mode="saccade", condition="none", views=2,
                             aggregates=True)
    sequences.draw_retrieval(gallery, views, tmp_path / "retrieval.png", count=n)
    sequences.draw_maps(gallery, views, config, tmp_path / "maps.png")
    from matplotlib.text import Text
    for name in NAMES:
        shown, is_math = Text()._preprocess_math(canvas.plain(name))
        assert not is_math and shown.strip().startswith(name[:1].strip(" \x00\n\t\udcff\u202e"))


def test_every_class_has_its_line_in_the_legend(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    legends = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, names, **kw: legends.append(names))
    views = SimpleNamespace(classes=["_background", "$x$"], maps={})
    gallery = sequences.Gallery(torch.rand(8, 4, 4, 3), torch.randn(8, 4), torch.randn(8, 4),
                              torch.rand(8, 2), torch.arange(8) % 2)
    config = SimpleNamespace(mode="saccade", condition="none", views=2,
                             aggregates=True)
    sequences.draw_maps(gallery, views, config, tmp_path / "maps.png")
    assert legends == [[" _background", r"\$x\$"]]


def test_nothing_in_the_report_is_markup_but_ours(tmp_path):
    """Every value that a user or a file chose is an attack; the page has none of its tags."""
    evil = "<script>alert(1)</script>"
    config = {field: evil for field in ("name", "method", "dataset", "mode", "condition", "views",
                                        "batch_size", "saliency", "data_dir")}
    rows = [dict.fromkeys(("probe", "predicts", "from", "head", "epochs", "unit", "value",
                           "untrained", "paper"), evil)]
    result = dict(config=config, step=3, n_train=1, n_val=1, samplings=4, remarks=[evil], rows=rows)
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "'><script>.png")
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((tmp_path / "plain.png").read_bytes())
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    page = write_report(tmp_path, result, tmp_path.glob("*.png")).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and page.count("<img") == 3


def test_a_page_needs_no_config_json(copied, monkeypatch):
    """The settings are the checkpoint's: a config.json that is edited or broken changes nothing."""
    undrawn = dataclasses.replace(evaluate.PROTOCOLS["saccade"], draw=lambda *_: [])
    monkeypatch.setitem(evaluate.PROTOCOLS, "saccade", undrawn)
    flags = ["--probe", "knn", "--views", "1", "--samplings", "1", "--figures"]
    for damage in (b"{", b'{"name": "<b>"}', None):
        run = copied()
        (run / "config.json").unlink()
        if damage:
            (run / "config.json").write_bytes(damage)
        assert evaluate.main([str(run / "last.pt"), *flags]) == 0
        assert "<h1>saccade</h1>" in (run / "report.html").read_text()
        shutil.rmtree(run)


# ---------------------------------------------------------------- silent wrong numbers

def test_a_constant_target_scores_zero_not_minus_a_trillion():
    for value in (0.1, 1 / 3, math.pi, 100.7, -1e-3):
        target = torch.full((10_007, 1), value)
        assert probes.r2(target + 0.01 * torch.randn_like(target), target).item() == 0
        assert probes.r2(target, target).item() == 1
        rounded = target * (1 + 5e-8 * torch.randn_like(target))        # constant but for rounding
        assert probes.r2(target + 0.01 * torch.randn_like(target), rounded).item() == 0


def test_a_single_class_is_remarked_on(copied, made, capsys):
    run = copied()
    data = run.parent / "one"
    shutil.copytree(made("saccade").parent / "photos" / "train" / "a", data / "a")
    flags = [str(run / "last.pt"), "--probe", "knn", "--views", "1", "--data-dir", str(data)]
    assert evaluate.main(flags) == 0
    result = json.loads((run / "probes-knn.json").read_text())
    assert [row["value"] for row in result["rows"]] == [100.0, 100.0]
    assert len(result["remarks"]) == 2 and "of one class" in result["remarks"][0]
    assert f"note: {result['remarks'][0]}" in capsys.readouterr().out
    assert evaluate.main([str(run / "last.pt"), "--probe", "knn", "--views", "1"]) == 0
    assert json.loads((run / "probes-knn.json").read_text())["remarks"] == []


def test_a_transfer_looks_through_the_run_s_own_patches(copied, made):
    """The target's preset has patches of 32 px and images of 96."""
    run = copied()
    data = str(made("saccade").parent / "photos")
    flags = [str(run / "last.pt"), "--probe", "transfer", "--dataset", "folder", "--data-dir", data,
             "--views", "1", "--probe-epochs", "1"]
    for more, side in (([], 8), (["--patch-size", "12", "--image-size", "24"], 12)):
        assert evaluate.main([*flags, *more]) == 0
        result = json.loads((run / "probes-transfer-folder-epochs1.json").read_text())
        assert [row["patch_size"] for row in result["rows"]] == [side]


def test_a_head_that_diverged_does_not_look_like_chance():
    head = torch.nn.Linear(3, 2)
    torch.nn.init.constant_(head.weight, math.nan)
    assert math.isnan(probes.accuracy(head, torch.ones(1, 4, 3), torch.zeros(4)))


@pytest.mark.parametrize("limit", ["1", "3"])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_handful_of_samples_is_probed_and_drawn(mode, limit, copied):
    run = copied(mode)
    flags = ["--limit", limit, "--probe-epochs", "1", "--samplings", "1", "--figures"]
    if mode != "regions":
        flags += ["--views", "1"]
    assert evaluate.main([str(run / "last.pt"), *flags]) == 0


# ---------------------------------------------------------------- the machine

def no_room(*_):
    torch.empty(1 << 60)


def full(*_):
    raise OSError(28, "No space left on device", "somewhere")


def stop(*_):
    raise KeyboardInterrupt


def no_compiler(*_):
    raise type("InductorError", (Exception,), dict(__module__="torch._inductor.exc"))("no\ng++")


@pytest.mark.parametrize("happens, status, words", [
    (no_room, 2, "error: out of memory; lower --limit"),
    (full, 2, "error: somewhere: No space left on device"),
    (stop, 130, "interrupted"),
    (no_compiler, 2, r"error: --compile: torch.compile failed (no\ng++)"),
])
def test_what_happens_to_the_machine_is_one_line_too(happens, status, words, copied, monkeypatch,
                                                     capsys):
    run = copied()
    monkeypatch.setattr(evaluate, "measure", happens)
    before = listing(run)
    capsys.readouterr()
    assert evaluate.main([str(run / "last.pt")]) == status
    error = capsys.readouterr().err.split("\r")[-1]
    assert error.startswith(words) and error.count("\n") == 1
    assert listing(run) == before


@pytest.mark.parametrize("flags", [[], ["--figures", "--json", "elsewhere.json"]])
def test_a_folder_that_cannot_be_written_is_noticed_before_the_probes(flags, copied, monkeypatch,
                                                                      tmp_path, capsys):
    run = copied()
    monkeypatch.chdir(tmp_path)
    touch = Path.touch

    def read_only(path, *args, **kwargs):                   # the tests may run as root
        if path.parent == run:
            raise OSError(30, "Read-only file system", str(path))
        touch(path, *args, **kwargs)

    monkeypatch.setattr(Path, "touch", read_only)
    monkeypatch.setattr(evaluate, "build_views", lambda *_: pytest.fail("data was read"))
    capsys.readouterr()
    assert evaluate.main([str(run / "last.pt"), *flags]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (Read-only file system)" in error and error.count("\n") == 1


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_within_seconds(number, status, copied):
    run = copied()
    command = [sys.executable, "evaluate.py", str(run / "last.pt"), "--samplings", "300"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    seen = b""
    while b"features" not in seen:                          # while it is at work
        seen += process.stderr.read1()
        assert process.poll() is None, seen
    process.send_signal(number)
    started = time.monotonic()
    out, rest = process.communicate(timeout=60)
    assert process.returncode == status and time.monotonic() - started < 5
    assert b"Traceback" not in seen + rest and out == b""
    last_line = rest.split(b"\r")[-1]
    assert last_line.strip() == (b"interrupted" if number == signal.SIGINT else b"")
    assert not list(run.glob("*.part"))


def test_a_refusal_waits_for_no_library_that_it_does_not_need():
    """Matplotlib, torchvision and PyTorch's compiler take seconds to import."""
    script = ("import sys, evaluate; evaluate.main(['x.pt']);"
              "print({'matplotlib', 'torchvision', 'torch._dynamo'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n" and done.stderr.count("\n") == 1


def test_the_gpu_script_knows_its_parts(tmp_path):
    done = subprocess.run(["sh", "benchmarks/gpu.sh", "smokee"], cwd=ROOT, capture_output=True,
                          text=True, env=os.environ | dict(OUT=str(tmp_path / "out")))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr.startswith("error: smokee: no such part") and done.stderr.count("\n") == 1
