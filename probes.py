"""Probes (seq-JEPA Secs. 4.3, A.2): small heads on frozen features, and the numbers that describe features.

    features = extract(model, views, ...)    every tensor the probes need, computed once, without gradient
    head     = fit(head, x, y, ...)          trained on those plain tensors: the model cannot be touched

Frozen means frozen: extraction runs under eval() and inference mode, so BatchNorm and dropout are as at
test time and no buffer moves. Where the paper draws fresh views every epoch, extraction draws S samplings
of every sample and epoch e trains on sampling e mod S.
Checked in tests/test_probes.py against scikit-learn and closed-form solutions.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing.device import seed_all


class Features(NamedTuple):
    """Frozen features of N samples, each seen S times as a sequence of V views; on the CPU, float32."""
    z_clean: torch.Tensor   # (S, N, D) encoder output of the mode's clean image, or of the first view if it has none
    z: torch.Tensor         # (S, N, 2, D) of the first two views
    a: torch.Tensor         # (S, N, V-1, E) embedded actions
    actions: torch.Tensor   # (S, N, V-1, A)
    params: torch.Tensor    # (S, N, V, P)
    labels: torch.Tensor    # (N,)
    z_agg: dict             # {M: (S, N, D+E)} aggregate of the first M views and the actions between them
    z_agg_blind: dict       # the same with all z set to zero: actions alone (Fig. 7, green)
    z_agg_still: dict       # the same with all a set to zero: views alone (Fig. 7, blue; B.2)

    def named(self):
        """(name, features (S, N, d)) of everything that a class is read from."""
        yield "z", self.z_clean
        for M, z_agg in self.z_agg.items():
            yield f"z_agg M={M}", z_agg


@torch.inference_mode()
def extract(model, views, lengths, device, *, samplings=1, seed=0, batch_size=256, index=None, only_agg=False, amp=False,
            what="features"):
    """Features of the samples `index` (all if None) of `views` for the inference lengths M_val in `lengths`.

    only_agg: leave out what only other probes than classification on z_agg need (the clean image, the ablated aggregates).
    amp: bfloat16 autocast."""
    was_training = model.training
    model.eval()
    index = torch.arange(len(views)) if index is None else index
    N, V, rows = len(index), max(*lengths, 2) + 1, []          # at least two observed views: the action between them is probed
    kept = ((1, 1),) if only_agg else ((1, 1), (0, 1), (1, 0))
    for s in range(samplings):
        for i, some in enumerate(tqdm(index.split(batch_size), desc=f"{what} {s + 1}/{samplings}", leave=False)):
            seed_all(seed, s, i)
            batch, clean = views(some, V - 1), None if only_agg else views.clean(some)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                z, a = model.encode(batch.views), model.embed(batch.actions)
                z_clean = z[:, 0] if clean is None else model.encoder(clean)
                aggregates = [model.aggregate(keep_z * z[:, :M], keep_a * a[:, :M - 1]) for keep_z, keep_a in kept for M in lengths]
            row = (z_clean, z[:, :2], a, batch.actions, batch.params, batch.labels, *aggregates)
            rows.append([column.cpu() for column in row])
    model.train(was_training)
    columns = [torch.cat(column).unflatten(0, (samplings, N)) for column in zip(*rows)]
    z_clean, z, a, actions, params = (column.float() for column in columns[:5])
    aggregates = [column.float() for column in columns[6:]]
    z_agg = [dict(zip(lengths, aggregates[i * len(lengths):])) for i in range(3)]
    return Features(z_clean, z, a, actions, params, columns[5][0], *z_agg)


def linear_head(d_in, d_out):
    """One linear map (A.2)."""
    return nn.Linear(d_in, d_out)


def mlp_head(d_in, d_out):
    """One hidden layer of 1024 with ReLU (A.2)."""
    return nn.Sequential(nn.Linear(d_in, 1024), nn.ReLU(), nn.Linear(1024, d_out))


def fit(head, x, y, loss, epochs, *, batch_size=256, seed=0, device="cpu"):
    """Train `head` with Adam, default settings (A.2), and return it on the CPU.

    x (S, N, d), y (S, N, ...) or (N, ...): epoch e sees sampling e mod S.  loss: (output, target) -> scalar."""
    S, N, _ = x.shape
    y = y if y.shape[:2] == (S, N) else y.expand(S, *y.shape)
    seed_all(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()                          # so that a probe's start depends on `seed` alone
    head, x, y = head.to(device).train(), x.to(device), y.to(device)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    for epoch in range(epochs):
        order = torch.randperm(N).to(device)
        for rows in order.split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss(head(x[epoch % S].index_select(0, rows)), y[epoch % S].index_select(0, rows)).backward()
            optimizer.step()
    return head.eval().cpu()


@torch.inference_mode()
def accuracy(head, x, y):
    """Top-1 in per cent, averaged over samplings.  x (S, N, d), y (N,)."""
    return 100 * (head(x).argmax(-1) == y).float().mean().item()


def r2(prediction, target):
    """R^2 per output dimension: 1 - SSE/SST, (n, k), (n, k) -> (k,).  Its mean is the score the paper reports.

    As scikit-learn: a constant target scores 1 if predicted exactly, else 0."""
    sse = (target - prediction).square().sum(0)
    sst = (target - target.mean(0)).square().sum(0)
    score = 1 - sse / sst.clamp_min(torch.finfo(sst.dtype).tiny)
    return torch.where(sst > 0, score, (sse == 0).to(score))


@torch.inference_mode()
def knn_accuracy(x, y, x_val, y_val, k=20, temperature=0.07):
    """Top-1 in per cent of a k-nearest-neighbour vote on cosine similarity, weights exp(similarity / T).

    x (N, d), y (N,), x_val (n, d), y_val (n,).  No head is trained, so nothing can overfit."""
    x, x_val, votes = F.normalize(x, dim=1), F.normalize(x_val, dim=1), int(y.max()) + 1
    correct = 0
    for rows, labels in zip(x_val.split(1024), y_val.split(1024)):
        similarity, nearest = (rows @ x.T).topk(min(k, len(x)), dim=1)
        weight = (similarity / temperature).softmax(1)
        correct += (weight.new_zeros(len(rows), votes).scatter_add(1, y[nearest], weight).argmax(1) == labels).sum().item()
    return 100 * correct / len(y_val)


def retrieval_ranks(z_hat, candidates, true, allowed):
    """Rank, from 1, of the true candidate by cosine similarity to the prediction.  -> (n,)

    z_hat (n, D), candidates (n, V, D), true (n,) index of the right one, allowed (n, V) bool: which compete.
    Ties count against the prediction, so that collapsed features cannot win."""
    similarity = F.cosine_similarity(z_hat[:, None], candidates, dim=2)
    right = similarity.gather(1, true[:, None])
    return ((similarity >= right) & allowed).sum(1)


def feature_std(z):
    """Spread of features (n, D): std of the L2-normalised z per dimension, times sqrt(D). 1 is healthy, 0 collapsed."""
    z = F.normalize(z.detach().float(), dim=1)
    return (z.std(0).mean() * z.shape[1] ** 0.5).item()


def effective_rank(z):
    """RankMe (Garrido et al., 2023) of features (n, D): exp of the entropy of the normalised singular values."""
    s = torch.linalg.svdvals(z.detach().float())
    p = s / s.sum().clamp_min(1e-12)
    return torch.exp(-(p * torch.log(p + 1e-12)).sum()).item()
