"""How fast it is, in tables, measured in one run on one machine. The data is random: no download.

    python -m benchmarks.bench                             all sections that this device does in
                                                           a few minutes
    python -m benchmarks.bench views regions --threads 2   some of them
    python -m benchmarks.bench train --compare torchvision

    views      views per second, batched and one image at a time
    train      whole training steps: samples per second along the fast path (float32, then
               + channels_last, + bf16, + compile), the share of the time that goes into views,
               memory, arithmetic and how much of the device's peak that is
    regions    DSeq-JEPA's region extraction, batched and per image with OpenCV and SciPy
    crops      crops of photographs: files decoded at every step, or kept decoded (crops.py)
    flops      what a step of DSeq-JEPA costs beside I-JEPA, part by part (flops.py)

The per-image way (per_image.py) is that of a DataLoader: a multinomial draw over all pixels and a
slice per fixation; torchvision's transforms per augmented view; torchvision's to-float and
normalise per render.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import config as settings
from benchmarks import crops, flops
from benchmarks.per_image import PerImage, loader, regions_one_by_one
from build import build_model
from config import MODES
from datasets import load
from images import Part, Split
from plumbing import command, flags
from plumbing.command import refuse_unwritable
from plumbing.device import compile_all, is_out_of_memory, pick_device, place, under_autocast
from plumbing.errors import BadInput, printable
from plumbing.files import save_atomically
from regions import ROUNDS, discriminative_regions
from train import Rates, build_optimizer, training_step


class Case(NamedTuple):
    """A kind of training step that is measured, at the sizes of a preset."""
    mode: str
    dataset: str
    method: str
    batch: int                  # samples on a GPU


VIEWS = {                       # name: mode, data set of the preset
    "saccades, 32 px of 96": ("saccade", "stl10"),
    "augmentations, 32 px": ("augment", "cifar100"),
    "augmentations, 64 px": ("augment", "tiny-imagenet"),
    "rotations, 128 px": ("rotation", "3diebench"),
}
TRAIN = {
    "saccade": Case("saccade", "stl10", "seq-jepa", 512),
    "rotation": Case("rotation", "3diebench", "seq-jepa", 512),
    "augment": Case("augment", "tiny-imagenet", "seq-jepa", 512),
    "dseq-jepa": Case("regions", "imagenet", "dseq-jepa", 128),
    "i-jepa": Case("regions", "imagenet", "i-jepa", 128),
}
REGIONS = {                     # name: rule, thresholds, most patches of a region (of 14 x 14)
    "otsu": ("otsu", 1, None),
    "otsu-refill": ("otsu-refill", ROUNDS, None),
    "otsu-refill, cut": ("otsu-refill", ROUNDS, 39),            # --max-region 0.2, the default
}
FAST_PATH = ("float32", "+ channels_last", "+ bf16", "+ compile")   # each on top of those before it
WARM_UP = 3                     # steps before time is taken, and three times as many if compiled: a
                                # region method meets a few sizes before it compiles no more
BOUNDS = {                      # flag: the least and the most that makes sense on one machine
    "threads": (1, 1024), "repeats": (1, 10_000), "images": (1, 100_000),
    "batch_size": (0, 100_000), "workers": (0, 1024),
}
TAU = 0.996                     # EMA momentum of the measured steps
PEAKS = {                       # dense bf16 FLOP/s, NVIDIA's data sheets
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12,
}


# ---------------------------------------------------------------- shared

def random_split(mode, size, n):
    """A Split of n random images, or of objects with 8 renders each.

    Speed does not depend on the content."""
    rng = np.random.default_rng(0)
    shape = (n, 3, size, size)
    latents = None
    if mode == "rotation":
        shape = (n, 8, 3, size, size)
        latents = rng.uniform(-1, 1, (n, 8, 7)).astype(np.float32)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return Split([Part(images, "train", rows=None, total=n)],
                 labels=np.zeros(n, dtype=np.int64), classes=["?"],
                 mean=(0.45, 0.44, 0.40), std=(0.22, 0.22, 0.22),
                 source=dict(bench=mode, size=size), latents=latents)


def make_views(config, n, device):
    """The mode's view sampler over n random images, and their Split.

    Mode saccade gets random maps of saliency, as published ones: none need be computed. They are
    uneven, as real ones are; a uniform map would flatter neither way."""
    split = random_split(config.mode, config.image_size, n)
    if config.mode != "saccade":
        return MODES[config.mode](split, config, device), split
    shape = (n, config.image_size, config.image_size)
    maps = np.random.default_rng(0).random(shape, dtype=np.float32) ** 3
    with tempfile.TemporaryDirectory() as folder:       # what stays mapped outlives the file's name
        np.save(Path(folder) / "saliency_train.npy", maps)
        config = dataclasses.replace(config, saliency=folder)
        return MODES[config.mode](split, config, device), split


def per_image(views, split, config, length=None):
    """PerImage of the same images, and in mode saccade of the same maps, as `views`."""
    saliency = None
    if config.mode == "saccade":
        saliency = views.saliency[torch.arange(len(views))].cpu()
    return PerImage(split, config, saliency, length)


def trainer(model, config, device, bf16):
    """A function batch -> Output: one training step of `model`, under bf16 autocast or not."""
    optimizer = build_optimizer(model, config, device)
    forward = under_autocast(model, device, enabled=bf16)
    rates = Rates(config.lr, config.weight_decay, TAU)
    return lambda batch: training_step(model, batch, optimizer, rates, forward)


def seconds(run, device, repeats, summary=min):
    """Time of one run after one to warm up.

    By default the shortest of `repeats`: the one that others on the machine disturbed least."""
    times = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return summary(times[1:])


def wait(device):
    """Let the device finish what it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


