"""Pre-train a world model.

    python train.py --dataset stl10 --mode saccade            the paper's STL-10 experiment (Sec. 5.4)
    python train.py --dataset solids --mode saccade --quick   minutes on a laptop, nothing to download
    python train.py ... --resume                              exactly where it stopped
    torchrun --nproc-per-node 8 train.py ...                  8 GPUs; --batch-size stays that of all together (distributed.py)

Prints a progress bar with images/s and the time left; writes runs/NAME/ (see runs.py). Settings: config.py.
Step t draws its views and its dropout from (seed, epoch, step, rank) alone, so a resumed run repeats what an
uninterrupted one would have done. Optimisation: seq-JEPA Sec. 4.2, DSeq-JEPA 0.A.1.2. Checked in tests/test_train.py
and, for several processes, in tests/test_distributed.py.
"""
import copy
import functools
import math
import signal
import sys
import time

import torch
from tqdm import tqdm

import config as settings
import figures
from build import build_model, build_views
from evaluate import online
from plumbing import distributed, files, runs
from plumbing.device import pick_device, place, seed_all, set_up
from plumbing.errors import BadInput
from probes import effective_rank, feature_std

SAVE_SECONDS = 60           # between checkpoints; the end of a run and a signal always save
LOOK_STEPS = 20             # between looks at the loss: each look waits for the device
HEALTH_ROWS = 4096          # features that the spread and rank of an epoch's last batch are computed from
COLLAPSED_STD, COLLAPSED_RANK = 0.05, 1.5       # below either, features have lost their content


def lr_at(step, *, steps, warmup, start, peak, end):
    """Learning rate of a step: linear from `start` to `peak` over `warmup` steps, then on a cosine to `end`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return cosine(min(1.0, (step - warmup) / max(1, steps - 1 - warmup)), peak, end)


def tau_at(progress, *, base, shape="cosine"):
    """EMA momentum of the target encoder: from `base` to 1, on a cosine (seq-JEPA A.3) or linear (I-JEPA)."""
    return cosine(progress, base, 1.0) if shape == "cosine" else base + (1 - base) * progress


def weight_decay_at(progress, *, start, end):
    """Weight decay: from `start` to `end` on a cosine; constant if `end` is negative."""
    return start if end < 0 else cosine(progress, start, end)


def cosine(progress, start, end):
    """From `start` (progress 0) to `end` (progress 1)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model, config, device):
    """AdamW; biases, norms and [AGG], all one-dimensional, are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim > 1], weight_decay=config.weight_decay),
              dict(params=[p for p in trained if p.ndim <= 1], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, fused=device.type in ("cuda", "cpu"))


def compile_all(model, views, **options):
    """torch.compile the model and the pixel work of a mode, in place: parameter names stay free of prefixes.

    The pixel work of mode augment at 64 px launches 254 kernels a view when eager and 38 when compiled (counted under
    torch 2.11), which read and write the images less often."""
    model.compile(**options)
    views.compile(**options)


def compile_or_warn(model, views, draw, autocast):
    """compile_all if trial steps on a copy of the model succeed; otherwise one warning and eager.

    draw: i -> batch. Two are tried, since a ViT's tokens differ in number and the second batch asks for another graph."""
    failure = None
    try:
        trial = copy.deepcopy(model)
        compile_all(trial, views)
        parallel = distributed.data_parallel(trial)
        for i in range(2):
            with autocast():
                out = parallel(draw(i))
            out.loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:              # the compiler's failures have no common type
        failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]
    failures = list(filter(None, distributed.everyone(failure)))
    if failures:
        views.run_eagerly()
        print(f"torch.compile failed ({failures[0]}), running eager; --no-compile hides this line")
    else:
        model.compile()


class Meters:
    """Sums over an epoch, of means over ranks. They stay on the device, so that no step waits for them."""

    def __init__(self, device, when, saved=None):
        """when: step -> words on the learning rate then and the last good checkpoint, for the message on a bad loss."""
        self.when = when
        self.sums = {name: torch.tensor(value, device=device) for name, value in (saved or {}).items()}
        self.sums = self.sums or dict(count=torch.zeros((), device=device), first_bad=torch.zeros((), device=device))

    def add(self, step, **values):
        """Add a step's numbers; remember the first step whose loss was not finite."""
        bad, values = self.sums["first_bad"], distributed.average(values)
        self.sums["first_bad"] = torch.where((bad == 0) & ~values["loss"].isfinite(), step + 1.0, bad)
        for name, value in dict(values, count=1.0).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def saved(self):
        return {name: total.item() for name, total in self.sums.items()}

    def means(self):
        """{name: mean so far}. Waits for the device. Raises BadInput on a loss that was not finite."""
        sums = self.saved()
        count, bad = sums.pop("count"), sums.pop("first_bad")
        if bad > 0:
            raise BadInput(f"the loss was not finite at step {int(bad) - 1} {self.when(int(bad) - 1)}: lower --lr, or look at the data")
        return {name: total / count for name, total in sums.items()}


