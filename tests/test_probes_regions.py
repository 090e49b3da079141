"""The ViT's probes: frozen means frozen, features by hand, schedules and groups as the protocol
says, the command users type."""
import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn

import config as settings
import evaluate
import probes
import probes_regions
import train
from build import build_model, build_views
from plumbing import scratch
from plumbing.heads import shuffled, train_head
from probes_regions import (
    extract_images,
    object_auc,
    of_patches,
)

CPU = torch.device("cpu")
FLAGS = (
    "--dataset folder --mode regions --encoder vit-nano --image-size 32 "
    "--patch-size 8 --min-patches 2 --epochs 2 --warmup-epochs 1 "
    "--batch-size 12 --device cpu"
).split()


@pytest.fixture
def setting(make_config, make_split, monkeypatch):
    def make(**changes):
        monkeypatch.setattr("build.load", lambda config, split: make_split(20, 32))
        config = make_config(
            "folder",
            "regions",
            image_size=32,
            patch_size=8,
            encoder="vit-nano",
            min_patches=2,
            **changes,
        )
        return build_model(config, {}), build_views(config, "train", torch.device("cpu"))
    return make


def test_features_are_the_target_encoders_and_by_hand(setting):
    model, views = setting()
    for p in model.target_encoder.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)                      # unlike the context encoder
    before = copy.deepcopy(model.state_dict())
    index = torch.arange(7)
    features = extract_images(model, views, CPU, index=index, batch_size=3)
    x, means = model.target_encoder.tokens(views.clean(index)), []
    for block in model.target_encoder.blocks:
        x = block(x)
        means.append(model.target_encoder.norm(x)[:, 1:].mean(1))
    last = model.target_encoder.norm(x)
    close = dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(features.blocks[0], torch.cat(means[2:], dim=1), **close)
    torch.testing.assert_close(features.mean[0], last[:, 1:].mean(1), **close)
    torch.testing.assert_close(features.cls[0], last[:, 0], **close)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and model.training
    assert [name for name, _ in features.named()] == ["mean patch token", "[CLS]"]


def test_training_features_are_of_augmented_crops_and_all_others_of_whole_images(setting):
    """Of what labelled training sees, not of pre-training's crops, which are larger."""
    model, views = setting()
    drawn = []
    augmented = views.augmented
    views.augmented = lambda index: drawn.append(augmented(index)) or drawn[-1]
    features = extract_images(model, views, CPU, crops=2, batch_size=len(views))
    assert features.blocks.shape == (2, 20, 4 * 128) and features.mean.shape == (1, 20, 128)
    assert len(drawn) == 2 and not torch.equal(*drawn)
    for s in range(2):
        views.clean, clean = lambda index: drawn[s], views.clean
        expected = extract_images(model, views, CPU, fields={"blocks"})
        views.clean = clean
        torch.testing.assert_close(features.blocks[s], expected.blocks[0])
    whole = extract_images(model, views, CPU)
    assert torch.equal(features.mean, whole.mean) and torch.equal(features.cls, whole.cls)


@pytest.fixture
def make_setup(setting, tmp_path):
    def make(views, names, **changes):
        return probes.Setup(dict(train=views, val=views), CPU, 0, M_train=0, probes=names,
                            folder=tmp_path, **changes)
    return make


@pytest.mark.parametrize("names, of_train, of_val", [
    (("linear",), {"blocks"}, {"blocks"}),
    (("knn",), {"mean", "cls"}, {"mean", "cls"}),
    (("cls",), {"cls"}, {"cls"}),
    (("finetune",), set(), set()),
    (("linear", "cls"), {"blocks", "cls"}, {"blocks", "cls"}),
])
def test_only_what_the_asked_for_probes_read_is_extracted(names, of_train, of_val, setting,
                                                          make_setup):
    model, views = setting()
    setup = make_setup(views, names, samplings=3)
    found = probes_regions.measure_images(model, setup)
    for features, wanted in zip(found, (of_train, of_val)):
        assert {name for name, value in features._asdict().items() if value is not None} == (
            wanted | {"labels"})
    if "linear" in names:
        train, val = found
        assert len(train.blocks) == 3 and len(val.blocks) == 1


def test_without_cls_there_is_no_cls_row(setting):
    model, views = setting(cls=False, regions="random")
    features = extract_images(model, views, CPU)
    assert [name for name, _ in features.named()] == ["mean patch token"]
    assert list(probes_regions.probe_cls(model, features, features, None)) == []


def linear_row(model, setup):
    train, val = probes_regions.measure_images(model, setup)
    row, = probes_regions.probe_linear(model, train, val, setup)
    return row, train


