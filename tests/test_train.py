"""Schedules at their corners, exact resume, signals, and the command users type."""
import contextlib
import csv
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from same import same

import train
from build import build_model
from images import Batch
from jepa import Output
from plumbing import loop
from plumbing.device import under_autocast
from plumbing.loop import epoch_order, micro_batches
from plumbing.runs import load_checkpoint
from train import build_optimizer, lr_at, tau_at, weight_decay_at

ROOT = Path(__file__).resolve().parents[1]
TINY = "--epochs 3 --batch-size 8 --warmup-epochs 1 --device cpu".split()
SMALL = "--width 2 --action-dim 4".split()
MODES = {
    "saccade": "--dataset folder --mode saccade --image-size 20 --patch-size 8 --views 2".split()
    + SMALL,
    "augment": "--dataset folder --mode augment --image-size 20 --views 2".split() + SMALL,
    "rotation": "--dataset solids --mode rotation --image-size 16 --limit 16 "
    "--object-views 4 --views 2".split()
    + SMALL,
    "regions": "--dataset folder --mode regions --encoder vit-nano --image-size 32 "
    "--patch-size 8 --min-patches 2".split(),
}


def command(mode, photos, tmp_path, *more):
    data = photos if "folder" in MODES[mode] else tmp_path / "data"
    return [*MODES[mode], *TINY, "--data-dir", str(data), "--out", str(tmp_path / "runs"), *more]


def test_learning_rate_at_its_corners():
    at = lambda step: lr_at(step, steps=100, warmup=20, start=1e-5, peak=4e-4, end=1e-5)
    assert at(0) == 1e-5 and at(20) == 4e-4 and at(99) == pytest.approx(1e-5)
    assert at(10) == pytest.approx((1e-5 + 4e-4) / 2)
    assert at(20 + 79 // 2) == pytest.approx(
        1e-5 + 3.9e-4 * 0.5 * (1 + math.cos(math.pi * 39 / 79))
    )
    rates = [at(s) for s in range(100)]
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_learning_rate_without_warmup_or_with_nothing_else():
    assert lr_at(0, steps=10, warmup=0, start=0.1, peak=1.0, end=0.1) == 1.0
    assert all(
        0 < lr_at(s, steps=5, warmup=20, start=0.1, peak=1.0, end=0.1) <= 1.0 for s in range(5)
    )
    assert lr_at(0, steps=1, warmup=0, start=0.1, peak=1.0, end=0.1) == 1.0


def test_warmup_may_start_elsewhere_than_the_end():
    """I-JEPA's: 2e-4 -> 1e-3 -> 1e-6."""
    at = lambda step: lr_at(step, steps=100, warmup=10, start=2e-4, peak=1e-3, end=1e-6)
    assert (
        at(0) == 2e-4
        and at(5) == pytest.approx(6e-4)
        and at(10) == pytest.approx(1e-3)
        and at(99) == pytest.approx(1e-6)
    )


def test_momentum_at_its_corners():
    assert tau_at(0, base=0.996) == pytest.approx(0.996) and tau_at(1, base=0.996) == 1
    assert (
        tau_at(0.5, base=0.9)
        == pytest.approx(0.95)
        == pytest.approx(tau_at(0.5, base=0.9, shape="linear"))
    )
    assert tau_at(0.25, base=0.9, shape="linear") == pytest.approx(0.925)
    assert tau_at(0.25, base=0.9) == pytest.approx(1 - 0.1 * 0.5 * (1 + math.cos(math.pi / 4)))
    taus = [tau_at(s / 49, base=0.9) for s in range(50)]
    assert taus == sorted(taus)


def test_weight_decay_at_its_corners():
    assert (
        weight_decay_at(0, start=0.04, end=0.4) == pytest.approx(0.04)
        and weight_decay_at(1, start=0.04, end=0.4) == 0.4
    )
    assert weight_decay_at(0.5, start=0.04, end=0.4) == pytest.approx(0.22)
    assert weight_decay_at(0.7, start=1e-3, end=-1) == 1e-3


