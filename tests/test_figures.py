"""Figures are drawn from plain files and features, in every case that can occur."""
import sys
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE, trustworthiness

from build import build_model
from figures import sequences as figures
from figures import tsne
from images import Batch, Views, normalise
from plumbing.runs import append_metrics
from probes import row


def metrics(epoch, probed=False):
    value = 1.0 if probed else float("nan")
    return dict(
        epoch=epoch,
        step=epoch,
        loss=1 / epoch,
        lr=0.1,
        tau=0.9,
        z_std=1,
        z_rank=3,
        z_agg_std=1,
        z_agg_rank=2,
        images_per_second=5,
        knn_z=value,
        knn_z_agg=value,
        action_r2=value,
    )


def drawn(path):
    return path.exists() and path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("probed", [False, True])
def test_curves_from_a_three_line_log(tmp_path, probed):
    for epoch in (1, 2, 3):
        append_metrics(tmp_path / "metrics.csv", metrics(epoch, probed and epoch == 2))
    assert drawn(figures.draw_curves(tmp_path))


def rows():
    classify = [
        row("classify", "class", name, "linear classifier", 3, "top-1 %", value)
        | dict(untrained=1.0, paper=None)
        for name, value in (("z", 30.0), ("z_agg M=1", 20.0), ("z_agg M=5", 40.0))
    ]
    path = [
        row("path", "position", f"z_agg, a_M, M={M}{words}", "linear", 3, "R2", 0.1 * M)
        | dict(untrained=0.0, paper=None)
        for M in (1, 5)
        for words in ("", ", no actions", ", no views")
    ]
    return classify + path


def test_nearest_neighbours_are_the_nearest(tmp_path, monkeypatch):
    """Features on a line: the neighbours of a point are the ones beside it."""
    angle = torch.linspace(0, 1, 9)
    gallery = figures.Gallery(
        torch.rand(9, 4, 4, 3),
        torch.stack([angle.cos(), angle.sin()], 1),
        torch.rand(9, 3),
        torch.rand(9, 2),
        torch.arange(9),
    )
    words = []
    monkeypatch.setattr(Axes, "set_xlabel", lambda self, text, **kw: words.append(text))
    views = type("V", (), dict(classes=list("abcdefghi")))
    assert drawn(figures.draw_retrieval(gallery, views, tmp_path / "r.png", count=3))
    assert words[0] == "a" and [w[0] for w in words[1:4]] == ["b", "c", "d"]
    assert words[4] == "e" and {w[0] for w in words[5:7]} == {"d", "f"}


class Shifts(Views):
    """A mode that the figures cannot know: a view is the image moved, an action how far."""

    groups = {"shift": slice(0, 1)}

    def __call__(self, index, M):
        shift = torch.rand(len(index), M + 1, 1)
        images = normalise(self.images[index], self.mean, self.std, channel_dim=1)
        views = [[image.roll(int(8 * s), 2) for s in row] for image, row in zip(images, shift)]
        views = torch.stack([torch.stack(row) for row in views])
        return Batch(views, shift[:, 1:] - shift[:, :-1], shift, self.labels_of(index))


@pytest.mark.parametrize("maps", [{}, {"shift": 0}])
def test_a_mode_from_outside_is_drawn_as_far_as_rows_allow(maps, make_config, make_split,
                                                           tmp_path, monkeypatch):
    config = make_config("folder", "augment", image_size=16, width=2, views=2, action_dim=4,
                         batch_size=8)
    views = Shifts(make_split(12, 16), config, torch.device("cpu"))
    views.maps = maps
    model = build_model(config, views.groups)
    config = SimpleNamespace(mode="shift", condition="shift", views=2, seed=0, aggregates=True)
    titles = []
    original = Axes.set_title

    def set_title(self, text, **kw):
        titles.append(text)
        return original(self, text, **kw)

    monkeypatch.setattr(Axes, "set_title", set_title)

    def names(rows):
        paths = list(figures.draw_all(model, views, config, rows, tmp_path))
        assert all(map(drawn, paths))
        return [path.stem for path in paths]

    assert names([]) == ["views", "retrieval", "maps"]
    assert ("z of view 1, by shift" in titles) == bool(maps)
    some = [r for r in rows() if "no actions" not in r["from"]]
    classify = [r for r in some if r["probe"] == "classify"]
    assert names(classify) == ["views", "retrieval", "maps", "lengths"]
    assert names(some) == ["views", "retrieval", "maps", "lengths", "path"]


