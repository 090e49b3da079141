"""Probes (seq-JEPA Secs. 4.3, 5.5, A.2, B.2, B.6): what small heads read from a frozen model.

    features = extract(model, views, ...)    all tensors that probes need, computed once, frozen
    head     = fit(head, x, y, ...)          trained on those plain tensors: no weight moves
    rows     = probe_NAME(model, train, val, setup)      train, val: Features of the two splits

Frozen means frozen: extraction runs under eval() and inference mode, so BatchNorm and dropout are
as at test time and no buffer moves. Where the paper draws fresh views every epoch, extraction draws
S samplings of every sample and epoch e trains on sampling e mod S.

Only what the probes asked for read is extracted, and only a batch of it need be in memory:
plumbing/scratch.py says where the rest is.

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

from plumbing import scratch
from plumbing.device import seed_all
from plumbing.heads import CPU, accuracy, knn_accuracy, outputs, r2, shuffled, train_head

QUICK_SHARE = 5                 # a --quick run trains MLP heads for a fifth of the epochs


@dataclass(frozen=True)
class Setup:
    """What the probes of one evaluation have in common."""
    views: dict                 # {"train", "val"}: samplers of views, images.Views; for dense
                                # probes splits of dense.probes.READERS
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
    folder: Path = None         # of the run: where probes that train for long keep checkpoints, and
                                # features lie that are too large for memory
    tag: str = ""               # and how these end: the data set, and whose weights

    def file(self, probe, suffix):
        """What a probe keeps under this suffix; None where there is no folder."""
        return self.folder and self.folder / f"{probe}-{self.tag}{suffix}"


# ---------------------------------------------------------------- features

class Features(NamedTuple):
    """Frozen features of N samples, each seen S times as a sequence of V views, on the CPU.

    None: no probe reads it.  float32; in half precision if large, but for actions and params."""
    z_clean: torch.Tensor   # (S, N, D) of the mode's clean image; of the first view if it has none
    z: torch.Tensor         # (S, N, 2, D) of the first two views
    a: torch.Tensor         # (S, N, V-1, E) embedded actions
    actions: torch.Tensor   # (S, N, V-1, A)
    params: torch.Tensor    # (S, N, V, P)
    labels: torch.Tensor    # (N,)
    z_agg: dict             # {M: (S, N, D+E)} aggregate of M views and the actions between them
    z_agg_no_views: dict    # the same with all z set to zero: actions alone (Fig. 7, green)
    z_agg_no_actions: dict  # the same with all a set to zero: views alone (Fig. 7, blue; B.2)

    def named(self):
        """(name, features (S, N, d)) of everything that a class is read from."""
        yield "z", self.z_clean
        for M, z_agg in self.z_agg.items():
            yield f"z_agg M={M}", z_agg


ALL = frozenset(Features._fields)
READS = {                       # fields that a probe reads, besides labels; not listed: all
    "classify": {"z_clean", "z_agg"},
    "knn": {"z_clean", "z_agg"},
    "action": {"z", "actions"},
    "parameters": {"z", "params"},
    "path": {"a", "params", "z_agg", "z_agg_no_views", "z_agg_no_actions"},
    "invariance": {"params", "z_agg_no_actions"},
    "retrieval": set(),
    "transfer": {"z_agg"},
}


def extract(model, views, lengths, device, *, fields=ALL, samplings=1, seed=0, batch_size=256,
            index=None, amp=False, what=None, folder=None):
    """Features of the samples `index` (all if None) of `views` for M_val in `lengths`.

    fields: which of them.  amp: bfloat16 autocast.  folder: see plumbing/scratch.py.
    what: them in words; if given, BadInput is raised if one is not finite."""
    index = torch.arange(len(views)) if index is None else index
    words = what or "features"
    M = max((2, *lengths))              # at least two views: the action between them is probed

    @torch.inference_mode()
    def batches(s):
        bar = tqdm(index.split(batch_size), desc=f"{words} {s + 1}/{samplings}", leave=False)
        for i, some in enumerate(bar):
            seed_all(seed, s, i)
            batch = views(some, M)
            clean = views.clean(some) if "z_clean" in fields else None
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                yield extract_batch(model, batch, clean, lengths, fields)

    was_training = model.training
    model.eval()
    found = {}
    if fields - {"labels"}:
        found = scratch.gather(batches, samplings, len(index), folder=folder,
                               exact=("actions", "params"), what=what)
    model.train(was_training)
    values = {name: found.get(name) for name in Features._fields}
    for name in ("z_agg", "z_agg_no_views", "z_agg_no_actions"):
        values[name] = {M: found[f"{name} M={M}"] for M in lengths if name in fields}
    return Features(**values | dict(labels=views.labels[index].cpu()))


def extract_batch(model, batch, clean, lengths, fields):
    """{name: (b, ...)} of one Batch; z_agg and its like for each M by itself.

    clean (b, 3, S, S), or None: the first view is probed instead."""
    z = model.encode(batch.views)
    a = model.embed(batch.actions)
    found = dict(z=z[:, :2], a=a, actions=batch.actions, params=batch.params)
    if "z_clean" in fields:
        found["z_clean"] = z[:, 0] if clean is None else model.encoder(clean)
    inputs = dict(z_agg=(z, a), z_agg_no_views=(0 * z, a), z_agg_no_actions=(z, 0 * a))
    for name, (z, a) in inputs.items():
        for M in lengths if name in fields else ():
            found[f"{name} M={M}"] = model.aggregate(z[:, :M], a[:, :M - 1])
    return {name: rows for name, rows in found.items() if name.split()[0] in fields}


def measure_views(model, setup):
    """Features of both splits for the modes whose samples are sequences of views."""
    fields = frozenset().union(*(READS.get(name, ALL) for name in setup.probes))

    def features(split, samplings, seed):
        return extract(model, setup.views[split], setup.lengths, setup.device, fields=fields,
                       samplings=samplings, seed=seed, amp=setup.amp, what=f"{split} features",
                       folder=setup.folder)

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


def fit(head, x, y, loss, epochs, *, batch_size=256, seed=0, device=CPU):
    """Train `head` with Adam, default settings (A.2), and return it on the CPU.

    x, y: see `shuffled`.  loss: (output, target) -> scalar."""
    head.to(device)
    optimizer = torch.optim.Adam(head.parameters(), fused=True)
    batches = shuffled(x, y, device, batch_size=batch_size)
    return train_head(head, batches, loss, epochs, optimizer, seed=seed).cpu()


def fit_head(kind, x, y, d_out, loss, setup):
    """A trained head of this kind and the epochs it took."""
    make, epochs = HEADS[kind]
    if setup.quick and kind == "mlp":
        epochs = epochs // QUICK_SHARE
    epochs = setup.probe_epochs or epochs
    d_in = sum(part.shape[-1] for part in (x if isinstance(x, list) else [x]))
    return fit(make(d_in, d_out), x, y, loss, epochs, seed=setup.seed, device=setup.device), epochs


# ---------------------------------------------------------------- scores

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

    x, y: pairs (train, val) of tensors (S, N, d), (S, N, k); of x also of lists of tensors."""
    kind = setup.heads.get(predicts, "linear")
    x_train, x_val = x
    y_train, y_val = y
    head, epochs = fit_head(kind, x_train, y_train, y_train.shape[-1], F.mse_loss, setup)
    scores = r2(torch.cat(list(outputs(head, x_val))), y_val.flatten(0, 1))
    mean = row(probe, predicts, features, kind, epochs, "R2", scores.mean().item())
    return mean | dict(per_dimension=scores.tolist())


