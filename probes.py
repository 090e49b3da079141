"""Probes (seq-JEPA Secs. 4.3, 5.5, A.2, B.2, B.6): what small heads read from a frozen model.

    features = extract(model, views, ...)    all tensors that probes need, computed once, frozen
    head     = fit(head, x, y, ...)          trained on those plain tensors: no weight moves
    rows     = probe_NAME(model, train, val, setup)      train, val: Features of the two splits

Frozen means frozen: extraction runs under eval() and inference mode, so BatchNorm and dropout are
as at test time and no buffer moves. Where the paper draws fresh views every epoch, extraction draws
S samplings of every sample and epoch e trains on sampling e mod S.

Here are the probes of modes whose samples are sequences of views; those of mode `regions` are in
probes_regions.py. evaluate.py says which mode has which.
Checked in tests/test_probes.py against scikit-learn and closed-form solutions.
"""
import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing.device import seed_all

QUICK_SHARE = 5                 # a --quick run trains MLP heads for a fifth of the epochs


@dataclass(frozen=True)
class Setup:
    """What the probes of one evaluation have in common."""
    views: dict                 # {"train", "val"}: samplers of views, images.Views
    device: torch.device
    seed: int
    M_train: int                # M of the run
    lengths: tuple = ()         # M_val: how many views z_agg is probed on; of methods without
                                # z_agg, none
    probes: tuple = ()          # names of all that will be asked for
    heads: dict = field(default_factory=dict)       # {part of an action: key of HEADS}, or "linear"
    samplings: int = 1          # S, of each training sample
    probe_epochs: int = 0       # of every head; 0: the protocol's
    quick: bool = False
    amp: bool = False           # bfloat16 autocast while features are extracted
    folder: Path = None         # of the run, where probes that train for long keep checkpoints
    tag: str = ""               # and how these end: the data set, and whose weights

    def file(self, probe, suffix):
        """What a probe keeps under this suffix; None where there is no folder."""
        return self.folder and self.folder / f"{probe}-{self.tag}{suffix}"


# ---------------------------------------------------------------- features

class Features(NamedTuple):
    """Frozen features of N samples, each seen S times as a sequence of V views; CPU, float32."""
    z_clean: torch.Tensor   # (S, N, D) of the mode's clean image; of the first view if it has none
    z: torch.Tensor         # (S, N, 2, D) of the first two views
    a: torch.Tensor         # (S, N, V-1, E) embedded actions
    actions: torch.Tensor   # (S, N, V-1, A)
    params: torch.Tensor    # (S, N, V, P)
    labels: torch.Tensor    # (N,)
    z_agg: dict             # {M: (S, N, D+E)} aggregate of M views and the actions between them
    z_agg_no_views: dict       # the same with all z set to zero: actions alone (Fig. 7, green)
    z_agg_no_actions: dict       # the same with all a set to zero: views alone (Fig. 7, blue; B.2)

    def named(self):
        """(name, features (S, N, d)) of everything that a class is read from."""
        yield "z", self.z_clean
        for M, z_agg in self.z_agg.items():
            yield f"z_agg M={M}", z_agg


@torch.inference_mode()
def extract(model, views, lengths, device, *, samplings=1, seed=0, batch_size=256, index=None,
            only_agg=False, amp=False, what="features"):
    """Features of the samples `index` (all if None) of `views` for M_val in `lengths`.

    only_agg: leave out what only other probes than classification on z_agg need (the clean image,
        the ablated aggregates).
    amp: bfloat16 autocast.  what: words for the progress bar."""
    index = torch.arange(len(views)) if index is None else index
    M = max((2, *lengths))              # at least two views: the action between them is probed
    was_training = model.training
    model.eval()
    batches = []
    for s in range(samplings):
        bar = tqdm(index.split(batch_size), desc=f"{what} {s + 1}/{samplings}", leave=False)
        for i, some in enumerate(bar):
            seed_all(seed, s, i)
            batch = views(some, M)
            clean = None if only_agg else views.clean(some)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                batches.append(extract_batch(model, batch, clean, lengths, only_agg))
    model.train(was_training)
    return join(batches, samplings)


def extract_batch(model, batch, clean, lengths, only_agg):
    """Features of one Batch, without the axis of samplings: (b, ...) for (S, N, ...).

    clean (b, 3, S, S), or None: the first view is probed instead."""
    z = model.encode(batch.views)
    a = model.embed(batch.actions)
    z_clean = z[:, 0] if clean is None else model.encoder(clean)

    def aggregates(z, a):
        return {M: model.aggregate(z[:, :M], a[:, :M - 1]).float().cpu() for M in lengths}

    return Features(
        z_clean=z_clean.float().cpu(),
        z=z[:, :2].float().cpu(),
        a=a.float().cpu(),
        actions=batch.actions.float().cpu(),
        params=batch.params.float().cpu(),
        labels=batch.labels.cpu(),
        z_agg=aggregates(z, a),
        z_agg_no_views={} if only_agg else aggregates(0 * z, a),
        z_agg_no_actions={} if only_agg else aggregates(z, 0 * a))


