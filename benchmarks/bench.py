"""How fast it is, in tables. Everything is measured in one run on one machine; the data is random and needs no download.

    python -m benchmarks.bench                             all sections that this device does in a few minutes
    python -m benchmarks.bench views regions --threads 2   some of them
    python -m benchmarks.bench train --compare torchvision

    views      views per second, batched and one image at a time
    train      whole training steps: samples per second along the fast path (float32, then + channels_last, + bf16, + compile), the
               share of the time that goes into views, memory, arithmetic and how much of the device's peak that is
    regions    DSeq-JEPA's region extraction, batched and per image with OpenCV and SciPy
    flops      what a step of DSeq-JEPA costs beside I-JEPA, part by part (flops.py)

The per-image way (per_image.py) is that of a DataLoader: a multinomial draw over all pixels and a slice per fixation; torchvision's
transforms per augmented view; torchvision's to-float and normalise per render.
"""
import argparse
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

import config as settings
from benchmarks import flops
from benchmarks.per_image import PerImage, loader, regions_one_by_one
from build import build_model
from config import MODES
from datasets import load
from images import Part, Split
from plumbing.device import compile_all, pick_device, place, under_autocast
from plumbing.errors import BadInput
from plumbing.files import save_atomically
from regions import ROUNDS, RULES, discriminative_regions
from train import Rates, build_optimizer, training_step

MEAN, STD = (0.45, 0.44, 0.40), (0.22, 0.22, 0.22)
VIEWS = {                       # name: mode, data set of the preset
    "saccades, 32 px of 96": ("saccade", "stl10"),
    "augmentations, 32 px": ("augment", "cifar100"),
    "augmentations, 64 px": ("augment", "tiny-imagenet"),
    "rotations, 128 px": ("rotation", "3diebench"),
}
TRAIN = {                       # name: mode, data set of the preset, method, batch on a GPU
    "saccade": ("saccade", "stl10", "seq-jepa", 512),
    "rotation": ("rotation", "3diebench", "seq-jepa", 512),
    "augment": ("augment", "tiny-imagenet", "seq-jepa", 512),
    "dseq-jepa": ("regions", "imagenet", "dseq-jepa", 128),
    "i-jepa": ("regions", "imagenet", "i-jepa", 128),
}
FAST_PATH = ("float32", "+ channels_last", "+ bf16", "+ compile")       # each on top of those before it
PEAKS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}     # dense bf16 FLOP/s, NVIDIA's data sheets
WARM_UP = 3                     # steps before time is taken; a compiled region method meets a few sizes before it compiles no more


# ---------------------------------------------------------------- shared

def random_split(mode, size, n):
    """A Split of n random images, or of objects with 8 renders each; speed does not depend on the content."""
    rng = np.random.default_rng(0)
    shape = (n, 8, 3, size, size) if mode == "rotation" else (n, 3, size, size)
    latents = rng.uniform(-1, 1, (n, 8, 7)).astype(np.float32) if mode == "rotation" else None
    part = Part(rng.integers(0, 256, shape, dtype=np.uint8), "train", None, n)
    return Split([part], np.zeros(n, dtype=np.int64), ["?"], MEAN, STD, dict(bench=mode, size=size), latents)


def make_views(mode, config, n, device):
    """The mode's view sampler over n random images, and their Split. No saliency is computed."""
    split = random_split(mode, config.image_size, n)
    views = MODES[mode](split, config, device)
    if mode == "saccade":               # uneven maps: a uniform one would flatter neither way, but real ones are uneven
        views.saliency.parts = [torch.rand(n, config.image_size, config.image_size, device=device) ** 3]
    return views, split


def seconds(run, device, repeats, summary=min):
    """Time of one run after one to warm up; the shortest of `repeats` is the one that others on the machine disturbed least."""
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
    batch = options.batch_size or (64 if device.type == "cpu" else 512)     # above some 30 MB a batch, a CPU is busy with fresh pages
    print(f"{'views per second':24s} {'batched':>10s} {'per image':>10s} {'ratio':>7s}   (batch {batch}; per image on the CPU)")
    for name, (mode, dataset) in VIEWS.items():
        batched, single = measure_views(mode, dataset, device, batch, options.repeats)
        print(f"{name:24s} {batched:10,.0f} {single:10,.0f} {batched / single:6.1f}x")


