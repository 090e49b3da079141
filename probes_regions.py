"""What a ViT's features are worth (DSeq-JEPA Secs. 4.2, 0.A.1.3): the probes of mode `regions`. Called by evaluate.py.

    linear     a linear head on the patch tokens of the last four blocks, averaged and joined: 4D numbers per image
    knn        nearest neighbours of the mean patch token and of [CLS]: nothing is trained
    cls        a linear head on the last [CLS] alone, as the paper does for CLEVR (--dataset clevr-count, clevr-distance)
    finetune   all weights, 50 epochs

All look at the target encoder, as I-JEPA does. The first three work on features extracted once; where the protocol draws
a fresh random crop in every epoch, S crops of each training image are drawn, and epoch e trains on crop e mod S.
Differs from the paper: fine-tuning has MAE's optimiser, layer-wise rates and schedule, but crops and flips only (no RandAugment,
mixup, drop path or second LayerNorm); numbers that our copy of the paper lost are MAE's, those of the CLEVR head ours.
Checked in tests/test_probes_regions.py.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing.device import seed_all
from probes import accuracy, knn_accuracy

LINEAR_EPOCHS, LINEAR_DROPS, LINEAR_LR, LINEAR_DECAY = 28, (8, 16, 24), 0.01, 5e-4      # lr for a batch of 256
CLS_EPOCHS, CLS_LR, CLS_DECAY = 100, 1e-3, 1e-2
TUNE_EPOCHS, TUNE_WARMUP, TUNE_LR, TUNE_DECAY, LAYER_DECAY, SMOOTHING = 50, 5, 1e-3, 0.05, 0.65, 0.1     # lr for a batch of 512


class ImageFeatures(NamedTuple):
    """Frozen features of N images, on the CPU, float32."""
    clean: torch.Tensor     # (1, N, 5D) of the images themselves: four blocks' mean patch tokens, the last normalised mean patch token
    crops: torch.Tensor     # (S, N, 5D) of random crops; empty if none were asked for
    cls: torch.Tensor       # (1, N, D) the last [CLS]; D = 0 if there is none
    labels: torch.Tensor    # (N,)

    def named(self):
        """(name, features (1, N, d)) of what a class is read from without training."""
        D = self.clean.shape[2] // 5
        yield "mean patch token", self.clean[:, :, 4 * D:]
        if self.cls.shape[2]:
            yield "[CLS]", self.cls


@torch.inference_mode()
def extract_images(model, views, device, *, samplings=0, seed=0, batch_size=256, index=None, amp=False, what="features"):
    """ImageFeatures of the images `index` (all if None) by the target encoder, under eval().  samplings: random crops of each."""
    vit, was_training = model.representation, model.training
    model.eval()
    index = torch.arange(len(views)) if index is None else index

    def encode(images):
        C = int(vit.cls_token is not None)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            *blocks, last = vit(images, keep=tuple(range(max(1, vit.depth - 3), vit.depth + 1)))
        blocks = [blocks[0]] * (4 - len(blocks)) + blocks                         # a ViT of fewer than four blocks
        pooled = torch.cat([x[:, C:].float().mean(1) for x in (*blocks, last)], dim=1)
        return pooled.cpu(), last[:, :C].flatten(1).float().cpu()

    passes = [[] for _ in range(1 + samplings)]
    labels = []
    for s, rows in enumerate(passes):
        for i, some in enumerate(tqdm(index.split(batch_size), desc=f"{what} {s + 1}/{1 + samplings}", leave=False)):
            seed_all(seed, 4, s, i)
            rows.append(encode(views.clean(some) if s == 0 else views(some).views[:, 0]))
            if s == 0:
                labels.append(views.labels[some].cpu())
    model.train(was_training)
    pooled, cls = (torch.stack([torch.cat(column) for column in columns]) for columns in zip(*[zip(*rows) for rows in passes]))
    return ImageFeatures(pooled[:1], pooled[1:], cls[:1], torch.cat(labels))


def measure_features(model, setup):
    """Features of both splits: of the images themselves, and of crops of the training images if the linear probe asks for them."""
    return [extract_images(model, setup.views[split], setup.device, samplings=samplings, seed=setup.seed + i, amp=setup.amp, what=f"{split} features")
            for i, (split, samplings) in enumerate((("train", setup.samplings if "linear" in setup.probes else 0), ("val", 0)))]


def fit_classifier(head, x, y, optimizer, lr_at_epoch, epochs, *, batch_size=256, seed=0, loss=F.cross_entropy):
    """Train `head` on x (S, N, d), y (N,): epoch e sees sampling e mod S at learning rate lr_at_epoch(e)."""
    seed_all(seed)
    device = next(head.parameters()).device                                       # features of a large data set stay in host memory
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr_at_epoch(epoch)
        for rows in torch.randperm(x.shape[1]).split(batch_size):
            if len(rows) > 1:                                                     # BatchNorm needs two
                optimizer.zero_grad(set_to_none=True)
                loss(head(x[epoch % len(x)].index_select(0, rows).to(device)), y[rows].to(device)).backward()
                optimizer.step()
    return head.eval()


def probe_linear(train, val, setup):
    """Top-1 of a linear head behind a BatchNorm, SGD with Nesterov momentum, 28 epochs, rate / 10 at 8, 16, 24."""
    epochs, D = setup.probe_epochs or LINEAR_EPOCHS, train.clean.shape[2] // 5
    x, y = train.crops[:, :, :4 * D], train.labels
    head = nn.Sequential(nn.BatchNorm1d(4 * D, affine=False, eps=1e-6), nn.Linear(4 * D, len(setup.views["val"].classes))).to(setup.device)
    optimizer = torch.optim.SGD(head.parameters(), lr=LINEAR_LR, momentum=0.9, nesterov=True, weight_decay=LINEAR_DECAY)
    drops = [drop * epochs / LINEAR_EPOCHS for drop in LINEAR_DROPS]
    head = fit_classifier(head, x, y, optimizer, lambda e: LINEAR_LR * 0.1 ** sum(e >= drop for drop in drops), epochs, seed=setup.seed).cpu()
    yield setup.row("linear", "class", "last 4 blocks, mean patch", "BatchNorm, linear, SGD", epochs, "top-1 %",
                    accuracy(head, val.clean[0, :, :4 * D], val.labels))


def probe_cls(train, val, setup):
    """Top-1 of a linear head on the last [CLS], AdamW on a cosine: the paper's CLEVR protocol (0.A.1.3)."""
    if not train.cls.shape[2]:
        return
    epochs = setup.probe_epochs or CLS_EPOCHS
    x, y = train.cls, train.labels
    head = nn.Linear(x.shape[2], len(setup.views["val"].classes)).to(setup.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=CLS_DECAY)
    head = fit_classifier(head, x, y, optimizer, lambda e: CLS_LR * (1 + math.cos(math.pi * e / epochs)) / 2, epochs,
                          seed=setup.seed).cpu()
    yield setup.row("cls", "class", "[CLS]", "linear, AdamW", epochs, "top-1 %", accuracy(head, val.cls[0], val.labels))


