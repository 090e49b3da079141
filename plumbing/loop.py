"""The loop's machinery: what happens before, between and after training steps.

    launch(train, parse, argv)      a script's `main`: every failure becomes one line and a status
    run = Run(config, ...)          device, data, the run's folder; refuses what cannot be trained
    run.place(model)                on the device, ready to train
    forward = run.begin(model, optimizer, rates)
                                    weights of a checkpoint, if resumed; torch.compile; the bar
    for step in run.steps():        ends when done, or after a signal
        ...                         one training step, of forward(batch)
        run.record(step, out)       meters, warnings, online probes, metrics.csv, checkpoints;
                                    moves on to the next step
    run.finish()                    the last words, and the exit status
    next_batch(views, ...)          a step's samples, under the step's own seed
    micro_batches(batch, K)         the same in K parts

Nothing in here is about JEPA. What a run's folder holds: runs.py; several processes:
distributed.py. Step t draws its views and its dropout from (seed, epoch, step, rank) alone, so a
resumed run repeats what an uninterrupted one would have done.
Checked in tests/test_train.py, tests/test_kill.py and, for several processes, test_distributed.py.
"""
import contextlib
import copy
import functools
import math
import signal
import sys
import time

import torch
from tqdm import tqdm

from plumbing import distributed, files, runs
from plumbing.device import (
    compile_all,
    is_out_of_memory,
    pick_device,
    place,
    seed_all,
    under_autocast,
)
from plumbing.errors import BadInput, printable
from plumbing.health import Meters, Stopwatch, collapsed, health

SAVE_SECONDS = 60           # between checkpoints; the end of a run and a signal always save
LOOK_STEPS = 20             # between looks at the loss: each look waits for the device
GRACE_SECONDS = 4           # after a signal, for the step at hand to end and be saved

_closing = contextlib.ExitStack()       # what ends with a run, however it ends: see `launch`