def measure_views(mode, dataset, device, batch, repeats):
    """Views per second of the batched and of the per-image way."""
    config = settings.Config(**settings.preset(dataset, mode) | dict(saliency="uniform"))
    views, split = make_views(mode, config, batch, device)
    index, few, M = torch.arange(batch), min(batch, 32), config.views
    batched = batch * (M + 1) / seconds(lambda: views(index, M), device, repeats)
    slow = PerImage(mode, split, config, views.saliency.parts[0].cpu() if mode == "saccade" else None)
    single = few * (M + 1) / seconds(lambda: torch.stack([slow[i] for i in range(few)]), torch.device("cpu"), repeats)
    return batched, single


# ---------------------------------------------------------------- training steps

def bench_train(device, options):
    """Table: each case along the fast path."""
    peak, source = peak_flops(device)
    last = options.through or ("compile" if device.type == "cuda" else "channels_last")
    stages = FAST_PATH[:FAST_PATH.index(f"+ {last}") + 1]
    sizes = "the paper's" if options.full else "--quick's"
    print(f"{'training steps':29s} {'samples/s':>10s} {'images/s':>10s} {'in views':>9s} {'memory':>9s} {'GFLOP/sample':>13s} "
          f"{'of peak':>8s}   ({sizes} sizes; peak {peak / 1e12:,.2f} TFLOP/s, {source})")
    for name, (mode, dataset, method, batch) in TRAIN.items():
        if options.only and name not in options.only:
            continue
        values = settings.preset(dataset, mode, quick=not options.full) | dict(method=method, saliency="uniform")
        config = settings.check(settings.Config(**values | dict(batch_size=options.batch_size or (batch if options.full else 32))))
        views, split = make_views(mode, config, config.batch_size, device)
        for stage in stages:
            report_step(f"{name if stage == stages[0] else '':12s} {stage:16s}", stage, views, config, device, peak, options)
        if options.compare:
            report_step(f"{'':12s} {'torchvision':16s}", stages[-1], views, config, device, peak, options, split)
        print(f"{'':12s} batch {config.batch_size}, {config.encoder}, {config.view_size} px")


def report_step(label, stage, views, config, device, peak, options, split=None):
    """Measure a stage and print its line."""
    try:
        rate, share, memory, cost = measure_step(stage, views, config, device, options, split)
    except Exception as error:                              # out of memory, or the compiler: the other stages can still be measured
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return print(f"{label} failed: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"[:140])
    share = "-" if split else f"{100 * share:.1f}%"                 # workers make views beside the step, not in it
    memory = f"{memory / 2 ** 30:.2f} GiB" if memory else "-"
    images = rate * config.views_per_sample
    print(f"{label} {rate:10,.1f} {images:10,.1f} {share:>9s} {memory:>9s} {cost / 1e9:13.3f} {100 * rate * cost / peak:7.1f}%", flush=True)


