"""The table: every probe of a mode, on features of the frozen model, beside a random twin; and
clear refusals."""
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import torch
from test_train import command

import config as settings
import datasets
import evaluate
import probes
import train
from build import build_model, build_views
from figures.runs import draw_transfer
from plumbing import runs
from plumbing.errors import BadInput
from plumbing.evaluate_flags import result_path
from plumbing.runs import load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def trained(photos, tmp_path):
    def run(mode, *flags):
        assert (
            train.main(command(mode, photos, tmp_path, "--name", mode, "--epochs", "1", *flags))
            == 0
        )
        return tmp_path / "runs" / mode
    return run


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("saccade", {"classify": 3, "knn": 3, "action": 1, "parameters": 1, "path": 6}),
        ("augment", {"classify": 3, "knn": 3, "action": 3, "parameters": 3}),
        (
            "rotation",
            {
                "classify": 3,
                "knn": 3,
                "action": 2,
                "parameters": 2,
                "path": 6,
                "invariance": 1,
                "retrieval": 3,
            },
        ),
    ],
)
def test_every_probe_of_a_mode_gives_its_rows(mode, expected, trained, capsys):
    run = trained(mode)
    lengths = ["1", "2"]
    assert (
        evaluate.main(
            [
                str(run / "last.pt"),
                "--views",
                *lengths,
                "--probe-epochs",
                "2",
                "--samplings",
                "1",
                "--figures",
            ]
        )
        == 0
    )
    result = json.loads((run / "probes.json").read_text())
    counts = {p: sum(r["probe"] == p for r in result["rows"]) for p in expected}
    assert counts == expected and len(result["rows"]) == sum(expected.values())
    printed = capsys.readouterr().out
    for r in result["rows"]:
        assert torch.tensor([r["value"], r["untrained"]]).isfinite().all() and r["epochs"] == (
            0 if r["probe"] in ("knn", "retrieval") else 2
        )
        assert r["from"] in printed and r["head"] in printed
    assert "val" in printed and result["n_train"] > 0 and result["step"] > 0


def test_evaluation_leaves_the_checkpoint_s_model_untouched(trained, monkeypatch):
    run = trained("saccade")
    seen = []
    original = evaluate.measure
    def measure(model, *rest):
        seen.append(model)
        return original(model, *rest)
    monkeypatch.setattr(evaluate, "measure", measure)
    assert evaluate.main([str(run / "last.pt"), "--probe-epochs", "1", "--samplings", "1"]) == 0
    saved = load_checkpoint(run / "last.pt")["model"]
    assert all(torch.equal(v, saved[k]) for k, v in seen[0].state_dict().items())


def test_untrained_twin_has_initial_weights_and_settled_statistics(make_config, photos):
    config = make_config(
        data_dir=str(photos), image_size=20, patch_size=8, width=2, action_dim=4, batch_size=8
    )
    views = build_views(config, "train", CPU)
    fresh = build_model(config, views.groups)
    twin = evaluate.settle_batchnorm(build_model(config, views.groups), views, 2)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), twin.parameters()))
    assert not torch.equal(fresh.encoder.bn1.running_mean, twin.encoder.bn1.running_mean)
    # the first layer sees what training will show it: its statistics are known
    with torch.no_grad():
        seen = fresh.encoder.conv1(
            views(torch.randint(len(views), (2000,)), 2).views[:, :2].flatten(0, 1)
        )
    torch.testing.assert_close(
        twin.encoder.bn1.running_mean, seen.mean((0, 2, 3)), atol=0.05, rtol=0.05
    )
    torch.testing.assert_close(
        twin.encoder.bn1.running_var, seen.var((0, 2, 3)), atol=0.05, rtol=0.05
    )


def test_heads_and_epochs_are_the_paper_s():
    epochs = {kind: epochs for kind, (_, epochs) in probes.HEADS.items()}
    assert epochs == {"linear classifier": 300, "mlp": 300, "linear": 50}
    heads = {}
    for mode, rules in evaluate.PROTOCOLS.items():
        assert rules.heads.keys() == settings.MODES[mode].groups.keys()
        heads |= rules.heads
    assert {part for part, kind in heads.items() if kind == "mlp"} == {"rotation", "crop", "jitter"}
    assert set(heads.values()) <= probes.HEADS.keys()


def test_every_mode_has_a_row_and_every_row_names_probes_that_exist():
    assert evaluate.PROTOCOLS.keys() == settings.MODES.keys()
    named = set()
    for rules in evaluate.PROTOCOLS.values():
        named |= {*rules.probes, *rules.on_request}
    assert named == evaluate.PROBES.keys()