def test_biases_norms_and_agg_are_not_decayed(make_config):
    model = build_model(make_config(width=2, action_dim=4), {"position": slice(0, 2)})
    decayed, free = build_optimizer(model, make_config(), torch.device("cpu")).param_groups
    assert decayed["weight_decay"] == 1e-3 and free["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in free["params"]} <= {
        "weight",
        "bias",
        "agg",
        "in_proj_bias",
    }
    assert any(names[id(p)] == "aggregator.agg" for p in free["params"])
    assert not any(
        "bn" in names[id(p)] or "norm" in names[id(p)] or "bias" in names[id(p)]
        for p in decayed["params"]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(free["params"]) == len(trained)


# ---------------------------------------------------------------- a batch in parts

def region_model_and_batch(make_config, size=8, **changes):
    """A model, and a batch whose first five images have a single region: no step."""
    config = make_config("folder", "regions", encoder="vit-nano", image_size=32, patch_size=8,
                         min_patches=2, predictor_depth=1, **changes)
    model = build_model(config, {}).train()
    blocks = torch.randint(1, config.region_count + 1, (size, 1, 16))
    blocks[:5] = config.region_count
    if config.method == "i-jepa":
        blocks = torch.stack([torch.arange(16) // 8 == part for part in (0, 1, 1, 1, 1)])
        blocks = blocks.long().expand(size, 5, 16)
    labels = torch.zeros(size, dtype=torch.int64)
    images = torch.randn(size, 1, 3, 32, 32)
    return model, Batch(images, blocks, torch.full((size, 1), 0.9), labels, torch.tensor(0.5))


def gradients_of(model, batch, K):
    model.zero_grad()
    out = train.backward(model, batch, model, K)
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return out, gradients


@pytest.mark.parametrize("changes", [
    dict(method="dseq-jepa"),
    dict(method="dseq-jepa", order="flat"),
    dict(method="dseq-jepa", proxy="grad-cam", cls=False),
    dict(method="i-jepa"),
])
def test_gradients_of_parts_add_up_to_those_of_the_batch(changes, make_config):
    """Though parts differ in how many of their images have a step, and some have none."""
    model, batch = region_model_and_batch(make_config, **changes)
    whole, expected = gradients_of(model, batch, 1)
    for K in (2, 4, 8):
        out, found = gradients_of(model, batch, K)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            rounding = 1e-5 * gradient.abs().max().item()
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=rounding + 1e-8)
        torch.testing.assert_close(out.loss, whole.loss.detach())
        torch.testing.assert_close(out.weight, whole.weight)
        torch.testing.assert_close(out.z, whole.z, atol=1e-5, rtol=1e-5)
        assert out.logs.keys() == whole.logs.keys()
        for name, value in whole.logs.items():
            torch.testing.assert_close(out.logs[name], value)


def test_the_mean_of_the_parts_means_would_be_another_loss(make_config):
    """What the test above would not see if all images had a step."""
    model, batch = region_model_and_batch(make_config)
    losses = [model(part).loss for part in micro_batches(batch, 2)]
    assert losses[0] == 0 and abs(sum(losses) / 2 - model(batch).loss) > 0.1 * model(batch).loss


def test_a_loss_of_the_whole_batch_has_no_parts(make_config):
    """Refused by its flag; here it is seen that it could not be done by mistake either."""
    model, batch = region_model_and_batch(make_config, method="dseq-c-jepa")
    assert model(batch).weight is None
    with pytest.raises(TypeError):
        train.backward(model, batch, model, 2)


def test_a_batch_without_any_step_gives_zeros_in_parts_too(make_config):
    model, batch = region_model_and_batch(make_config, size=4)
    out, found = gradients_of(model, batch, 2)
    assert out.loss == 0 and all((gradient == 0).all() for gradient in found.values())


def test_all_parts_but_the_last_are_kept_from_other_processes():
    """DDP's `no_sync`, around forward and backward pass, through the function that trains."""
    class Parallel(torch.nn.Linear):
        together = True
        seen = ()

        @contextlib.contextmanager
        def no_sync(self):
            self.together = False
            yield
            self.together = True

        def forward(self, batch):
            loss = super().forward(batch.views).mean()
            loss.register_hook(lambda _: self.note("backward"))
            self.note("forward")
            return Output(loss, batch.views, batch.views, {}, torch.tensor(1.0))

        def note(self, what):
            self.seen += ((what, self.together),)

    model = Parallel(2, 2)
    batch = Batch(*(torch.ones(6, 2) for _ in range(4)), torch.tensor(0.5))
    forward = under_autocast(model, torch.device("cpu"), enabled=False)
    train.backward(model, batch, forward, 3)
    alone = (("forward", False), ("backward", False))
    assert model.seen == (*alone, *alone, ("forward", True), ("backward", True))


def test_a_run_in_parts_is_the_run(photos, tmp_path, capsys):
    """The same views; metrics and weights to rounding; and another K may resume it."""
    rows = {}
    for K in ("1", "4"):
        assert train.main(command("regions", photos, tmp_path, "--name", K, "--accumulate", K)) == 0
        rows[K] = rows_without_speed(tmp_path / "runs" / K)
    assert [row.keys() for row in rows["1"]] == [row.keys() for row in rows["4"]]
    for one, four in zip(rows["1"], rows["4"]):
        for name, value in one.items():
            assert float(four[name]) == pytest.approx(float(value), rel=1e-3, nan_ok=True), name
    one, four = (load_checkpoint(tmp_path / "runs" / K / "last.pt")["model"] for K in ("1", "4"))
    for name, weights in one.items():
        # AdamW divides by the size of a gradient: of one that is all rounding, the step is not
        assert (weights - four[name]).abs().mean() < 1e-4
    argv = command("regions", photos, tmp_path, "--name", "4", "--accumulate", "2", "--resume")
    assert train.main(argv) == 0
    assert train.main(command("regions", photos, tmp_path, "--accumulate", "3")) == 2
    assert "--accumulate 3: does not divide the 8 samples" in capsys.readouterr().err


def test_every_sample_once_an_epoch_in_an_order_of_seed_and_epoch():
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(o.tolist()) == list(range(50)) for o in orders)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    epoch_order.cache_clear()
    assert torch.equal(epoch_order(50, 0, 0), orders[0])


def rows_without_speed(run):
    with open(run / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k != "images_per_second"}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("mode", MODES)
# in the middle and, with 4 or 2 steps an epoch, at the end of an epoch
@pytest.mark.parametrize("stop_after", [4, 6])
def test_resumed_run_is_bit_identical(mode, stop_after, photos, tmp_path, monkeypatch, capsys):
    stop_after = min(stop_after, 4) if mode == "rotation" else stop_after
    assert train.main(command(mode, photos, tmp_path, "--name", "straight")) == 0
    steps = []
    original = train.next_batch

    def interrupted(views, config, step, epoch_steps):
        steps.append(step)
        if len(steps) == stop_after:
            # the step at hand is finished, saved, and the run leaves
            os.kill(os.getpid(), signal.SIGTERM)
        return original(views, config, step, epoch_steps)

    monkeypatch.setattr(train, "next_batch", interrupted)
    assert train.main(command(mode, photos, tmp_path, "--name", "resumed")) == 128 + signal.SIGTERM
    assert f"after step {stop_after}" in capsys.readouterr().out
    monkeypatch.setattr(train, "next_batch", original)
    assert train.main(command(mode, photos, tmp_path, "--name", "resumed", "--resume")) == 0
    straight, resumed = (tmp_path / "runs" / name for name in ("straight", "resumed"))
    a, b = (load_checkpoint(run / "last.pt") for run in (straight, resumed))
    assert (
        a["step"] == b["step"]
        and same(a["model"], b["model"])
        and same(a["optimizer"], b["optimizer"])
    )
    assert rows_without_speed(straight) == rows_without_speed(resumed)


def test_resuming_on_other_images_says_so(photos, tmp_path, capsys):
    """As many photos under the same names, one of them darker; and the same ones moved."""
    def resumed(folder):
        argv = command("saccade", folder, tmp_path, "--name", "run", "--resume")
        assert train.main(argv) == 0
        return capsys.readouterr().out

    assert train.main(command("saccade", photos, tmp_path, "--name", "run")) == 0
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert "does not hold the images" not in resumed(moved)
    for file in sorted(moved.rglob("*.png")):
        with Image.open(file) as image:
            darker = image.point(lambda value: value // 2)
        darker.save(file)
    assert "does not hold the images" in resumed(moved)


def test_a_run_whose_model_learned_otherwise_does_not_go_on(photos, tmp_path, capsys):
    """As one of mode regions from before [CLS] left the predictor: the same settings, weights that
    fit, and no `revision`."""
    assert train.main(command("regions", photos, tmp_path, "--name", "old")) == 0
    folder = tmp_path / "runs" / "old"
    checkpoint = load_checkpoint(folder / "last.pt")
    assert checkpoint.pop("revision") == 2
    torch.save(checkpoint | dict(step=8), folder / "last.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert train.main(command("regions", photos, tmp_path, "--name", "old", "--resume")) == 2
    error = capsys.readouterr().err
    assert "was begun by code whose RegionJEPA learns otherwise (revision 1, here 2)" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # A model that never changed has no number, nor had its checkpoints.
    assert train.main(command("saccade", photos, tmp_path, "--name", "same")) == 0
    folder = tmp_path / "runs" / "same"
    checkpoint = load_checkpoint(folder / "last.pt")
    del checkpoint["revision"]
    torch.save(checkpoint | dict(step=8), folder / "last.pt")
    assert train.main(command("saccade", photos, tmp_path, "--name", "same", "--resume")) == 0


def test_other_columns_are_refused_after_a_step_not_after_an_epoch(
    photos, tmp_path, monkeypatch, capsys
):
    argv = command("saccade", photos, tmp_path, "--name", "run")
    assert train.main(argv) == 0
    folder = tmp_path / "runs" / "run"
    torch.save(load_checkpoint(folder / "last.pt") | dict(step=4), folder / "last.pt")
    metrics = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(metrics.replace("z_std", "z_deviation"))
    steps = []
    original = train.next_batch
    monkeypatch.setattr(train, "next_batch", lambda views, config, step, epoch_steps: (
        steps.append(step), original(views, config, step, epoch_steps))[1])
    assert train.main([*argv, "--resume"]) == 2 and steps == [4]
    words = "other columns than this code writes (z_deviation, z_std); move the file away"
    assert words in capsys.readouterr().err


def test_another_seed_is_another_run(photos, tmp_path):
    for seed in ("0", "1"):
        assert (
            train.main(
                command(
                    "saccade",
                    photos,
                    tmp_path,
                    "--name",
                    seed,
                    "--seed",
                    seed,
                    "--epochs",
                    "1",
                    "--warmup-epochs",
                    "0",
                )
            )
            == 0
        )
    a, b = (load_checkpoint(tmp_path / "runs" / seed / "last.pt")["model"] for seed in ("0", "1"))
    assert not same(a, b)


@pytest.mark.parametrize(
    "mode, conditions",
    [
        ("saccade", ["none"]),
        ("augment", ["crop", "jitter", "blur", "none"]),
        ("rotation", ["color", "rotation+color", "none"]),
    ],
)
def test_every_condition_trains(mode, conditions, photos, tmp_path):
    for condition in conditions:
        assert (
            train.main(command(mode, photos, tmp_path, "--condition", condition, "--epochs", "1"))
            == 0
        )


@pytest.mark.parametrize(
    "flags",
    [
        ["--views", "1"],
        ["--action-in", "predictor"],
        ["--action-embed", "raw"],
        ["--action-embed", "noise"],
        ["--no-ior"],
        ["--saliency", "uniform"],
        ["--z-norm"],
        ["--stem", "imagenet"],
    ],
)
def test_ablations_train(flags, photos, tmp_path):
    assert train.main(command("saccade", photos, tmp_path, *flags, "--epochs", "1")) == 0


def test_nan_stops_the_run_names_the_step_and_keeps_the_checkpoint(
    photos, tmp_path, monkeypatch, capsys
):
    original = train.next_batch

    def poisoned(views, config, step, epoch_steps):
        batch = original(views, config, step, epoch_steps)
        return batch._replace(views=batch.views * float("nan")) if step == 5 else batch

    monkeypatch.setattr(train, "next_batch", poisoned)
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1)          # save after every step
    assert train.main(command("saccade", photos, tmp_path, "--name", "r")) == 2
    message = capsys.readouterr().err
    lr = lr_at(5, steps=12, warmup=4, start=1e-5, peak=4e-4, end=1e-5)
    assert (
        f"not finite at step 5 (learning rate {lr:.2g}); "
        f"{tmp_path / 'runs' / 'r' / 'last.pt'}, from before it, is kept"
        in message
    )
    checkpoint = load_checkpoint(tmp_path / "runs" / "r" / "last.pt")
    assert checkpoint["step"] == 5 and all(v.isfinite().all() for v in checkpoint["model"].values())


@pytest.mark.parametrize("where", [torch.nn.Module, torch], ids=["model", "views"])
def test_compile_failure_is_one_line_and_the_run_goes_on(
    where, photos, tmp_path, monkeypatch, capsys
):
    def broken(*args):
        raise RuntimeError("no compiler\nand more")

    # torch.compile itself succeeds; calling what it returns fails
    compiled = (lambda f: broken) if where is torch else broken
    monkeypatch.setattr(where, "compile", compiled)
    if where is torch:
        monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    assert train.main(command("saccade", photos, tmp_path, "--compile", "--epochs", "1")) == 0
    assert (
        capsys.readouterr().out.count(
            "torch.compile failed (RuntimeError: no compiler), running eager"
        )
        == 1
    )


@pytest.mark.parametrize("mode", ["saccade", "regions"])
def test_compiled_runs_train(mode, photos, tmp_path, monkeypatch, capsys):
    """Everything that --compile does but code generation, which takes minutes on a CPU."""
    monkeypatch.setattr(
        loop, "compile_all", functools.partial(loop.compile_all, backend="aot_eager")
    )
    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile(self, backend="aot_eager")
    )
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    around_probes, online = [], train.online
    monkeypatch.setattr(
        train,
        "online",
        lambda *args, **kwargs: [
            around_probes.append(graphs["unique_graphs"]),
            online(*args, **kwargs),
            around_probes.append(graphs["unique_graphs"]),
        ][1],
    )
    for name, flag in (("eager", "--no-compile"), ("compiled", "--compile")):
        assert (
            train.main(
                command(
                    mode,
                    photos,
                    tmp_path,
                    "--name",
                    name,
                    flag,
                    "--epochs",
                    "1",
                    "--warmup-epochs",
                    "0",
                    "--lr",
                    "1e-6",
                    "--probe-every",
                    "1",
                )
            )
            == 0
        )
    assert "failed" not in capsys.readouterr().out and graphs["unique_graphs"] > 0
    # probes compile nothing
    assert around_probes[0] == around_probes[1] < around_probes[2] == around_probes[3]
    eager, compiled = (
        float(rows_without_speed(tmp_path / "runs" / name)[0]["loss"])
        for name in ("eager", "compiled")
    )
    assert compiled == pytest.approx(eager, abs=1e-3)
    assert not any(
        "_orig_mod" in k
        for k in load_checkpoint(tmp_path / "runs" / "compiled" / "last.pt")["model"]
    )


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "1000"], "--batch-size 1000: more than the 36 samples there are"),
    (["--data-dir", "nowhere"], "nowhere: not found"),
    (["--saliency", "somewhere"], "--saliency somewhere: expected signature, uniform, deepgaze"),
    (["--device", "tpu"], "--device tpu: not available here"),
    (["--action-dim", "3"], "--action-dim 3"),
])
def test_bad_input_is_one_line_status_2_and_no_run_folder(flags, words, photos, tmp_path, capsys):
    assert train.main(command("saccade", photos, tmp_path, *flags)) == 2
    error = capsys.readouterr().err
    assert (
        words in error
        and len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    )
    assert not (tmp_path / "runs").exists()