def measure_step(stage, views, config, device, options, split=None):
    """Samples per second, share of the time in views, peak bytes on a GPU (else 0), FLOPs per sample, at one stage of the fast path.

    split: views come from a DataLoader over it."""
    done = FAST_PATH[:FAST_PATH.index(stage) + 1]
    model = build_model(config, views.groups).to(device).train()
    index, progress = torch.arange(config.batch_size), torch.full((), 0.5, device=device)       # half the images with salient regions
    cost = flops.count(model, views(index[:32], config.views)._replace(progress=progress))
    if "+ channels_last" in done:
        model = place(model, device)
    if "+ compile" in done:
        torch._dynamo.reset()                       # or a case compiles for any size, having seen another case's
        views = copy.copy(views)                    # the eager stages of others keep theirs
        compile_all(model, views)
    optimizer = build_optimizer(model, config, device)
    forward = under_autocast(model, device, "+ bf16" in done)
    rates = Rates(lr=config.lr, weight_decay=config.weight_decay, tau=0.996)

    def make():
        return views(index, config.views)._replace(progress=progress)

    def step():
        return training_step(model, next(batches) if split else make(), optimizer, rates, forward)

    calls = 5 if device.type == "cuda" else 1       # between looks at the clock: a GPU's queue must not run empty
    if split:
        saliency = views.saliency.parts[0].cpu() if config.mode == "saccade" else None
        steps = 3 * WARM_UP + calls * (options.repeats + 1)
        dataset = PerImage(config.mode, split, config, saliency, steps * config.batch_size)
        batches = loader(dataset, make(), device, options.workers)
    for _ in range(3 * WARM_UP if "+ compile" in done else WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    each = seconds(lambda: [step() for _ in range(calls)], device, options.repeats, median) / calls
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    making = (lambda: [make() for _ in range(calls)]) if split is None else (lambda: None)      # workers' time is not the step's
    share = seconds(making, device, options.repeats, median) / calls / each
    return config.batch_size / each, share, memory, cost


def peak_flops(device):
    """FLOP/s that a device can do at most, and where the number is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((key for key in PEAKS if all(word in name for word in key.split())), None)
        if known:
            return PEAKS[known], f"{known}, dense bf16, data sheet"
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / seconds(lambda: a @ a, device, 5), f"measured, {n} x {n} matrices in {str(dtype).removeprefix('torch.')}"


# ---------------------------------------------------------------- regions

def bench_regions(device, options):
    """Table: maps per second, and whether both ways find the same regions."""
    n, few, N, grid = options.batch_size or 512, 64, 5, 14
    generator = torch.Generator().manual_seed(0)
    maps = F.interpolate(torch.randn(n, 1, 6, 6, generator=generator), (grid, grid), mode="bicubic")[:, 0].flatten(1)
    low, high = maps.aminmax(dim=1, keepdim=True)
    maps = ((maps - low) / (high - low)).view(n, grid, grid)
    print(f"{'maps per second, 14 x 14':24s} {'batched':>10s} {'per image':>10s} {'ratio':>7s} {'agree':>6s}"
          f"   (batch {n}; per image on the CPU)")
    for rule in RULES:
        there, rounds = maps.to(device), 1 if rule == "otsu" else ROUNDS
        batched = n / seconds(lambda: discriminative_regions(there, N, rule), device, options.repeats)
        slow = lambda: np.stack([regions_one_by_one(m, N, rounds, 10) for m in maps[:few].numpy()])
        single = few / seconds(slow, torch.device("cpu"), options.repeats)
        agree = (discriminative_regions(there, N, rule)[:few].cpu().numpy() == slow()).mean()
        print(f"{rule:24s} {batched:10,.0f} {single:10,.0f} {batched / single:6.1f}x {100 * agree:5.1f}%")


# ---------------------------------------------------------------- FLOPs of the region methods

def bench_flops(device, options):
    """Table: GFLOPs per image of a step at ViT-B/16, 224 px, N = 5."""
    if options.data_dir:
        config = settings.Config(**settings.preset("folder", "regions") | dict(data_dir=options.data_dir, limit=options.images))
        split, what = load(config, "pretrain"), "images of --data-dir"
    else:
        split, what = flops.noise_split(options.images, 224), "blurred noise"
    size = min(options.batch_size or 64, len(split.labels))
    print(f"{'GFLOP/image, ViT-B/16':34s} {'target':>7s} {'context':>8s} {'predictor':>10s} {'total':>7s} {'ratio':>6s} {'steps':>6s} "
          f"{'seen':>6s} {'masks':>6s}   (multiply-add = 2 FLOP; {len(split.labels)} {what}, batch {size}, untrained)")
    costs = flops.region_costs(split, device, size)
    for name, c in (costs | flops.curricula(costs)).items():
        of = {part: value / 1e9 for part, value in c.flops.items()}
        print(f"{name:34s} {of['target_encoder']:7.1f} {of['encoder']:8.1f} {of['predictor']:10.1f} {of['total']:7.1f} "
              f"{c.flops['total'] / costs['i-jepa'].flops['total']:5.2f}x {c.steps:6.2f} {c.seen:6.1f} {c.predicted:6.1f}")


# ---------------------------------------------------------------- the command

def keep(path, device, started, **found):
    """Write a JSON file of what was found, with command, commit (+ if files differ from it), device and seconds since `started`."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    record = dict(command=" ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
                  commit=subprocess.run(git, capture_output=True, text=True).stdout.strip(),
                  device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores",
                  torch=torch.__version__, seconds=round(time.monotonic() - started, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_atomically(Path(path), lambda part: part.write_text(json.dumps(record | found, indent=1) + "\n"))


SECTIONS = {"views": bench_views, "train": bench_train, "regions": bench_regions, "flops": bench_flops}


class Tee:
    """Prints to several files at once."""

    def __init__(self, *files):
        self.files = files

    def write(self, text):
        for file in self.files:
            file.write(text)

    def flush(self):
        self.files[0].flush()


def parser():
    """The command line; the sections are SECTIONS."""
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all; on a CPU, without flops)")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    p.add_argument("--batch-size", type=int, default=0, metavar="N", help="samples per batch (default: fitting for device and section)")
    p.add_argument("--repeats", type=int, default=5, metavar="N", help="times that each measurement is taken (default: 5)")
    p.add_argument("--full", action=argparse.BooleanOptionalAction, help="train: the paper's sizes (default: on a GPU; else --quick's)")
    p.add_argument("--only", nargs="+", choices=list(TRAIN), help="train: these cases")
    p.add_argument("--through", choices=["channels_last", "bf16", "compile"],
                   help="train: where along the fast path to stop (default: compile; without a GPU, channels_last)")
    p.add_argument("--compare", choices=["torchvision"], help="train: also feed the model from a per-image DataLoader")
    p.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="train: its worker processes (default: one per core)")
    p.add_argument("--data-dir", metavar="DIR", help="flops: a folder of photographs (default: blurred noise)")
    p.add_argument("--images", type=int, default=64, metavar="N", help="flops: how many images (default: 64)")
    p.add_argument("--json", metavar="FILE", help="also keep the tables there, with command, commit, device and time")
    return p


