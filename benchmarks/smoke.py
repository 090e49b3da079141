"""Does every mode and method run on this machine, on the fast path, without needless waits?

    python -m benchmarks.smoke                  every case; on a GPU at the paper's model sizes with
                                                bf16 and compile, on a CPU tiny and eager
    python -m benchmarks.smoke --only dseq-jepa --out runs/smoke

It takes minutes; run it first on a new GPU.

Each case trains for 20 steps on random images. It fails if a loss is not finite, if the model or
the work on pixels does not compile as one graph, or if anything is compiled again after the first
10 steps. On a GPU it also fails if the host waits for the device more often than it must: not at
all, for the region methods once a step (attention.sizes), with Grad-CAM twice.
Writes OUT/smoke.json: command, commit, device, wall time, and a line a case. Exit status 1 if a
case fails.
"""
import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

import config as settings
from benchmarks.bench import (
    BOUNDS,
    TRAIN,
    check_kept,
    keep,
    make_views,
    one_line,
    trainer,
    wait,
)
from build import build_model
from config import MODES, REGION_METHODS
from plumbing import command, flags
from plumbing.device import compile_all, pick_device, place, seed_all
from plumbing.errors import BadInput, printable

SYNC = "called a synchronizing CUDA operation"      # each warning of set_sync_debug_mode says so
STEPS = 20
WARM_UP = 10        # by then what is compiled for a few sizes first, then for any, is settled

# Data sets and batches are bench.py's, which then finds the code compiled.
DATASETS = {case.mode: case.dataset for case in TRAIN.values()}
BATCHES = {case.mode: case.batch for case in TRAIN.values()}


def every_method():
    """{name: (mode, fields of Config)}, one for each method of each mode."""
    cases = {}
    for mode in DATASETS:
        for method in MODES[mode].methods:
            name = method if mode == "regions" else f"{mode}, {method}"
            cases[name] = (mode, dict(method=method))
    return cases


VARIANTS = {        # other plans for compiled parts that a method has tried: eager
    "dseq-jepa, grad-cam": ("regions", dict(method="dseq-jepa", proxy="grad-cam")),
    "dseq-jepa, no cls": ("regions", dict(method="dseq-jepa", cls=False, regions="random")),
    "dseq-jepa, flat": ("regions", dict(method="dseq-jepa", order="flat")),
}
CASES = every_method() | VARIANTS


def waits_allowed(config):
    """How often a step may wait for the device."""
    if config.method not in REGION_METHODS:
        return 0
    return 2 if config.proxy == "grad-cam" else 1


def smoke(config, device, backend):
    """Train for STEPS steps; backend: torch.compile's, None = eager.  -> dict of what was seen."""
    started = time.monotonic()
    views, _ = make_views(config, config.batch_size, device)
    model = place(build_model(config, views.groups), device).train()
    torch._dynamo.reset()
    if backend:
        compile_all(model, views, backend=backend, fullgraph=True)
    train_on = trainer(model, config, device, bf16=device.type == "cuda")
    index = torch.arange(config.batch_size)
    losses = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == WARM_UP:
                wait(device)
                caught.clear()
                graphs = graphs_compiled()
                settled = time.monotonic()
                warn_of_waits(device, True)
            seed_all(0, step)
            progress = torch.full((), step / STEPS, device=device)
            batch = views(index, config.views)._replace(progress=progress)
            losses.append(train_on(batch).loss.detach())
        warn_of_waits(device, False)
        wait(device)
    now = time.monotonic()
    steps = STEPS - WARM_UP
    waits = [w for w in caught if SYNC in str(w.message)]
    return dict(backend=backend,
                graphs=graphs_compiled(),
                loss=[round(loss, 5) for loss in torch.stack(losses).tolist()],
                compiled_late=graphs_compiled() - graphs,
                waits_per_step=len(waits) / steps,
                waits_at=sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits}),
                samples_per_second=round(config.batch_size * steps / (now - settled), 1),
                seconds=round(now - started, 1))