def test_the_commands_users_type(photos, tmp_path):
    """python train.py ... && python evaluate.py ..., as separate processes."""
    run = tmp_path / "runs" / "r"
    flags = command("saccade", photos, tmp_path, "--name", "r")
    for line in (
        [str(ROOT / "train.py"), *flags],
        [str(ROOT / "evaluate.py"), str(run / "last.pt"), "--probe-epochs", "2", "--figures"],
    ):
        done = subprocess.run([sys.executable, *line], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "untrained" in done.stdout and "z_agg M=4" in done.stdout
    expected = {
        "config.json",
        "metrics.csv",
        "curves.png",
        "last.pt",
        "encoder.pt",
        "probes.json",
        "views.png",
    }
    assert expected <= {p.name for p in run.iterdir()}
    again = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True
    )
    assert (
        again.returncode == 2
        and again.stderr.startswith("error: ")
        and "exists already" in again.stderr
    )


def test_collapse_is_said_once_and_health_is_not(photos, tmp_path, monkeypatch, capsys):
    """An encoder that answers the same to everything triggers the warning; an ordinary run does
    not."""
    assert (
        train.main(command("saccade", photos, tmp_path, "--name", "healthy", "--epochs", "2")) == 0
    )
    assert "collapsed" not in "".join(capsys.readouterr())
    forward = train.build_model

    def constant(config, groups):
        model = forward(config, groups)
        model.encoder.register_forward_hook(lambda module, inputs, z: z * 0 + 1)
        return model

    monkeypatch.setattr(train, "build_model", constant)
    assert (
        train.main(
            command(
                "saccade",
                photos,
                tmp_path,
                "--name",
                "collapsed",
                "--epochs",
                "1",
                "--warmup-epochs",
                "0",
            )
        )
        == 0
    )
    assert "".join(capsys.readouterr()).count("warning: z has collapsed at epoch 1") == 1


def test_online_probes_fill_their_columns_and_leave_training_alone(photos, tmp_path):
    for name, flags in (("plain", []), ("probed", ["--probe-every", "2"])):
        assert train.main(command("saccade", photos, tmp_path, "--name", name, *flags)) == 0
    plain, probed = (tmp_path / "runs" / name for name in ("plain", "probed"))
    assert same(
        load_checkpoint(plain / "last.pt")["model"], load_checkpoint(probed / "last.pt")["model"]
    )
    knn = [float(row["knn_z"]) for row in rows_without_speed(probed)]
    assert [math.isnan(v) for v in knn] == [True, False, True] and 0 <= knn[1] <= 100
    assert all(math.isnan(float(row["action_r2"])) for row in rows_without_speed(plain))
