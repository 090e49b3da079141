"""Figures of several runs put every number where it belongs."""
import json

import pytest
from matplotlib.axes import Axes
from test_figures import drawn, rows

from figures import runs
from probes import row


def test_heatmap_puts_each_run_in_its_cell(tmp_path, monkeypatch):
    files = []
    for M_tr in (1, 3):
        files.append(tmp_path / f"{M_tr}.json")
        config = dict(
            dataset="folder", mode="saccade", condition="none", views=M_tr, name=f"M{M_tr}"
        )
        files[-1].write_text(json.dumps(dict(config=config, rows=rows())))
    shown = []
    original = Axes.imshow
    monkeypatch.setattr(
        Axes,
        "imshow",
        lambda self, values, **kw: shown.append(values) or original(self, values, **kw),
    )
    assert drawn(runs.draw_heatmap(files, tmp_path / "heat.png"))
    assert shown == [[[20.0, 40.0], [20.0, 40.0]]]


@pytest.fixture
def plotted(monkeypatch):
    """What Axes.plot is given, {label: (x, y)} of the labelled lines."""
    lines, original = {}, Axes.plot

    def plot(self, x, y, *args, **kw):
        if "label" in kw:
            lines.setdefault(kw["label"], []).append((x, y))
        return original(self, x, y, *args, **kw)

    monkeypatch.setattr(Axes, "plot", plot)
    return lines


def result(tmp_path, name, rows, **config):
    """A probes.json of a run with these settings."""
    config = (
        dict(dataset="solids", mode="rotation", condition="rotation", views=3, name=name) | config
    )
    (tmp_path / f"{name}.json").write_text(
        json.dumps(dict(dataset="folder", config=config, rows=rows))
    )
    return tmp_path / f"{name}.json"


def test_sweep_joins_the_means_of_seeds_at_every_training_length(tmp_path, plotted):
    def measured(top1, score):
        return [
            row("classify", "class", "z", "", 1, "top-1 %", 0.0),
            row("classify", "class", "z_agg M=3", "", 1, "top-1 %", top1),
            row("action", "rotation", "z_1, z_2", "", 1, "R2", score),
            row("path", "rotation", "z_agg, a_M, M=3", "", 1, "R2", 9.0),
        ]

    files = [
        result(tmp_path, "c", measured(50.0, 0.7), views=3),
        result(tmp_path, "a", measured(30.0, 0.2), views=1),
        result(tmp_path, "b", measured(40.0, 0.4), views=1),
    ]
    assert drawn(runs.draw_sweep(files, tmp_path / "sweep.png"))
    assert plotted == {
        "rotation": [([1, 3], pytest.approx([0.3, 0.7]))],
        "M_val 3": [([1, 3], [35.0, 50.0])],
    }


def test_sweep_keeps_data_sets_and_conditions_apart(tmp_path, plotted):
    rows = [row("action", "rotation", "z_1, z_2", "", 1, "R2", 0.5)]
    files = [result(tmp_path, "a", rows), result(tmp_path, "b", rows, condition="none")]
    assert drawn(runs.draw_sweep(files, tmp_path / "sweep.png"))
    assert list(plotted) == [
        "solids rotation, condition rotation: rotation",
        "solids rotation, condition none: rotation",
    ]


def test_transfer_is_drawn_against_length_and_cost(tmp_path, plotted):
    def measured(patch, values):
        return [
            row(
                "transfer",
                "class",
                f"z_agg M={M}, {M * patch}e9 MAC an image",
                "linear classifier",
                1,
                "top-1 %",
                value,
            )
            | dict(gmac=M * patch / 10, patch_size=patch, untrained=1.0)
            for M, value in values
        ]

    files = [
        result(tmp_path, "a", measured(84, [(4, 30.0), (1, 20.0)])),
        result(tmp_path, "b", measured(32, [(1, 10.0), (8, 15.0)])),
    ]
    assert drawn(runs.draw_transfer(files, tmp_path / "transfer.png"))
    assert plotted["a, patches of 84 px"] == [([1, 4], [20.0, 30.0]), ([8.4, 33.6], [20.0, 30.0])]
    assert plotted["b, patches of 32 px"] == [([1, 8], [10.0, 15.0]), ([3.2, 25.6], [10.0, 15.0])]
    assert plotted["a, patches of 84 px, untrained"][0] == ([1, 4], [1.0, 1.0])
