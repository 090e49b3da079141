"""Training the whole encoder on labels (DSeq-JEPA Secs. 4.2, 0.A.1.3): the probe `finetune`, Table
1's second column.

    images (B, 3, S, S)  ->  target encoder without its last LayerNorm  ->  mean patch token
                         ->  a new LayerNorm  ->  linear  ->  logits (B, classes)

The paper adapts "the fine-tuning protocol of MAE", with 50 epochs of batches of 512; all else is
MAE's table. Rates fall with depth and branches drop out, as `TUNING` says for each encoder; a
training image is cropped, flipped, sent through RandAugment and erased in part, then mixed with
another of its batch. Tested on whole images.

RandAugment is torchvision's: it lacks two of the 15 operations of timm's "rand-m9-mstd0.5-inc1",
which MAE names (Invert, SolarizeAdd), and the jitter of the level, and posterises less.
The paper also takes "the same learning rate setting as in I-JEPA", which we could not find: rates
are MAE's. Of ViTs smaller than B, which nobody tuned, all is ours.
The loop is that of loop.py: several processes, exact resumption. Checked in tests/test_finetune.py.
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from dense import loop
from plumbing import distributed
from plumbing.device import seed_all
from probes import QUICK_SHARE, row

EPOCHS = 50
WARMUP_EPOCHS = 5
BATCH_SIZE = 512
LR_END = 1e-6
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1
MIXUP = 0.8                     # both parameters of the Beta distribution of the share that is kept
CUTMIX = 1.0
ROUNDS = 2                      # of RandAugment; in each ...
PROBABILITY = 0.5               # ... an image takes one operation with this probability
ERASE = v2.RandomErasing(p=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")


class Tuning(NamedTuple):
    """What depends on the encoder's size."""
    lr: float                   # for a batch of 256
    layer_decay: float          # of the rate, from one layer to the one below
    drop_path: float            # probability to leave out a branch of the last block


TUNING = {          # by D
    128: Tuning(1e-3, 0.75, 0.0),           # vit-nano, ours
    192: Tuning(1e-3, 0.75, 0.0),           # vit-tiny, ours
    384: Tuning(5e-4, 0.75, 0.1),           # vit-small, ours
    768: Tuning(5e-4, 0.65, 0.1),           # vit-base
    1024: Tuning(1e-3, 0.75, 0.2),          # vit-large
    1280: Tuning(1e-3, 0.75, 0.3),          # vit-huge
}


class Classifier(nn.Module):
    """A copy of a ViT, and on its mean patch token a LayerNorm and a linear head, both new."""

    def __init__(self, vit, classes):
        super().__init__()
        self.vit = copy.deepcopy(vit).requires_grad_(True)
        self.vit.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(vit.dim, eps=1e-6)
        self.head = nn.Linear(vit.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def forward(self, images, targets=None):
        """images (B, 3, S, S)  ->  logits (B, classes); given targets, their cross-entropy.

        targets (B, classes): each row sums to 1."""
        tokens, = self.vit(images)
        C = int(self.vit.cls_token is not None)
        logits = self.head(self.fc_norm(tokens[:, C:].mean(1)))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float(), targets, label_smoothing=SMOOTHING)


def recipe_for(vit, n, epochs):
    """The loop's Recipe for so many epochs of n training images; the warm-up keeps its share.

    The batch is smaller where there are fewer images; the rate is in proportion to it."""
    ranks = distributed.world_size()
    batch_size = min(BATCH_SIZE, max(1, n // ranks) * ranks)
    tuning = TUNING[vit.dim]
    steps = max(1, epochs * n // batch_size)
    return loop.Recipe(
        steps, batch_size, lr=tuning.lr * batch_size / 256, lr_end=LR_END,
        warmup=steps * WARMUP_EPOCHS // EPOCHS, weight_decay=WEIGHT_DECAY,
        layer_decay=tuning.layer_decay, drop_path=tuning.drop_path,
        save_every=max(1, n // batch_size))


def augmented_batches(views, recipe, seed):
    """first step -> iterator over (images (b, 3, S, S), targets (b, classes)) of this rank.

    Which images depends on (seed, step), what becomes of them on (seed, step, rank)."""
    classes = len(views.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=MIXUP, num_classes=classes),
                           v2.CutMix(alpha=CUTMIX, num_classes=classes)])
    operation = rand_augment(views.mean)

    def batches(first):
        for step in range(first, recipe.steps):
            some = loop.chosen(len(views), recipe.batch_size, seed, step)
            index = torch.tensor([i for _, i in some])
            seed_all(seed, 8, step, distributed.rank())
            images = augment(views.augmented(index), views.mean, views.std, operation)
            yield mix(images, views.labels_of(index))

    return batches


def rand_augment(fill):
    """A transform of one image (3, S, S) in [0, 1].  fill (3,): what a warp uncovers."""
    # Of 11 levels the ninth is timm's 9 of 10; of torchvision's usual 31 it would be a third of it.
    once = v2.RandAugment(num_ops=1, magnitude=9, num_magnitude_bins=11, fill=fill.tolist(),
                          interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose(ROUNDS * [v2.RandomApply([once], p=PROBABILITY)])


def augment(images, mean, std, operation):
    """The operation on each image, then erasing: (B, 3, S, S), normalised by mean, std -> same."""
    mean = mean.view(3, 1, 1)
    std = std.view(3, 1, 1)
    pixels = (images * std + mean).clamp_(0, 1)             # rounding may have left it
    # Image by image: on a batch torchvision would draw once for all.
    return torch.stack([ERASE((operation(image) - mean) / std) for image in pixels])


def probe_finetune(model, train, val, setup):
    """Top-1 after training everything (Table 1's second column)."""
    seed_all(setup.seed)
    views = setup.views["train"]
    usual = EPOCHS // QUICK_SHARE if setup.quick else EPOCHS
    epochs = setup.probe_epochs or usual
    net = Classifier(model.representation, len(views.classes))
    recipe = recipe_for(net.vit, len(views), epochs)
    batches = augmented_batches(views, recipe, setup.seed)
    loop.train(net, net.vit, recipe, batches, setup, "finetune")
    yield row("finetune", "class", "mean patch token, all weights", "linear, AdamW", epochs,
              "top-1 %", top1(net, setup.views["val"]))


@torch.inference_mode()
def top1(net, views):
    """Top-1 of a Classifier in per cent, on the images themselves.

    Each rank looks at its share of them; all ranks return the same."""
    right = torch.zeros((), device=views.device)
    for some in torch.tensor(loop.shared(len(views)), dtype=torch.int64).split(256):
        right += (net(views.clean(some)).argmax(1) == views.labels_of(some)).sum()
    mean = distributed.average(dict(right=right))["right"]
    return 100 * mean.item() * distributed.world_size() / len(views)
