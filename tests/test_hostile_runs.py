"""What a stranger, a full disk or an editor may do to a run: one line, exit 2, nothing changed.

FLAGS, FOLDERS, CHECKPOINTS and METRICS are tables: a case more is a line more. All go through
train.main in this process.
"""
import contextlib
import copy
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from config import config_of
from plumbing import files, loop, runs
from plumbing.device import is_out_of_memory, refuse_giant
from plumbing.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 10                # until a case counts as hanging
TINY = (
    "--dataset folder --mode saccade --image-size 20 --patch-size 8 --views 2 --width 2 "
    "--action-dim 4 --epochs 3 --batch-size 8 --warmup-epochs 1 --device cpu"
).split()
REGIONS = "--dataset imagenet --mode regions"
BIG = 10 ** 9
NAN = float("nan")


# ---------------------------------------------------------------- how a case is judged

@contextlib.contextmanager
def no_longer_than(seconds):
    def stop(number, frame):
        raise TimeoutError(f"no answer in {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def call(argv):
    """train.main's exit status."""
    try:
        with no_longer_than(SECONDS):
            return train.main(argv)
    except SystemExit as leave:             # argparse's
        return leave.code


def listing(root):
    """{path: what is there} of everything below root."""
    return {
        path: path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink() else 0
        for path in sorted(root.rglob("*"))
    }


def check_refused(argv, words, root, capsys):
    before = listing(root)
    capsys.readouterr()
    status = call(argv)
    out, err = capsys.readouterr()
    errors = [line for line in err.split("\n") if line]
    assert status == 2, (status, err)
    assert len(errors) == 1 and errors[0].startswith("error: "), err
    assert words in errors[0] and errors[0].isprintable(), err
    assert listing(root) == before


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """Settings and folder of a run that stopped in the middle of its second epoch."""
    root = tmp_path_factory.mktemp("hostile")
    argv = [*TINY, "--data-dir", str(photos), "--out", str(root), "--name", "r"]
    original, steps = train.next_batch, []

    def interrupted(*args):
        steps.append(0)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    train.next_batch = interrupted
    assert train.main(argv) == 128 + signal.SIGTERM
    train.next_batch = original
    assert {p.name for p in root.iterdir()} == {"r"}
    return argv, root / "r"


@pytest.fixture
def run(finished, tmp_path):
    """The command that continues a copy of that run, and the copy."""
    argv, folder = finished
    shutil.copytree(folder, tmp_path / "runs" / "r")
    return [*argv, "--out", str(tmp_path / "runs"), "--resume"], tmp_path / "runs" / "r"


# ---------------------------------------------------------------- flags

FLAGS = [
    (f"--views {BIG}", "--views 1000000000: must be at least 1 and at most 100"),
    ("--views -3", "--views -3: must be"),
    (f"--image-size {BIG}", "--image-size 1000000000: must be at least 8 and at most 4,096"),
    ("--image-size 4097", "--image-size 4097: must be"),
    (f"--patch-size {BIG}", "--patch-size 1000000000: must be"),
    (f"--width {BIG}", "--width 1000000000: must be"),
    (f"--action-dim {BIG}", "--action-dim 1000000000: must be"),
    (f"--agg-hidden {10 ** 12}", "--agg-hidden 1000000000000: must be"),
    (f"--batch-size {10 ** 12}", "--batch-size 1000000000000: must be"),
    (f"--epochs {10 ** 18}", "--epochs 1000000000000000000: must be"),
    (f"--warmup-epochs {10 ** 18}", "--warmup-epochs 1000000000000000000: must be"),
    (f"--limit {10 ** 30}", "--limit 1000"),
    (f"--seed {2 ** 64}", "--seed 18446744073709551616: must be"),
    (f"--seed {10 ** 400}", "--seed 1000"),
    ("--seed -1", "--seed -1: must be"),
    (f"--workers {BIG}", "--workers 1000000000: must be"),
    (f"--probe-every {10 ** 12}", "--probe-every 1000000000000: must be"),
    (f"--keep-every {10 ** 12}", "--keep-every 1000000000000: must be"),
    (f"--dataset solids --object-views {BIG}", "--object-views 1000000000: must be"),
    (f"--dataset solids --mode rotation --object-views {BIG}", "--object-views 1000000000: must"),
    (f"{REGIONS} --predictor-depth {BIG}", "--predictor-depth 1000000000: must be"),
    (f"{REGIONS} --predictor-depth -1", "--predictor-depth"),
    (f"{REGIONS} --predictor-width {32 * BIG}", "--predictor-width 32000000000: must be"),
    (f"{REGIONS} --predictor-width -32", "--predictor-width -32"),
    (f"{REGIONS} --image-size {16 * BIG}", "--patch-size 16: gives 1,000,000,000 patches a side"),
    (f"{REGIONS} --image-size 4096", "--patch-size 16: gives 256 patches a side, at most 128"),
    (f"{REGIONS} --region-count {BIG}", "--region-count 1000000000"),
    (f"{REGIONS} --min-patches {BIG}", "--min-patches 1000000000"),
    (f"{REGIONS} --saliency-block {BIG}", "--saliency-block 1000000000"),
    (f"{REGIONS} --crop-scale nan", "--crop-scale nan: must be above 0"),
    (f"{REGIONS} --crop-scale 2", "--crop-scale 2.0: must be"),
    ("--dataset stl10 --mode augment --crop-scale nan", "--crop-scale"),
    ("--crop-scale nan", "--crop-scale"),
    ("--width 1024 --agg-hidden 65536 --action-dim 8192", "a model of this size takes"),
    (f"{REGIONS} --encoder vit-huge --predictor-width 8192 --predictor-depth 100", "a model of"),
    ("--lr nan", "--lr nan"), ("--lr inf", "--lr inf"), ("--lr -1", "--lr -1.0"),
    ("--lr 1e400", "--lr inf"), ("--lr-start nan", "--lr-start nan"),
    ("--lr-end inf", "--lr-end inf"), ("--weight-decay nan", "--weight-decay nan"),
    ("--weight-decay-end -2", "--weight-decay-end -2.0"), ("--ema nan", "--ema nan"),
    ("--ema -0.1", "--ema -0.1"), ("--batch-size 0", "--batch-size 0"),
    ("--dataset solids --rotation-range nan", "--rotation-range nan"),
    ("--dataset solids --hue-range inf", "--hue-range inf"),
    ("--views 2.5", "invalid int value"), ("--views", "expected one argument"),
    ("--views 0x10", "invalid int value"), ("--lr abc", "invalid float value"),
    ("--colour \x1b[31mred", "unrecognized arguments: --colour \\x1b[31mred"),
    ("--colour red\ngreen", "unrecognized arguments: --colour red\\ngreen"),
    ("--condition \x1b[2J", "--condition"), ("--dataset \x1b[2J", "invalid choice"),
    ("--name ..", "--name ..: expected a plain folder name"),
    ("--name .", "--name .: expected a plain folder name"),
    ("--name a/b", "--name a/b: expected a plain folder name"),
    ("--name /", "--name /: expected a plain folder name"),
    ("--name a/", "--name a/: expected a plain folder name"),
    ("--name ../../a", "expected a plain folder name"),
    ("--name a\nb", "--name 'a\\nb': has control characters"),
    ("--name \x1b[31m", "--name '\\x1b[31m': has control characters"),
    ("--name a\0b", "--name 'a\\x00b': has control characters"),
    ("--name a\x85b", "has control characters"),
    ("--name \udcff", "has control characters or is no UTF-8"),
    (f"--name {'n' * 201}", "201 bytes long, expected at most 200"),
    ("--name " + 101 * "\u00e4", "202 bytes long"),
    (f"--name {'n' * 5000}", "5000 bytes long"),
    ("--out ", "--out '': expected a folder"), ("--data-dir ", "--data-dir '': expected a folder"),
    ("--out a\0b", "--out 'a\\x00b': has control"), ("--data-dir a\0b", "--data-dir 'a\\x00b'"),
    (f"--out {'n' * 5000}", "File name too long"),
    ("--saliency a\0b", "--saliency 'a\\x00b': has control"),
    ("--device ", "--device"), ("--device cpu:0", "--device cpu:0: not available"),
    ("--device cpu:abc", "--device cpu:abc: not available"), ("--device mps:3", "--device mps:3"),
    ("--device cuda:\u00b2", "--device cuda:\u00b2"), ("--device cuda:", "--device cuda:"),
    ("--device cuda:01", "--device cuda:01"), ("--device meta", "--device meta: not available"),
    ("--device tpu\x1b[0m", "--device"),
]


@pytest.mark.parametrize("line, words", FLAGS, ids=[repr(line)[:60] for line, _ in FLAGS])
def test_flags(line, words, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, _, value = line.rpartition(" ")
    argv = [*name.split(" "), value]
    if "--dataset" not in line:
        argv = ["--dataset", "folder", *argv]
    if "--data-dir" not in line:
        argv = ["--data-dir", str(photos), *argv]
    check_refused(argv, words, tmp_path, capsys)


def test_the_largest_values_are_no_refusal():
    """Bounds leave room for all that the papers do, and 64 bits for a seed."""
    for line in (
        f"--seed {2 ** 64 - 1} --views 100 --epochs 1000000 --limit 1000000000",
        "--mode regions --dataset imagenet --encoder vit-huge --image-size 448",
    ):
        train.settings.from_command_line(line.split())


def test_a_giant_is_not_built(monkeypatch):
    built = []

    def build():
        built.append(torch.nn.Linear(10 ** 6, 10 ** 6))
        return built[0]

    with pytest.raises(BadInput, match="takes 16,000.0 GB to train and cpu has"):
        refuse_giant(build, "cpu")
    assert built[0].weight.is_meta
    refuse_giant(lambda: torch.nn.Linear(10, 10), "cpu")


# ---------------------------------------------------------------- memory

ERRORS = [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory"), True),
    (OSError(12, "Cannot allocate memory"), True),
    (OSError(28, "No space left on device"), False),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("shapes cannot be multiplied"), False),
    (ValueError("out of memory"), False),
]


@pytest.mark.parametrize("error, expected", ERRORS, ids=[repr(e)[:40] for e, _ in ERRORS])
def test_words_of_missing_memory(error, expected):
    assert is_out_of_memory(error) == expected


@pytest.mark.parametrize("shape", [(10 ** 15,), (2 ** 40, 2 ** 40)])
def test_a_cpu_without_memory_is_one_line(shape, photos, tmp_path, capsys, monkeypatch):
    """PyTorch's own words, in whatever version."""
    monkeypatch.setattr(train, "training_step", lambda *args: torch.empty(shape))
    argv = [*TINY, "--data-dir", str(photos), "--out", str(tmp_path)]
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: out of memory; lower --batch-size")
    assert err.count("error") == 1


# ---------------------------------------------------------------- folders

def as_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def as_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)