def test_a_mode_without_a_row_is_refused():
    with pytest.raises(BadInput, match=r"^mode shift has no row in evaluate.PROTOCOLS; add one"):
        evaluate.protocol("shift")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--probe", "invariance"], "--probe invariance: does not apply to mode saccade"),
        (["--probe", "transfer"], "--probe transfer: stands alone and needs --dataset"),
        (
            [
                "--probe",
                "transfer",
                "--dataset",
                "folder",
                "--patch-size",
                "90",
                "--image-size",
                "40",
            ],
            "--patch-size 90 is larger",
        ),
        (["--image-size", "40"], "--image-size: only with --probe transfer"),
        (
            [
                "--probe",
                "transfer",
                "--dataset",
                "folder",
                "--figures",
                "--image-size",
                "40",
                "--patch-size",
                "8",
            ],
            "--figures: shows the run's own data",
        ),
        (["--json", "nowhere/x.json"], "nowhere/x.json: its folder does not exist"),
        (["--json", "/"], "/: is no plain file"),
        (["--limit", "-5"], "--limit -5: must be at least 0"),
        (["--views", "0"], "--views 0: M_val must be at least 1"),
        (["--samplings", "0"], "--samplings 0: must be at least 1"),
        (["--data-dir", "nowhere"], "nowhere: not found"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, words, trained, capsys):
    run = trained("saccade")
    capsys.readouterr()
    assert evaluate.main([str(run / "last.pt"), *flags]) == 2
    error = capsys.readouterr().err
    assert (
        words in error
        and len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    )
    assert not (run / "probes.json").exists()


def test_transfer_probes_another_data_set(trained, photos, tmp_path):
    from PIL import Image
    run = trained("saccade")
    for i in range(30):
        (tmp_path / "other" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (80 * (i % 3), i, 0)).save(
            tmp_path / "other" / f"class{i % 3}" / f"{i}.png"
        )
    flags = [
        "--probe",
        "transfer",
        "--dataset",
        "folder",
        "--data-dir",
        str(tmp_path / "other"),
        "--image-size",
        "24",
        "--patch-size",
        "10",
    ]
    assert (
        evaluate.main(
            [
                str(run / "last.pt"),
                *flags,
                "--views",
                "1",
                "3",
                "--probe-epochs",
                "2",
                "--samplings",
                "1",
            ]
        )
        == 0
    )
    result = json.loads((run / "probes-transfer-folder-epochs2.json").read_text())
    assert [r["probe"] for r in result["rows"]] == ["transfer"] * 2 and result["n_train"] + result[
        "n_val"
    ] == 30
    assert (result["dataset"], result["classes"]) == ("folder", 3)
    one, three = result["rows"]  # what draw_transfer reads
    assert (
        one["patch_size"] == three["patch_size"] == 10
        and one["gmac"] < three["gmac"] < 3 * one["gmac"]
    )
    assert f"M=3, {three['gmac']:.3g}e9 MAC" in three["from"]
    assert draw_transfer(
        [run / "probes-transfer-folder-epochs2.json"], tmp_path / "transfer.png"
    ).exists()


def test_multiply_adds_are_those_of_b6():
    """B.6: 1.25e9 for 4 patches of 84 px. (Its 2.35e9 for 8 patches of 32 px is what 4 patches
    cost; 8 take 4.56e9.)"""
    from types import SimpleNamespace

    from config import Config
    def cost(patch, M):
        config = Config(mode="saccade", image_size=224, patch_size=patch)
        views = lambda index, M: SimpleNamespace(
            views=torch.zeros(2, M + 1, 3, patch, patch), actions=torch.zeros(2, M, 2)
        )
        return probes.multiply_adds(build_model(config, {"position": slice(0, 2)}), views, M) / 1e9
    assert cost(84, 4) == pytest.approx(1.25, abs=0.01)
    assert cost(32, 8) == pytest.approx(4.56, abs=0.01) and cost(32, 4) == pytest.approx(
        2.29, abs=0.01
    )


def test_foreign_checkpoint_is_refused(tmp_path, capsys):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")
    assert evaluate.main([str(tmp_path / "x.pt")]) == 2
    assert "not a checkpoint of this project" in capsys.readouterr().err


def test_more_views_than_renders_is_refused(trained, capsys):
    run = trained("rotation")
    assert evaluate.main([str(run / "last.pt"), "--views", "4"]) == 2
    assert "--views 4" in capsys.readouterr().err


# the paper's lengths, 1 3 5, are too many as well
@pytest.mark.parametrize("lengths", [["--views", "1", "4"], []])
def test_more_views_than_renders_is_refused_before_anything_is_rendered(
    lengths, trained, tmp_path, monkeypatch, capsys
):
    run = trained("rotation")
    capsys.readouterr()
    monkeypatch.setattr(evaluate, "build_views", lambda *_: pytest.fail("data was prepared first"))
    assert (
        evaluate.main([str(run / "last.pt"), *lengths, "--data-dir", str(tmp_path / "elsewhere")])
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.startswith("error: --views ")
        and error.count("\n") == 1
        and "an object has 4" in error
    )
    assert not (tmp_path / "elsewhere").exists()


