"""Figures of several runs put every number where it belongs."""
import json
import math

import pytest
from matplotlib.axes import Axes
from test_figures import drawn, rows

from figures import runs
from plumbing.errors import BadInput
from probes import row


def test_heatmap_puts_each_run_in_its_cell(tmp_path, monkeypatch):
    files = []
    for M_tr in (1, 3):
        files.append(tmp_path / f"{M_tr}.json")
        config = dict(
            dataset="folder", mode="saccade", method="seq-jepa", condition="none", views=M_tr,
            name=f"M{M_tr}",
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
    config = dict(dataset="solids", mode="rotation", method="seq-jepa", condition="rotation",
                  views=3, name=name) | config
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


def test_transfer_without_an_untrained_twin(tmp_path, plotted):
    rows = [row("transfer", "class", "z_agg M=1", "", 1, "top-1 %", 20.0)
            | dict(gmac=1.0, patch_size=8, untrained=None, paper=None)]
    assert drawn(runs.draw_transfer([result(tmp_path, "a", rows)], tmp_path / "x.png"))
    assert list(plotted) == ["a, patches of 8 px"]


def test_a_heatmap_shows_means_of_seeds_and_one_setting(tmp_path, monkeypatch):
    def measured(M_val, top1):
        return [row("classify", "class", f"z_agg M={M_val}", "", 1, "top-1 %", top1)]

    shown = []
    original = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, values, **kw:
                        shown.append(values) or original(self, values, **kw))
    files = [
        result(tmp_path, "a", measured(1, 30.0), views=1),
        result(tmp_path, "b", measured(1, 40.0), views=1),
        result(tmp_path, "c", measured(3, 50.0), views=3),
    ]
    assert drawn(runs.draw_heatmap(files, tmp_path / "heat.png"))
    assert shown[0] == [[35.0, pytest.approx(math.nan, nan_ok=True)],
                        [pytest.approx(math.nan, nan_ok=True), 50.0]]
    for other in (dict(method="byol"), dict(condition="none"), dict(mode="saccade"),
                  dict(dataset="stl10")):
        mixed = [*files, result(tmp_path, "d", measured(1, 20.0), **other)]
        with pytest.raises(BadInput, match="these are 2"):
            runs.draw_heatmap(mixed, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_sweep_keeps_methods_apart(tmp_path, plotted):
    rows = [row("action", "rotation", "z_1, z_2", "", 1, "R2", 0.5)]
    files = [result(tmp_path, "a", rows), result(tmp_path, "b", rows, method="sie")]
    runs.draw_sweep(files, tmp_path / "sweep.png")
    assert list(plotted) == ["solids rotation, condition rotation: rotation",
                             "solids rotation, sie, condition rotation: rotation"]


# ---------------------------------------------------------------- Fig. 1

def cloud(n):
    """n points, as close to one another as can be."""
    return [(f"method {i}", "z", (80.0 + i / 1000, 0.5), {"rotation": (0.5, None)})
            for i in range(n)]


@pytest.fixture
def saved(monkeypatch):
    """The Figure that is written, to be measured."""
    figures = []
    monkeypatch.setattr(runs, "save", lambda figure, path: figures.append(figure) or path)
    return figures


def test_scatter_puts_each_row_at_its_values_with_its_bars(tmp_path, monkeypatch):
    bars = []
    original = Axes.errorbar
    monkeypatch.setattr(Axes, "errorbar", lambda self, *args, **kw: bars.append(
        (*args, kw["xerr"], kw["yerr"])) or original(self, *args, **kw))
    points = [("a", "z", (80.0, 1.5), {"rotation": (0.5, 0.1), "color": (0.9, 0.2)}),
              ("b", "z_agg M=5", (90.0, None), {"color": (0.7, None)})]
    assert drawn(runs.draw_scatter(points, tmp_path / "x.png"))
    assert bars == [(0.5, 80.0, 0.1, 1.5), (0.9, 80.0, 0.2, 1.5), (0.7, 90.0, None, None)]


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_no_name_in_the_scatter_covers_another_or_a_point(n, saved, tmp_path):
    runs.draw_scatter(cloud(n), tmp_path / "x.png")
    figure = saved[0]
    figure.draw_without_rendering()
    names = [text.get_window_extent() for text in figure.axes[-1].texts if text.get_text()]
    assert len(names) == n
    for i, box in enumerate(names):
        assert not box.overlaps(figure.axes[-1].get_window_extent())
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert not any(box.overlaps(other) for other in names[:i])


def test_names_in_the_scatter_stand_in_the_order_of_the_points(saved, tmp_path):
    points = [("low", "z", (10.0, None), {"rotation": (0.1, None)}),
              ("high", "z", (30.0, None), {"rotation": (0.2, None)}),
              ("middle", "z", (20.0, None), {"rotation": (0.3, None)})]
    runs.draw_scatter(points, tmp_path / "x.png")
    heights = {text.get_text(): text.get_position()[1] for text in saved[0].axes[0].texts}
    assert (heights["low\nclass from z"] < heights["middle\nclass from z"]
            < heights["high\nclass from z"])
    labels = [axis.get_xlabel() for axis in saved[0].axes]
    assert labels == ["R\u00b2 of the relative rotation, from z"]
    assert saved[0].axes[0].get_ylabel() == "top-1 of the class, %"


def test_a_part_that_never_varies_has_no_panel(saved, tmp_path):
    still = [(*point[:3], point[3] | {"color": (0.0, 0.0)}) for point in cloud(3)]
    runs.draw_scatter(still, tmp_path / "x.png")
    labels = [axis.get_xlabel() for axis in saved[0].axes]
    assert labels == ["R\u00b2 of the relative rotation, from z"]
    nothing = [(*point[:3], {"color": (0.0, 0.0)}) for point in still]
    runs.draw_scatter(nothing, tmp_path / "y.png")
    assert len(saved[1].axes) == 1


def test_forty_eight_points_differ_in_colour_or_marker():
    looks = [runs._look(i) for i in range(48)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 48
