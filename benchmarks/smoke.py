"""Does every mode and method run on this machine, on the fast path, without needless waits?  Minutes; run it first on a new GPU.

    python -m benchmarks.smoke                        every case; on a GPU at the paper's model sizes with bf16 and compile, on a CPU tiny and eager
    python -m benchmarks.smoke --only dseq-jepa --out runs/smoke

Each case trains for 20 steps on random images and fails if a loss is not finite, if the model or the work on pixels does not
compile as one graph, if anything is compiled again after the first 10 steps, or if on a GPU the host waits for the device more often
than it must: not at all, for the region methods once a step (attention.sizes), with Grad-CAM twice. Writes OUT/smoke.json: command,
commit, device, wall time, and a line a case. Exit status 1 if a case fails.
"""
import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

import config as settings
from benchmarks.bench import TRAIN, keep, make_views, wait
from build import build_model
from config import MODES, REGION_METHODS
from plumbing.device import compile_all, pick_device, place, seed_all, under_autocast
from plumbing.errors import BadInput
from train import Rates, build_optimizer, training_step

SYNC = "called a synchronizing CUDA operation"       # what torch.cuda.set_sync_debug_mode says of each
STEPS, WARM_UP = 20, 10             # what is compiled for a few sizes first, then for any, is settled by then
DATASETS = {mode: dataset for mode, dataset, _, _ in TRAIN.values()}        # bench.py's, as are the batches: it then finds the code compiled
BATCHES = {mode: batch for mode, _, _, batch in TRAIN.values()}
CASES = {method if mode == "regions" else f"{mode}, {method}": (mode, dict(method=method)) for mode in DATASETS for method in MODES[mode].methods}
VARIANTS = {                        # other plans for compiled parts that a method above has tried: eager
    "dseq-jepa, grad-cam": ("regions", dict(method="dseq-jepa", proxy="grad-cam")),
    "dseq-jepa, no cls": ("regions", dict(method="dseq-jepa", cls=False, regions="random")),
    "dseq-jepa, flat": ("regions", dict(method="dseq-jepa", order="flat")),
}
CASES |= VARIANTS


def waits_allowed(config):
    """How often a step may wait for the device."""
    if config.method not in REGION_METHODS:
        return 0
    return 2 if config.proxy == "grad-cam" else 1


def smoke(config, device, backend):
    """Train for STEPS steps; backend: torch.compile's, None = eager.  -> dict of what was seen."""
    started = time.monotonic()
    views, _ = make_views(config.mode, config, config.batch_size, device)
    model = place(build_model(config, views.groups), device).train()
    optimizer = build_optimizer(model, config, device)
    forward = under_autocast(model, device, device.type == "cuda")
    rates = Rates(lr=config.lr, weight_decay=config.weight_decay, tau=0.996)
    torch._dynamo.reset()
    if backend:
        compile_all(model, views, backend=backend, fullgraph=True)
    losses, index = [], torch.arange(config.batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == WARM_UP:
                wait(device)
                caught.clear()
                graphs, settled = graphs_compiled(), time.monotonic()
                warn_of_waits(device, True)
            seed_all(0, step)
            progress = torch.full((), step / STEPS, device=device)
            losses.append(training_step(model, views(index, config.views)._replace(progress=progress), optimizer, rates, forward).loss.detach())
        warn_of_waits(device, False)
        wait(device)
    late = time.monotonic() - settled
    places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if SYNC in str(w.message)})
    waits = sum(SYNC in str(w.message) for w in caught) / (STEPS - WARM_UP)
    return dict(backend=backend, graphs=graphs_compiled(), loss=[round(x, 5) for x in torch.stack(losses).tolist()], compiled_late=graphs_compiled() - graphs,
                waits_per_step=waits, waits_at=places, samples_per_second=round(config.batch_size * (STEPS - WARM_UP) / late, 1),
                seconds=round(time.monotonic() - started, 1))


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
        wrong.append(f"{result['waits_per_step']:g} waits a step at {', '.join(result['waits_at'])}, {waits_allowed(config)} allowed")
    return "; ".join(wrong)


def main(argv=None):
    """Exit status 0, 1 if a case failed, 2 for bad input."""
    p = argparse.ArgumentParser(prog="smoke.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    p.add_argument("--batch-size", type=int, metavar="N", help="samples per batch (default: bench.py's on a GPU, else 8)")
    p.add_argument("--backend", choices=["none", "inductor", "aot_eager"],
                   help="of torch.compile (default: inductor on CUDA, else none); aot_eager generates no code and is quick")
    p.add_argument("--out", default="runs/smoke", metavar="DIR", help="where smoke.json goes (default: runs/smoke)")
    options = p.parse_args(argv)
    try:
        device = pick_device(options.device)
        if options.batch_size is not None and options.batch_size < 2:
            raise BadInput(f"--batch-size {options.batch_size}: must be at least 2")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    on_gpu, started, results = device.type == "cuda", time.monotonic(), {}
    backend = {"none": None, None: "inductor" if on_gpu else None}.get(options.backend, options.backend)
    for name, (mode, changes) in CASES.items():
        if options.only and name not in options.only:
            continue
        batch = options.batch_size or (BATCHES[mode] if on_gpu else 8)
        values = settings.preset(DATASETS[mode], mode, quick=not on_gpu) | dict(saliency="uniform", batch_size=batch)
        config = settings.check(settings.Config(**values | changes))
        try:
            result = smoke(config, device, None if name in VARIANTS else backend)
            result["wrong"] = verdict(result, config)
        except Exception as error:          # one case must not hide the others; errors of the compiler have no common type
            result = dict(wrong=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        results[name] = result
        loss, rate = result.get("loss", [float("nan")]), result.get("samples_per_second", 0)
        print(f"{'FAILED' if result['wrong'] else 'ok':6s} {name:22s} loss {loss[0]:.3f} -> {loss[-1]:.3f} {rate:9,.0f} samples/s  "
              f"{result['wrong']}", flush=True)
        keep(Path(options.out) / "smoke.json", device, started, compile=backend, bf16=on_gpu, cases=results)     # a limit may end this
    print(f"{Path(options.out) / 'smoke.json'}: {len(results)} cases in {time.monotonic() - started:.0f} s")
    return int(any(r["wrong"] for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
