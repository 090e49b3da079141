"""Pre-train a world model.

    python train.py --dataset stl10 --mode saccade            the paper's STL-10 run (Sec. 5.4)
    python train.py --dataset solids --mode saccade --quick   minutes on a laptop, no download
    python train.py ... --resume                              exactly where it stopped
    torchrun --nproc-per-node 8 train.py ...                  8 GPUs; --batch-size is that of all

Read `train` first: it is a whole training. `training_step` is what happens in a step; what happens
in between (files, signals, several processes) is in plumbing/loop.py and not about JEPA.
Prints a progress bar with images/s and the time left; writes runs/NAME/ (plumbing/runs.py).
Optimisation: seq-JEPA Sec. 4.2, DSeq-JEPA 0.A.1.2. Checked in tests/test_train.py.
"""
import functools
import math
import sys
from typing import NamedTuple

import torch

import config as settings
from build import build_model, build_views
from evaluate import online, protocol
from figures.sequences import draw_curves
from jepa import Output
from plumbing.device import refuse_giant
from plumbing.distributed import unaveraged
from plumbing.loop import Run, launch, micro_batches, next_batch


def train(config):
    """One pre-training, from settings to trained weights. Returns the exit status."""
    refuse_early(config)
    run = Run(config, build_views, each_epoch=online, at_the_end=draw_curves)
    model = run.place(build_model(config, run.views.groups))
    optimizer = build_optimizer(model, config, run.device)
    rates = functools.partial(rates_at, config=config, epoch_steps=run.epoch_steps)
    forward = run.begin(model, optimizer, rates)
    for step in run.steps():
        batch = next_batch(run.views, config, step, run.epoch_steps)
        out = training_step(model, batch, optimizer, rates(step), forward, config.accumulate)
        run.record(step, out)
    return run.finish()


def training_step(model, batch, optimizer, rates, forward=None, accumulate=1):
    """One update of the model and of its target encoder from a batch; returns the Output.

    forward: how the batch goes through the model, if not by `model(batch)`: under autocast, say.
    accumulate: K, the batch goes through it in K parts, one after another."""
    set_rates(optimizer, rates)
    optimizer.zero_grad(set_to_none=True)
    out = backward(model, batch, forward or model, accumulate)
    optimizer.step()
    model.update_target(rates.tau)
    return out


def backward(model, batch, forward, K):
    """Give the model the gradients of the batch's loss; returns the Output.

    With K > 1 parts the loss of the batch is the mean of theirs, each weighted by how many of its
    samples have a loss. What the weights add up to is known after the last part, so gradients of
    weight * loss are gathered, and divided then. The host waits for the device nowhere."""
    if K == 1:
        out = forward(batch)
        out.loss.backward()
        return out
    *early, last = micro_batches(batch, K)
    with unaveraged(forward):
        outputs = [add_gradients(forward(part)) for part in early]
    outputs.append(add_gradients(forward(last)))
    whole = joined(outputs)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    # K times their mean is the sum of the weights.
    torch._foreach_mul_(gradients, 1 / (K * whole.weight).clamp(min=1e-12))
    return whole


def add_gradients(out):
    """Add those of weight * loss to what the parameters have; returns the Output, without graph."""
    (out.weight * out.loss).backward()
    return out._replace(loss=out.loss.detach())


def joined(outputs):
    """The Output of a batch from those of its parts, which are equally large."""
    weights = torch.stack([out.weight for out in outputs])
    losses = torch.stack([out.loss for out in outputs])
    logs = {}
    for name in outputs[0].logs:
        logs[name] = torch.stack([out.logs[name] for out in outputs]).mean()
    return Output(loss=(weights * losses).sum() / weights.sum().clamp(min=1e-12),
                  z=torch.cat([out.z for out in outputs]),
                  z_agg=torch.cat([out.z_agg for out in outputs]),
                  logs=logs, weight=weights.mean())


# ---------------------------------------------------------------- the optimiser

def build_optimizer(model, config, device):
    """AdamW; biases, norms and [AGG], all one-dimensional, are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = dict(params=[p for p in trained if p.ndim > 1], weight_decay=config.weight_decay)
    others = dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)
    fused = device.type in ("cuda", "cpu")
    return torch.optim.AdamW([decayed, others], lr=config.lr, fused=fused)


def set_rates(optimizer, rates):
    """Let the optimiser of `build_optimizer` use these rates."""
    decayed, others = optimizer.param_groups
    decayed["lr"] = rates.lr
    others["lr"] = rates.lr
    decayed["weight_decay"] = rates.weight_decay


# ---------------------------------------------------------------- schedules: functions of the step

class Rates(NamedTuple):
    """What changes from step to step."""
    lr: float
    weight_decay: float
    tau: float              # EMA momentum of the target encoder


def rates_at(step, config, epoch_steps):
    """The Rates of a step.  epoch_steps: steps in an epoch."""
    steps = config.epochs * epoch_steps
    warmup = config.warmup_epochs * epoch_steps
    progress = step / max(1, steps - 1)
    return Rates(
        lr=lr_at(step, steps=steps, warmup=warmup, start=config.lr_start, peak=config.lr,
                 end=config.lr_end),
        weight_decay=weight_decay_at(progress, start=config.weight_decay,
                                     end=config.weight_decay_end),
        tau=tau_at(progress, base=config.ema, shape=config.ema_shape))


def lr_at(step, *, steps, warmup, start, peak, end):
    """Learning rate: linear from `start` to `peak` over `warmup` steps, on a cosine to `end`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(min(1.0, (step - warmup) / max(1, steps - 1 - warmup)), peak, end)


def tau_at(progress, *, base, shape="cosine"):
    """EMA momentum: from `base` to 1, on a cosine (seq-JEPA A.3) or linearly (I-JEPA)."""
    return cosine(progress, base, 1.0) if shape == "cosine" else base + (1 - base) * progress


def weight_decay_at(progress, *, start, end):
    """Weight decay: from `start` to `end` on a cosine; constant if `end` is negative."""
    return start if end < 0 else cosine(progress, start, end)


def cosine(progress, start, end):
    """From `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def refuse_early(config):
    """Before data is read: a mode that evaluation does not know, a model larger than the memory.

    Raises: BadInput."""
    protocol(config.mode)
    groups = settings.MODES[config.mode].groups
    refuse_giant(lambda: build_model(config, groups), config.device)


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped."""
    return launch(train, settings.from_command_line, argv)


if __name__ == "__main__":
    sys.exit(main())
