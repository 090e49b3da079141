"""A run's folder: atomic writes, checkpoints that cannot run code, clear refusals."""
import dataclasses
import os
import pickle

import pytest
import torch

import runs
from build import build_model
from config import BadInput
from runs import append_metrics, drop_metrics_after, load_checkpoint, read_metrics, save_atomically


@pytest.fixture
def saved(make_config):
    config = make_config(width=2, action_dim=4)
    model = build_model(config, {"position": slice(0, 2)})
    runs.create_run(config)
    runs.save_checkpoint(config, model, torch.optim.AdamW(model.parameters()), 7, dict(loss_sum=1.0))
    return config, model


def test_checkpoint_round_trip(saved):
    config, model = saved
    checkpoint = load_checkpoint(config.run_dir / "last.pt")
    assert checkpoint["step"] == 7 and runs.config_of(checkpoint) == config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in checkpoint["model"].items())
    encoder = torch.load(config.run_dir / "encoder.pt", weights_only=True)
    assert encoder.keys() == model.encoder.state_dict().keys()
    assert not list(config.run_dir.glob("*.part"))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_checkpoint_with_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(format=runs.FORMAT, model=Trap()), "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(BadInput, match=name):
            load_checkpoint(name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.unlink(), "no checkpoint there"),
    (lambda p: p.write_bytes(p.read_bytes()[:-2000]), "is damaged"),
    (lambda p: p.write_bytes(b"hello"), "is damaged"),
    (lambda p: p.write_bytes(b""), "is damaged"),
    (lambda p: torch.save({"state_dict": {}}, p), "not a checkpoint of this project"),
    (lambda p: torch.save([1, 2], p), "not a checkpoint of this project"),
    (lambda p: torch.save(dict(format=runs.FORMAT, version=99), p), "checkpoint version 99"),
])
def test_foreign_and_damaged_checkpoints_are_named(saved, damage, words):
    path = saved[0].run_dir / "last.pt"
    damage(path)
    with pytest.raises(BadInput, match=words) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_interrupted_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("before")

    def write(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        save_atomically(path, write)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_existing_run_is_not_overwritten(saved):
    with pytest.raises(BadInput, match="exists already; continue it with --resume"):
        runs.open_run(saved[0])


def test_resume_needs_the_same_settings(saved):
    same = dataclasses.replace(saved[0], resume=True, device="cpu", probe_every=3)
    assert runs.open_run(same)["step"] == 7
    with pytest.raises(BadInput, match=r"started with --lr 0.0004 \(now 0.1\)"):
        runs.open_run(dataclasses.replace(same, lr=0.1))


def test_resume_without_a_run_is_said(make_config):
    with pytest.raises(BadInput, match="no checkpoint there"):
        runs.open_run(make_config(resume=True))


def test_metrics_of_repeated_epochs_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    for epoch in (1, 2, 3):
        append_metrics(path, dict(epoch=epoch, step=10 * epoch, loss=0.5 / epoch))
    with open(path, "a") as file:
        file.write("4,40")                                   # a line cut short by a kill
    drop_metrics_after(path, 20)
    assert read_metrics(path) == [dict(epoch=1, step=10, loss=0.5), dict(epoch=2, step=20, loss=0.25)]
    drop_metrics_after(tmp_path / "absent.csv", 5)
