"""Two processes on the CPU do what one does: gradients, statistics, exact resume, signals,
failures, the command users type."""
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from same import same
from torch import nn

import config as settings
import train
from build import build_model, build_views
from images import PAIR_METHODS, Batch
from plumbing import distributed
from plumbing.device import seed_all
from plumbing.errors import BadInput
from plumbing.health import health
from plumbing.runs import load_checkpoint

# seconds until ranks that wait for each other fail a test instead of hanging it
PATIENCE = 400
ROOT = Path(__file__).resolve().parents[1]
SACCADE = "--dataset folder --mode saccade --image-size 20 --patch-size 8 --views 2".split()
TINY = "--width 2 --action-dim 4 --epochs 3 --batch-size 8 --warmup-epochs 1 --device cpu".split()


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def spawn(work, *args):
    """work(*args) in two processes that torchrun would have started."""
    port, = free_ports(1)
    ranks, started = (
        torch.multiprocessing.spawn(_as_rank, (port, work, args), nprocs=2, join=False),
        time.monotonic(),
    )
    while not ranks.join(timeout=5):
        if time.monotonic() - started > PATIENCE:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError("two ranks wait for each other")


def _as_rank(rank, port, work, args):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    work(*args)


# ---------------------------------------------------------------- gradients

REGIONS = dict(
    mode="regions",
    dataset="folder",
    encoder="vit-nano",
    image_size=32,
    patch_size=8,
    min_patches=2,
    predictor_depth=1,
)
SACCADES = dict(mode="saccade", dataset="folder", image_size=20, patch_size=8)
ROTATIONS = dict(mode="rotation", dataset="solids", image_size=16, limit=16, object_views=4)
CASES = {
    "saccade": dict(SACCADES, z_norm=True),
    "augment": dict(mode="augment", dataset="folder", image_size=20, stem="imagenet"),
    "rotation": dict(ROTATIONS, condition="rotation+color"),
    **{method: dict(ROTATIONS, method=method) for method in PAIR_METHODS},
    "conv-jepa": dict(SACCADES, method="conv-jepa"),
    "simclr transformer": dict(ROTATIONS, method="simclr", projector="transformer"),
    "byol transformer": dict(ROTATIONS, method="byol", projector="transformer"),
    **{method: dict(REGIONS, method=method) for method in settings.REGION_METHODS},
    "dseq-jepa grad-cam": dict(REGIONS, method="dseq-jepa", proxy="grad-cam", cls=False),
    "dseq-jepa flat": dict(REGIONS, method="dseq-jepa", order="flat"),
    # In parts; alone, in one.
    "dseq-jepa in parts": dict(REGIONS, method="dseq-jepa", accumulate=2),
    "i-jepa in parts": dict(REGIONS, method="i-jepa", accumulate=4),
}


def setup(case, photos, tmp_path):
    """A model without dropout and one batch of 8, the same at every call."""
    preset = settings.preset(case["dataset"], case["mode"], method=case.get("method"))
    values = preset | dict(
        width=4, action_dim=4, data_dir=str(tmp_path if "solids" in case["dataset"] else photos)
    )
    config = settings.check(settings.Config(**(values | case)))
    views = build_views(config, "pretrain", torch.device("cpu"))
    model = build_model(config, views.groups).train()
    seed_all(1)
    batch = views(torch.arange(8), min(2, config.views))._replace(progress=torch.tensor(0.5))
    if "dseq" in config.method:         # the first three, all rank 0's, have no step: neither has
                                        # one half of what rank 0 sees
        batch.actions[:3] = config.region_count
        batch.params[:3] = 0.9
    # no residual branch and no token is left at its initial zero
    for name, p in model.named_parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.update_target(0.0)
    if getattr(model, "vicreg", 0):
        model.vicreg = 0.1                              # at its own 0.001 the test would not see it
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model, batch, config.accumulate


def share(batch):
    """This rank's half of every part of a Batch."""
    b = len(batch.views) // distributed.world_size()
    return Batch(*(x[distributed.rank() * b:][:b] if x.dim() else x for x in batch))