# ---------------------------------------------------------------- views

def bench_views(device, options):
    """Table: views per second."""
    fitting = 64 if device.type == "cpu" else 512       # above 30 MB a CPU is busy with fresh pages
    batch = options.batch_size or fitting
    print(f"{'views per second':24s} {'batched':>10s} {'per image':>10s} {'ratio':>7s}   "
          f"(batch {batch}; per image on the CPU)")
    for name, (mode, dataset) in VIEWS.items():
        config = settings.Config(**settings.preset(dataset, mode))
        batched, single = measure_views(config, device, batch, options.repeats)
        print(f"{name:24s} {batched:10,.0f} {single:10,.0f} {batched / single:6.1f}x")


def measure_views(config, device, batch, repeats):
    """Views per second of the batched and of the per-image way."""
    views, split = make_views(config, batch, device)
    index = torch.arange(batch)
    batched = seconds(lambda: views(index, config.views), device, repeats)

    few = min(batch, 32)
    slow = per_image(views, split, config)
    single = seconds(lambda: torch.stack([slow[i] for i in range(few)]), torch.device("cpu"),
                     repeats)
    views_each = config.views + 1
    return batch * views_each / batched, few * views_each / single


# ---------------------------------------------------------------- training steps

class Step(NamedTuple):
    """What was measured of a training step."""
    rate: float             # samples per second
    share: float            # of the time that goes into views; None where workers make them
    memory: int             # peak on a GPU, bytes; elsewhere 0
    flops: float            # per sample


def bench_train(device, options):
    """Table: each case along the fast path."""
    peak, source = peak_flops(device)
    last = options.through or ("compile" if device.type == "cuda" else "channels_last")
    stages = FAST_PATH[:FAST_PATH.index(f"+ {last}") + 1]
    sizes = "the paper's" if options.full else "--quick's"
    print(f"{'training steps':29s} {'samples/s':>10s} {'images/s':>10s} {'in views':>9s} "
          f"{'memory':>9s} {'GFLOP/sample':>13s} {'of peak':>8s}   "
          f"({sizes} sizes; peak {peak / 1e12:,.2f} TFLOP/s, {source})")
    for name, case in TRAIN.items():
        if options.only and name not in options.only:
            continue
        config = config_of(case, options)
        views, split = make_views(config, config.batch_size, device)
        for stage in stages:
            label = f"{name if stage == stages[0] else '':12s} {stage:16s}"
            report_step(label, stage, views, config, device, peak, options)
        if options.compare:
            label = f"{'':12s} {'torchvision':16s}"
            report_step(label, stages[-1], views, config, device, peak, options, split)
        print(f"{'':12s} batch {config.batch_size}, {config.encoder}, {config.view_size} px")


