"""What a ViT's features are worth (DSeq-JEPA Secs. 4.2, 0.A.1.3): the probes of mode `regions`.

    linear     a linear head on the patch tokens of the last four blocks, each under the ViT's last
               norm, averaged and joined: 4D numbers per image
    knn        nearest neighbours of the mean patch token and of [CLS]: probes.probe_knn
    cls        a linear head on the last [CLS] alone, as the paper does for CLEVR
               (--dataset clevr-count, clevr-distance)

All look at the target encoder, as I-JEPA does. `linear` trains on random crops, of 0.08 to 1 of the
image and flipped or not, and is tested on the images themselves, as are the others. The protocol
draws a fresh crop in every epoch. With as many samplings S as epochs or more, so do we, and keep
nothing; with fewer, S crops of each training image are encoded once, and epoch e trains on crop
e mod S. The other features are extracted once: only those that the probes asked for read, and where
they are is for plumbing/scratch.py to say. Fine-tuning and dense tasks are in dense/.

Numbers of `linear` and `cls` are those of the authors' newer settings: our copy of the paper lost
them.
Called by evaluate.py. Checked in tests/test_probes_regions.py.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from plumbing import scratch
from plumbing.device import seed_all
from plumbing.heads import accuracy, knn_accuracy, shuffled, train_head
from probes import row

LINEAR_EPOCHS = 28
LINEAR_DROPS = (8, 16, 24)      # epochs after which the rate is a tenth
LINEAR_LR = 0.01                # for a batch of 256
LINEAR_DECAY = 5e-4
BATCH = 256                     # of both heads on frozen features
CLS_EPOCHS = 100
CLS_LR = 1e-3
CLS_DECAY = 0.05
MASKED = 500                    # images whose object is looked for, at most


# ---------------------------------------------------------------- features

class ImageFeatures(NamedTuple):
    """Frozen features of N images, on the CPU.

    None: there is none, or no probe reads it.  float32; in half precision if large."""
    labels: torch.Tensor            # (N,)
    blocks: torch.Tensor = None     # (S, N, 4D) mean patch tokens of the last four blocks: of S
                                    # random crops, or of the images themselves, S = 1
    mean: torch.Tensor = None       # (1, N, D) mean patch token of the output
    cls: torch.Tensor = None        # (1, N, D) its [CLS]

    def named(self):
        """(name, features (1, N, d)) of what a class is read from without training."""
        yield "mean patch token", self.mean
        if self.cls is not None:
            yield "[CLS]", self.cls


ALL = frozenset({"blocks", "mean", "cls"})
READS = {                       # fields that a probe reads, besides labels; not listed: all
    "linear": {"blocks"},
    "knn": {"mean", "cls"},
    "cls": {"cls"},
    "finetune": set(),
}


def extract_images(model, views, device, *, fields=ALL, crops=0, seed=0, batch_size=256, index=None,
                   amp=False, what=None, folder=None):
    """ImageFeatures of the images `index` (all if None) by the target encoder, under eval().

    fields: which of them.  crops: `blocks` are of that many random crops of each image.
    amp: bfloat16 autocast.  folder: see plumbing/scratch.py.
    what: them in words; if given, BadInput is raised if one is not finite."""
    index = torch.arange(len(views)) if index is None else index
    words = what or "features"

    def gathered(images_of, samplings, fields):
        @torch.inference_mode()
        def batches(s):
            bar = tqdm(index.split(batch_size), desc=f"{words} {s + 1}/{samplings}", leave=False)
            for i, some in enumerate(bar):
                seed_all(seed, 4, s, i)
                images = images_of(some)
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    yield pool(model.representation, images, fields)

        return scratch.gather(batches, samplings, len(index), folder=folder, what=what)

    was_training = model.training
    model.eval()
    found = {}
    if crops and "blocks" in fields:
        found |= gathered(views.augmented, crops, {"blocks"})
        fields = fields - {"blocks"}
    if fields:
        found |= gathered(views.clean, 1, fields)
    model.train(was_training)
    return ImageFeatures(views.labels[index].cpu(), **found)


def pool(vit, images, fields):
    """images (b, 3, S, S) -> {name: (b, ...)} of these fields of ImageFeatures.

    Without [CLS] there is no `cls`."""
    C = int(vit.cls_token is not None)
    keep = ()
    if "blocks" in fields:
        keep = tuple(range(max(1, vit.depth - 3), vit.depth + 1))
    *blocks, output = vit(images, keep=keep)
    found = {}
    if "blocks" in fields:
        blocks = (4 - len(blocks)) * [blocks[0]] + blocks       # a ViT of fewer than four blocks
        # The ViT's last norm on each of them, as the authors and I-JEPA's evaluation have it.
        means = [vit.norm(tokens)[:, C:].float().mean(1) for tokens in blocks]
        found["blocks"] = torch.cat(means, dim=1)
    if "mean" in fields:
        found["mean"] = output[:, C:].float().mean(1)
    if "cls" in fields and C:
        found["cls"] = output[:, 0]
    return found


def measure_images(model, setup):
    """Features of both splits: of crops for training the linear head, else of the images."""
    fields = frozenset().union(*(READS.get(name, ALL) for name in setup.probes))

    def features(split, fields, crops, seed):
        return extract_images(model, setup.views[split], setup.device, fields=fields, crops=crops,
                              seed=seed, amp=setup.amp, what=f"{split} features",
                              folder=setup.folder)

    fresh = setup.samplings >= linear_epochs(setup)
    train = features("train", fields - {"blocks"} if fresh else fields, setup.samplings, setup.seed)
    val = features("val", fields, 0, setup.seed + 1)
    return train, val


# ---------------------------------------------------------------- heads on frozen features

def linear_epochs(setup):
    """For how many epochs the linear head is trained."""
    return setup.probe_epochs or LINEAR_EPOCHS


def fresh_crops(model, setup):
    """What the linear head is trained on, in new crops every epoch: see heads.shuffled.

    Each batch is encoded when its turn comes."""
    views = setup.views["train"]
    model.eval()

    def batches(epoch):
        order = torch.randperm(len(views)).split(BATCH)
        for i, some in enumerate(tqdm(order, desc=f"linear, epoch {epoch + 1}", leave=False)):
            if len(some) == 1:                      # BatchNorm needs two
                continue
            seed_all(setup.seed, 4, epoch, i)
            images = views.augmented(some)
            with torch.no_grad(), torch.autocast(setup.device.type, torch.bfloat16,
                                                 enabled=setup.amp):
                x = pool(model.representation, images, {"blocks"})["blocks"]
            yield x, views.labels_of(some)

    return batches


def probe_linear(model, train, val, setup):
    """Top-1 of a linear head behind a BatchNorm; SGD, 28 epochs, rate / 10 after 8, 16, 24."""
    classes = len(setup.views["val"].classes)
    epochs = linear_epochs(setup)
    drops = [drop * epochs / LINEAR_EPOCHS for drop in LINEAR_DROPS]

    def rate(epoch):
        return LINEAR_LR * 0.1 ** sum(epoch >= drop for drop in drops)

    if train.blocks is None:
        batches = fresh_crops(model, setup)
    else:                                           # BatchNorm needs two rows
        batches = shuffled(train.blocks, train.labels, setup.device, batch_size=BATCH, least=2)
    d = val.blocks.shape[2]
    head = nn.Sequential(nn.BatchNorm1d(d, affine=False, eps=1e-6), nn.Linear(d, classes))
    head = head.to(setup.device)
    optimizer = torch.optim.SGD(head.parameters(), lr=LINEAR_LR, momentum=0.9, nesterov=True,
                                weight_decay=LINEAR_DECAY)
    train_head(head, batches, F.cross_entropy, epochs, optimizer, rate, seed=setup.seed)
    yield row("linear", "class", "last 4 blocks, mean patch", "BatchNorm, linear, SGD", epochs,
              "top-1 %", accuracy(head.cpu(), val.blocks, val.labels))


def probe_cls(model, train, val, setup):
    """Top-1 of a linear head on the last [CLS], AdamW on a cosine: the CLEVR protocol (0.A.1.3)."""
    if train.cls is None:
        return
    classes = len(setup.views["val"].classes)
    epochs = setup.probe_epochs or CLS_EPOCHS

    def rate(epoch):
        return CLS_LR * (1 + math.cos(math.pi * epoch / epochs)) / 2

    head = nn.Linear(train.cls.shape[2], classes).to(setup.device)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=CLS_DECAY)
    batches = shuffled(train.cls, train.labels, setup.device, batch_size=BATCH, least=2)
    train_head(head, batches, F.cross_entropy, epochs, optimizer, rate, seed=setup.seed)
    yield row("cls", "class", "[CLS]", "linear, AdamW", epochs, "top-1 %",
              accuracy(head.cpu(), val.cls, val.labels))


# ---------------------------------------------------------------- while training

def online_regions(model, setup, some):
    """k-NN top-1 of the mean patch token and of [CLS], NaN without one; then what `on_object` says.

    some: {split: indices (n,) of samples}."""
    train, val = [extract_images(model, setup.views[split], setup.device, fields=READS["knn"],
                                 index=some[split]) for split in ("train", "val")]
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