def gradients(model, batch, K):
    """(loss, gradients, buffers) after one backward pass over the global batch, in K parts."""
    K = K if distributed.world_size() > 1 else 1
    model = distributed.globalise_batchnorm(model)
    parallel = distributed.data_parallel(model)
    out = train.backward(model, share(batch), parallel, K)
    loss = distributed.average(dict(loss=out.loss.detach()))["loss"]
    buffers = {k: v for k, v in model.named_buffers() if v.is_floating_point()}
    return (
        dict(loss=loss, **{k: p.grad for k, p in model.named_parameters() if p.grad is not None}),
        buffers,
        health(out),
    )


def write_gradients(photos, tmp_path):
    distributed.start()
    torch.save(
        {name: gradients(*setup(case, photos, tmp_path)) for name, case in CASES.items()},
        tmp_path / f"{distributed.rank()}.pt",
    )
    distributed.finish()


def test_two_processes_give_the_gradients_of_one(photos, tmp_path):
    """Also every BatchNorm buffer, of the target encoder's too, and the collapse measures; and all
    ranks have the same."""
    alone = {name: gradients(*setup(case, photos, tmp_path)) for name, case in CASES.items()}
    spawn(write_gradients, photos, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (expected, buffers, signs) in alone.items():
        # a bias before a BatchNorm has no gradient but rounding, which grows with the loss
        rounding = 1e-6 * max(1, expected["loss"].item())
        for found, found_buffers, found_health in (r[name] for r in ranks):
            assert expected.keys() == found.keys() and buffers.keys() == found_buffers.keys()
            for a, b in ((expected, found), (buffers, found_buffers)):
                for key in a:
                    scale = a[key].abs().max()
                    assert (a[key] - b[key]).abs().max() <= 2e-5 * scale + rounding, (
                        f"{name}: {key} differs by "
                        f"{(a[key] - b[key]).abs().max():.1e} of {scale:.1e}"
                    )
            assert found_health == pytest.approx(signs, rel=1e-3)
        for a, b in zip(ranks[0][name][:2], ranks[1][name][:2]):
            assert all(torch.equal(a[key], b[key]) for key in a), f"{name}: ranks differ"


def test_global_batchnorm_with_one_process_is_batchnorm():
    for x, kind in (
        (torch.randn(8, 3, 5, 5) + 100, nn.BatchNorm2d),
        (torch.randn(8, 3), nn.BatchNorm1d),
    ):
        plain = kind(3)
        ours = distributed.GlobalBatchNorm(3)
        for net in (plain, ours):
            net(x)
            net.weight.data.fill_(2), net.bias.data.fill_(3)
        torch.testing.assert_close(ours(x), plain(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.running_mean, plain.running_mean)
        torch.testing.assert_close(ours.running_var, plain.running_var)
        assert ours.num_batches_tracked == 2 and torch.equal(
            ours.eval()(x).isfinite().all(), torch.tensor(True)
        )
        assert list(ours.state_dict()) == list(plain.state_dict())


def test_batchnorms_are_replaced_and_their_tensors_stay(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.2)),
        nn.Flatten(),
        nn.BatchNorm1d(4, affine=False).eval(),
    )
    tensors = model.state_dict(keep_vars=True)
    names = [name for name, _ in model.named_parameters()]
    assert distributed.globalise_batchnorm(model) is model
    first, second = model[1][0], model[3]
    assert type(first) is type(second) is distributed.GlobalBatchNorm
    assert (first.eps, first.momentum, first.training, second.training) == (1e-3, 0.2, True, False)
    assert (
        list(model.state_dict()) == list(tensors)
        and [n for n, _ in model.named_parameters()] == names
    )
    assert all(tensor is tensors[name] for name, tensor in model.state_dict(keep_vars=True).items())
    alone = nn.BatchNorm1d(2)
    found = distributed.globalise_batchnorm(alone)
    assert type(found) is distributed.GlobalBatchNorm and found.weight is alone.weight


def test_alone_nothing_changes():
    x, values = torch.randn(3, 2), dict(a=torch.ones(()))
    assert distributed.gather(x) is x and distributed.average(values) is values
    assert distributed.highest(3, True) == (3, True) and distributed.everyone("x") == ["x"]
    model = nn.BatchNorm1d(2)
    assert (
        distributed.globalise_batchnorm(model) is model
        and distributed.data_parallel(model) is model
    )
    assert (
        distributed.on_main(max, 1, 2) == 2
        and distributed.in_turn(max, 1, 2) == 2
        and distributed.first_failure(2) == (True, 2)
    )
    with pytest.raises(BadInput, match="no"):
        distributed.in_turn(refuse, "no")


def refuse(why):
    raise BadInput(why)