def as_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def as_dead_link(path):
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("nowhere")


def as_loop(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(path.name)


# (what is done to OUT/NAME/..., where, words of the refusal); all of a fresh run
FOLDERS = [
    (as_file, "", "runs: is no folder; choose another --out"),
    (as_file, "fresh", "fresh: is no folder"),
    (as_dead_link, "", "is no folder"),
    (as_dead_link, "fresh", "is no folder"),
    (as_loop, "", "is no folder"),
    (as_loop, "fresh", "is no folder"),
    *((as_folder, f"fresh/{name}", f"{name}: is no regular file")
      for name in ("config.json", "metrics.csv", "encoder.pt", "last.pt", "curves.png", ".lock")),
]


@pytest.mark.parametrize("damage, where, words", FOLDERS)
def test_folders(damage, where, words, photos, tmp_path, capsys):
    damage(tmp_path / "runs" / where)
    argv = [*TINY, "--data-dir", str(photos), "--out", str(tmp_path / "runs"), "--name", "fresh"]
    check_refused(argv, words, tmp_path, capsys)
    check_refused([*argv, "--resume"], words, tmp_path, capsys)


@pytest.mark.parametrize("name", ["config.json", "metrics.csv", "last.pt", "previous.pt", ".lock"])
@pytest.mark.parametrize("damage", [as_folder, as_pipe, as_dead_link])
def test_what_is_no_file_is_not_opened(damage, name, run, tmp_path, capsys):
    argv, folder = run
    damage(folder / name)
    check_refused(argv, f"{name}: is no regular file", tmp_path, capsys)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_without_permission(resume, run, tmp_path, capsys, monkeypatch):
    """Asked of the system, whom root need not obey: so it is told to say no."""
    argv, folder = run
    monkeypatch.setattr(runs.os, "access", lambda path, how: Path(path) != tmp_path / "runs" / "r")
    if not resume:
        shutil.rmtree(folder)
        folder.mkdir()
    check_refused(argv, "r: no permission to write there", tmp_path, capsys)


# ---------------------------------------------------------------- one name, two processes

HOLDER = """
import sys, time
from pathlib import Path
from plumbing import files
files.lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held(folder):
    """Another process has locked the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


def test_the_second_process_is_told_who_holds_the_run_and_kill_9_lets_go(run, tmp_path, capsys):
    argv, folder = run
    with held(folder) as process:
        words = f"r: is being written by process {process.pid} on "
        check_refused(argv, words, tmp_path, capsys)
        (folder / "last.pt").unlink()           # a run that has not saved yet is somebody's too
        check_refused(argv, words, tmp_path, capsys)
        check_refused(argv[:-1], words, tmp_path, capsys)
    assert train.main(argv) == 0
    assert train.main(argv) == 0                # main lets go of it


def test_two_fresh_runs_that_prepare_at_once(photos, tmp_path, capsys, monkeypatch):
    """Both find no folder; the first to make it has it, even if it is done before the second."""
    argv = [*TINY, "--data-dir", str(photos), "--out", str(tmp_path), "--name", "r"]
    build_views, inside = train.build_views, []

    def slowly(*args):
        if not inside:
            inside.append(1)
            assert train.main(argv) == 0
            inside.append(listing(tmp_path))
        return build_views(*args)

    monkeypatch.setattr(train, "build_views", slowly)
    assert train.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1
    assert "r: another process has made this run meanwhile" in err
    assert listing(tmp_path) == inside[1]


def test_a_lock_s_holder_may_be_unreadable(run, tmp_path, capsys):
    argv, folder = run
    with held(folder):
        (folder / ".lock").write_bytes(b"\xff\x1b[2J")
        check_refused(argv, "r: is being written by \ufffd\\x1b[2J;", tmp_path, capsys)


def test_kept_epochs_without_a_last_checkpoint_are_no_fresh_folder(run, tmp_path, capsys):
    argv, folder = run
    (folder / "last.pt").rename(folder / "epoch-1.pt")
    (folder / "previous.pt").unlink(missing_ok=True)
    for command in (argv, argv[:-1]):
        check_refused(command, "r: has epoch-1.pt and no last.pt; mv ", tmp_path, capsys)


@pytest.mark.parametrize("environment, words", [
    (dict(WORLD_SIZE="2"), "RANK '' in the environment, where WORLD_SIZE is '2': start with"),
    (dict(WORLD_SIZE="2", RANK="0"), "LOCAL_RANK ''"),
    (dict(WORLD_SIZE="two"), "WORLD_SIZE 'two'"),
    (dict(WORLD_SIZE=""), "WORLD_SIZE ''"),
    (dict(WORLD_SIZE="-2"), "WORLD_SIZE '-2'"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_PORT="x"), "MASTER_PORT 'x'"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_PORT="1"), "MASTER_ADDR ''"),
])
def test_a_cluster_s_environment_without_torchrun(
    environment, words, run, tmp_path, capsys, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_refused(run[0], words, tmp_path, capsys)


def test_where_there_are_no_locks_runs_go_on(run, monkeypatch):
    argv, folder = run
    monkeypatch.setattr(files, "fcntl", None)
    assert train.main(argv) == 0


def test_a_renamed_run_is_continued(run):
    argv, folder = run
    folder.rename(folder.with_name("new"))
    assert train.main([*argv, "--name", "new"]) == 0
    assert runs.load_checkpoint(folder.with_name("new") / "last.pt")["step"] == 12


# ---------------------------------------------------------------- checkpoints

def changed(**changes):
    """A checkpoint in which parts are replaced, or taken away if None."""
    def damage(checkpoint):
        for name, value in changes.items():
            checkpoint[name] = value
            if value is None:
                del checkpoint[name]
    return damage


def inside(part, name, value=None):
    """A checkpoint one of whose parts is changed in one place, or there lacks it if None."""
    def damage(checkpoint):
        checkpoint[part][name] = value
        if value is None:
            del checkpoint[part][name]
    return damage


def weights(change, name="encoder.conv1.weight"):
    def damage(checkpoint):
        checkpoint["model"][name] = change(checkpoint["model"][name])
    return damage


def poked(number):
    def change(tensor):
        tensor.view(-1)[-1] = number
        return tensor
    return change


def moments(change):
    def damage(checkpoint):
        change(checkpoint["optimizer"])
    return damage


UNFIT = "optimizer does not fit"
CHECKPOINTS = {
    "no config": (changed(config=None), "has no config"),
    "no step": (changed(step=None), "has no step"),
    "no meters": (changed(meters=None), "has no meters"),
    "no model": (changed(model=None), "has no model"),
    "no optimizer": (changed(optimizer=None), "has no optimizer"),
    "no format": (changed(format=None), "not a checkpoint of this project"),
    "format is a tensor": (changed(format=torch.zeros(3)), "not a checkpoint of this project"),
    "no version": (changed(version=None), "checkpoint version None"),
    "version is a tensor": (changed(version=torch.zeros(3)), "checkpoint version tensor"),
    "step -5": (changed(step=-5), "its step is -5"),
    "step 2.5": (changed(step=2.5), "its step is 2.5, expected int"),
    "step x": (changed(step="x"), "its step is 'x', expected int"),
    "step True": (changed(step=True), "its step is True, expected int"),
    "step is a tensor": (changed(step=torch.tensor(6)), "its step is tensor(6), expected int"),
    "step 10**9": (changed(step=BIG), "step 1,000,000,000 and its meters are not of 3 epochs of 4"),
    "step 10**30": (changed(step=10 ** 30), "are not of 3 epochs of 4 steps"),
    "step of another epoch": (changed(step=7), "step 7 and its meters are not of"),
    "config is a list": (changed(config=[1]), "its config is [1], expected dict"),
    "config has a number for a name": (inside("config", 3, 4), "names something 3"),
    "mode nope": (inside("config", "mode", "nope"), "setting mode is 'nope', expected one of"),
    "dataset 3": (inside("config", "dataset", 3), "setting dataset is 3, expected a value of"),
    "views abc": (inside("config", "views", "abc"), "setting views is 'abc', expected a value of"),
    "views True": (inside("config", "views", True), "setting views is True"),
    "views 2.0": (inside("config", "views", 2.0), "setting views is 2.0"),
    "views 10**9": (inside("config", "views", BIG), "--views 1000000000: must be"),
    "lr abc": (inside("config", "lr", "abc"), "setting lr is 'abc'"),
    "lr nan": (inside("config", "lr", NAN), "--lr nan"),
    "ior 1": (inside("config", "ior", 1), "setting ior is 1"),
    "method is a list": (inside("config", "method", ["x"]), "setting method is ['x']"),
    "name is a tensor": (inside("config", "name", torch.zeros(2)), "setting name is tensor"),
    "unknown setting": (inside("config", "colour", "red"), "does not know (colour)"),
    "other views": (inside("config", "views", 3), "started with --views 3 (now 2)"),
    "meters is a list": (changed(meters=[]), "its meters is [], expected dict"),
    "no meter": (changed(meters={}), "its meters are not of"),
    "no count": (inside("meters", "count"), "its meters are not of"),
    "no loss": (inside("meters", "loss"), "its meters are not of"),
    "count 3": (inside("meters", "count", 3.0), "its meters are not of"),
    "count nan": (inside("meters", "count", NAN), "its meters are not of"),
    "first_bad 4": (inside("meters", "first_bad", 4.0), "its meters are not of"),
    "first_bad nan": (inside("meters", "first_bad", NAN), "its meters are not of"),
    "loss nan": (inside("meters", "loss", NAN), "its meters are not of"),
    "loss x": (inside("meters", "loss", "x"), "its meter loss is 'x', expected a number"),
    "loss is a tensor": (inside("meters", "loss", torch.ones(2)), "its meter loss is tensor"),
    "model is a tensor": (changed(model=torch.ones(2)), "its model is tensor([1., 1.])"),
    "no weight": (inside("model", "encoder.conv1.weight"), "encoder.conv1.weight: absent"),
    "a weight more": (inside("model", "more", torch.ones(2)), "more: torch.float32 (2,), expected"),
    "weight is a list": (weights(lambda w: [1.0]), "encoder.conv1.weight are no plain tensor"),
    "weight NaN": (weights(poked(NAN)), "weights encoder.conv1.weight are not finite"),
    "weight inf": (weights(poked(NAN), "target_encoder.bn1.running_var"), "running_var are not"),
    "weight of another shape": (weights(lambda w: w[0]), "do not fit the model"),
    "weight of another type": (weights(torch.Tensor.double), "torch.float64"),
    "weight of whole numbers": (weights(torch.Tensor.int), "torch.int32"),
    "complex weight": (weights(lambda w: w + 1j), "torch.complex64"),
    "sparse weight": (weights(torch.Tensor.to_sparse), "are no plain tensor"),
    "meta weight": (weights(lambda w: w.to("meta")), "are no plain tensor"),
    "giant weight": (weights(lambda w: torch.zeros(1).expand(10 ** 12)), "are no plain tensor"),
    "optimizer is a list": (changed(optimizer=[1]), "its optimizer is [1], expected dict"),
    "optimizer is empty": (changed(optimizer={}), UNFIT),
    "no state": (moments(lambda o: o.pop("state")), UNFIT),
    "empty state": (moments(lambda o: o["state"].clear()), UNFIT),
    "no groups": (moments(lambda o: o.pop("param_groups")), UNFIT),
    "a group less": (moments(lambda o: o["param_groups"].pop()), UNFIT),
    "groups are numbers": (moments(lambda o: o.update(param_groups=[1, 2])), UNFIT),
    "a parameter less": (moments(lambda o: o["param_groups"][0]["params"].pop()), UNFIT),
    "moments of no parameter": (moments(lambda o: o["state"].update({999: {}})), UNFIT),
    "moments under a word": (moments(lambda o: o["state"].update(x={})), UNFIT),
    "no exp_avg": (moments(lambda o: o["state"][0].pop("exp_avg")), UNFIT),
    "no moments": (moments(lambda o: o["state"][0].clear()), UNFIT),
    "moments are words": (moments(lambda o: o["state"].update({0: "x"})), UNFIT),
    "moments of another shape":
        (moments(lambda o: o["state"][0].update(exp_avg=torch.ones(2))), UNFIT),
    "moments NaN": (moments(lambda o: poked(NAN)(o["state"][0]["exp_avg_sq"])), UNFIT),
}


@pytest.fixture(scope="module")
def intact(finished):
    return runs.load_checkpoint(finished[1] / "last.pt")


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(case, intact, run, tmp_path, capsys):
    argv, folder = run
    damage, words = CHECKPOINTS[case]
    checkpoint = copy.deepcopy(intact)
    damage(checkpoint)
    torch.save(checkpoint, folder / "last.pt")
    (folder / "previous.pt").unlink(missing_ok=True)
    check_refused(argv, words, tmp_path, capsys)


def test_a_meter_that_is_missing_is_noticed_at_the_first_step(intact, run, capsys):
    argv, folder = run
    checkpoint = copy.deepcopy(intact)
    checkpoint["meters"]["more"] = 1.0
    torch.save(checkpoint, folder / "last.pt")
    assert train.main(argv) == 2
    assert "the checkpoint's meters are not those of this model" in capsys.readouterr().err


def test_rates_in_the_optimizer_s_groups_do_not_matter(intact, run, finished):
    """A run's settings are those of its Config, whatever a group in the file says."""
    argv, folder = run
    checkpoint = copy.deepcopy(intact)
    for group in checkpoint["optimizer"]["param_groups"]:
        params = group["params"]
        group.clear()
        group["params"] = params
    torch.save(checkpoint, folder / "last.pt")
    assert train.main(argv) == 0


@pytest.mark.parametrize("change, words", [
    (dict(mode="nope"), "setting mode is 'nope'"),
    (dict(views="abc"), "setting views is 'abc'"),
    (dict(colour="red"), "settings that this code does not know (colour)"),
])
def test_config_of_an_edited_checkpoint(change, words, intact):
    with pytest.raises(BadInput) as error:
        config_of(dict(config=intact["config"] | change))
    assert words in str(error.value) and str(error.value).startswith("the checkpoint has ")


# ---------------------------------------------------------------- metrics.csv

HEAD = b"epoch,step,loss\n"
METRICS = {
    "words": (HEAD + b"1,four,0.5\n", "line 2 is '1,four,0.5', expected 3 numbers"),
    "binary": (bytes(range(256)) * 4, "not a text file"),
    "zeros": (bytes(100) + b"\n" + bytes(100) + b"\n", "metrics.csv: line 2"),
    "UTF-16": ("epoch,step\n1,4\n".encode("utf-16"), "not a text file"),
    "no step": (b"epoch,loss\n1,0.5\n", "metrics.csv: line 2 is '1,0.5'"),
    "no header": (b"1,4,0.5\n2,8,0.4\n", "metrics.csv: line 2"),
    "header twice": (HEAD + HEAD + b"1,4,0.5\n", "metrics.csv: line 2 is 'epoch,step,loss'"),
    "a column twice": (b"epoch,step,step\n1,4,4\n", "metrics.csv: line 2"),
    "a short line": (HEAD + b"1,4\n2,8,0.5\n", "line 2 is '1,4', expected 3 numbers"),
    "a long line": (HEAD + b"1,4,0.5,6\n", "line 2 is '1,4,0.5,6'"),
    "an empty line": (HEAD + b"1,4,0.5\n\n2,8,0.4\n", "line 3 is ''"),
    "an empty field": (HEAD + b"1,,0.5\n", "line 2 is '1,,0.5'"),
    "step NaN": (HEAD + b"1,nan,0.5\n", "line 2 is '1,nan,0.5'"),
    "step -5": (HEAD + b"1,-5,0.5\n", "line 2 is '1,-5,0.5'"),
    "an epoch twice": (HEAD + b"1,4,0.5\n1,4,0.5\n", "line 3 is '1,4,0.5', expected 3 numbers and"),
    "two runs in one": (HEAD + b"1,4,0.5\n2,8,0.5\n1,4,0.5\n", "line 4"),
    "semicolons": (b"epoch;step;loss\n1;4;0.5\n", "metrics.csv: line 2"),
    "quotes": (HEAD + b'"1","4","0.5"\n', "metrics.csv: line 2"),
    "a page of HTML": (b"<html>\n<body>\n</body>\n", "metrics.csv: line 2"),
    "control characters": (HEAD + b"1,\x1b[2J,0.5\n", "line 2 is '1,\\x1b[2J,0.5'"),
    "one giant line": (HEAD + b"9" * 10 ** 6 + b"\n", "metrics.csv: line 2"),
}


@pytest.mark.parametrize("case", METRICS)
def test_metrics(case, run, tmp_path, capsys):
    argv, folder = run
    text, words = METRICS[case]
    (folder / "metrics.csv").write_bytes(text)
    check_refused(argv, words, tmp_path, capsys)


def test_metrics_with_other_columns_are_not_mixed(run, capsys):
    argv, folder = run
    (folder / "metrics.csv").write_bytes(HEAD + b"1,4,0.5\n")
    assert train.main(argv) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "metrics.csv: has other columns than this code writes" in error
    assert (folder / "metrics.csv").read_bytes() == HEAD + b"1,4,0.5\n"


@pytest.mark.parametrize("text", [None, b"", b"epo", HEAD, HEAD + b"1,4"])
def test_metrics_that_are_lost_or_cut_short_begin_anew(text, run):
    argv, folder = run
    if text is None:
        (folder / "metrics.csv").unlink()
    else:
        (folder / "metrics.csv").write_bytes(text)
    assert train.main(argv) == 0
    assert [row["step"] for row in runs.read_metrics(folder / "metrics.csv")] == [8, 12]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\0"])
def test_a_run_needs_no_config_json(text, run):
    """It is for readers; --resume writes it again."""
    argv, folder = run
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    assert train.main(argv) == 0
    assert (folder / "config.json").read_text().startswith('{\n "dataset": "folder"')


# ---------------------------------------------------------------- damage at random

def damaged(data, rng):
    """Bytes with a few changed, cut off, doubled, put in, or exchanged for others."""
    data = bytearray(data)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    kind = rng.randrange(5)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        data[b:b] = data[a:a + rng.randint(1, 200)]
    elif kind == 3:
        data[a:a] = rng.randbytes(rng.randint(1, 40))
    else:
        del data[a:a + rng.randint(1, 200)]
    return bytes(data)


@pytest.mark.parametrize("name, seeds", [("last.pt", 100), ("metrics.csv", 100),
                                         ("config.json", 15), (".lock", 5)])
def test_random_damage_is_refused_or_does_no_harm(name, seeds, run, monkeypatch, capsys):
    """The run goes on, or there is one line; to save time it goes no further than its first step.

    A checkpoint that is accepted is the one that was saved."""
    argv, folder = run
    before = runs.load_checkpoint(folder / "last.pt")
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    accepted = 0

    def stop(step):
        raise BadInput("as far as that")

    monkeypatch.setattr(train, "next_batch", lambda *args: stop)
    for seed in range(seeds):
        for path, content in whole.items():
            path.write_bytes(content)
        (folder / name).write_bytes(damaged(whole[folder / name], random.Random(seed)))
        monkeypatch.setattr(train, "next_batch", lambda *args: stop(0))
        assert call(argv) == 2, seed
        errors = [e for e in capsys.readouterr().err.split("\n") if "error" in e.lower()]
        assert len(errors) == 1 and errors[0].startswith("error: "), (seed, errors)
        if "as far as that" in errors[0]:
            accepted += 1
            if name == "last.pt":
                from same import same
                assert same(runs.load_checkpoint(folder / name), before), seed
    print(f"{name}: {accepted} of {seeds} went on")


# ---------------------------------------------------------------- signals and full disks

def test_a_signal_in_a_step_without_end_leaves_in_seconds(run, tmp_path, capsys, monkeypatch):
    argv, folder = run
    before = (folder / "last.pt").read_bytes()
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.3)

    def endless(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(train, "next_batch", endless)
    started = time.monotonic()
    with pytest.raises(SystemExit) as leave:
        train.main(argv)
    assert leave.value.code == 128 + signal.SIGTERM and time.monotonic() - started < 5
    said = "stopped by SIGTERM in step 6, which would have taken too long to end"
    assert said in capsys.readouterr().out
    assert (folder / "last.pt").read_bytes() == before and not list(folder.glob("*.part"))
    files.lock(folder)                          # nobody holds it any more
    files.unlock()


def test_a_signal_while_probing_leaves_and_the_run_repeats_the_epoch(
    run, finished, capsys, monkeypatch
):
    argv, folder = run
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.3)
    online = train.online

    def endless(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(train, "online", endless)
    with pytest.raises(SystemExit) as leave:
        train.main(argv)
    assert leave.value.code == 128 + signal.SIGTERM
    assert runs.load_checkpoint(folder / "last.pt")["step"] == 6
    monkeypatch.setattr(train, "online", online)
    assert train.main(argv) == 0
    assert [row["step"] for row in runs.read_metrics(folder / "metrics.csv")] == [4, 8, 12]


def test_to_save_may_take_its_time(run, monkeypatch):
    argv, folder = run
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.2)
    next_batch, save = train.next_batch, runs.save_checkpoint

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(*args)

    def slowly(*args):
        time.sleep(0.5)
        save(*args)

    monkeypatch.setattr(train, "next_batch", signalled)
    monkeypatch.setattr(runs, "save_checkpoint", slowly)
    assert train.main(argv) == 128 + signal.SIGTERM
    assert runs.load_checkpoint(folder / "last.pt")["step"] == 7