def config_of(case, options):
    """The Config of a Case, of the paper's sizes or of --quick's."""
    batch = options.batch_size or (case.batch if options.full else 32)
    values = settings.preset(case.dataset, case.mode, quick=not options.full)
    return settings.check(settings.Config(**values | dict(method=case.method, batch_size=batch)))


def report_step(label, stage, views, config, device, peak, options, split=None):
    """Measure a stage and print its line."""
    try:
        step = measure_step(stage, views, config, device, options, split)
    except Exception as error:          # no memory, or the compiler: other stages can be measured
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{label} failed: {one_line(error)}"[:140], flush=True)
        return
    images = step.rate * config.views_per_sample
    share = "-" if step.share is None else f"{100 * step.share:.1f}%"
    memory = f"{step.memory / 2 ** 30:.2f} GiB" if step.memory else "-"
    of_peak = 100 * step.rate * step.flops / peak
    print(f"{label} {step.rate:10,.1f} {images:10,.1f} {share:>9s} {memory:>9s} "
          f"{step.flops / 1e9:13.3f} {of_peak:7.1f}%", flush=True)


def one_line(error):
    """The type of an exception and the first line of its message."""
    message = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}"


def measure_step(stage, views, config, device, options, split=None):
    """Step of training at one stage of the fast path.  split: a DataLoader over it makes views."""
    done = FAST_PATH[:FAST_PATH.index(stage) + 1]
    model = build_model(config, views.groups).to(device).train()
    index = torch.arange(config.batch_size)
    halfway = torch.full((), 0.5, device=device)        # half the images with salient regions

    def make_batch(index=index):
        return views(index, config.views)._replace(progress=halfway)

    flops_each = flops.count(model, make_batch(index[:32]))
    if "+ channels_last" in done:
        model = place(model, device)
    if "+ compile" in done:
        torch._dynamo.reset()               # or it compiles for any size, having seen other cases'
        views = copy.copy(views)            # the eager stages of others keep theirs
        compile_all(model, views)
    train_on = trainer(model, config, device, bf16="+ bf16" in done)

    on_gpu = device.type == "cuda"
    calls = 5 if on_gpu else 1              # between two looks at the clock, which empty its queue
    warm_up = 3 * WARM_UP if "+ compile" in done else WARM_UP
    next_batch = make_batch
    if split:
        steps = 3 * WARM_UP + calls * (options.repeats + 1)
        dataset = per_image(views, split, config, length=steps * config.batch_size)
        batches = loader(dataset, make_batch(), device, options.workers)
        next_batch = lambda: next(batches)

    def train_steps():
        for _ in range(calls):
            train_on(next_batch())

    def make_batches():
        for _ in range(calls):
            make_batch()

    for _ in range(warm_up):
        train_on(next_batch())
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    each = seconds(train_steps, device, options.repeats, median) / calls
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    share = None
    if not split:                           # workers make views beside the step, not in it
        share = seconds(make_batches, device, options.repeats, median) / calls / each
    return Step(config.batch_size / each, share, memory, flops_each)


def peak_flops(device):
    """FLOP/s that a device can do at most, and where the number is from."""
    n = 2048
    dtype = torch.float32
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peak in PEAKS.items():
            if all(word in name for word in known.split()):
                return peak, f"{known}, dense bf16, data sheet"
        n = 8192
        dtype = torch.bfloat16
    a = torch.randn(n, n, device=device, dtype=dtype)
    peak = 2 * n ** 3 / seconds(lambda: a @ a, device, 5)
    return peak, f"measured, {n} x {n} matrices in {str(dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------- regions