# ---------------------------------------------------------------- runs

def rows_without_speed(run):
    return [
        re.sub(r",[^,]*(,[^,]*,[^,]*,[^,]*)$", r"\1", line)
        for line in (run / "metrics.csv").read_text().splitlines()
    ]


def assert_same_run(one, other):
    a, b = (load_checkpoint(run / "last.pt") for run in (one, other))
    assert (
        a["step"] == b["step"]
        and same(a["model"], b["model"])
        and same(a["optimizer"], b["optimizer"])
        and same(a["meters"], b["meters"])
    )
    assert rows_without_speed(one) == rows_without_speed(other)


def several_runs(flags, folder, ports):
    """One after another, to import PyTorch once. A signal reaches the two ranks one step apart:
    neither may stop alone."""
    ports, rank, original, steps = (
        iter(ports),
        int(os.environ["RANK"]),
        train.next_batch,
        [],
    )
    sys.stderr = open(folder / f"{rank}.err", "w", buffering=1)

    def launch(*more):
        os.environ["MASTER_PORT"] = str(next(ports))
        status = train.main([*flags, *more])
        # main leaves that to the end of the process where it fails
        distributed.finish()
        return status

    def interrupted(views, config, step, epoch_steps):
        steps.append(step)
        if len(steps) == (6, 5)[rank]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(views, config, step, epoch_steps)

    def poisoned(views, config, step, epoch_steps):
        batch = original(views, config, step, epoch_steps)
        return batch._replace(views=batch.views * float("nan")) if (step, rank) == (5, 1) else batch

    assert launch("--name", "straight") == 0
    train.next_batch = interrupted
    assert launch("--name", "resumed") == 128 + signal.SIGTERM and steps == [0, 1, 2, 3, 4]
    train.next_batch = original
    assert launch("--name", "resumed", "--resume") == 0
    assert launch("--name", "uneven", "--batch-size", "7") == 2
    train.next_batch = poisoned
    assert launch("--name", "nan") == 2


def test_runs_of_two_processes(photos, tmp_path):
    """Exact resume after a signal; a checkpoint for any number of processes; bad input and NaN are
    one line of all ranks."""
    flags = [*SACCADE, *TINY, "--data-dir", str(photos), "--out", str(tmp_path)]
    spawn(several_runs, flags, tmp_path, free_ports(5))
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    errors = [
        line
        for rank in range(2)
        for line in (tmp_path / f"{rank}.err").read_text().splitlines()
        if line.startswith("error")
    ]
    assert (
        len(errors) == 2
        and any("--batch-size 7: cannot be split evenly over 2 processes" in e for e in errors)
        and any("not finite at step 5" in e for e in errors)
    )
    assert not (tmp_path / "uneven").exists() and not (tmp_path / "nan" / "last.pt").exists()
    checkpoint = load_checkpoint(tmp_path / "resumed" / "last.pt")
    assert not any(k.startswith("module.") or "_orig_mod" in k for k in checkpoint["model"])
    assert train.main([*flags, "--name", "alone", "--epochs", "1"]) == 0
    assert (
        load_checkpoint(tmp_path / "alone" / "last.pt")["model"].keys()
        == checkpoint["model"].keys()
    )
    # what two saved, one loads
    assert train.main([*flags, "--name", "resumed", "--resume"]) == 0


def shares(config):
    """What every rank's first batches are made of, with `views` that answer with their index and a
    random number."""
    class Views:
        device = torch.device("cpu")

        def __len__(self):
            return 24

        def __call__(self, index, M):
            return Batch(index, torch.rand(()), None, None)

        def prefetch(self, index, M):
            # reading ahead may draw, as mode rotation does; the step must not notice
            torch.rand(3)
    return [[train.next_batch(Views(), config, step, 3)[:2] for step in range(6)]]


def test_ranks_share_every_batch_and_draw_differently(make_config, monkeypatch):
    config = make_config(batch_size=8)
    whole = shares(config)[0]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        halves += shares(config)
    for (index, random), (a, first), (b, second) in zip(whole, *halves):
        # rank 0 of many draws as the only one does
        assert torch.equal(index, torch.cat([a, b])) and first == random != second


@pytest.fixture
def torchrun():
    """Starts a torchrun of two processes; none outlives the test."""
    jobs = []

    def start(*line, **kwargs):
        environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        jobs.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    "2",
                    *map(str, line),
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                **kwargs,
            )
        )
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            job.terminate()                             # it ends its processes, by force after 30 s
            job.wait()