class Stopwatch:
    """Images per second since it was made."""

    def __init__(self):
        self.start, self.count = time.monotonic(), 0

    def lap(self):
        return round(self.count / (time.monotonic() - self.start), 1)


class StopSignal:
    """SIGTERM and SIGINT ask the loop to save and leave after the step at hand."""

    def __init__(self):
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.set)

    def set(self, number, frame):
        self.number = number


def prepare(config):
    """All that the user's input can make fail. Nothing of the run is written yet.

    -> its checkpoint if --resume, else None; device; views to train on; views to probe, if --probe-every"""
    checkpoint = runs.open_run(config)
    if config.batch_size % distributed.world_size():
        raise BadInput(f"--batch-size {config.batch_size}: cannot be split evenly over {distributed.world_size()} processes; "
                       "choose a multiple of their number")
    device = distributed.own_device(pick_device(config.device))
    views = build_views(config, "pretrain", device)
    if len(views) < config.batch_size:
        raise BadInput(f"--batch-size {config.batch_size}: more than the {len(views):,} samples there are; lower it")
    probe_views = {split: build_views(config, split, device) for split in ("train", "val")} if config.probe_every and distributed.is_main() else None
    return checkpoint, device, views, probe_views


def train(config):
    """Run (or resume) one pre-training.  Returns the exit status: 0, or 128 + signal if one stopped it."""
    checkpoint, device, views, probe_views = distributed.in_turn(prepare, config)
    if len(set(distributed.everyone((len(views), checkpoint and checkpoint["step"])))) > 1:
        raise BadInput("the nodes do not see the same data or not the same run; give each the same --data-dir, and all one --out")
    distributed.connect(device)
    set_up(device)
    model = place(build_model(config, views.groups), device).train()
    distributed.globalise_batchnorm(model)
    optimizer = build_optimizer(model, config, device)

    epoch_steps = len(views) // config.batch_size           # a short last batch would make the graph compile again
    steps, warmup = config.epochs * epoch_steps, config.warmup_epochs * epoch_steps
    images_per_step = config.batch_size * config.views_per_sample

    rate = functools.partial(lr_at, steps=steps, warmup=warmup, start=config.lr_start, peak=config.lr, end=config.lr_end)

    def when(step):
        last = config.run_dir / "last.pt"
        return f"(learning rate {rate(step):.2g}); " + (f"{last}, from before it, is kept" if last.exists() else "nothing had been saved before")

    step, meters = 0, Meters(device, when)
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, meters = checkpoint["step"], Meters(device, when, checkpoint["meters"])
    if config.epochs <= config.warmup_epochs:
        print(f"note: --epochs {config.epochs} ends within --warmup-epochs {config.warmup_epochs}: the learning rate never decays")
    distributed.on_main(runs.create_run, config)
    distributed.on_main(runs.drop_metrics_after, config.run_dir / "metrics.csv", step)
    stop = StopSignal()
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=config.amp and device.type == "cuda")
    if config.compile or (config.compile is None and device.type == "cuda"):
        compile_or_warn(model, views, lambda i: next_batch(views, config, step + i, epoch_steps), autocast)
    parallel = distributed.data_parallel(model)             # after compiling, as PyTorch advises: its compiler does not see through DDP

    stopped, saved_at, clock = 0, time.monotonic(), Stopwatch()
    bar = tqdm(total=steps * images_per_step, initial=step * images_per_step, unit="img", unit_scale=True, desc=config.name,
               disable=not distributed.is_main())
    while step < steps and not stopped:
        batch = next_batch(views, config, step, epoch_steps)
        progress = step / max(1, steps - 1)
        lr = rate(step)
        tau = tau_at(progress, base=config.ema, shape=config.ema_shape)
        decayed, others = optimizer.param_groups
        decayed["lr"] = others["lr"] = lr
        decayed["weight_decay"] = weight_decay_at(progress, start=config.weight_decay, end=config.weight_decay_end)
        out = training_step(model, batch, optimizer, autocast, tau, parallel)
        meters.add(step, loss=out.loss.detach(), **out.logs)
        step += 1
        bar.update(images_per_step)
        clock.count += images_per_step

        if step % LOOK_STEPS == 0:
            bar.set_postfix(loss=f"{meters.means()['loss']:.4f}")
        if step % epoch_steps == 0:
            epoch, means = step // epoch_steps, meters.means()      # waits for the steps under way, so that the clock counts them
            row = dict(epoch=epoch, step=step, **means, lr=lr, tau=tau, **health(out), images_per_second=clock.lap())
            distributed.on_main(end_epoch, row, model, probe_views, config, device, bar)
            meters, clock = Meters(device, when), Stopwatch()       # a fresh clock: probes are not training time
        # A signal reaches the ranks at different steps, and their clocks differ.
        stopped, save_now = distributed.highest(stop.number, time.monotonic() - saved_at > SAVE_SECONDS)
        keep = config.keep_every and step % (config.keep_every * epoch_steps) == 0
        if save_now or stopped or step == steps or keep:
            distributed.on_main(save, config, model, optimizer, step, meters, f"epoch-{step // epoch_steps}.pt" if keep else None)
            saved_at = time.monotonic()
    bar.close()
    if step < steps:
        print(f"stopped by {signal.Signals(int(stopped)).name} after step {step} of {steps}; saved, continue with --resume")
        return 128 + int(stopped)
    distributed.on_main(figures.draw_curves, config.run_dir)
    print(f"{config.run_dir}: {steps} steps done. Next: python evaluate.py {config.run_dir / 'last.pt'} --figures")
    return 0