def bench_regions(device, options):
    """Table: maps per second, and whether both ways find the same regions."""
    n = options.batch_size or 512
    few = 64
    N = 5
    maps = random_maps(n, 14)
    on_device = maps.to(device)
    print(f"{'maps per second, 14 x 14':24s} {'batched':>10s} {'per image':>10s} {'ratio':>7s} "
          f"{'agree':>6s}   (batch {n}; per image on the CPU)")
    for name, (rule, rounds, most) in REGIONS.items():

        def batched():
            return discriminative_regions(on_device, N, rule, 10, most)

        def one_by_one():
            found = [regions_one_by_one(m, N, rounds, 10, most) for m in maps[:few].numpy()]
            return np.stack(found)

        fast = n / seconds(batched, device, options.repeats)
        slow = few / seconds(one_by_one, torch.device("cpu"), options.repeats)
        agree = (batched()[:few].cpu().numpy() == one_by_one()).mean()
        print(f"{name:24s} {fast:10,.0f} {slow:10,.0f} {fast / slow:6.1f}x {100 * agree:5.1f}%")


def random_maps(n, grid):
    """Smooth random saliency (n, grid, grid) from 0 to 1."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(n, 1, 6, 6, generator=generator)
    maps = F.interpolate(coarse, (grid, grid), mode="bicubic")[:, 0].flatten(1)
    low, high = maps.aminmax(dim=1, keepdim=True)
    return ((maps - low) / (high - low)).view(n, grid, grid)


# ---------------------------------------------------------------- FLOPs of the region methods

def bench_flops(device, options):
    """Table: GFLOPs per image of a step at ViT-B/16, 224 px, N = 5."""
    if options.data_dir:
        values = settings.preset("folder", "regions")
        values |= dict(data_dir=options.data_dir, limit=options.images)
        split = load(settings.Config(**values), "pretrain")
        what = "images of --data-dir"
    else:
        split = flops.noise_split(options.images, 224)
        what = "blurred noise"
    size = min(options.batch_size or 64, len(split.labels))
    print(f"{'GFLOP/image, ViT-B/16':34s} {'target':>7s} {'context':>8s} {'predictor':>10s} "
          f"{'total':>7s} {'ratio':>6s} {'steps':>6s} {'seen':>6s} {'masks':>6s}   "
          f"(multiply-add = 2 FLOP; {len(split.labels)} {what}, batch {size}, untrained)")
    costs = flops.region_costs(split, device, size)
    i_jepa = costs["i-jepa"].flops["total"]
    for name, cost in (costs | flops.curricula(costs)).items():
        giga = {part: value / 1e9 for part, value in cost.flops.items()}
        ratio = cost.flops["total"] / i_jepa
        print(f"{name:34s} {giga['target_encoder']:7.1f} {giga['encoder']:8.1f} "
              f"{giga['predictor']:10.1f} {giga['total']:7.1f} {ratio:5.2f}x {cost.steps:6.2f} "
              f"{cost.seen:6.1f} {cost.predicted:6.1f}")


# ---------------------------------------------------------------- crops of photographs

def bench_crops(device, options):
    """Table: images per second that become crops, on the CPU; cores and disk for ImageNet."""
    with tempfile.TemporaryDirectory() as folder:
        files = crops.photographs(options, folder)
        rows = list(crops.table(files, options.threads, options.batch_size or 32, options.repeats))
    what = "of --data-dir" if options.data_dir else "of noise, 500 x 375 pixels"
    print(f"{len(files)} files {what}")
    crops.show(rows)


# ---------------------------------------------------------------- the command

SECTIONS = {"views": bench_views, "train": bench_train, "regions": bench_regions,
            "crops": bench_crops, "flops": bench_flops}


class Tee:
    """Prints to several files at once."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        for file in self.files:
            file.write(text)

    def flush(self):
        self.files[0].flush()