def test_torchrun_stops_at_a_signal_and_one_process_evaluates(photos, tmp_path, torchrun):
    run = tmp_path / "runs" / "r"
    flags = [
        *SACCADE,
        *TINY,
        "--data-dir",
        str(photos),
        "--out",
        str(run.parent),
        "--name",
        "r",
        "--probe-every",
        "1",
    ]
    job = torchrun(ROOT / "train.py", *flags, "--epochs", "100000", cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (run / "metrics.csv").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    assert out.count("stopped by SIGTERM after step") == 1, err
    assert {p.name for p in run.iterdir()} >= {
        "config.json",
        "metrics.csv",
        "last.pt",
        "encoder.pt",
    }
    step = load_checkpoint(run / "last.pt")["step"]
    assert step >= 4 and f"after step {step} of" in out
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "evaluate.py"),
            str(run / "last.pt"),
            "--probe",
            "knn",
            "--samplings",
            "1",
            "--views",
            "2",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and json.loads((run / "probes-knn.json").read_text()), done.stderr


FAILS_ONCE = """
import os, sys
import train
from plumbing import loop
from plumbing.errors import BadInput

original = train.next_batch


def failing(views, config, step, epoch_steps):
    if step == 5 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise BadInput("rank 1 cannot go on")
    return original(views, config, step, epoch_steps)


train.next_batch, loop.SAVE_SECONDS = failing, -1
sys.exit(train.main())
"""


def test_a_failing_rank_ends_all_with_one_line_and_max_restarts_recovers(
    photos, tmp_path, torchrun
):
    script = tmp_path / "fails_once.py"
    script.write_text(FAILS_ONCE)
    flags = [
        *SACCADE,
        *TINY,
        "--data-dir",
        str(photos),
        "--out",
        str(tmp_path / "runs"),
        "--name",
        "r",
        "--resume",
    ]
    job = torchrun("--max-restarts", "1", script, *flags)
    out, err = job.communicate(timeout=120)
    assert (
        job.returncode == 0 and load_checkpoint(tmp_path / "runs" / "r" / "last.pt")["step"] == 12
    ), err
    assert (
        err.count("error: rank 1 cannot go on") == 1
        and "exitcode: 2" in err
        and "Connection closed" not in err
    ), err


FAILS_WITH_A_BUSY_THREAD = """
import atexit
import os
import sys
import time

if os.environ["RANK"] == "0":
    # Registered first, so called last: no Python runs between it and the teardown.
    atexit.register(sum, range(200_000_000))            # has the interpreter's lock for seconds

import torch
import torch.distributed as dist
from plumbing.errors import BadInput
from plumbing.loop import launch


def work(_):
    if dist.get_rank() == 1:
        time.sleep(0.5)
        os._exit(0)                                     # whereupon rank 0's thread frees its tensor
    dist.all_reduce(torch.ones(1), async_op=True)
    raise BadInput("rank 0 cannot go on")


sys.exit(launch(work, lambda argv: None))
"""


def test_a_failing_rank_keeps_its_exit_status_while_gloo_frees_a_tensor(tmp_path, torchrun):
    """Python's teardown would abort it."""
    script = tmp_path / "fails.py"
    script.write_text(FAILS_WITH_A_BUSY_THREAD)
    job = torchrun(script)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 1 and err.count("error: rank 0 cannot go on") == 1, err
    assert "failed (exitcode: 2) local_rank: 0" in err and "terminate called" not in err, err


KILLED_ONCE = FAILS_ONCE.replace('raise BadInput("rank 1 cannot go on")', "os.kill(os.getpid(), 9)")


def test_a_killed_rank_is_one_line_of_ours_and_max_restarts_recovers(photos, tmp_path, torchrun):
    """The lock on the run's folder went with the processes that had it."""
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    flags = [*SACCADE, *TINY, "--data-dir", str(photos), "--out", str(tmp_path / "runs")]
    job = torchrun("--max-restarts", "1", script, *flags, "--name", "r", "--resume")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert load_checkpoint(tmp_path / "runs" / "r" / "last.pt")["step"] == 12
    # torchrun's SIGTERM may come before the survivor has noticed
    assert err.count("error: ") == err.count("error: another process of this run ended") <= 1, err
    assert "Traceback" not in err, err