class Classifier(nn.Module):
    """A ViT and a linear head on its mean patch token: (B, 3, S, S) -> (B, classes)."""

    def __init__(self, vit, classes):
        super().__init__()
        self.vit, self.head = copy.deepcopy(vit).requires_grad_(True), nn.Linear(vit.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)                         # MAE: start from nothing but the features
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        tokens, = self.vit(images)
        return self.head(tokens[:, int(self.vit.cls_token is not None):].mean(1))

    def groups(self):
        """One parameter group per layer, its rate multiplied by LAYER_DECAY for every layer above it; no decay on biases and norms."""
        depth, groups = self.vit.depth, {}
        for name, p in self.named_parameters():
            number = int(name.split(".")[2]) + 1 if name.startswith("vit.blocks.") else depth + 1 if name.startswith(("head", "vit.norm")) else 0
            decay = TUNE_DECAY if p.ndim > 1 else 0.0
            groups.setdefault((number, decay), dict(params=[], scale=LAYER_DECAY ** (depth + 1 - number), weight_decay=decay))["params"].append(p)
        return list(groups.values())


def tuning_rate(step, steps):
    """Share of the peak rate: linear over the first tenth of the steps (5 of 50 epochs), then a cosine to zero."""
    warmup = steps * TUNE_WARMUP / TUNE_EPOCHS
    return (step + 1) / warmup if step + 1 < warmup else 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / (steps - warmup)))


def probe_finetune(train, val, setup):
    """Top-1 after training everything (Table 1's second column): AdamW, rates falling with depth, label smoothing, crops and flips."""
    seed_all(setup.seed)
    views, epochs, batch_size = setup.views["train"], setup.probe_epochs or TUNE_EPOCHS, min(512, len(setup.views["train"]))
    net = Classifier(setup.model.representation, len(setup.views["val"].classes)).to(setup.device).train()
    optimizer = torch.optim.AdamW(net.groups(), betas=(0.9, 0.999))
    steps = len(views) // batch_size
    for step in tqdm(range(epochs * steps), desc="fine-tuning", leave=False):
        epoch, i = divmod(step, steps)
        rate = tuning_rate(step, epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = TUNE_LR * batch_size / 512 * rate * group["scale"]
        seed_all(setup.seed, epoch)
        rows = torch.randperm(len(views))[i * batch_size:(i + 1) * batch_size]
        seed_all(setup.seed, epoch, i + 1)
        batch = views(rows)
        flip = torch.rand(len(rows), 1, 1, 1, device=setup.device) < 0.5
        images = torch.where(flip, batch.views[:, 0].flip(3), batch.views[:, 0])
        with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.amp):
            logits = net(images)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), batch.labels, label_smoothing=SMOOTHING).backward()
        optimizer.step()
    net.eval()
    with torch.inference_mode():
        right = sum((net(setup.views["val"].clean(some)).argmax(1) == setup.views["val"].labels[some].to(setup.device)).sum()
                    for some in torch.arange(len(setup.views["val"])).split(256))
    yield setup.row("finetune", "class", "mean patch token, all weights", "linear, AdamW", epochs, "top-1 %", 100 * right.item() / len(setup.views["val"]))


def online_regions(model, views, config, device, some):
    """Top-1 of k-NN on the mean patch token and on [CLS] (NaN without one).  some: {split: indices}."""
    train, val = (extract_images(model, views[split], device, index=some[split]) for split in ("train", "val"))
    values = [knn_accuracy(x[0], train.labels, x_val[0], val.labels) for (_, x), (_, x_val) in zip(train.named(), val.named())]
    return (*values, float("nan"))[:2]