class Run:
    """One pre-training, as the machine sees it."""

    def __init__(self, config, build_views, each_epoch, at_the_end):
        """Prepare all that the user's input can make fail; nothing of the run is written yet.

        build_views: (config, split, device) -> views of a split.
        each_epoch: (model, probe views, config, device, due=bool) -> more columns for metrics.csv.
        at_the_end: (run folder) -> None, called when all steps are done.
        Raises: BadInput."""
        self.config = config
        self.each_epoch = each_epoch
        self.at_the_end = at_the_end
        prepared = distributed.in_turn(prepare, config, build_views)
        self.checkpoint, self.device, self.views, self.probe_views = prepared
        begins_at = self.checkpoint and self.checkpoint["step"]
        if len(set(distributed.everyone((len(self.views), begins_at)))) > 1:
            raise BadInput("the nodes do not see the same data or not the same run; "
                           "give each the same --data-dir, and all one --out")
        distributed.connect(self.device)
        # A short last batch would make the graph compile again, so there is none.
        self.epoch_steps = len(self.views) // config.batch_size
        self.total_steps = config.epochs * self.epoch_steps
        self.images_per_step = config.batch_size * config.views_per_sample
        self.images = self.views.digest()
        if self.checkpoint:
            self.check_progress()

    def check_progress(self):
        """Raises BadInput if a checkpoint's step and sums are not of an epoch of this length."""
        step = self.checkpoint["step"]
        meters = self.checkpoint["meters"]
        into_epoch = step % self.epoch_steps
        fits = step <= self.total_steps and meters.get("count") == into_epoch
        fits = fits and meters.get("first_bad") == 0
        if into_epoch:
            fits = fits and math.isfinite(meters.get("loss", math.nan))
        if not fits:
            raise BadInput(f"{self.config.run_dir / 'last.pt'}: step {step:,} and its meters are "
                           f"not of {self.config.epochs:,} epochs of {self.epoch_steps:,} steps; "
                           "was the data changed, or the file edited?")
        before = self.checkpoint.get("images")
        if before not in (None, self.images) and distributed.is_main():
            print(f"note: --resume: {printable(self.config.data_dir)} does not hold the images "
                  "that the run began with, or they are read otherwise: what comes is not the "
                  "run as it would have gone on")

    def place(self, model):
        """The model on this rank's device, in train mode, with BatchNorms of the global batch."""
        return distributed.globalise_batchnorm(place(model, self.device).train())

    def begin(self, model, optimizer, rates):
        """Fill in what a checkpoint holds and make the run's folder.

        rates: step -> Rates.  -> the model as a function of a batch: compiled, under autocast, and
        with gradients averaged over ranks, as far as each applies."""
        config = self.config
        self.model = model
        self.optimizer = optimizer
        self.rates = rates
        self.step = 0
        self.meters = Meters(self.device, self.when)
        if self.checkpoint:
            runs.refuse_other_revision(model, self.checkpoint, config.run_dir)
            runs.restore(model, self.checkpoint)
            runs.restore_optimizer(optimizer, self.checkpoint)
            self.step = self.checkpoint["step"]
            self.meters = Meters(self.device, self.when, self.checkpoint["meters"])
        if config.epochs <= config.warmup_epochs:
            print(f"note: --epochs {config.epochs} ends within --warmup-epochs "
                  f"{config.warmup_epochs}: the learning rate never decays")
        on_cuda = self.device.type == "cuda"
        forward = functools.partial(under_autocast, device=self.device,
                                    enabled=config.amp and on_cuda)
        if config.compile or (config.compile is None and on_cuda):
            compile_or_warn(model, self.views, self.trial_batch, forward)
        # After compiling, as PyTorch advises: its compiler does not see through DDP.
        parallel = distributed.data_parallel(model)
        distributed.on_main(runs.create_run, config, self.checkpoint)
        distributed.on_main(runs.drop_metrics_after, config.run_dir / "metrics.csv", self.step)
        self.stop_signal = StopSignal(self.give_up)
        self.stopped = 0
        self.saved_at = time.monotonic()
        self.clock = Stopwatch()
        self.bar = tqdm(total=self.total_steps * self.images_per_step,
                        initial=self.step * self.images_per_step, unit="img", unit_scale=True,
                        desc=config.name, disable=not distributed.is_main())
        _closing.callback(self.bar.close)
        _closing.callback(self.stop_signal.call_off)
        return forward(parallel)

    def steps(self):
        """The numbers of the steps that are still to do, until a signal stops the run."""
        while self.step < self.total_steps and not self.stopped:
            yield self.step
        self.bar.close()

    def record(self, step, out):
        """Note what a step gave; look, probe, write and save when it is time to."""
        self.meters.add(step, loss=out.loss.detach(), **out.logs)
        self.step = step + 1
        self.clock.count += self.images_per_step
        if self.checkpoint and step == self.checkpoint["step"]:
            distributed.on_main(self.look_at_columns, self.row(out))
        if self.step % LOOK_STEPS == 0:
            self.bar.set_postfix(loss=f"{self.meters.means()['loss']:.4f}")
        if self.step % self.epoch_steps == 0:
            self.end_epoch(out)
        self.save_if_due()
        self.bar.update(self.images_per_step)       # last: a full disk does not look like the end

    def end_epoch(self, out):
        """Write the epoch's line of metrics.csv, with a warning if features have collapsed."""
        distributed.on_main(self.write_epoch, self.row(out))
        self.meters = Meters(self.device, self.when)
        self.clock = Stopwatch()            # a fresh clock: probes are not training time

    def row(self, out):
        """What a line of metrics.csv says at this step, but for probes."""
        means = self.meters.means()         # waits for the steps under way: the clock counts them
        rates = self.rates(self.step - 1)
        return dict(epoch=self.step // self.epoch_steps, step=self.step, **means, lr=rates.lr,
                    tau=rates.tau, **health(out), images_per_second=self.clock.lap())

    def look_at_columns(self, row):
        """After the first step of a resumed run, not after its first epoch: refuse a metrics.csv
        of other columns."""
        row |= self.each_epoch(self.model, self.probe_views, self.config, self.device, due=False)
        runs.refuse_other_columns(self.config.run_dir / "metrics.csv", row)

    def write_epoch(self, row):
        """Of end_epoch, what rank 0 does while the others wait."""
        warning = collapsed(row)
        if warning:
            self.bar.write(warning)
        due = self.probe_views and row["epoch"] % self.config.probe_every == 0
        row |= self.each_epoch(self.model, self.probe_views, self.config, self.device, due=due)
        runs.append_metrics(self.config.run_dir / "metrics.csv", row)

    def save_if_due(self):
        """Checkpoint after a signal, once a minute, at the end and where --keep-every asks."""
        # A signal reaches the ranks at different steps, and their clocks differ.
        late = time.monotonic() - self.saved_at > SAVE_SECONDS
        self.stopped, late = distributed.highest(self.stop_signal.number, late)
        keep_steps = self.config.keep_every * self.epoch_steps
        keep = keep_steps and self.step % keep_steps == 0
        if late or self.stopped or keep or self.step == self.total_steps:
            self.stop_signal.call_off()             # to save may take its time
            distributed.on_main(self.save, keep)
            self.saved_at = time.monotonic()
            self.stop_signal.patient = self.step == self.total_steps    # curves may take theirs

    def save(self, keep):
        """Checkpoint, unless the loss or the weights have gone bad.  keep: also as epoch-K.pt."""
        if self.meters.sums["count"] > 0:
            self.meters.means()
        norms = torch._foreach_norm(list(self.model.parameters()))
        if not torch.stack(norms).isfinite().all():     # a step's loss says nothing of its update
            raise BadInput(f"the weights were not finite after step {self.step - 1} "
                           f"{self.when(self.step - 1)}: lower --lr, or look at the data")
        runs.save_checkpoint(self.config, self.model, self.optimizer, self.step,
                             self.meters.saved(), self.images)
        if keep:
            folder = self.config.run_dir
            files.link(folder / "last.pt", folder / f"epoch-{self.step // self.epoch_steps}.pt")

    def finish(self):
        """Say how it ended. -> exit status: 0, or 128 + the signal that stopped it."""
        folder = self.config.run_dir
        if self.step < self.total_steps:
            name = signal.Signals(int(self.stopped)).name
            print(f"stopped by {name} after step {self.step} of {self.total_steps}; saved, "
                  "continue with --resume")
            return 128 + int(self.stopped)
        distributed.on_main(self.at_the_end, folder)
        print(f"{folder}: {self.total_steps} steps done. "
              f"Next: python evaluate.py {folder / 'last.pt'} --figures")
        return 0

    def give_up(self, number):
        """Leave after a signal without saving: the step or the probes at hand take too long."""
        self.bar.close()
        last = self.config.run_dir / "last.pt"
        kept = "nothing had been saved before"
        if last.exists():
            kept = f"{last}, the checkpoint before, is kept; continue with --resume"
        print(f"stopped by {signal.Signals(number).name} in step {self.step}, which would have "
              f"taken too long to end; {kept}")
        sys.exit(128 + number)

    def when(self, step):
        """Words for a message on a bad loss: how fast it learned then, and what is left."""
        last = self.config.run_dir / "last.pt"
        kept = f"{last}, from before it, is kept" if last.exists() else \
            "nothing had been saved before"
        return f"(learning rate {self.rates(step).lr:.2g}); {kept}"

    def trial_batch(self, i):
        """A batch to try the compiler on, as large as those that go through the model."""
        batch = next_batch(self.views, self.config, self.step + i, self.epoch_steps)
        return micro_batches(batch, self.config.accumulate)[0]