def keep(path, device, started, **found):
    """Write what was found to a JSON file, with all that one must know to judge it.

    That is command, commit (+ if files differ from it), device, and seconds since `started`."""
    git = ["git", "-C", str(Path(__file__).parent),
           "describe", "--always", "--dirty=+", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    name = f"{device.type}, {os.cpu_count()} cores"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    record = dict(command=" ".join(command), commit=commit, device=name, torch=torch.__version__,
                  seconds=round(time.monotonic() - started, 1), **found)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(path, lambda part: part.write_text(json.dumps(record, indent=1) + "\n"))


def parser():
    """The command line; the sections are SECTIONS."""
    p = flags.Parser(prog="python -m benchmarks.bench", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sections", nargs="*", metavar="SECTION",
                   help=f"{', '.join(SECTIONS)} (default: all; on a CPU, without flops)")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--batch-size", type=int, default=0, metavar="N",
                   help="samples per batch (default: fitting for device and section)")
    p.add_argument("--repeats", type=int, default=5, metavar="N",
                   help="times that each measurement is taken (default: 5)")
    p.add_argument("--json", metavar="FILE",
                   help="also keep the tables there, with command, commit, device and time")
    train = p.add_argument_group("section train")
    train.add_argument("--full", action=argparse.BooleanOptionalAction,
                       help="the paper's sizes (default: on a GPU; else --quick's)")
    train.add_argument("--only", nargs="+", choices=list(TRAIN), metavar="CASE",
                       help=f"of {', '.join(TRAIN)}")
    train.add_argument("--through", choices=["channels_last", "bf16", "compile"],
                       help="where along the fast path to stop (default: compile; "
                            "without a GPU, channels_last)")
    train.add_argument("--compare", choices=["torchvision"],
                       help="also feed the model from a per-image DataLoader")
    train.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N",
                       help="its worker processes (default: one per core)")
    costs = p.add_argument_group("sections crops and flops")
    costs.add_argument("--data-dir", metavar="DIR",
                       help="a folder of photographs (default: blurred noise)")
    costs.add_argument("--images", type=int, default=64, metavar="N",
                       help="how many images (default: 64)")
    return p


def check(options):
    """Raises BadInput for an unknown section, a number that makes no sense or a bad --json."""
    for section in options.sections:
        if section not in SECTIONS:
            raise BadInput(f"{section}: no such section; choose of {', '.join(SECTIONS)}")
    for name, (low, high) in BOUNDS.items():
        value = getattr(options, name)
        if not low <= value <= high:
            raise BadInput(f"{flags.name_of(name)} {value}: must be at least {low} "
                           f"and at most {high:,}")
    if options.batch_size == 1:
        raise BadInput("--batch-size 1: must be at least 2, or 0 for what fits the section")
    if options.json is not None:
        check_kept(options.json)


def check_kept(path):
    """Make the folder of a JSON file and refuse one that `keep` could not write."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    refuse_unwritable(path, "choose another place", holds='"command"')


def run(section, device, options):
    """Print a section's table.  -> 0, 1 if it broke off, 2 for bad input."""
    status = 0
    try:
        SECTIONS[section](device, options)
    except (BadInput, OSError) as error:    # OpenCV absent, say: the other sections need none
        print(printable(f"error: {section}: {error}"), file=sys.stderr)
        status = 2
    except Exception as error:          # a bug: who waits for a lent machine still gets the rest
        if is_out_of_memory(error):
            print(f"error: {section}: out of memory; lower --batch-size", file=sys.stderr)
        else:
            traceback.print_exc()
        status = 1
    print()
    return status


def parse(argv=None):
    """Options from the command line."""
    options = parser().parse_args(argv)
    check(options)
    return options


def bench(options):
    """Print the tables.  -> 0, 1 if a section broke off, 2 for bad input."""
    started = time.monotonic()
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    if options.full is None:
        options.full = on_gpu
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name(device) if on_gpu else device.type
    print(f"torch {torch.__version__} on {where}, {options.threads} CPU threads")

    status = 0
    printed = io.StringIO()
    quick = [section for section in SECTIONS if section != "flops"]
    for section in options.sections or (list(SECTIONS) if on_gpu else quick):
        with contextlib.redirect_stdout(Tee(sys.stdout, printed)):
            status = run(section, device, options) or status
        if options.json is not None:    # after every section: the next may outlast its time
            keep(options.json, device, started, threads=options.threads,
                 tables=printed.getvalue().splitlines())
    return status


def main(argv=None):
    """Exit status 0, 1 if a section broke off, 2 for bad input, 128 + signal if stopped."""
    return command.run(bench, parse, argv, less="lower --batch-size")


if __name__ == "__main__":
    sys.exit(main())
