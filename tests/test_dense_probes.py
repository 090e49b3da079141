"""Dense probes from the command line: what goes together, and a small run from end to end."""
import json
from types import SimpleNamespace

import pytest
import torch

import config as settings
import evaluate
import train
from dense import probes as dense
from plumbing import distributed
from plumbing.errors import BadInput
from plumbing.runs import load_checkpoint

FLAGS = ("--dataset folder --mode regions --encoder vit-nano --image-size 32 --patch-size 8 "
         "--min-patches 2 --epochs 1 --warmup-epochs 0 --batch-size 12 --device cpu").split()


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert train.main([*FLAGS, "--data-dir", str(photos), "--out", str(out), "--name", "r"]) == 0
    return out / "r"


def test_tables_name_the_same_probes_and_data():
    assert dense.PROBES.keys() == dense.DATA.keys()
    assert {name for names in dense.DATA.values() for name in names} == dense.READERS.keys()
    assert set(dense.NO_FEATURES) == set(evaluate.PROTOCOLS["regions"].on_request)


@pytest.mark.parametrize(
    "names, dataset, words",
    [
        (("segment",), None, "--probe segment: stands alone and needs --dataset scenes or ade20k"),
        (("segment",), "coco", "needs --dataset scenes or ade20k"),
        (("detect", "knn"), "coco", "--probe detect: stands alone"),
        (("linear",), "ade20k", "--dataset ade20k: is for --probe segment-linear or segment"),
        (("finetune",), "scenes", "--dataset scenes: is for --probe"),
    ],
)
def test_what_does_not_go_together(names, dataset, words):
    with pytest.raises(BadInput, match=words):
        dense.refuse(names, dataset)


def test_several_processes_are_for_what_shares_its_work(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    dense.refuse(("segment",), "scenes")
    dense.refuse(("finetune",), None)
    with pytest.raises(BadInput, match="--nproc-per-node: only --probe"):
        dense.refuse(("finetune", "knn"), None)


def test_compile_is_for_frozen_features():
    dense.refuse(("finetune", "knn"), None, compiled=True)
    with pytest.raises(BadInput, match="--compile: is for frozen features"):
        dense.refuse(("segment",), "scenes", compiled=True)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--probe", "segment-linear"], "needs --dataset"),
        (["--probe", "segment", "--dataset", "ade20k", "--data-dir", "DIR"], "no images and"),
        (["--probe", "segment", "--dataset", "scenes", "--image-size", "64"], "--image-size: only"),
        (["--dataset", "scenes"], "is for --probe"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, tmp_path, flags, words, capsys):
    flags = [str(tmp_path) if flag == "DIR" else flag for flag in flags]
    before = sorted(path.name for path in run.iterdir())
    assert evaluate.main([str(run / "last.pt"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_checkpoint_is_probed_on_scenes(run, tmp_path, capsys):
    words = ["--probe", "segment-linear", "--dataset", "scenes", "--data-dir", str(tmp_path),
             "--limit", "16", "--probe-epochs", "2", "--quick", "--figures", "--device", "cpu"]
    weights = load_checkpoint(run / "last.pt")["model"]
    assert evaluate.main([str(run / "last.pt"), *words]) == 0
    name = "segment-linear-scenes-limit16-epochs2-quick"
    result = json.loads((run / f"probes-{name}.json").read_text())
    rows = result["rows"]
    assert [(row["predicts"], row["from"]) for row in rows] == [
        ("17 classes", "frozen patch tokens"), ("17 classes", "nothing"),
        ("objects, background", "frozen patch tokens"), ("objects, background", "nothing")]
    assert all(row["unit"] == "mIoU" and 0 < row["value"] < 100 for row in rows)
    assert all(row["paper"] is None for row in rows)
    # Of the commonest label everywhere there is no second opinion.
    assert all((row["untrained"] is None) == (row["from"] == "nothing") for row in rows)
    assert all(row["untrained"] > 0 for row in rows if row["from"] != "nothing")
    assert (result["dataset"], result["n_train"], result["n_val"]) == ("scenes", 16, 16)
    assert (run / f"{name}.png").stat().st_size > 10_000
    assert name in (run / "report.html").read_text()
    assert not list(run.glob("segment*.pt"))
    table = capsys.readouterr().out
    assert f"{rows[0]['value']:.1f}" in table and "16 training and 16 validation" in table
    after = load_checkpoint(run / "last.pt")["model"]
    assert all(torch.equal(weights[name], after[name]) for name in weights)


def test_a_run_of_pairs_ends_with_its_table():
    """Labels of pairs are files, of which no class can be counted: a remark on that must not fail
    after days of training."""
    pairs = SimpleNamespace(labels=("a.png", "b.png"))
    config = settings.check(settings.Config(**settings.preset("imagenet", "regions")))
    assert evaluate.remarks_on(dict(train=pairs, val=pairs), config) == []