def join(batches, samplings):
    """Features of all batches of one sampling after another, (b, ...) each -> (S, N, ...)."""
    def joined(parts):
        if not isinstance(parts[0], dict):
            return torch.cat(parts).unflatten(0, (samplings, -1))
        by_length = {}
        for M in parts[0]:
            by_length[M] = joined([part[M] for part in parts])
        return by_length

    features = Features(*map(joined, zip(*batches)))                # field by field
    return features._replace(labels=features.labels[0])             # the same in every sampling


def not_finite(features):
    """Names of the fields of Features, of any mode, that hold NaN or Inf."""
    names = []
    for name, value in features._asdict().items():
        tensors = value.values() if isinstance(value, dict) else [value]
        if not all(tensor.isfinite().all() for tensor in tensors):
            names.append(name)
    return names


def measure_views(model, setup):
    """Features of both splits for the modes whose samples are sequences of views."""
    def features(split, samplings, seed):
        return extract(model, setup.views[split], setup.lengths, setup.device,
                       samplings=samplings, seed=seed, only_agg=setup.probes == ("transfer",),
                       amp=setup.amp, what=f"{split} features")

    train = features("train", setup.samplings, setup.seed)
    val = features("val", 1, setup.seed + 1)
    return train, val


# ---------------------------------------------------------------- heads

def linear_head(d_in, d_out):
    """One linear map (A.2)."""
    return nn.Linear(d_in, d_out)


def mlp_head(d_in, d_out):
    """One hidden layer of 1024 with ReLU (A.2)."""
    return nn.Sequential(nn.Linear(d_in, 1024), nn.ReLU(), nn.Linear(1024, d_out))


HEADS = {                       # and for how many epochs each is trained, A.2
    "linear classifier": (linear_head, 300),
    "mlp": (mlp_head, 300),
    "linear": (linear_head, 50),
}


