"""Metrics against scikit-learn, heads against closed forms, and proof that the model is not
touched."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, r2_score
from sklearn.neighbors import KNeighborsClassifier

from build import build_model
from probes import (
    accuracy,
    extract,
    fit,
    knn_accuracy,
    linear_head,
    mlp_head,
    r2,
    retrieval_ranks,
)
from saccades import Saccades

CPU = torch.device("cpu")


@pytest.mark.parametrize("n, k", [(50, 1), (200, 4), (7, 3)])
def test_r2_is_scikit_learn_s(n, k):
    y, noise = torch.randn(n, k, dtype=torch.double), torch.randn(n, k, dtype=torch.double)
    y[:, 0] = y[:, 0] * 10 + 3
    scores = r2(y + 0.7 * noise, y)
    np.testing.assert_allclose(scores, r2_score(y, y + 0.7 * noise, multioutput="raw_values"))
    assert scores.mean().item() == pytest.approx(r2_score(y, y + 0.7 * noise))


def test_r2_of_a_constant_target_as_scikit_learn():
    y = torch.ones(6, 2)
    prediction = torch.stack([torch.ones(6), torch.zeros(6)], dim=1)
    np.testing.assert_allclose(r2(prediction, y), r2_score(y, prediction, multioutput="raw_values"))


def test_accuracy_is_scikit_learn_s():
    head, x, y = linear_head(5, 3), torch.randn(1, 80, 5), torch.randint(0, 3, (80,))
    assert accuracy(head, x, y) == pytest.approx(100 * accuracy_score(y, head(x[0]).argmax(1)))


def test_knn_is_brute_force():
    x, y, x_val = torch.randn(90, 6), torch.randint(0, 4, (90,)), torch.randn(40, 6)
    truth = torch.randint(0, 4, (40,))
    vote = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(x, y)
    assert knn_accuracy(x, y, x_val, truth) == pytest.approx(100 * vote.score(x_val, truth))


def test_linear_regressor_reaches_least_squares():
    x, weight = torch.randn(1, 400, 6), torch.randn(6, 2)
    y = x[0] @ weight + 0.3 * torch.randn(400, 2) + 1.5
    design = torch.cat([x[0], torch.ones(400, 1)], dim=1)
    best = torch.linalg.lstsq(design, y).solution
    head = fit(linear_head(6, 2), x, y, F.mse_loss, epochs=1500)
    torch.testing.assert_close(head.weight.T, best[:-1], atol=0.02, rtol=0.02)
    torch.testing.assert_close(head.bias, best[-1], atol=0.02, rtol=0.02)


def test_mlp_head_learns_what_a_linear_one_cannot():
    x = torch.randn(1, 1000, 2)
    y = (x[0, :, :1] * x[0, :, 1:])
    bent, straight = (
        fit(make(2, 1), x, y, F.mse_loss, 60)(x[0]).detach() for make in (mlp_head, linear_head)
    )
    assert r2(bent, y).item() > 0.9 and r2(straight, y).item() < 0.1
    assert mlp_head(2, 1)[0].out_features == 1024


def test_epoch_e_trains_on_sampling_e_mod_s():
    """Two samplings with opposite targets: one epoch follows the first, and only alternation sees
    both."""
    x = torch.ones(2, 64, 1)
    y = torch.stack([torch.ones(64, 1), -torch.ones(64, 1)])
    one = fit(linear_head(1, 1), x, y, F.mse_loss, epochs=1)
    first_only = fit(linear_head(1, 1), x[:1], y[:1], F.mse_loss, epochs=1)
    assert torch.equal(one.weight, first_only.weight)
    two = fit(linear_head(1, 1), x, y, F.mse_loss, epochs=2)
    assert not torch.equal(
        two.weight, fit(linear_head(1, 1), x[:1], y[:1], F.mse_loss, epochs=2).weight
    )


def test_a_probe_s_result_depends_on_its_seed_alone():
    x, y = torch.randn(1, 50, 4), torch.randn(50, 2)
    results = []
    for state in (1, 2):
        torch.manual_seed(state)
        results.append(fit(linear_head(4, 2), x, y, F.mse_loss, 3).weight)
    assert torch.equal(*results)


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