def test_what_draws_the_views_may_be_chosen(tmp_path):
    config = SimpleNamespace(mode="shift")
    seen = []
    paths = figures.draw_all("model", "views", config, [], tmp_path,
                             draw_views=lambda *args: seen.append(args))
    next(paths)
    assert seen == [("views", config, tmp_path / "views.png")]


def test_pca_finds_the_two_directions_of_most_variance():
    x = torch.randn(99, 2) @ torch.tensor([[5.0, 0, 0, 0], [0, 2, 0, 0]]) + 3
    points, name = figures.project(x)
    assert name == "PCA" and points.shape == (99, 2)
    assert sorted(points.std(0) / x.std(0)[:2].numpy()[[0, 1]]) == pytest.approx([1, 1], rel=0.05)


def test_tsne_keeps_neighbourhoods_as_scikit_learn_does(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)          # importing it fails, installed or not
    x = torch.tensor(load_digits().data[:250]).float()
    points, name = figures.project(x)
    assert name == "t-SNE" and points.shape == (250, 2)
    theirs = TSNE(method="exact", random_state=0, max_iter=500).fit_transform(x.numpy())
    kept = [trustworthiness(x.numpy(), flat, n_neighbors=10) for flat in (points, theirs)]
    assert kept[0] > kept[1] - 0.01 and kept[1] > 0.95
    assert trustworthiness(x.numpy(), figures._pca(x), n_neighbors=10) < kept[0] - 0.1
    assert (figures.project(x)[0] == points).all()


def test_tsne_widths_give_the_perplexity_and_the_slope_is_that_of_the_divergence():
    x = torch.randn(120, 5).double()
    p = tsne.neighbourhood(torch.cdist(x, x).square())
    entropy = -(p * p.clamp(min=1e-30).log()).sum(1)
    torch.testing.assert_close(entropy.exp(), torch.full((120,), tsne.PERPLEXITY).double(),
                               rtol=1e-4, atol=0)
    P = (p + p.T) / 240
    y = torch.randn(120, 2).double().requires_grad_()
    near = 1 / (1 + (y[:, None] - y[None]).square().sum(2))
    near = near * (1 - torch.eye(120))
    Q = near / near.sum()
    off = ~torch.eye(120, dtype=torch.bool)
    (P[off] * (P[off] / Q[off]).log()).sum().backward()
    torch.testing.assert_close(tsne.slope(P, y.detach()), y.grad)


class FakeUMAP:
    """Stands in for umap-learn, which the tests must not need: the first two columns are the
    map."""

    def __init__(self, random_state, n_jobs):
        assert random_state == 0

    def fit_transform(self, x):
        return x[:, :2]


@pytest.mark.parametrize("n, method", [(figures.FEW, "UMAP"), (figures.FEW - 1, "PCA")])
def test_maps_use_umap_where_there_is_one_and_say_so(n, method, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FakeUMAP))
    titles = []
    monkeypatch.setattr(
        Figure, "suptitle", lambda self, text, **kw: titles.append(text)
    )
    gallery = figures.Gallery(
        torch.rand(n, 4, 4, 3),
        torch.randn(n, 5),
        torch.randn(n, 7),
        torch.rand(n, 2),
        torch.arange(n) % 2,
    )
    config = SimpleNamespace(mode="saccade", condition="none", views=2, aggregates=True)
    views = SimpleNamespace(classes=["a", "b"], maps={"x of fixation": 0})
    assert drawn(figures.draw_maps(gallery, views, config, tmp_path / "maps.png"))
    assert titles == [f"{method} of {n} validation samples, condition none (as Fig. 14)"]
    assert (figures.project(gallery.z)[0] == gallery.z[:, :2].numpy()).all() == (method == "UMAP")


def test_maps_of_a_method_without_aggregate_show_z_alone(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **kw: titles.append(text))
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **kw: titles.append(text))
    n = figures.FEW - 1
    gallery = figures.Gallery(torch.rand(n, 4, 4, 3), torch.randn(n, 5), torch.empty(n, 0),
                              torch.rand(n, 2), torch.arange(n) % 2)
    config = SimpleNamespace(mode="rotation", condition="none", method="simclr", aggregates=False)
    views = SimpleNamespace(classes=["a", "b"], maps={"angle x": 0})
    assert drawn(figures.draw_maps(gallery, views, config, tmp_path / "maps.png"))
    assert titles == ["z of view 1, by class", "z of view 1, by angle x",
                      f"PCA of {n} validation samples, condition none, simclr"]