def prepare(config, build_views):
    """Of Run's constructor, what ranks do one after another.

    -> checkpoint if --resume, else None; device; views to train on; views to probe or None"""
    checkpoint = runs.open_run(config, main=distributed.is_main())
    processes = distributed.world_size()
    if config.batch_size % processes:
        raise BadInput(f"--batch-size {config.batch_size}: cannot be split evenly over {processes} "
                       "processes; choose a multiple of their number")
    share = config.batch_size // processes
    if share % config.accumulate:
        raise BadInput(f"--accumulate {config.accumulate}: does not divide the {share:,} samples "
                       "that a process has of --batch-size; change one of them")
    device = distributed.own_device(pick_device(config.device))
    views = build_views(config, "pretrain", device)
    if len(views) < config.batch_size:
        raise BadInput(f"--batch-size {config.batch_size}: more than the {len(views):,} samples "
                       "there are; lower it")
    probe_views = None
    if config.probe_every and distributed.is_main():
        probe_views = {split: build_views(config, split, device) for split in ("train", "val")}
    return checkpoint, device, views, probe_views


class StopSignal:
    """SIGTERM and SIGINT ask the loop to save and leave after the step at hand.

    Where that takes longer than GRACE_SECONDS, give_up(number of the signal) is called."""

    def __init__(self, give_up):
        self.number = 0
        self.patient = False                                    # once saving has begun
        self.give_up = give_up
        signal.signal(signal.SIGTERM, self.set)
        signal.signal(signal.SIGINT, self.set)
        if hasattr(signal, "SIGALRM"):                          # not on Windows
            signal.signal(signal.SIGALRM, lambda number, frame: self.give_up(self.number))

    def set(self, number, frame):
        if not self.number and not self.patient and hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        self.number = number

    def call_off(self):
        """Do not give up any more, nor for a signal that is still to come."""
        self.patient = True
        if hasattr(signal, "SIGALRM"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def compile_or_warn(model, views, draw, forward):
    """compile_all if trial steps on a copy of the model succeed; else one warning, and eager.

    draw: i -> batch.  forward: model -> function of a batch.  Two batches are tried, since a ViT's
    tokens differ in number and the second batch asks for another graph."""
    failure = None
    try:
        trial = copy.deepcopy(model)
        compile_all(trial, views)
        run_trial = forward(distributed.data_parallel(trial))
        for i in range(2):
            run_trial(draw(i)).loss.backward()
    except Exception as error:              # the compiler's failures have no common type
        if is_out_of_memory(error):
            raise
        first_line = str(error).splitlines()[0] if str(error) else ""
        failure = f"{type(error).__name__}: {first_line}"[:100]
    failures = list(filter(None, distributed.everyone(failure)))
    if failures:
        views.run_eagerly()
        print(f"torch.compile failed ({failures[0]}), running eager; --no-compile hides this line")
    else:
        model.compile()


# ---------------------------------------------------------------- which samples, under which seed

def next_batch(views, config, step, epoch_steps):
    """This rank's share of a step's batch. What comes after it is read ahead where it lies on disk.

    Its samples depend on (seed, epoch); its views and the dropout on (seed, epoch, step, rank)."""
    # The next step first: the seed that this leaves behind is the one of the step at hand.
    views.prefetch(seeded_index(views, config, step + 1, epoch_steps), config.views)
    index = seeded_index(views, config, step, epoch_steps)
    last_step = max(1, config.epochs * epoch_steps - 1)
    progress = torch.full((), step / last_step, device=views.device)
    return views(index, config.views)._replace(progress=progress)


def micro_batches(batch, K):
    """A Batch in K parts of equal size, in its order. Scalars are those of the whole."""
    parts = [x.chunk(K) if x.dim() else [x] * K for x in batch]
    return [type(batch)(*columns) for columns in zip(*parts)]


def seeded_index(views, config, step, epoch_steps):
    """Which samples this rank sees at a step, (b,) int64. Seeds every generator for that step."""
    epoch, i = divmod(step, epoch_steps)
    rank = distributed.rank()
    share = config.batch_size // distributed.world_size()
    order = epoch_order(len(views), config.seed, epoch)
    index = order[i * config.batch_size + rank * share:][:share]
    seed_all(config.seed, epoch, i, rank)
    return index


@functools.lru_cache(maxsize=2)     # asked for at every step and for the next; drawn once an epoch
def epoch_order(n, seed, epoch):
    """The order in which an epoch visits n samples: (n,) int64 on the CPU, of (seed, epoch)."""
    seed_all(seed, epoch)
    return torch.randperm(n)


# ---------------------------------------------------------------- the command

LESS = "lower --batch-size, --image-size, or --views where there are several, or give --resident no"


def launch(train, parse, argv=None, less=LESS, again="continue with --resume"):
    """main of a script that may be several processes: train(parse(argv)), on every rank.

    less, again: advice where memory does not suffice, and where another process was killed.
    -> exit status: that of `train`, 2 for bad input, 128 + signal if stopped before the loop.
    Of several ranks the first that fails says why."""
    def leave(number, frame):                           # cleans up while data is being prepared
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    if hasattr(sys.stdout, "reconfigure"):              # a terminal that lacks a letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    _closing.callback(files.unlock)
    try:
        distributed.start()
        done = train(distributed.on_main(parse, argv))
        distributed.finish()
        return done
    except SystemExit as error:         # argparse's, or a signal's
        distributed.skip_teardown(error.code)
        raise
    except KeyboardInterrupt:
        message = "interrupted before training began; nothing was changed"
        status = 128 + signal.SIGINT
    except Exception as error:
        message, status = explain(error, less, again)
        if message is None:     # a bug; or a rank that failed, and said why, cannot be reached
            first, status = distributed.first_failure(status)
            if first:
                raise
            return status
    finally:
        _closing.close()        # the progress bar, before a message; the lock of the run's folder
    first, status = distributed.first_failure(status)
    if first:
        print(message, file=sys.stderr)
    return status


def explain(error, less, again):
    """(one line that says what can be done about an error, None for a bug; exit status)"""
    if isinstance(error, BadInput):
        return f"error: {error}", 2
    if is_out_of_memory(error):
        return f"error: out of memory; {less}", 2
    if isinstance(error, OSError):
        why = error
        if error.filename:
            why = f"{error.filename}: {error.strerror}; make room, or choose another folder"
        return f"error: {printable(why)}", 2
    if distributed.has_lost_a_rank(error):
        return ("error: another process of this run ended without a word, killed or out of memory; "
                f"{again}"), 1
    return None, 1