def test_samplings_for_every_epoch_are_drawn_fresh_and_not_kept(setting, make_setup):
    """Each crop is seen once; the same seed gives the same number."""
    model, views = setting()
    drawn = []
    augmented = views.augmented
    views.augmented = lambda index: drawn.append(augmented(index)) or drawn[-1]
    results = []
    for samplings in (3, 3, 4):
        drawn.clear()
        setup = make_setup(views, ("linear",), samplings=samplings, probe_epochs=3)
        row, train = linear_row(model, setup)
        assert train.blocks is None and len(drawn) == 3
        assert len({crops.sum().item() for crops in drawn}) == 3
        results.append(row["value"])
    assert results[0] == results[1] == results[2]
    row, train = linear_row(model, dataclasses.replace(setup, samplings=2))
    assert len(train.blocks) == 2 and 0 <= row["value"] <= 100


@pytest.mark.parametrize("samplings", [2, 3])
def test_linear_probe_has_the_authors_optimiser_and_a_tenth_of_the_rate_at_8_16_24(
        samplings, setting, make_setup, monkeypatch):
    """Stored crops or fresh ones; 28 epochs, shortened with their drops to 7."""
    model, views = setting()
    rates = []

    class Watched(torch.optim.SGD):
        def __init__(self, parameters, **options):
            super().__init__(parameters, **options)
            assert options == dict(lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "SGD", Watched)
    epochs = 7 if samplings == 2 else 3
    row, train = linear_row(model, make_setup(views, ("linear",), samplings=samplings,
                                              probe_epochs=epochs))
    assert (train.blocks is None) == (samplings == 3)
    if epochs == 7:
        assert rates == pytest.approx([1e-2] * 2 + [1e-3] * 2 + [1e-4] * 2 + [1e-5])
    assert (probes_regions.LINEAR_EPOCHS, probes_regions.LINEAR_DROPS) == (28, (8, 16, 24))
    assert len(rates) == row["epochs"] == epochs


def test_cls_head_has_the_authors_optimiser_on_a_cosine_to_zero(setting, make_setup, monkeypatch):
    model, views = setting()
    rates = []

    class Watched(torch.optim.AdamW):
        def step(self, *args):
            group = self.param_groups[0]
            assert group["weight_decay"] == 0.05
            rates.append(group["lr"])
            return super().step(*args)

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    setup = make_setup(views, ("cls",))
    train, val = probes_regions.measure_images(model, setup)
    row, = probes_regions.probe_cls(model, train, val, setup)
    assert len(rates) == row["epochs"] == 100
    assert rates[0] == 1e-3 and rates[50] == pytest.approx(5e-4)
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-6


@pytest.mark.parametrize("samplings", [1, 2])
def test_a_single_row_left_over_does_not_reach_batchnorm(samplings, setting, make_setup,
                                                         monkeypatch):
    monkeypatch.setattr(probes_regions, "BATCH", 19)                # of 20 images
    model, views = setting()
    setup = make_setup(views, ("linear",), samplings=samplings, probe_epochs=2)
    row, _ = linear_row(model, setup)
    assert math.isfinite(row["value"])


def test_on_disk_the_probes_say_what_they_say_in_memory(setting, make_setup, monkeypatch, tmp_path):
    model, views = setting()
    setup = make_setup(views, ("linear", "knn", "cls"), samplings=2, probe_epochs=4)
    monkeypatch.delenv("TMPDIR", raising=False)
    values = []
    for bound in (scratch.IN_MEMORY, 0):
        monkeypatch.setattr(scratch, "IN_MEMORY", bound)
        train, val = probes_regions.measure_images(model, setup)
        assert train.blocks.dtype == (torch.float32 if bound else torch.float16)
        values.append([row["value"] for name in setup.probes
                       for row in evaluate.PROBES[name](model, train, val, setup)])
    assert len(values[0]) == 4
    assert values[1] == pytest.approx(values[0], abs=5.1)           # 5: one image of 20
    assert list(tmp_path.glob("tmp*")) == []