def saved_with(run, **config):
    """The run's checkpoint, as if it had been trained with these settings."""
    checkpoint = load_checkpoint(run / "last.pt")
    torch.save(checkpoint | dict(config=checkpoint["config"] | config), run / "last.pt")
    return str(run / "last.pt")


@pytest.mark.parametrize(
    "dataset, words",
    [
        ("stl10", "train_X.bin: not found"),
        ("cifar10", "no intact cifar10 there"),
        ("tiny-imagenet", "tiny-imagenet-200: not found"),
        ("3diebench", "train_images.npy: not found"),
    ],
)
def test_data_of_another_kind_is_refused_and_nothing_is_fetched(
    dataset, words, trained, photos, monkeypatch, capsys
):
    """--data-dir names a folder of photos, the run was trained on something else."""
    checkpoint = saved_with(trained("saccade"), dataset=dataset)
    monkeypatch.setattr(
        datasets, "_download", lambda *_, **__: pytest.fail("a download was started")
    )
    capsys.readouterr()
    assert evaluate.main([checkpoint, "--data-dir", str(photos)]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ")
        and error.count("\n") == 1
        and words in error
        and str(photos) in error
    )


def test_classes_of_the_data_are_said(trained, tmp_path, capsys):
    """A folder of other classes is no error (heads are trained on it), but a reader must see it."""
    from PIL import Image
    run = trained("saccade")
    for i in range(30):
        (tmp_path / "other" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (80 * (i % 3), i, 0)).save(
            tmp_path / "other" / f"class{i % 3}" / f"{i}.png"
        )
    flags = [
        "--data-dir",
        str(tmp_path / "other"),
        "--views",
        "1",
        "--samplings",
        "1",
        "--probe-epochs",
        "1",
    ]
    assert evaluate.main([str(run / "last.pt"), *flags]) == 0
    assert "27 training and 3 validation samples of 3 classes" in capsys.readouterr().out
    assert json.loads((run / "probes.json").read_text())["classes"] == 3


# ---------------------------------------------------------------- what is kept of an evaluation

def test_what_trains_a_network_is_computed_first_and_shown_in_its_place(monkeypatch):
    """It may refuse what it kept of another training; features are then not extracted in vain."""
    called = []

    def probe(name):
        def rows(model, train, val, setup):
            called.append((name, train))
            yield probes.row(name, "class", "z", "none", 0, "top-1 %", 1.0)
        return rows

    for name in ("linear", "finetune", "knn"):
        monkeypatch.setitem(evaluate.PROBES, name, probe(name))
    def extract(model, setup):
        called.append("extracted")
        return "train", "val"

    rules = dataclasses.replace(evaluate.PROTOCOLS["regions"], measure=extract)
    setup = probes.Setup({}, CPU, 0, M_train=1, probes=("linear", "finetune", "knn"))
    rows = evaluate.measure("model", setup, rules)
    assert [row["probe"] for row in rows] == ["linear", "finetune", "knn"]
    assert called == [("finetune", None), "extracted", ("linear", "train"), ("knn", "train")]


def test_what_was_kept_of_another_fine_tuning_is_refused_before_all_else(trained, capsys,
                                                                         monkeypatch):
    run = trained("regions")
    command = [str(run / "last.pt"), "--probe", "linear", "finetune", "--samplings", "1",
               "--limit", "8", "--probe-epochs"]
    assert evaluate.main([*command, "1"]) == 0
    kept = (run / "finetune-folder-limit8-epochs1.pt").read_bytes()
    other = run / "finetune-folder-limit8-epochs2.pt"
    other.write_bytes(kept)
    never = dataclasses.replace(evaluate.PROTOCOLS["regions"],
                                measure=lambda *_: pytest.fail("features were extracted"))
    monkeypatch.setitem(evaluate.PROTOCOLS, "regions", never)
    capsys.readouterr()
    assert evaluate.main([*command, "2"]) == 2
    assert f"{other.name}: is of a training on" in capsys.readouterr().err
    assert other.read_bytes() == kept
    assert (run / "probes-linear-finetune-limit8-epochs1.json").exists()
    assert not (run / "probes-linear-finetune-limit8-epochs2.json").exists()