def fit(head, x, y, loss, epochs, *, batch_size=256, seed=0, device="cpu"):
    """Train `head` with Adam, default settings (A.2), and return it on the CPU.

    x (S, N, d), y (S, N, ...) or (N, ...): epoch e sees sampling e mod S.
    loss: (output, target) -> scalar."""
    S, N, _ = x.shape
    y = y if y.shape[:2] == (S, N) else y.expand(S, *y.shape)
    seed_all(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()               # so that its start depends on `seed` alone
    head.to(device).train()
    x = x.to(device)
    y = y.to(device)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    for epoch in range(epochs):
        order = torch.randperm(N).to(device)
        for rows in order.split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            output = head(x[epoch % S].index_select(0, rows))
            loss(output, y[epoch % S].index_select(0, rows)).backward()
            optimizer.step()
    return head.eval().cpu()


def fit_head(kind, x, y, d_out, loss, setup):
    """A trained head of this kind and the epochs it took."""
    make, epochs = HEADS[kind]
    if setup.quick and kind == "mlp":
        epochs = epochs // QUICK_SHARE
    epochs = setup.probe_epochs or epochs
    head = make(x.shape[-1], d_out)
    return fit(head, x, y, loss, epochs, seed=setup.seed, device=setup.device), epochs


# ---------------------------------------------------------------- scores

@torch.inference_mode()
def accuracy(head, x, y):
    """Top-1 in per cent, averaged over samplings; NaN if the head diverged.  x (S, N, d), y (N,)"""
    scores = head(x)
    if not scores.isfinite().all():
        return float("nan")
    return 100 * (scores.argmax(-1) == y).float().mean().item()


def r2(prediction, target):
    """R^2 per output dimension: 1 - SSE/SST, (n, k), (n, k) -> (k,).  The paper reports its mean.

    As scikit-learn: a constant target scores 1 if predicted exactly, else 0. Constant is also what
    varies by no more than float32 rounds."""
    target = target.double()            # in float32 the mean of equal numbers is not quite theirs
    sse = (target - prediction).square().sum(0)
    sst = (target - target.mean(0)).square().sum(0)
    rounding = torch.finfo(torch.float32).eps * target.abs().amax(0)
    score = 1 - sse / sst.clamp_min(torch.finfo(sst.dtype).tiny)
    return torch.where(sst > len(target) * rounding.square(), score, (sse == 0).to(score))


@torch.inference_mode()
def knn_accuracy(x, y, x_val, y_val, k=20, temperature=0.07):
    """Top-1 in per cent of k nearest neighbours by cosine similarity, votes exp(similarity / T).

    x (N, d), y (N,), x_val (n, d), y_val (n,).  No head is trained, so nothing can overfit."""
    x = F.normalize(x, dim=1)
    x_val = F.normalize(x_val, dim=1)
    classes = int(y.max()) + 1
    correct = 0
    for rows, labels in zip(x_val.split(1024), y_val.split(1024)):
        similarity, nearest = (rows @ x.T).topk(min(k, len(x)), dim=1)
        weight = (similarity / temperature).softmax(1)
        votes = weight.new_zeros(len(rows), classes).scatter_add(1, y[nearest], weight)
        correct += (votes.argmax(1) == labels).sum().item()
    return 100 * correct / len(y_val)


def retrieval_ranks(z_hat, candidates, true, allowed):
    """Rank, from 1, of the true candidate by cosine similarity to the prediction.  -> (n,)

    z_hat (n, D), candidates (n, V, D), true (n,) index of the right one, allowed (n, V) bool: which
    compete.  Ties count against the prediction, so that collapsed features cannot win."""
    similarity = F.cosine_similarity(z_hat[:, None], candidates, dim=2)
    right = similarity.gather(1, true[:, None])
    return ((similarity >= right) & allowed).sum(1)


# ---------------------------------------------------------------- probes: rows of the table

def row(probe, predicts, features, head, epochs, unit, value):
    """One line of the table."""
    return {"probe": probe, "predicts": predicts, "from": features, "head": head,
            "epochs": epochs, "unit": unit, "value": value}


def top1_row(probe, name, x, labels, x_val, labels_val, setup):
    """A row: a linear classifier trained on x (S, N, d), labels (N,), its top-1 on the others."""
    classes = len(setup.views["val"].classes)
    head, epochs = fit_head("linear classifier", x, labels, classes, F.cross_entropy, setup)
    value = accuracy(head, x_val, labels_val)
    return row(probe, "class", name, "linear classifier", epochs, "top-1 %", value)


def regression(probe, predicts, features, x, y, setup):
    """A row: the paper's head for `predicts`, its R^2 averaged over the dimensions.

    x, y: pairs (train, val) of tensors (S, N, d), (S, N, k)."""
    kind = setup.heads.get(predicts, "linear")
    x_train, x_val = x
    y_train, y_val = y
    head, epochs = fit_head(kind, x_train, y_train, y_train.shape[-1], F.mse_loss, setup)
    with torch.inference_mode():
        scores = r2(head(x_val).flatten(0, 1), y_val.flatten(0, 1))
    mean = row(probe, predicts, features, kind, epochs, "R2", scores.mean().item())
    return mean | dict(per_dimension=scores.tolist())


def probe_classify(model, train, val, setup):
    """Top-1 of a linear classifier on z and on z_agg for every M_val (Tables 1-3, 6)."""
    for (name, x), (_, x_val) in zip(train.named(), val.named()):
        yield top1_row("classify", name, x, train.labels, x_val, val.labels, setup)


def probe_knn(model, train, val, setup):
    """Top-1 of 20 nearest neighbours on the same features: nothing is trained."""
    for (name, x), (_, x_val) in zip(train.named(), val.named()):
        value = knn_accuracy(x[0], train.labels, x_val[0], val.labels)
        yield row("knn", "class", name, "k-NN, k 20, T 0.07", 0, "top-1 %", value)


def probe_action(model, train, val, setup):
    """R^2 of the relative action from the z of its two views (Sec. 4.3)."""
    for name, columns in setup.views["val"].groups.items():
        yield action_row(name, columns, train, val, setup)


def action_row(name, columns, train, val, setup):
    """R^2 of these columns of the first action."""
    x = [features.z.flatten(2) for features in (train, val)]
    y = [features.actions[:, :, 0, columns] for features in (train, val)]
    return regression("action", name, "z_1, z_2", x, y, setup)


def probe_parameters(model, train, val, setup):
    """R^2 of a view's own transformation parameters from its z alone (Table 1, last column)."""
    for name, columns in setup.views["val"].param_groups.items():
        x = [features.z[:, :, 0] for features in (train, val)]
        y = [features.params[:, :, 0, columns] for features in (train, val)]
        yield regression("parameters", name, "z_1", x, y, setup)


def probe_path(model, train, val, setup):
    """Path integration (Sec. 5.5): R^2 of the action x_1 -> x_{M+1} from (z_agg, a_M).

    Then the same without actions, and without views (Fig. 7)."""
    views = setup.views["val"]
    name, columns = next(iter(views.groups.items()))
    for M in train.z_agg:
        y = []
        for features in (train, val):
            path = views.relative(features.params[:, :, 0], features.params[:, :, M])
            y.append(path[..., columns])
        for ablated in ("", ", no actions", ", no views"):
            x = [path_input(features, M, ablated) for features in (train, val)]
            yield regression("path", name, f"z_agg, a_M, M={M}{ablated}", x, y, setup)


def path_input(features, M, ablated):
    """(z_agg, a_M), (S, N, D+2E)."""
    a = features.a[:, :, M - 1]
    if ablated == ", no actions":
        return torch.cat([features.z_agg_no_actions[M], 0 * a], dim=2)
    if ablated == ", no views":
        return torch.cat([features.z_agg_no_views[M], a], dim=2)
    return torch.cat([features.z_agg[M], a], dim=2)


def probe_invariance(model, train, val, setup):
    """R^2 of each view's rotation from z_agg with actions zeroed, averaged over the views (B.2)."""
    M = setup.M_train
    columns = setup.views["val"].param_groups["rotation"]
    x = train.z_agg_no_actions[M], val.z_agg_no_actions[M]
    rows = []
    for i in range(M):
        y = train.params[:, :, i, columns], val.params[:, :, i, columns]
        rows.append(regression("invariance", "rotation", f"z_agg M={M}, no actions", x, y, setup))
    per_view = [r["value"] for r in rows]
    yield rows[0] | dict(value=sum(per_view) / M, per_view=per_view)


@torch.inference_mode()
def probe_retrieval(model, train, val, setup):
    """Does z_hat find the true next view among the object's views it has not seen?

    MRR, H@1, H@5 (as SIE's predictor metrics)."""
    model.eval()
    views = setup.views["val"]
    M = setup.M_train
    V = views.view_count
    ranks = []
    for index in torch.arange(len(views)).split(16):                # b objects, all their renders
        seed_all(setup.seed, 2, int(index[0]))
        chosen = torch.rand(len(index), V).topk(M + 1).indices      # (b, M+1) in 0..V-1, distinct
        pixels, params = views.all_views(index)                     # (b, V, 3, S, S), (b, V, P)
        chosen = chosen.to(params.device)
        seen = chosen[:, :M]
        each = torch.arange(len(index), device=params.device)[:, None]

        path = params[each, chosen]                                 # (b, M+1, P)
        a = model.embed(views.relative(path[:, :-1], path[:, 1:]))
        z = model.encode(pixels[each, seen])
        z_hat = model.predict(model.aggregate(z, a[:, :-1]), a[:, -1])
        candidates = model.target_encoder(pixels.flatten(0, 1)).unflatten(0, (-1, V))
        unseen = torch.ones(len(index), V, dtype=torch.bool, device=z.device)
        unseen[each, seen] = False
        ranks.append(retrieval_ranks(z_hat, candidates, chosen[:, M], unseen).cpu())

    ranks = torch.cat(ranks).float()
    scores = {"MRR": 1 / ranks, "H@1": (ranks <= 1).float(), "H@5": (ranks <= 5).float()}
    features = f"z_hat, M={M}, among {V - M}"
    for name, score in scores.items():
        yield row("retrieval", "next view", features, "none", 0, name, score.mean().item())


def probe_transfer(model, train, val, setup):
    """Top-1 on another data set's classes from z_agg, with the multiply-adds of an image (B.6)."""
    for M, x in train.z_agg.items():
        cost = multiply_adds(model, setup.views["val"], M) / 1e9
        name = f"z_agg M={M}, {cost:.3g}e9 MAC an image"
        top1 = top1_row("transfer", name, x, train.labels, val.z_agg[M], val.labels, setup)
        yield top1 | dict(gmac=cost, patch_size=setup.views["val"].patch_size)


def multiply_adds(model, views, M):
    """Multiply-adds to encode and aggregate M views of one image: the "flops" of B.6.

    A FLOP counter's number, halved."""
    from torch.utils.flop_counter import FlopCounterMode  # not above: for this alone, 0.1 s

    batch = views(torch.zeros(2, dtype=torch.long), M)
    model = copy.deepcopy(model).train()    # the counter does not see eval mode's fused transformer
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        z = model.encode(batch.views[:, :M])
        a = model.embed(batch.actions)
        model.aggregate(z, a[:, :M - 1])
    return counter.get_total_flops() / 2 / len(batch.views)


def online_views(model, setup, some):
    """k-NN top-1 of z and of z_agg (NaN without one), R^2 of the action.

    some: {split: indices (n,) of samples}."""
    def features(split):
        return extract(model, setup.views[split], setup.lengths, setup.device,
                       seed=setup.seed, index=some[split])

    train = features("train")
    val = features("val")
    M = setup.M_train
    knn_z = knn_accuracy(train.z_clean[0], train.labels, val.z_clean[0], val.labels)
    knn_z_agg = float("nan")
    if setup.lengths:
        knn_z_agg = knn_accuracy(train.z_agg[M][0], train.labels, val.z_agg[M][0], val.labels)
    name, columns = next(iter(setup.views["val"].groups.items()))
    return knn_z, knn_z_agg, action_row(name, columns, train, val, setup)["value"]
