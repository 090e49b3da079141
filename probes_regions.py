"""What a ViT's features are worth (DSeq-JEPA Secs. 4.2, 0.A.1.3): the probes of mode `regions`.

    linear     a linear head on the patch tokens of the last four blocks, averaged and joined: 4D
               numbers per image
    knn        nearest neighbours of the mean patch token and of [CLS]: probes.probe_knn
    cls        a linear head on the last [CLS] alone, as the paper does for CLEVR
               (--dataset clevr-count, clevr-distance)

All look at the target encoder, as I-JEPA does, and work on features extracted once; where the
protocol draws a fresh random crop in every epoch, S crops of each training image are drawn, and
epoch e trains on crop e mod S. Fine-tuning and dense tasks are in dense/.

Differs from the paper: numbers of the CLEVR head that our copy of the paper lost are ours.
Called by evaluate.py. Checked in tests/test_probes_regions.py.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing.device import seed_all
from probes import accuracy, knn_accuracy, row

LINEAR_EPOCHS = 28
LINEAR_DROPS = (8, 16, 24)      # epochs after which the rate is a tenth
LINEAR_LR = 0.01                # for a batch of 256
LINEAR_DECAY = 5e-4
CLS_EPOCHS = 100
CLS_LR = 1e-3
CLS_DECAY = 1e-2
MASKED = 500                    # images whose object is looked for, at most


# ---------------------------------------------------------------- features

class ImageFeatures(NamedTuple):
    """Frozen features of N images, on the CPU, float32."""
    clean: torch.Tensor     # (1, N, 5D) mean patch tokens of four blocks and of the output
    crops: torch.Tensor     # (S, N, 5D) the same of random crops; empty if none were asked for
    cls: torch.Tensor       # (1, N, D) the last [CLS]; D = 0 if there is none
    labels: torch.Tensor    # (N,)

    def named(self):
        """(name, features (1, N, d)) of what a class is read from without training."""
        D = self.clean.shape[2] // 5
        yield "mean patch token", self.clean[:, :, 4 * D:]
        if self.cls.shape[2]:
            yield "[CLS]", self.cls


@torch.inference_mode()
def extract_images(model, views, device, *, samplings=0, seed=0, batch_size=256, index=None,
                   amp=False, what="features"):
    """ImageFeatures of the images `index` (all if None) by the target encoder, under eval().

    samplings: random crops of each.  amp: bfloat16 autocast.  what: words for the progress bar."""
    index = torch.arange(len(views)) if index is None else index
    was_training = model.training
    model.eval()
    pooled = []             # of the images themselves, then of each sampling of crops: (N, 5D)
    cls = []                # likewise: (N, D)
    for s in range(1 + samplings):
        batches = []
        bar = tqdm(index.split(batch_size), desc=f"{what} {s + 1}/{1 + samplings}", leave=False)
        for i, some in enumerate(bar):
            seed_all(seed, 4, s, i)
            images = views.clean(some) if s == 0 else views(some).views[:, 0]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                batches.append(pool(model.representation, images))
        means, tokens = zip(*batches)
        pooled.append(torch.cat(means))
        cls.append(torch.cat(tokens))
    model.train(was_training)
    pooled = torch.stack(pooled)
    return ImageFeatures(pooled[:1], pooled[1:], cls[0][None], views.labels[index].cpu())


def pool(vit, images):
    """images (b, 3, S, S) -> mean patch tokens of the last four blocks and of the output (b, 5D).

    And the output's [CLS] (b, D), or (b, 0) if there is none; both on the CPU."""
    C = int(vit.cls_token is not None)
    last_four = range(max(1, vit.depth - 3), vit.depth + 1)
    *blocks, output = vit(images, keep=tuple(last_four))
    missing = 4 - len(blocks)
    blocks = missing * [blocks[0]] + blocks                 # a ViT of fewer than four blocks
    means = [tokens[:, C:].float().mean(1) for tokens in (*blocks, output)]
    return torch.cat(means, dim=1).cpu(), output[:, :C].flatten(1).float().cpu()


def measure_images(model, setup):
    """Features of both splits: of the images, and of training crops if the linear probe asks."""
    def features(split, samplings, seed):
        return extract_images(model, setup.views[split], setup.device, samplings=samplings,
                              seed=seed, amp=setup.amp, what=f"{split} features")

    crops = setup.samplings if "linear" in setup.probes else 0
    train = features("train", crops, setup.seed)
    val = features("val", 0, setup.seed + 1)
    return train, val


# ---------------------------------------------------------------- heads on frozen features

def fit_classifier(head, x, y, optimizer, lr_at_epoch, epochs, *, batch_size=256, seed=0,
                   loss=F.cross_entropy):
    """Train `head` on x (S, N, d), y (N,): epoch e sees sampling e mod S.

    lr_at_epoch: e -> learning rate.  The features of a large data set stay in host memory."""
    seed_all(seed)
    device = next(head.parameters()).device
    for module in head.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = lr_at_epoch(epoch)
        for rows in torch.randperm(x.shape[1]).split(batch_size):
            if len(rows) == 1:                      # BatchNorm needs two
                continue
            optimizer.zero_grad(set_to_none=True)
            output = head(x[epoch % len(x)].index_select(0, rows).to(device))
            loss(output, y[rows].to(device)).backward()
            optimizer.step()
    return head.eval()


