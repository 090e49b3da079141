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
import probes_regions
import train
from build import build_model, build_views
from probes_regions import (
    extract_images,
    fit_classifier,
    object_auc,
    of_patches,
)

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
    features = extract_images(
        model, views, torch.device("cpu"), samplings=2, index=torch.arange(7), batch_size=3
    )
    x, means = model.target_encoder.tokens(views.clean(torch.arange(7))), []
    for block in model.target_encoder.blocks:
        x = block(x)
        means.append(x[:, 1:].mean(1))
    last = model.target_encoder.norm(x)
    torch.testing.assert_close(
        features.clean[0], torch.cat([*means[2:], last[:, 1:].mean(1)], dim=1), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(features.cls[0], last[:, 0], atol=1e-4, rtol=1e-4)
    assert features.crops.shape == (2, 7, 5 * 128) and not torch.equal(
        features.crops[0], features.crops[1]
    )
    assert (
        all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        and model.training
    )
    assert [name for name, _ in features.named()] == ["mean patch token", "[CLS]"]


def test_without_cls_there_is_no_cls_row(setting):
    model, views = setting(cls=False, regions="random")
    features = extract_images(model, views, torch.device("cpu"))
    assert [name for name, _ in features.named()] == [
        "mean patch token"
    ] and features.crops.numel() == 0
    assert list(probes_regions.probe_cls(model, features, features, None)) == []


def test_linear_probe_rates_fall_tenfold_at_8_16_24_of_28_epochs():
    """The rates that the optimiser really used, seen from a parameter whose gradient is 1 at every
    step."""
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.w.expand(len(x))

    head, seen = Constant(), []
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    x, y = torch.zeros(1, 4, 1), torch.zeros(4)

    def loss(out, target):
        seen.append(-head.w.item())
        return out.mean()

    drops, base = probes_regions.LINEAR_DROPS, probes_regions.LINEAR_LR
    fit_classifier(
        head,
        x,
        y,
        optimizer,
        lambda e: base * 0.1 ** sum(e >= d for d in drops),
        28,
        batch_size=4,
        loss=loss,
    )
    steps = torch.tensor([*seen, -head.w.item()]).diff()
    torch.testing.assert_close(
        steps, torch.tensor([0.01] * 8 + [1e-3] * 8 + [1e-4] * 8 + [1e-5] * 4), atol=1e-6, rtol=1e-3
    )


def test_linear_probe_solves_a_separable_problem_and_random_labels_stay_at_chance():
    torch.manual_seed(1)
    y = torch.arange(600) % 3
    x = F.one_hot(y, 3).float() @ torch.randn(3, 10) + 0.1 * torch.randn(600, 10)
    head = nn.Sequential(nn.BatchNorm1d(10, affine=False), nn.Linear(10, 3))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    head = fit_classifier(head, x[None, :400], y[:400], optimizer, lambda e: 0.1, 10)
    assert (head(x[400:]).argmax(1) == y[400:]).float().mean() == 1
    shuffled = y[torch.randperm(600)]
    head = fit_classifier(head, x[None, :400], shuffled[:400], optimizer, lambda e: 0.1, 10)
    assert (head(x[400:]).argmax(1) == shuffled[400:]).float().mean() < 0.5


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
    rows = json.loads((run / "probes-linear-knn-cls-finetune.json").read_text())["rows"]
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
    assert (run / "finetune-folder.pt").exists()
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
