"""How a network with a ViT inside is trained on labels: the loop of segmentation, detection and
fine-tuning (DSeq-JEPA Table 2, 0.A.1.3).

    batches = from_files(samples, recipe, setup, collate)       first step -> batches from there on
    train(net, vit, recipe, batches, setup, name)               net(*batch) -> loss, a scalar

It differs from pre-training (train.py) in what such recipes have: rates that fall with a layer's
depth, a warm-up and one fall of the rate, stochastic depth, no target encoder. Under torchrun each
rank has its share of every batch. Training goes on exactly where its last checkpoint was written:
what a step sees depends on (seed, step, rank) alone, and a sample's crop on (seed, epoch, index),
whoever draws it.
Checked in tests/test_dense_loop.py.
"""
import hashlib
import math
import os
import signal
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from plumbing import distributed
from plumbing.device import place, seed_all
from plumbing.errors import BadInput
from plumbing.files import save_atomically

BETAS = (0.9, 0.999)
LOOK_STEPS = 20             # between looks at the loss: each look waits for the device
SHAPES = {                  # how far the rate has fallen, by the share of the steps that is done
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,                                # "poly" of power 1
}


class Recipe(NamedTuple):
    """How long, how fast. `lr` is for a batch of `batch_size`, whatever the number of ranks."""
    steps: int
    batch_size: int             # of all ranks together
    lr: float                   # highest rate, of what is not in the ViT
    lr_end: float = 0.0
    warmup: int = 0             # steps, linear from 0
    shape: str = "cosine"       # key of SHAPES
    weight_decay: float = 0.05
    layer_decay: float = 1.0    # of the rate, from one layer to the one below; 1: the same for all
    drop_path: float = 0.0      # of the last block; the first has none
    save_every: int = 1000      # a checkpoint every so many steps

    def lasting(self, epochs, samples):
        """The same for so many passes over so many samples; the warm-up keeps its share."""
        steps = max(1, epochs * samples // self.batch_size)
        return self._replace(steps=steps, warmup=self.warmup * steps // self.steps)

    def epochs(self, samples):
        """Passes over so many samples, rounded."""
        return round(self.steps * self.batch_size / samples)


def rate(recipe, step):
    """Learning rate at a step, counted from 0."""
    if step + 1 < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = max(0, step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr_end + (recipe.lr - recipe.lr_end) * SHAPES[recipe.shape](done)


def parameter_groups(net, vit, recipe):
    """Groups for AdamW; `scale` of each is what its rate is multiplied by (as MAE and BEiT).

    Patch embedding and [CLS] are layer 0 of the ViT, its block i is layer i from 1 up, and its last
    norm belongs with the rest of the net, at the full rate. What has one axis (biases, norms,
    [CLS]) is not decayed. What needs no gradient is left out."""
    in_vit = {id(parameter): name for name, parameter in vit.named_parameters()}
    groups = {}
    for parameter in net.parameters():
        if not parameter.requires_grad:
            continue
        name = in_vit.get(id(parameter), "norm")
        layer = 0
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith("norm"):
            layer = vit.depth + 1
        decay = recipe.weight_decay if parameter.ndim > 1 else 0.0
        scale = recipe.layer_decay ** (vit.depth + 1 - layer)
        empty = dict(params=[], scale=scale, weight_decay=decay)
        groups.setdefault((layer, decay), empty)["params"].append(parameter)
    return list(groups.values())


# ---------------------------------------------------------------- the loop

def train(net, vit, recipe, batches, setup, name):
    """Train `net`, in place, and leave it under eval().

    net: net(*batch) is the mean loss of this rank's samples, a scalar.  vit: the ViT within it.
    batches: first step -> iterator over this rank's batches, tuples on the device.
    setup: probes.Setup.  name: the probe's; its checkpoint is setup.file(name, ".pt"), but of
    --quick, which takes minutes, none: it would only be in the way of the next try.
    Raises: BadInput if loss or weights are not finite, or the checkpoint is another training's."""
    if recipe.batch_size % distributed.world_size():
        raise BadInput(f"--nproc-per-node: batches of {recipe.batch_size} cannot be split evenly "
                       f"over {distributed.world_size()} processes; start a number that divides it")
    keep = None if setup.quick else setup.file(name, ".pt")
    what = f"{name}, {setup.tag}"
    key = [name, setup.views["train"].digest(), setup.seed, *recipe, digest(net)]
    net = distributed.globalise_batchnorm(place(net, setup.device)).train()
    vit.drop_paths(recipe.drop_path)
    optimizer = torch.optim.AdamW(parameter_groups(net, vit, recipe), lr=recipe.lr, betas=BETAS)
    first = resume(net, optimizer, key, keep)
    if len(set(distributed.everyone(first))) > 1:
        raise BadInput(f"{keep}: not all nodes see it; give them one folder of runs")
    parallel = distributed.data_parallel(net)
    losses = []
    with tqdm(total=recipe.steps, initial=first, desc=what, leave=False,
              disable=not distributed.is_main()) as bar:
        for step, batch in zip(range(first, recipe.steps), batches(first)):
            seed_all(setup.seed, 5, step, distributed.rank())       # of drop path and dropout
            for group in optimizer.param_groups:
                group["lr"] = rate(recipe, step) * group["scale"]
            with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.amp):
                loss = parallel(*batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            done = step + 1
            saves = done % recipe.save_every == 0 or done == recipe.steps
            if saves or done % LOOK_STEPS == 0:
                bar.set_postfix(loss=f"{look(losses, net, step, what):.4f}")
                losses.clear()
            if saves and keep:
                distributed.on_main(save, keep, net, optimizer, key, done)
            bar.update()
    net.eval()


def look(losses, net, step, what):
    """Mean loss over steps and ranks. Raises: BadInput unless it and the weights are finite."""
    norms = torch.stack(torch._foreach_norm(list(net.parameters())))
    means = distributed.average(dict(loss=torch.stack(losses).mean(), norm=norms.float().sum()))
    if not all(value.isfinite() for value in means.values()):
        raise BadInput(f"{what}: loss or weights were not finite at step {step}; if the run "
                       "diverged, probe a checkpoint from before that, else lower the rate")
    return means["loss"].item()


# ---------------------------------------------------------------- its checkpoint

def digest(net):
    """A text that tells these weights from others."""
    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def save(keep, net, optimizer, key, step):
    """Write the checkpoint, whole or not at all."""
    state = dict(key=key, step=step, net=net.state_dict(), optimizer=optimizer.state_dict())
    try:
        save_atomically(keep, lambda part: torch.save(state, part))
    except (OSError, RuntimeError) as error:            # RuntimeError: torch's, of a full disk
        raise BadInput(f"{keep}: step {step} could not be saved ({error!s:.100}); "
                       "make room, then start the same again") from None


def resume(net, optimizer, key, keep):
    """Fill in what `keep` holds, if it exists.  -> steps done"""
    if not keep or not keep.exists():
        return 0
    try:
        saved = torch.load(keep, map_location="cpu", weights_only=True)
        same = saved["key"] == key
    except Exception:                   # what torch.load raises on such files has no common type
        raise BadInput(f"{keep}: is damaged or no checkpoint of such a training; "
                       "delete it or move it away") from None
    if not same:
        raise BadInput(f"{keep}: is of a training on other images, from other weights or by "
                       "another recipe; delete it or move it away")
    net.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


# ---------------------------------------------------------------- which samples

class _Drawn(Dataset):
    """samples[i] of an epoch, under the seed of (seed, epoch, i); leaves torch's own stream be."""

    def __init__(self, samples, seed):
        self.samples = samples
        self.seed = seed

    def __getitem__(self, which):
        epoch, index = which
        with torch.random.fork_rng(devices=[]):
            seed_all(self.seed, 6, epoch, index)
            try:
                return self.samples[index]
            except BadInput as error:           # a worker would wrap it into its own traceback
                return error


@lru_cache(maxsize=2)
def _order(n, seed, epoch):
    """The order in which an epoch visits n samples: (n,), of (seed, epoch)."""
    return np.random.default_rng((seed, 7, epoch)).permutation(n)


def chosen(n, batch_size, seed, step):
    """This rank's share of a step's batch: [(epoch, index of one of n samples)].

    Epochs follow one another without a gap: a batch may hold the end of one and the next's
    beginning."""
    share = batch_size // distributed.world_size()
    first = step * batch_size + distributed.rank() * share
    found = []
    for position in range(first, first + share):
        epoch, i = divmod(position, n)
        found.append((epoch, int(_order(n, seed, epoch)[i])))
    return found


def from_files(samples, recipe, setup, collate):
    """`batches` of `train` from anything with a length and samples[i] of setup.views["train"].

    collate: list of samples -> batch, a tuple.  Files are read by as many processes as this rank's
    share of the cores, what lies in memory by this one."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = 0 if setup.views["train"].in_memory else max(1, (os.cpu_count() or 1) // ranks)

    def batches(first):
        indices = (chosen(len(samples), recipe.batch_size, setup.seed, step)
                   for step in range(first, recipe.steps))
        # A generator of its own: otherwise the loader draws from torch's.
        loader = DataLoader(_Drawn(samples, setup.seed), batch_sampler=indices,
                            collate_fn=partial(_collated, collate), num_workers=workers,
                            worker_init_fn=_outlive_signals, generator=torch.Generator(),
                            pin_memory=setup.device.type == "cuda")
        for batch in loader:
            if isinstance(batch, BadInput):
                raise batch
            yield on_device(batch, setup.device)

    return batches


def _outlive_signals(worker):
    """A signal to all processes is this one's to answer: it ends its workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _collated(collate, drawn):
    """A batch, or the first error among what was drawn."""
    errors = [sample for sample in drawn if isinstance(sample, BadInput)]
    return errors[0] if errors else collate(drawn)


def on_device(value, device):
    """Every tensor in lists, tuples and dictionaries moved to the device."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: on_device(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(each, device) for each in value)
    return value


def shared(n):
    """Which of n samples this rank predicts: every k-th of k ranks, none of them twice."""
    return range(distributed.rank(), n, distributed.world_size())