def training_step(model, batch, optimizer, autocast, tau, parallel=None):
    """One update of model and target from a batch; returns the Output.  parallel: `model` as several ranks call it."""
    with autocast():
        out = (parallel or model)(batch)
    optimizer.zero_grad(set_to_none=True)
    out.loss.backward()
    optimizer.step()
    model.update_target(tau)
    return out


def next_batch(views, config, step, epoch_steps):
    """This rank's share of a step's batch; rows of the one after that lie in host memory or on disk are read ahead.

    Its samples depend on (seed, epoch), its views and the step's dropout on (seed, epoch, step, rank)."""
    views.prefetch(seeded_index(views, config, step + 1, epoch_steps), config.views)
    index = seeded_index(views, config, step, epoch_steps)
    progress = torch.full((), step / max(1, config.epochs * epoch_steps - 1), device=views.device)
    return views(index, config.views)._replace(progress=progress)


def seeded_index(views, config, step, epoch_steps):
    """Which samples this rank sees at a step, (b,) int64. Seeds every generator for that step."""
    epoch, i = divmod(step, epoch_steps)
    share, rank = config.batch_size // distributed.world_size(), distributed.rank()
    index = epoch_order(len(views), config.seed, epoch)[i * config.batch_size + rank * share:][:share]
    seed_all(config.seed, epoch, i, rank)
    return index


def end_epoch(row, model, probe_views, config, device, bar):
    """Warn of collapse, probe if it is time to, and write the epoch's line."""
    warn_of_collapse(row, bar)
    row |= online(model, probe_views, config, device, due=probe_views and row["epoch"] % config.probe_every == 0)
    runs.append_metrics(config.run_dir / "metrics.csv", row)


def health(out):
    """Whether features live: their spread and effective rank over the last batch of an epoch (low = collapse)."""
    z = distributed.gather(out.z.detach().flatten(0, 1)[:HEALTH_ROWS // distributed.world_size()])
    z_agg = distributed.gather(out.z_agg.detach())
    return dict(z_std=feature_std(z), z_rank=effective_rank(z), z_agg_std=feature_std(z_agg), z_agg_rank=effective_rank(z_agg))


def warn_of_collapse(row, bar):
    """Say so, in one line, when an epoch's features have become nearly the same for every input."""
    for name in ("z", "z_agg"):
        std, rank = row[f"{name}_std"], row[f"{name}_rank"]
        if std < COLLAPSED_STD or rank < COLLAPSED_RANK:
            bar.write(f"warning: {name} has collapsed at epoch {row['epoch']} (spread {std:.3f}, effective rank {rank:.1f}): a low loss "
                      "means nothing now; lower --lr, raise --ema, or, but in mode regions, try --z-norm")
            return


def save(config, model, optimizer, step, meters, keep):
    """Checkpoint, unless the loss has gone bad since the last one.  keep: a file name under which it also stays."""
    if meters.sums["count"] > 0:
        meters.means()
    norms = torch._foreach_norm(list(model.parameters()))               # the loss of a last step says nothing of its update
    if not torch.stack(norms).isfinite().all():
        raise BadInput(f"the weights were not finite after step {step - 1} {meters.when(step - 1)}: lower --lr, or look at the data")
    runs.save_checkpoint(config, model, optimizer, step, meters.saved())
    if keep:
        files.link(config.run_dir / "last.pt", config.run_dir / keep)


@functools.lru_cache(maxsize=2)              # asked for at every step, also for the next; drawn once an epoch
def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n samples: (n,) int64 on the CPU, a function of (seed, epoch)."""
    seed_all(seed, epoch)
    return torch.randperm(n)


def main(argv=None):
    """Exit status 0, 2 for bad input, 128 + signal if stopped. Of several ranks the first that fails says why."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))    # clean up while data is being prepared
    distributed.start()
    try:
        status = train(distributed.on_main(settings.from_command_line, argv))
        distributed.finish()
        return status
    except BadInput as error:
        message, status = f"error: {error}", 2
    except torch.OutOfMemoryError:
        message, status = "error: out of memory; lower --batch-size, --image-size, or --views where there are several, or give --resident no", 2
    except OSError as error:
        why = f"{error.filename}: {error.strerror}; free or choose another --out or --data-dir" if error.filename else error
        message, status = f"error: {why}", 2
    except KeyboardInterrupt:
        message, status = "interrupted before training began; nothing was changed", 128 + signal.SIGINT
    except Exception:                           # a bug; or a rank that failed can no longer be reached, and has said why
        first, status = distributed.first_failure(1)
        if first:
            raise
        return status
    first, status = distributed.first_failure(status)
    if first:
        print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
