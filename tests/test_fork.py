"""A new kind of view comes from outside: one class, and one row in each of three tables.

What is missing is said in one line, before data is read.
"""
import csv
import dataclasses
import json

import pytest
import torch

import config as settings
import evaluate
import train
from images import Batch, Views, normalise


class Shifts(Views):
    """Mode `shift`: sample indices -> Batch of windows of one image, each moved sideways.

    actions (B, M, 1): from one window to the next, in image sides. params (B, M+1, 1): its own."""

    conditions = ("shift", "none")
    groups = {"shift": slice(0, 1)}
    param_groups = {"shift": slice(0, 1)}
    maps = {"shift": 0}

    def __call__(self, index, M):
        """index (B,) int64 on the CPU -> Batch of M observed views and the one after."""
        shifts = torch.randint(self.image_size, (len(index), M + 1), device=self.device)
        views = self.to_views(self.images[index], shifts)
        params = shifts[..., None] / self.image_size
        actions = self.relative(params[:, :-1], params[:, 1:])
        return Batch(views, actions, params, self.labels_of(index))

    def to_views(self, images, shifts):
        """uint8 images (B, 3, S, S), shifts (B, K) -> views (B, K, 3, S, S), normalised."""
        column = torch.arange(self.image_size, device=self.device)
        picked = (column + shifts[..., None]) % self.image_size             # (B, K, S)
        picked = picked[:, :, None, None].expand(-1, -1, 3, self.image_size, -1)
        views = images[:, None].expand_as(picked).gather(4, picked)
        return normalise(views, self.mean, self.std, channel_dim=2)


@pytest.fixture
def fork(monkeypatch):
    """Registers a mode `shift`, with some of its rows or with none."""
    def register(views=Shifts, modes=True, presets=True, protocols=True):
        if modes:
            monkeypatch.setitem(settings.MODES, "shift", views)
        if presets:
            monkeypatch.setitem(settings.PRESETS, ("folder", "shift"), dict(image_size=20, views=2))
        if protocols:
            row = dataclasses.replace(evaluate.SEQUENCES, lengths=(1, 2))
            monkeypatch.setitem(evaluate.PROTOCOLS, "shift", row)
    return register


@pytest.fixture
def command(photos, tmp_path):
    return ["--dataset", "folder", "--mode", "shift", "--data-dir", str(photos),
            "--out", str(tmp_path), "--device", "cpu", "--probe-every", "1", "--epochs", "1",
            "--warmup-epochs", "0", "--batch-size", "8", "--width", "2", "--action-dim", "4"]


def test_a_window_shows_the_image_from_its_shift_on(make_config, make_split):
    """Views, actions and params by hand."""
    config = make_config("folder", "augment", image_size=24)
    views = Shifts(make_split(), config, torch.device("cpu"))
    batch = views(torch.arange(5), 3)
    assert batch.views.shape == (5, 4, 3, 24, 24) and batch.actions.shape == (5, 3, 1)
    whole = views.clean(torch.arange(5))
    for i in range(5):
        for k in range(4):
            shift = round(batch.params[i, k, 0].item() * 24)
            assert torch.equal(batch.views[i, k], whole[i].roll(-shift, 2))
    torch.testing.assert_close(batch.actions, batch.params[:, 1:] - batch.params[:, :-1])


def test_a_mode_from_outside_trains_is_probed_and_drawn(fork, command, tmp_path, capsys):
    fork()
    assert train.main(command) == 0
    run = tmp_path / "folder-shift"
    with open(run / "metrics.csv", newline="") as file:
        epoch = list(csv.DictReader(file))[-1]
    for column in ("loss", "knn_z", "knn_z_agg", "action_r2"):
        assert torch.tensor(float(epoch[column])).isfinite()
    capsys.readouterr()

    checkpoint = str(run / "last.pt")
    flags = ["--probe-epochs", "1", "--samplings", "1", "--figures"]
    assert evaluate.main([checkpoint, *flags]) == 0
    rows = json.loads((run / "probes.json").read_text())["rows"]
    expected = ["classify"] * 3 + ["knn"] * 3 + ["action", "parameters"]
    assert [row["probe"] for row in rows] == expected
    assert [row["from"] for row in rows[:3]] == ["z", "z_agg M=1", "z_agg M=2"]
    assert {row["predicts"] for row in rows[6:]} == {"shift"}
    printed = capsys.readouterr().out
    for row in rows:
        assert torch.tensor([row["value"], row["untrained"]]).isfinite().all()
        assert row["paper"] is None and row["from"] in printed
    drawn = {path.name for path in run.iterdir()}
    figures = {"curves.png", "views.png", "retrieval.png", "maps.png", "lengths.png", "report.html"}
    assert figures <= drawn

    assert train.main([*command, "--condition", "none"]) == 0
    assert (tmp_path / "folder-shift-none" / "last.pt").exists()


def test_a_mode_from_outside_runs_quick(fork, command, tmp_path):
    fork()
    assert train.main([*command, "--quick"]) == 0
    assert (tmp_path / "quick-folder-shift" / "last.pt").exists()


def without(member):
    """The class Shifts as its author forgot to write one of its members."""
    members = {name: value for name, value in vars(Shifts).items() if name != member}
    return type("Shifts", (Views,), members)


@pytest.mark.parametrize("missing, words", [
    (dict(modes=False), "--mode: invalid choice: 'shift'"),
    (dict(presets=False), "mode shift has no row in config.PRESETS"),
    (dict(protocols=False), "mode shift has no row in evaluate.PROTOCOLS; add one"),
    (dict(views=without("__call__")), "mode shift: Shifts lacks __call__"),
    (dict(views=without("to_views")), "mode shift: Shifts lacks to_views"),
])
def test_what_a_mode_lacks_is_said_in_one_line_before_data_is_read(missing, words, fork, command,
                                                                   tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("build.load", lambda *_: pytest.fail("data was read first"))
    fork(**missing)
    try:
        status = train.main(command)
    except SystemExit as left:                              # argparse's way
        status = left.code
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_mode_has_no_row_any_more_cannot_be_evaluated(fork, command, tmp_path,
                                                                  monkeypatch, capsys):
    fork()
    assert train.main(command) == 0
    capsys.readouterr()
    monkeypatch.delitem(evaluate.PROTOCOLS, "shift")
    monkeypatch.setattr("build.load", lambda *_: pytest.fail("data was read first"))
    assert evaluate.main([str(tmp_path / "folder-shift" / "last.pt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mode shift has no row in evaluate.PROTOCOLS")
    assert error.count("\n") == 1
