"""kill -9, again and again: no file is left half-written, and --resume ends where an undisturbed
run ends.

    KILLS=50 python -m pytest tests/test_kill.py

About half of the kills come at random moments of a run, the others at a random step of writing a
checkpoint or the cache.
Every run is a process forked from one that has imported everything already.
"""
import csv
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from same import same
from tqdm import tqdm

import datasets
import train
from plumbing import loop, runs

KILLS = int(os.environ.get("KILLS", 12))
KILLS_A_RUN = 4                 # then it is left to end
TINY = (
    "--dataset folder --mode saccade --image-size 20 --patch-size 8 --views 2 "
    "--width 2 --action-dim 4 --epochs 2 --batch-size 8 "
    "--warmup-epochs 1 --device cpu --probe-every 2 --resume"
).split()
STEPS = {
    "save": (torch, "save"),
    "fsync": (os, "fsync"),
    "link": (os, "link"),
    "replace": (os, "replace"),
    "unlink": (os, "unlink"),
    "decode": (datasets.prepare, "decode"),
    "batch": (train, "next_batch"),
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs kill -9")


# ---------------------------------------------------------------- in the forked process

def run(argv, log, aim=None, strike=signal.SIGKILL):
    """train.main, output into `log`, checkpoints after every step.

    aim: (name, n): `strike` comes at the n-th call of STEPS[name]. Without it, how often each was
    called is left in log.json."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    torch.set_num_threads(1)
    # its own one leaves a semaphore behind when killed in a process of multiprocessing
    tqdm.set_lock(threading.RLock())
    loop.SAVE_SECONDS = -1
    # drawing would take as long as the run
    train.draw_curves = lambda folder: (folder / "curves.png").touch()
    counts = dict.fromkeys(STEPS, 0)
    for name, (owner, attribute) in STEPS.items():
        setattr(owner, attribute, counted(getattr(owner, attribute), name, counts, aim, strike))
    status = train.main(argv)
    if aim is None:
        Path(f"{log}.json").write_text(json.dumps(counts))
    sys.exit(status)


def counted(original, name, counts, aim, strike):
    def call(*args, **kwargs):
        counts[name] += 1
        if (name, counts[name]) == aim:
            if name == "save":
                write_half(original, *args)
            if name in ("link", "replace"):     # after it; before it is after fsync and link
                original(*args, **kwargs)
            os.kill(os.getpid(), strike)
        return original(*args, **kwargs)
    return call


def write_half(save, state, file):
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    file.flush()


def run_on_a_disk_that_fills(argv, log, saves):
    """As `run`, but after some checkpoints no file may grow beyond half of one."""
    import resource
    original, done = runs.save_checkpoint, []

    def save(config, *args):
        if len(done) == saves:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        done.append(original(config, *args))

    runs.save_checkpoint = save
    run(argv, log)


# ---------------------------------------------------------------- in the test's process

@pytest.fixture(scope="module")
def fork():
    """start(function, ...) -> a process forked from a server that has imported torch and train, and
    computes with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill", "torch._dynamo", "matplotlib.pyplot"])
    patch = pytest.MonkeyPatch()
    # no pool of threads, which a fork would not copy
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv(
        "PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    )
    started = []

    def start(function, *args):
        started.append(context.Process(target=function, args=args))
        started[-1].start()
        return started[-1]

    # the server starts with the first, and takes these settings along
    start(os.getpid).join()
    patch.undo()
    yield start
    for process in started:
        process.kill()


def end(process):
    process.join(60)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def undisturbed(fork, photos, tmp_path_factory):
    """(folder with its own copy of the photos, seconds, calls of each step, the run's folder) of a
    run that nothing disturbs."""
    root = tmp_path_factory.mktemp("kill")
    shutil.copytree(photos, root / "data", ignore=shutil.ignore_patterns(".cache"))
    begin, log = time.monotonic(), root / "undisturbed.log"
    assert end(fork(run, command(root, "undisturbed"), log)) == 0, log.read_text()
    seconds, counts = time.monotonic() - begin, json.loads(Path(f"{log}.json").read_text())
    assert counts["save"] == 16 and min(counts.values()) > 0            # 8 steps, two files
    shutil.copytree(root / "data" / ".cache", root / "cache")
    return root, seconds, counts, root / "runs" / "undisturbed"


def command(root, name):
    return [*TINY, "--data-dir", str(root / "data"), "--out", str(root / "runs"), "--name", name]


def check_whole(root, folder):
    """Every file that bears its final name can be read."""
    steps = {
        name: runs.load_checkpoint(folder / name)["step"]
        for name in ("previous.pt", "last.pt")
        if (folder / name).exists()
    }
    assert steps.get("previous.pt", -1) <= steps.get("last.pt", -1)
    if (folder / "encoder.pt").exists():
        runs._verify(folder / "encoder.pt")
    if (folder / "config.json").exists():
        json.loads((folder / "config.json").read_text())
    if (folder / "metrics.csv").exists():
        assert all(
            row["step"] == 4 * row["epoch"] for row in runs.read_metrics(folder / "metrics.csv")
        )
    for key in (root / "data" / ".cache").glob("*.json"):
        assert json.loads(key.read_text()) == json.loads((root / "cache" / key.name).read_text())
        np.testing.assert_array_equal(
            np.load(key.with_suffix(".npy")), np.load(root / "cache" / key.with_suffix(".npy").name)
        )
    for array in (root / "data" / ".cache").glob("*.npy"):
        np.load(array)


def check_result(root, folder, reference):
    """Model, optimizer, metrics apart from the speed, and the files there are: those of the
    undisturbed run."""
    a, b = (runs.load_checkpoint(f / "last.pt") for f in (folder, reference))
    assert (
        all(same(a[k], b[k]) for k in ("step", "meters", "model", "optimizer")) and a["step"] == 8
    )
    assert same(*(torch.load(f / "encoder.pt", weights_only=True) for f in (folder, reference)))
    rows = [
        [
            {k: v for k, v in row.items() if k != "images_per_second"}
            for row in csv.DictReader(open(f / "metrics.csv", newline=""))
        ]
        for f in (folder, reference)
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    assert {p.name for p in folder.iterdir()} == {p.name for p in reference.iterdir()}
    assert {p.name for p in (root / "data" / ".cache").iterdir()} == {
        p.name for p in (root / "cache").iterdir()
    }


def test_killed_at_any_moment_a_run_resumes_to_the_same_result(fork, undisturbed):
    root, seconds, counts, reference = undisturbed
    rng, kills, ends = random.Random(0), [], 0
    # a cache, a run's last file, its last two
    corners = [("decode", 9), ("replace", counts["replace"]), ("save", counts["save"])]
    while len(kills) < KILLS:
        name = f"killed-{ends}"
        folder, log = root / "runs" / name, root / f"{name}.log"
        shutil.rmtree(root / "data" / ".cache")             # killed while it decodes, too
        for attempt in range(KILLS_A_RUN + 1):
            aim = delay = None
            if attempt < KILLS_A_RUN and len(kills) < KILLS:
                if attempt == 0 and corners:
                    aim = corners.pop()
                elif len(kills) % 2:
                    aim = rng.choice(list(STEPS))
                    # there is less to do each time
                    aim = aim, rng.randint(1, 1 + counts[aim] // (attempt + 1))
                else:
                    delay = rng.uniform(0, seconds / (attempt + 1))
            process = fork(run, command(root, name), log, aim or ("never", 0))
            if delay:
                process.join(delay)
                process.kill()
            status = end(process)
            if status == 0:
                break
            assert status == -signal.SIGKILL, f"{log.read_text()} after {kills}"
            kills.append(aim or f"{delay:.2f} s")
            check_whole(root, folder)
        assert status == 0, log.read_text()
        check_result(root, folder, reference)
        ends += 1
    print(f"{len(kills)} kills, {ends} runs ended, {seconds:.1f} s undisturbed: {kills}")


@pytest.mark.parametrize("saves", [0, 3])
def test_a_disk_that_fills_stops_the_run_in_one_line_and_it_resumes_to_the_same_result(
    saves, fork, undisturbed
):
    root, _, _, reference = undisturbed
    folder, log = root / "runs" / f"full-{saves}", root / f"full-{saves}.log"
    assert end(fork(run_on_a_disk_that_fills, command(root, folder.name), log, saves)) == 2
    errors = [line for line in log.read_text().splitlines() if "error" in line.lower()]
    kept = (
        f"{folder / 'last.pt'}, the checkpoint before, is kept"
        if saves
        else "there was no checkpoint before"
    )
    assert (
        len(errors) == 1
        and f"error: {folder}" in errors[0]
        and errors[0].endswith(
            f"step {saves + 1} could not be saved ({os.strerror(errno.EFBIG)}); {kept}: "
            "mend this, then --resume"
        )
    )
    assert saves == 0 or runs.load_checkpoint(folder / "last.pt")["step"] == saves
    assert not list(folder.glob("*.part"))
    assert end(fork(run, command(root, folder.name), log)) == 0, log.read_text()
    check_result(root, folder, reference)


def test_resumed_from_the_previous_checkpoint_it_ends_in_the_same_result(fork, undisturbed):
    """Its metrics go beyond that checkpoint: the epoch is not there twice."""
    root, _, _, reference = undisturbed
    folder, log = root / "runs" / "damaged", root / "damaged.log"
    assert end(fork(run, command(root, folder.name), log, ("batch", 5))) == -signal.SIGKILL
    # step 4, the end of an epoch
    os.truncate(folder / "last.pt", (folder / "last.pt").stat().st_size - 1000)
    assert len(runs.read_metrics(folder / "metrics.csv")) == 1
    assert end(fork(run, command(root, folder.name), log)) == 2
    offer = (
        f"{folder / 'last.pt'}: is damaged and was not loaded; "
        "the checkpoint before it is intact: mv "
    )
    assert offer in log.read_text() and "Traceback" not in log.read_text()
    os.replace(folder / "previous.pt", folder / "last.pt")
    assert runs.load_checkpoint(folder / "last.pt")["step"] == 3
    assert end(fork(run, command(root, folder.name), log)) == 0, log.read_text()
    check_result(root, folder, reference)


@pytest.mark.parametrize(
    "strike, aim, said",
    [
        (signal.SIGINT, ("decode", 5), "before training began"),
        (signal.SIGTERM, ("decode", 5), ""),
        (signal.SIGINT, ("batch", 5), "saved, continue with --resume"),
    ],
)
def test_an_interrupted_run_leaves_nothing_unfinished(strike, aim, said, fork, undisturbed):
    root, _, _, reference = undisturbed
    folder, log = root / "runs" / f"stopped-{aim[0]}-{strike}", root / "stopped.log"
    shutil.rmtree(root / "data" / ".cache")
    assert end(fork(run, command(root, folder.name), log, aim, strike)) == 128 + strike
    assert "Traceback" not in log.read_text() and not list(root.glob("**/*.part"))
    assert said in log.read_text()
    assert end(fork(run, command(root, folder.name), log)) == 0, log.read_text()
    check_result(root, folder, reference)
