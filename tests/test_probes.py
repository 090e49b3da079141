"""Features are the frozen model's and only those that are read; retrieval by hand. Heads and
scores: test_heads.py."""
import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch

import evaluate
import probes
from build import build_model
from plumbing import scratch
from probes import extract, retrieval_ranks
from saccades import Saccades

CPU = torch.device("cpu")


@pytest.fixture
def model_and_views(make_config, make_split):
    config = make_config(image_size=24, patch_size=8, width=2, action_dim=4)
    views = Saccades(make_split(), config, CPU)
    model = build_model(config, views.groups).train()
    # so that eval() and train() give different numbers
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model, views


def test_frozen_means_frozen(model_and_views):
    model, views = model_and_views
    before = {k: v.clone() for k, v in model.state_dict().items()}
    features = extract(model, views, [1, 3], CPU, samplings=2, batch_size=5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert not features.z.requires_grad


def test_features_are_those_of_the_model_in_eval_mode(model_and_views):
    model, views = model_and_views
    features = extract(model, views, [1, 3], CPU, samplings=2, batch_size=len(views))
    model.eval()
    with torch.no_grad():
        for s in range(2):
            from plumbing.device import seed_all
            seed_all(0, s, 0)
            batch = views(torch.arange(len(views)), 3)
            z, a = model.encode(batch.views), model.embed(batch.actions)
            torch.testing.assert_close(features.z[s], z[:, :2])
            torch.testing.assert_close(features.z_agg[1][s], model.aggregate(z[:, :1], a[:, :0]))
            torch.testing.assert_close(features.z_agg[3][s], model.aggregate(z[:, :3], a[:, :2]))
            torch.testing.assert_close(
                features.z_agg_no_views[3][s], model.aggregate(0 * z[:, :3], a[:, :2])
            )
            torch.testing.assert_close(
                features.z_agg_no_actions[3][s], model.aggregate(z[:, :3], 0 * a[:, :2])
            )
            torch.testing.assert_close(
                features.z_clean[s], model.encoder(views.clean(torch.arange(len(views))))
            )
            assert torch.equal(features.actions[s], batch.actions) and torch.equal(
                features.params[s], batch.params
            )
    assert torch.equal(features.labels, views.labels) and not torch.equal(
        features.z[0], features.z[1]
    )


def test_only_what_the_asked_for_probes_read_is_extracted(model_and_views, monkeypatch):
    model, views = model_and_views
    everything = extract(model, views, [1, 3], CPU)
    asked = []
    monkeypatch.setattr(views, "clean", lambda index: asked.append(index))
    for names in (["transfer"], ["retrieval"], ["action", "parameters"], ["path"]):
        setup = probes.Setup(dict(train=views, val=views), CPU, 0, M_train=3, lengths=(1, 3),
                             probes=tuple(names))
        wanted = set().union(*(probes.READS[name] for name in names))
        for features in probes.measure_views(model, setup):
            assert torch.equal(features.labels, views.labels)
            for name, value in features._asdict().items():
                assert bool(value is not None and len(value)) == (name in wanted | {"labels"})
        train = probes.measure_views(model, setup)[0]
        for name in wanted & {"z", "actions", "params", "a"}:           # and it is the same
            assert torch.equal(getattr(train, name), getattr(everything, name))
    assert not asked                                                    # no clean image was made
    assert everything.z_clean is not None and len(everything.z_agg_no_views) == 2


@pytest.mark.parametrize("name", ["classify", "knn", "action", "parameters", "path", "transfer"])
def test_a_probe_reads_no_more_than_it_says(name, model_and_views):
    """It works on what is extracted for it alone; a probe that is not listed gets everything."""
    model, views = model_and_views
    setup = probes.Setup(dict(train=views, val=views), CPU, 0, M_train=3, lengths=(1,),
                         probes=(name,), probe_epochs=1)
    train, val = probes.measure_views(model, setup)
    assert list(evaluate.PROBES[name](model, train, val, setup))
    setup = dataclasses.replace(setup, probes=("a fork's",))
    assert None not in probes.measure_views(model, setup)[0]


def test_on_disk_every_probe_says_nearly_what_it_says_in_memory(model_and_views, monkeypatch,
                                                               tmp_path):
    model, views = model_and_views
    names = ("classify", "knn", "action", "parameters", "path")
    setup = probes.Setup(dict(train=views, val=views), CPU, 0, M_train=3, lengths=(1, 3),
                         probes=names, probe_epochs=3, samplings=2, folder=tmp_path)
    monkeypatch.delenv("TMPDIR", raising=False)
    values = []
    for bound in (scratch.IN_MEMORY, 0):
        monkeypatch.setattr(scratch, "IN_MEMORY", bound)
        train, val = probes.measure_views(model, setup)
        assert train.z.dtype == (torch.float32 if bound else torch.float16)
        assert train.actions.dtype == train.params.dtype == torch.float32
        rows = [row for name in names for row in evaluate.PROBES[name](model, train, val, setup)]
        values.append([row["value"] for row in rows])
    assert len(values[0]) == 3 + 3 + 1 + 1 + 6
    for in_memory, on_disk in zip(*values):
        assert on_disk == pytest.approx(in_memory, abs=0.01)
    assert list(tmp_path.glob("tmp*")) == []


def test_features_of_the_trained_model_are_gone_before_those_of_the_untrained_come(monkeypatch):
    alive = weakref.WeakSet()
    counts = []

    def measure(model, setup):
        counts.append(len(alive))
        pair = torch.ones(3), torch.ones(3)
        alive.update(pair)
        return pair

    def probe(model, train, val, setup):
        counts.append(len(alive))
        yield probes.row("p", "class", "z", "none", 0, "top-1 %", train.sum().item())

    monkeypatch.setitem(evaluate.PROBES, "p", probe)
    setup = probes.Setup({}, CPU, 0, M_train=1, probes=("p",))
    rules = SimpleNamespace(measure=measure)
    rows = evaluate.measure_both("model", "twin", setup, rules, {}, ("p",))
    assert counts == [0, 2, 0, 2]
    assert rows[0]["value"] == rows[0]["untrained"] == 3


def test_retrieval_ranks_by_hand():
    candidates = torch.tensor([[[1.0, 0], [0.8, 0.6], [0, 1], [-1, 0]]]).expand(3, -1, -1)
    z_hat = torch.tensor([[1.0, 0.05], [1.0, 0.05], [1.0, 0.05]])
    everyone = torch.ones(3, 4, dtype=torch.bool)
    assert retrieval_ranks(z_hat, candidates, torch.tensor([0, 2, 3]), everyone).tolist() == [
        1,
        3,
        4,
    ]
    without_first = everyone.clone()
    without_first[:, 0] = False
    assert retrieval_ranks(z_hat, candidates, torch.tensor([1, 2, 3]), without_first).tolist() == [
        1,
        2,
        3,
    ]


def test_collapsed_features_do_not_win_retrieval():
    ones = torch.ones(2, 5, 3)
    assert retrieval_ranks(
        ones[:, 0], ones, torch.tensor([0, 3]), torch.ones(2, 5, dtype=torch.bool)
    ).tolist() == [5, 5]