def probe_classify(model, train, val, setup):
    """Top-1 of a linear classifier on z and on z_agg for every M_val (Tables 1-3, 6)."""
    for (name, x), (_, x_val) in zip(train.named(), val.named()):
        yield top1_row("classify", name, x, train.labels, x_val, val.labels, setup)


def probe_knn(model, train, val, setup):
    """Top-1 of 20 nearest neighbours on the same features: nothing is trained."""
    for (name, x), (_, x_val) in zip(train.named(), val.named()):
        value = knn_accuracy(x[0], train.labels, x_val[0], val.labels, device=setup.device)
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
    """z_agg (S, N, D+E) and a_M (S, N, E): a list of two."""
    a = features.a[:, :, M - 1]
    if ablated == ", no actions":
        return [features.z_agg_no_actions[M], torch.zeros(()).expand(a.shape)]
    if ablated == ", no views":
        return [features.z_agg_no_views[M], a]
    return [features.z_agg[M], a]


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
                       fields=READS["knn"] | READS["action"], seed=setup.seed, index=some[split])

    train = features("train")
    val = features("val")
    M = setup.M_train
    knn_z = knn_accuracy(train.z_clean[0], train.labels, val.z_clean[0], val.labels)
    knn_z_agg = float("nan")
    if setup.lengths:
        knn_z_agg = knn_accuracy(train.z_agg[M][0], train.labels, val.z_agg[M][0], val.labels)
    name, columns = next(iter(setup.views["val"].groups.items()))
    return knn_z, knn_z_agg, action_row(name, columns, train, val, setup)["value"]