def graphs_compiled():
    """Graphs that torch.compile has made so far, recompilations included."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def warn_of_waits(device, on):
    """Let PyTorch warn whenever the host waits for the GPU; nothing to do on other devices."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("warn" if on else "default")


def verdict(result, config):
    """What is wrong with a result: "" if nothing."""
    wrong = []
    if not torch.tensor(result["loss"]).isfinite().all():
        wrong.append("loss not finite")
    if result["backend"] and not result["graphs"]:
        wrong.append("nothing was compiled")
    if result["compiled_late"]:
        wrong.append(f"{result['compiled_late']} graphs compiled after step {WARM_UP}")
    if result["waits_per_step"] > waits_allowed(config):
        wrong.append(f"{result['waits_per_step']:g} waits a step at "
                     f"{', '.join(result['waits_at'])}, {waits_allowed(config)} allowed")
    return "; ".join(wrong)


def attempt(config, device, backend):
    """What `smoke` has seen and, under "wrong", the verdict."""
    try:
        result = smoke(config, device, backend)
        result["wrong"] = verdict(result, config)
    except Exception as error:          # the compiler's have no common type; other cases follow
        result = dict(wrong=one_line(error))
    return result


def summary(name, result):
    """A line on one case."""
    loss = result.get("loss", [float("nan")])
    rate = result.get("samples_per_second", 0)
    return (f"{'FAILED' if result['wrong'] else 'ok':6s} {name:22s} "
            f"loss {loss[0]:.3f} -> {loss[-1]:.3f} {rate:9,.0f} samples/s  {result['wrong']}")


def parser():
    """The command line."""
    p = flags.Parser(prog="python -m benchmarks.smoke", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE",
                   help="of " + ", ".join(f'"{name}"' for name in CASES))
    p.add_argument("--batch-size", type=int, metavar="N",
                   help="samples per batch (default: bench.py's on a GPU, else 8)")
    p.add_argument("--backend", choices=["none", "inductor", "aot_eager"],
                   help="of torch.compile (default: inductor on CUDA, else none); aot_eager "
                        "generates no code and is quick")
    p.add_argument("--out", default="runs/smoke", metavar="DIR",
                   help="where smoke.json goes (default: runs/smoke)")
    return p


def parse(argv=None):
    """Options from the command line."""
    options = parser().parse_args(argv)
    most = BOUNDS["batch_size"][1]
    if options.batch_size is not None and not 2 <= options.batch_size <= most:
        raise BadInput(f"--batch-size {options.batch_size}: must be at least 2 "
                       f"and at most {most:,}")
    check_kept(Path(options.out) / "smoke.json")
    return options


def run(options):
    """Try the cases.  -> 0, 1 if one failed."""
    device = pick_device(options.device)
    started = time.monotonic()
    on_gpu = device.type == "cuda"
    backend = options.backend or ("inductor" if on_gpu else "none")
    backend = None if backend == "none" else backend
    path = Path(options.out) / "smoke.json"
    results = {}
    for name in options.only or CASES:
        mode, changes = CASES[name]
        batch = options.batch_size or (BATCHES[mode] if on_gpu else 8)
        values = settings.preset(DATASETS[mode], mode, quick=not on_gpu, method=changes["method"])
        config = settings.check(settings.Config(**values | dict(batch_size=batch) | changes))
        results[name] = attempt(config, device, None if name in VARIANTS else backend)
        print(summary(name, results[name]), flush=True)
        # After every case: a time limit may end this.
        keep(path, device, started, compile=backend, bf16=on_gpu, cases=results)
    print(f"{printable(path)}: {len(results)} cases in {time.monotonic() - started:.0f} s")
    return int(any(result["wrong"] for result in results.values()))


def main(argv=None):
    """Exit status 0, 1 if a case failed, 2 for bad input, 128 + signal if stopped."""
    return command.run(run, parse, argv, less="lower --batch-size")


if __name__ == "__main__":
    sys.exit(main())