def main(argv=None):
    """Print the tables. Exit status 0, 1 if a section broke off, 2 for bad input."""
    options, started, printed, status = parser().parse_args(argv), time.monotonic(), io.StringIO(), 0
    try:
        device = pick_device(options.device)
        unknown = [s for s in options.sections if s not in SECTIONS]
        if unknown:
            raise BadInput(f"{unknown[0]}: no such section; choose of {', '.join(SECTIONS)}")
        too_few = min(options.threads, options.repeats, options.images) < 1 or min(options.batch_size, options.workers) < 0
        if too_few or options.batch_size == 1:
            raise BadInput("--threads, --repeats and --images must be at least 1, --batch-size at least 2, --workers at least 0")
        options.full = device.type == "cuda" if options.full is None else options.full
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        print(f"torch {torch.__version__} on {where}, {options.threads} CPU threads")
        for section in options.sections or [s for s in SECTIONS if s != "flops" or device.type == "cuda"]:
            with contextlib.redirect_stdout(Tee(sys.stdout, printed)):
                try:
                    SECTIONS[section](device, options)
                except BadInput as error:       # OpenCV absent, for example: the other sections need none
                    status = 2
                    print(f"error: {section}: {error}", file=sys.stderr)
                except Exception:               # a bug: whoever waits for a lent machine still gets the rest
                    status = 1
                    traceback.print_exc()
                print()
            if options.json:                    # after every section: the next may take what is left of the machine's time
                keep(options.json, device, started, threads=options.threads, tables=printed.getvalue().splitlines())
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
