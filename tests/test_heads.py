"""Heads against closed forms, scores against scikit-learn, blocks against all at once; and the same
heads on features that lie on the disk."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, r2_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from plumbing import heads, scratch
from plumbing.heads import accuracy, knn_accuracy, neighbours, outputs, r2, shuffled, train_head
from probes import fit, linear_head, mlp_head

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


# ---------------------------------------------------------------- blocks

def brute_force(x, y, x_val, y_val, k, temperature=0.07):
    """Top-1 of weighted nearest neighbours, one sample after another, in float64."""
    right = 0
    x = x.double() / x.double().norm(dim=1, keepdim=True)
    for sample, label in zip(x_val.double(), y_val.tolist()):
        similarity = x @ (sample / sample.norm())
        votes = {}
        for i in similarity.argsort(descending=True, stable=True)[:k].tolist():
            weight = math.exp((similarity[i].item() - 1) / temperature)
            votes[y[i].item()] = votes.get(y[i].item(), 0) + weight
        right += max(votes, key=votes.get) == label
    return 100 * right / len(y_val)


@pytest.mark.parametrize("N, n, k, block", [
    (90, 40, 20, 1000),             # one block
    (90, 40, 20, 16),               # blocks smaller than k, short last blocks on both sides
    (90, 40, 20, 30),               # no short one of x
    (7, 5, 20, 4),                  # k > N
    (33, 9, 1, 1),                  # single rows
])
def test_knn_in_blocks_is_brute_force(N, n, k, block, monkeypatch):
    monkeypatch.setattr(heads, "BLOCK", block)
    x = torch.randn(N, 6)
    y = torch.randint(0, 4, (N,))
    x_val = torch.randn(n, 6)
    truth = torch.randint(0, 6, (n,))                               # two classes never seen
    assert knn_accuracy(x, y, x_val, truth, k=k) == pytest.approx(
        brute_force(x, y, x_val, truth, k))


def test_neighbours_in_blocks_are_the_nearest_in_order(monkeypatch):
    x = torch.randn(100, 5)
    rows = torch.randn(8, 5)
    similarity = F.cosine_similarity(rows[:, None], x[None], dim=2)
    best, index = similarity.topk(12, dim=1)
    for block in (7, 12, 50, 100):
        monkeypatch.setattr(heads, "BLOCK", block)
        found, where = neighbours(rows, x, 12)
        torch.testing.assert_close(found, best)
        assert torch.equal(where, index)


def test_ties_across_blocks_count_each_neighbour_once(monkeypatch):
    """Each row stands three times, far apart: any two of equal neighbours have one label."""
    monkeypatch.setattr(heads, "BLOCK", 8)
    x = torch.randn(20, 4).repeat(3, 1)
    y = torch.randint(0, 3, (20,)).repeat(3)
    x_val = torch.randn(15, 4)
    truth = torch.randint(0, 3, (15,))
    for k in (3, 4, 20):
        assert knn_accuracy(x, y, x_val, truth, k=k) == pytest.approx(
            brute_force(x, y, x_val, truth, k))
        _, where = neighbours(x_val, x, k)
        assert all(len(set(row)) == k for row in where.tolist())


def test_collapsed_features_have_neighbours_all_the_same(monkeypatch):
    monkeypatch.setattr(heads, "BLOCK", 16)
    y = torch.arange(60) // 40                                      # two thirds are class 0
    value = knn_accuracy(torch.ones(60, 3), y, torch.ones(9, 3), torch.zeros(9).long(), k=60)
    assert value == 100


def test_outputs_and_accuracy_in_blocks_are_those_of_all_at_once(monkeypatch):
    monkeypatch.setattr(heads, "BLOCK", 16)
    head = linear_head(5, 3)
    x = torch.randn(2, 50, 5)
    y = torch.randint(0, 3, (50,))
    torch.testing.assert_close(torch.cat(list(outputs(head, x))), head(x).detach().flatten(0, 1))
    right = (head(x).argmax(-1) == y).float().mean().item()
    assert accuracy(head, x, y) == pytest.approx(100 * right)
    x[1, 49, 0] = math.nan
    assert math.isnan(accuracy(head, x, y))


# ---------------------------------------------------------------- batches

def test_an_epoch_sees_every_row_once_with_its_target():
    x = torch.arange(20.0).view(2, 10, 1)
    y = torch.arange(10)
    orders = []
    for epoch in range(3):
        torch.manual_seed(epoch)
        pairs = list(shuffled(x, y, CPU, batch_size=4)(epoch))
        assert [len(rows) for rows, _ in pairs] == [4, 4, 2]
        rows = torch.cat([rows for rows, _ in pairs])[:, 0]
        targets = torch.cat([targets for _, targets in pairs])
        assert torch.equal(rows - 10 * (epoch % 2), targets.float())
        assert targets.sort().values.tolist() == list(range(10))
        orders.append(targets.tolist())
    assert orders[0] != orders[1] != orders[2]


def test_a_last_batch_of_one_row_is_left_out_where_two_are_needed():
    x = torch.randn(1, 9, 2)
    y = torch.arange(9)
    assert [len(rows) for rows, _ in shuffled(x, y, CPU, batch_size=4)(0)] == [4, 4, 1]
    batches = shuffled(x, y, CPU, batch_size=4, least=2)
    assert [len(rows) for rows, _ in batches(0)] == [4, 4]
    head = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 9))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    train_head(head, batches, F.cross_entropy, 2, optimizer)        # BatchNorm would refuse one
    assert all(weights.isfinite().all() for weights in head.parameters())


def test_several_features_are_joined_row_by_row():
    x = [torch.randn(2, 30, 3), torch.randn(2, 30, 2), torch.zeros(()).expand(2, 30, 4)]
    y = torch.randn(2, 30, 1)
    joined = torch.cat(x, dim=2)
    parts = fit(linear_head(9, 1), x, y, F.mse_loss, 4)
    whole = fit(linear_head(9, 1), joined, y, F.mse_loss, 4)
    assert torch.equal(parts.weight, whole.weight)
    assert torch.equal(torch.cat(list(outputs(whole, x))), torch.cat(list(outputs(whole, joined))))


def test_the_rate_of_each_epoch_is_the_one_asked_for():
    head = linear_head(1, 1)
    optimizer = torch.optim.SGD(head.parameters(), lr=9.0)
    used = []

    def loss(output, target):
        used.append(optimizer.param_groups[0]["lr"])
        return output.mean()

    batches = shuffled(torch.zeros(1, 4, 1), torch.zeros(4), CPU, batch_size=2)
    train_head(head, batches, loss, 3, optimizer, lambda epoch: 10.0 ** -epoch)
    assert used == [1, 1, 0.1, 0.1, 0.01, 0.01]


# ---------------------------------------------------------------- features on the disk

@pytest.fixture
def both(monkeypatch, tmp_path):
    """x (S, N, d) in memory and on the disk, in half precision."""
    def make(x):
        monkeypatch.setattr(scratch, "IN_MEMORY", 0)
        monkeypatch.delenv("TMPDIR", raising=False)
        stored = scratch.gather(lambda s: [dict(x=x[s])], *x.shape[:2], folder=tmp_path)["x"]
        assert stored.dtype == torch.float16
        return x, stored
    return make


def test_on_disk_heads_and_neighbours_are_those_in_memory_bit_by_bit(both):
    """Numbers that half precision holds exactly: nothing differs but where they lie."""
    x, stored = both((4 * torch.randn(2, 300, 7)).round())
    y = torch.randint(0, 3, (300,))
    in_memory, on_disk = [fit(linear_head(7, 3), rows, y, F.cross_entropy, 3, batch_size=32)
                          for rows in (x, stored)]
    assert torch.equal(in_memory.weight, on_disk.weight)
    assert accuracy(in_memory, x, y) == accuracy(in_memory, stored, y)
    assert knn_accuracy(x[0], y, x[1], y) == knn_accuracy(stored[0], y, stored[1], y)


def test_half_precision_hardly_changes_what_a_head_learns(both):
    """Features of mean 3 and deviation 1, classes that overlap."""
    y = torch.arange(2000) % 4
    centres = 0.6 * torch.randn(4, 16)
    x, stored = both((centres[y] + torch.randn(2000, 16) + 3)[None])
    in_memory, on_disk = [fit(linear_head(16, 4), rows, y, F.cross_entropy, 30)
                          for rows in (x, stored)]
    assert not torch.equal(in_memory.weight, on_disk.weight)
    torch.testing.assert_close(in_memory.weight, on_disk.weight, atol=1e-3, rtol=0)
    top1 = accuracy(in_memory, x, y)
    assert 60 < top1 < 99
    assert accuracy(on_disk, stored, y) == pytest.approx(top1, abs=0.2)
    assert knn_accuracy(stored[0, ::2], y[::2], stored[0, 1::2], y[1::2]) == pytest.approx(
        knn_accuracy(x[0, ::2], y[::2], x[0, 1::2], y[1::2]), abs=0.3)