def test_linear_probe_solves_a_separable_problem_and_random_labels_stay_at_chance():
    torch.manual_seed(1)
    y = torch.arange(600) % 3
    x = F.one_hot(y, 3).float() @ torch.randn(3, 10) + 0.1 * torch.randn(600, 10)
    head = nn.Sequential(nn.BatchNorm1d(10, affine=False), nn.Linear(10, 3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    train_head(head, shuffled(x[None, :400], y[:400], CPU), F.cross_entropy, 10, optimizer)
    assert (head(x[400:]).argmax(1) == y[400:]).float().mean() == 1
    shuffled_y = y[torch.randperm(600)]
    train_head(head, shuffled(x[None, :400], shuffled_y[:400], CPU), F.cross_entropy, 10, optimizer)
    assert (head(x[400:]).argmax(1) == shuffled_y[400:]).float().mean() < 0.5


def test_train_then_evaluate_every_probe_and_figure(photos, tmp_path, capsys):
    out = ["--data-dir", str(photos), "--out", str(tmp_path)]
    assert train.main([*FLAGS, *out, "--name", "r", "--probe-every", "1"]) == 0
    run = tmp_path / "r"
    assert (
        evaluate.main(
            [
                str(run / "last.pt"),
                "--probe",
                "linear",
                "knn",
                "cls",
                "finetune",
                "--probe-epochs",
                "2",
                "--figures",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    rows = json.loads((run / "probes-linear-knn-cls-finetune-epochs2.json").read_text())["rows"]
    assert [(r["probe"], r["from"]) for r in rows] == [
        ("linear", "last 4 blocks, mean patch"),
        ("knn", "mean patch token"),
        ("knn", "[CLS]"),
        ("cls", "[CLS]"),
        ("finetune", "mean patch token, all weights"),
    ]
    config = settings.check(settings.Config(**settings.preset("imagenet", "regions")))
    published = evaluate.paper_numbers(config)
    for other in (dict(epochs=1), dict(limit=9), dict(regions="random")):
        assert evaluate.paper_numbers(dataclasses.replace(config, **other)) == {}
    assert list(published.values()) == [73.5, 84.0] and set(published) <= {
        (r["probe"], r["predicts"], r["from"]) for r in rows
    }
    assert all(0 <= r["value"] <= 100 for r in rows)
    assert all(0 <= r["untrained"] <= 100 for r in rows[:-1]) and rows[-1]["untrained"] is None
    assert (run / "finetune-folder-epochs2.pt").exists()
    assert {
        "regions.png",
        "steps.png",
        "clusters.png",
        "curves.png",
        "report.html",
        "encoder.pt",
    } <= {p.name for p in run.iterdir()}
    # encoder.pt is what was evaluated
    target = {
        k.removeprefix("target_encoder."): v
        for k, v in torch.load(run / "last.pt", weights_only=True)["model"].items()
        if k.startswith("target_encoder.")
    }
    encoder = torch.load(run / "encoder.pt", weights_only=True)
    assert encoder.keys() == target.keys() and all(
        torch.equal(encoder[k], target[k]) for k in target
    )
    # on other images, with the run's own image and patch size
    assert (
        evaluate.main(
            [
                str(run / "last.pt"),
                "--dataset",
                "folder",
                "--data-dir",
                str(photos),
                "--probe",
                "knn",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    capsys.readouterr()
    for flags, words in (
        (
            ["--probe", "classify"],
            "does not apply to mode regions; choose from linear, knn, cls, ",
        ),
        (["--dataset", "folder", "--patch-size", "4"], "the run's own is kept"),
        (["--probe", "transfer"], "does not apply"),
    ):
        assert evaluate.main([str(run / "last.pt"), *flags]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


# ---------------------------------------------------------------- whether saliency finds the object

def test_object_auc_is_scikit_learn_s_over_pixels():
    saliency = torch.rand(5, 9).mul(4).round().div(4)                       # with ties
    masks = (torch.rand(5, 12, 12) < 0.4).float()
    found = object_auc(saliency, of_patches(masks, (3, 3)))
    for b in range(5):
        of_pixels = saliency[b].view(3, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
        expected = roc_auc_score(masks[b].flatten().numpy(), of_pixels.flatten().numpy())
        assert found[b].item() == pytest.approx(expected, abs=1e-5)
    assert object_auc(saliency, torch.ones(5, 9)).isnan().all()


def test_on_object_sees_masks_and_says_nan_without(setting):
    model, views = setting()
    index = torch.arange(4)
    assert all(math.isnan(value) for value in probes_regions.on_object(model, views, index))
    grid = model.encoder.grid
    batch = views(index)._replace(views=views.clean(index)[:, None])
    saliency = model.look(batch)[2]
    rank = model.plan.regions(saliency, grid)
    side = views.image_size // grid[0]
    first = (rank == 1).float().view(-1, *grid)
    views.masks = lambda index: first.repeat_interleave(side, 1).repeat_interleave(side, 2)
    auc, share = probes_regions.on_object(model, views, index)
    assert share == pytest.approx(1) and 0.5 < auc <= 1