def probe_linear(model, train, val, setup):
    """Top-1 of a linear head behind a BatchNorm; SGD, 28 epochs, rate / 10 after 8, 16, 24."""
    D = train.clean.shape[2] // 5
    x = train.crops[:, :, :4 * D]
    x_val = val.clean[0, :, :4 * D]
    classes = len(setup.views["val"].classes)
    epochs = setup.probe_epochs or LINEAR_EPOCHS
    drops = [drop * epochs / LINEAR_EPOCHS for drop in LINEAR_DROPS]

    def rate(epoch):
        return LINEAR_LR * 0.1 ** sum(epoch >= drop for drop in drops)

    head = nn.Sequential(nn.BatchNorm1d(4 * D, affine=False, eps=1e-6), nn.Linear(4 * D, classes))
    head = head.to(setup.device)
    optimizer = torch.optim.SGD(head.parameters(), lr=LINEAR_LR, momentum=0.9, nesterov=True,
                                weight_decay=LINEAR_DECAY)
    head = fit_classifier(head, x, train.labels, optimizer, rate, epochs, seed=setup.seed).cpu()
    yield row("linear", "class", "last 4 blocks, mean patch", "BatchNorm, linear, SGD", epochs,
              "top-1 %", accuracy(head, x_val, val.labels))


def probe_cls(model, train, val, setup):
    """Top-1 of a linear head on the last [CLS], AdamW on a cosine: the CLEVR protocol (0.A.1.3)."""
    D = train.cls.shape[2]
    if D == 0:
        return
    classes = len(setup.views["val"].classes)
    epochs = setup.probe_epochs or CLS_EPOCHS

    def rate(epoch):
        return CLS_LR * (1 + math.cos(math.pi * epoch / epochs)) / 2

    head = nn.Linear(D, classes).to(setup.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=CLS_DECAY)
    head = fit_classifier(head, train.cls, train.labels, optimizer, rate, epochs, seed=setup.seed)
    yield row("cls", "class", "[CLS]", "linear, AdamW", epochs, "top-1 %",
              accuracy(head.cpu(), val.cls[0], val.labels))


# ---------------------------------------------------------------- while training

def online_regions(model, setup, some):
    """k-NN top-1 of the mean patch token and of [CLS], NaN without one; then what `on_object` says.

    some: {split: indices (n,) of samples}."""
    train = extract_images(model, setup.views["train"], setup.device, index=some["train"])
    val = extract_images(model, setup.views["val"], setup.device, index=some["val"])
    values = []
    for (_, x), (_, x_val) in zip(train.named(), val.named()):
        values.append(knn_accuracy(x[0], train.labels, x_val[0], val.labels))
    knn_patches = values[0]
    knn_cls = values[1] if len(values) > 1 else float("nan")
    return knn_patches, knn_cls, *on_object(model, setup.views["val"], some["val"][:MASKED])


@torch.inference_mode()
def on_object(model, views, index):
    """Whether saliency finds the object, where the data set knows its pixels (solids).

    ->  mean over images of object_auc, and of the share of R_1's area that shows the object; NaN
    where there are no masks, or no saliency. Images are whole, as in figures."""
    nan = float("nan")
    if views.masks is None or model.plan.proxy == "none":
        return nan, nan
    aucs = []
    shares = []
    for some in index.split(64):
        batch = views(some)._replace(views=views.clean(some)[:, None])
        _, _, saliency = model.look(batch)
        grid = model.encoder.grid
        first = model.plan.regions(saliency, grid) == 1
        shown = of_patches(views.masks(some).to(saliency.device), grid)
        aucs.append(object_auc(saliency, shown))
        has_first = first.any(1)
        share = (shown * first).sum(1) / first.sum(1).clamp(min=1)
        shares.append(share[has_first])
    return torch.cat(aucs).nanmean().item(), torch.cat(shares).mean().item()


def of_patches(masks, grid):
    """Means of masks (n, S, S) over the patches of a grid: (n, P)."""
    n, S, _ = masks.shape
    H, W = grid
    return masks.view(n, H, S // H, W, S // W).mean((2, 4)).flatten(1)


def object_auc(saliency, shown):
    """How well saliency tells pixels of the object from the rest: area under the ROC curve, (n,).

    The chance that of two pixels, one of each kind, that of the object lies in the more salient
    patch; equal saliency counts half. 0.5: no better than chance, 0: always the other way round.
    saliency, and which share of a patch shows the object: (n, P). NaN if one kind is missing."""
    above = (saliency[:, :, None] > saliency[:, None, :]).float()
    above += 0.5 * (saliency[:, :, None] == saliency[:, None, :]).float()
    rest = 1 - shown
    won = torch.einsum("np,npq,nq->n", shown, above, rest)
    return won / (shown.sum(1) * rest.sum(1))
