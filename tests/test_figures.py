"""Figures are drawn from plain files and features, in every case that can occur; the report needs nothing else."""
import json
import re

import pytest
import torch

import figures
from evaluate import row
from report import write_report
from runs import append_metrics


def metrics(epoch, probed=False):
    value = 1.0 if probed else float("nan")
    return dict(epoch=epoch, step=epoch, loss=1 / epoch, lr=0.1, tau=0.9, z_std=1, z_rank=3, z_agg_std=1, z_agg_rank=2, images_per_second=5,
                knn_z=value, knn_z_agg=value, action_r2=value)


def drawn(path):
    return path.exists() and path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("probed", [False, True])
def test_curves_from_a_three_line_log(tmp_path, probed):
    for epoch in (1, 2, 3):
        append_metrics(tmp_path / "metrics.csv", metrics(epoch, probed and epoch == 2))
    assert drawn(figures.draw_curves(tmp_path))


def rows():
    classify = [row("classify", "class", name, "linear classifier", 3, "top-1 %", value) | dict(untrained=1.0, paper=None)
                for name, value in (("z", 30.0), ("z_agg M=1", 20.0), ("z_agg M=5", 40.0))]
    path = [row("path", "position", f"z_agg, a_M, M={M}{words}", "linear", 3, "R2", 0.1 * M) | dict(untrained=0.0, paper=None)
            for M in (1, 5) for words in ("", ", no actions", ", no views")]
    return classify + path


def test_heatmap_puts_each_run_in_its_cell(tmp_path, monkeypatch):
    files = []
    for M_tr in (1, 3):
        files.append(tmp_path / f"{M_tr}.json")
        files[-1].write_text(json.dumps(dict(config=dict(views=M_tr), rows=rows())))
    shown = []
    original = figures.plt.Axes.imshow
    monkeypatch.setattr(figures.plt.Axes, "imshow", lambda self, values, **kw: shown.append(values) or original(self, values, **kw))
    assert drawn(figures.draw_heatmap(files, tmp_path / "heat.png"))
    assert shown == [[[20.0, 40.0], [20.0, 40.0]]]


def test_nearest_neighbours_are_the_nearest(tmp_path, monkeypatch):
    """Features on a line: the neighbours of a point are the ones beside it."""
    angle = torch.linspace(0, 1, 9)
    gallery = figures.Gallery(torch.rand(9, 4, 4, 3), torch.stack([angle.cos(), angle.sin()], 1), torch.rand(9, 3), torch.rand(9, 2), torch.arange(9))
    words = []
    monkeypatch.setattr(figures.plt.Axes, "set_xlabel", lambda self, text, **kw: words.append(text))
    views = type("V", (), dict(classes=list("abcdefghi")))
    assert drawn(figures.draw_retrieval(gallery, views, tmp_path / "r.png", count=3))
    assert words[0] == "a" and [w[0] for w in words[1:4]] == ["b", "c", "d"]
    assert words[4] == "e" and {w[0] for w in words[5:7]} == {"d", "f"}


def test_pca_finds_the_two_directions_of_most_variance():
    x = torch.randn(200, 2) @ torch.tensor([[5.0, 0, 0, 0], [0, 2, 0, 0]]) + 3
    points, name = figures.project(x)
    if name.startswith("PCA"):
        assert sorted(points.std(0) / x.std(0)[:2].numpy()[[0, 1]]) == pytest.approx([1, 1], rel=0.05)
    assert points.shape == (200, 2)


def test_report_is_one_file_with_table_figures_and_settings(tmp_path):
    append_metrics(tmp_path / "metrics.csv", metrics(1))
    figures.draw_curves(tmp_path)
    figures.draw_lengths(rows(), type("C", (), dict(views=3)), tmp_path / "lengths.png")
    figures.draw_path(rows(), tmp_path / "path.png")
    config = dict(name="a <b>", method="seq-jepa", dataset="folder", mode="saccade", condition="none", views=3, batch_size=8)
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = write_report(tmp_path, dict(step=7, n_train=5, n_val=2, samplings=1, rows=rows())).read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("<tr>") == 1 + len(rows()) and "a &lt;b&gt;" in page
    assert not re.search(r"""(src|href)=['"](?!data:)""", page)