@pytest.mark.parametrize("last", [False, True], ids=["in between", "at the end"])
def test_a_signal_during_a_save_waits_for_it(last, run, monkeypatch):
    argv, folder = run
    monkeypatch.setattr(loop, "GRACE_SECONDS", 0.2)
    if not last:
        monkeypatch.setattr(loop, "SAVE_SECONDS", -1)
    save = runs.save_checkpoint

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        save(*args)

    monkeypatch.setattr(runs, "save_checkpoint", interrupted)
    status = train.main(argv)
    checkpoint = runs.load_checkpoint(folder / "last.pt")
    if last:
        assert status == 0 and (folder / "curves.png").exists()
    else:
        assert status == 128 + signal.SIGTERM and checkpoint["step"] == 8


def test_a_flag_that_older_code_let_be_typed_does_not_hinder_resuming(run):
    """Mode saccade never read --rotation-range: a run that has another value there goes on."""
    argv, folder = run
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    checkpoint["config"]["rotation_range"] = 0.5
    torch.save(checkpoint, folder / "last.pt")
    assert train.main(argv) == 0
    checkpoint["config"]["patch_size"] = 9
    torch.save(checkpoint, folder / "last.pt")
    assert train.main(argv) == 2


@pytest.mark.parametrize("fails", ["save_checkpoint", "append_metrics"])
def test_a_full_disk_s_line_stands_alone_and_nothing_says_100_percent(
    fails, photos, tmp_path, capsys, monkeypatch
):
    def full(*args):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(runs, fails, full)
    argv = [*TINY, "--epochs", "1", "--warmup-epochs", "0", "--name", "r"]
    assert train.main([*argv, "--data-dir", str(photos), "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().split("\n")
    assert lines[-1].startswith("error: somewhere: No space left on device")
    assert sum("error" in line for line in lines) == 1 and "100%" not in "".join(lines)


def test_a_terminal_that_lacks_a_letter_of_a_name_is_no_error(tmp_path):
    folder = tmp_path / "f\u00f6tos"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 90, 30)).save(folder / f"{i}.png")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--dataset", "folder", "--mode", "saccade",
         "--data-dir", str(folder), "--image-size", "16", "--patch-size", "8", "--epochs", "1",
         "--batch-size", "4", "--width", "8", "--agg-hidden", "16", "--action-dim", "8",
         "--out", str(tmp_path), "--name", "x"],
        capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert r"f\xf6tos has a single class" in done.stdout