@pytest.mark.parametrize("flags, name", [
    ([], "probes.json"),
    (["--limit", "100"], "probes-limit100.json"),
    (["--limit", "0", "--probe-epochs", "3", "--quick"], "probes.json"),
    (["--probe", "knn", "--quick"], "probes-knn-quick.json"),
    (["--probe", "knn"], "probes-knn.json"),
    (["--probe", "segment", "--dataset", "scenes", "--limit", "100"],
     "probes-segment-scenes-limit100.json"),
    (["--probe", "segment", "--dataset", "scenes", "--probe-epochs", "3", "--quick"],
     "probes-segment-scenes-epochs3-quick.json"),
    (["--limit", "100", "--json", "elsewhere/x.json"], "../elsewhere/x.json"),
])
def test_no_part_of_the_probes_or_of_the_data_replaces_the_whole(flags, name):
    of_run = result_path(evaluate.parse(["runs/last.pt", *flags]))
    of_weights = result_path(evaluate.parse(["--weights", "runs/v.it.pth", *flags]))
    assert of_run == Path(os.path.normpath(f"runs/{name}"))
    assert of_weights == (of_run if "--json" in flags else Path(f"runs/v.it-{name}"))


def test_an_evaluation_of_another_limit_leaves_all_of_the_first(trained, tmp_path):
    """Its numbers, and the pictures of a dense task; the report has those that belong to it."""
    run = trained("regions")
    command = [str(run / "last.pt"), "--probe", "segment-linear", "--dataset", "scenes",
               "--data-dir", str(tmp_path), "--quick", "--probe-epochs", "1", "--figures",
               "--limit"]
    shown = {}
    before = {}
    for flags in (["8"], ["12", "--no-untrained"]):
        assert evaluate.main([*command, *flags]) == 0
        assert all(path.read_bytes() == data for path, data in before.items())
        before = {path: path.read_bytes() for path in run.glob("*-limit*")}
        shown[flags[0]] = re.findall("<h2>(.*?)</h2>", (run / "report.html").read_text())
    eight = "segment-linear-scenes-limit8-epochs1-quick"
    twelve = "segment-linear-scenes-limit12-epochs1-quick"
    names = [f"probes-{eight}.json", f"{eight}.png", f"{eight}-untrained.png",
             f"probes-{twelve}.json", f"{twelve}.png"]
    assert sorted(path.name for path in before) == sorted(names)
    assert shown["8"] == ["Probes", "curves", eight, f"{eight}-untrained"]
    assert shown["12"] == ["Probes", "curves", twelve]


class Trap:
    def __reduce__(self):
        return print, ("sprung",)


@pytest.mark.parametrize(
    "damage, words",
    [
        (
            lambda path: torch.save(load_checkpoint(path) | dict(version=runs.VERSION + 1), path),
            f"checkpoint version {runs.VERSION + 1}, this code reads",
        ),
        (
            lambda path: torch.save(load_checkpoint(path) | dict(model=Trap()), path),
            "contains more than tensors",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:-5000]), "is damaged"),
        (
            lambda path: path.write_bytes((path.parent / "encoder.pt").read_bytes()),
            "not a checkpoint of this project",
        ),
        (lambda path: path.unlink(), "no checkpoint there"),
    ],
)
def test_unusable_checkpoint_is_one_line_and_status_2(damage, words, trained, capsys):
    run = trained("saccade")
    damage(run / "last.pt")
    capsys.readouterr()
    assert evaluate.main([str(run / "last.pt")]) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and captured.err.count("\n") == 1
        and words in captured.err
        and str(run) in captured.err
    )
    assert captured.out == "" and not (run / "probes.json").exists()


def test_all_heads_beat_noise_on_informative_features(make_config):
    """End to end of one row: features that contain the class and the action are read out, pure
    noise is not."""
    from types import SimpleNamespace

    from probes import Features, Setup
    def features(n, informative):
        y = torch.randint(0, 3, (n,))
        action = torch.randn(1, n, 1, 2)
        z = torch.randn(1, n, 2, 6)
        if informative:
            z[0, :, 0, :3] += 4 * torch.nn.functional.one_hot(y, 3)
            z[0, :, 1, 3:5] = z[0, :, 0, 3:5] + action[0, :, 0]
        return Features(
            z[:, :, 0], z, action, action, torch.randn(1, n, 2, 2), y, {1: z[:, :, 0]}, {}, {}
        )
    views = SimpleNamespace(groups={"position": slice(0, 2)}, classes=["a", "b", "c"])
    setup = Setup(views={"val": views}, device=CPU, seed=0, M_train=1, probe_epochs=600)
    for informative in (True, False):
        pair = features(900, informative), features(300, informative)
        top1 = next(probes.probe_classify(None, *pair, setup))["value"]
        score = next(probes.probe_action(None, *pair, setup))["value"]
        assert (top1 > 90 and score > 0.9) if informative else (top1 < 50 and score < 0.1)
