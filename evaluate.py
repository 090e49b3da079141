"""Evaluate a trained world model with the paper's protocols (seq-JEPA Secs. 4.3, A.2).

    python evaluate.py runs/NAME/last.pt                       every probe that applies, one table
    python evaluate.py runs/NAME/last.pt --views 1 3 5         other inference lengths M_val
    python evaluate.py runs/NAME/last.pt --probe action --figures

Prints a table, each trained number beside the same probe on a randomly initialised model of the same
shape, and beside the paper's number where there is one; writes it to runs/NAME/probes.json. Heads train
on features extracted once from the frozen model (probes.py). Checked in tests/test_evaluate.py.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import figures
from build import build_model, build_views, pick_device, seed_all
from config import BadInput
from probes import accuracy, extract, fit, linear_head, mlp_head, r2
from runs import config_of, load_checkpoint, save_atomically

EPOCHS = {"linear classifier": 300, "mlp": 300, "linear": 50}                              # A.2
HEADS = {"linear classifier": linear_head, "mlp": mlp_head, "linear": linear_head}
# Which head regresses which part of an action.  A.2
REGRESSORS = {"position": "linear", "rotation": "mlp", "color": "linear", "crop": "mlp", "jitter": "mlp", "blur": "linear"}
VIEWS = {"saccade": (1, 4, 6), "rotation": (1, 3, 5), "augment": (1, 3, 5)}                # Tables 1-3, 6
CALIBRATION_BATCHES = 20

# The paper's numbers: (data set, mode, condition, M_tr) -> {(probe, features): value}
PAPER = {
    ("stl10", "saccade", "position", 4): {("classify", "z"): 81.20, ("classify", "z_agg M=1"): 71.45,
                                          ("classify", "z_agg M=4"): 83.44, ("classify", "z_agg M=6"): 84.12},
    ("stl10", "saccade", "none", 4): {("classify", "z"): 61.38, ("classify", "z_agg M=1"): 62.21, ("classify", "z_agg M=4"): 70.45},
}


def probe_classify(train, val, options):
    """Top-1 of a linear classifier on z and on z_agg for every M_val (Tables 1-3, 6)."""
    classes = int(max(train.labels.max(), val.labels.max())) + 1
    features = {"z": (train.z_clean, val.z_clean)}
    features |= {f"z_agg M={M}": (train.z_agg[M], val.z_agg[M]) for M in train.z_agg}
    for name, (x, x_val) in features.items():
        head = fit_head("linear classifier", x, train.labels, classes, F.cross_entropy, options)
        yield dict(probe="classify", predicts="class", features=name, head="linear classifier", unit="top-1 %",
                   value=accuracy(head, x_val, val.labels))


def probe_action(train, val, options):
    """R^2 of the relative action from the z of its two views (Sec. 4.3)."""
    for name, columns in options.groups.items():
        yield regression("action", name, "z_1, z_2", train.z[:, :, :2].flatten(2), train.actions[:, :, 0, columns],
                         val.z[:, :, :2].flatten(2), val.actions[:, :, 0, columns], options)


PROBES = {"classify": probe_classify, "action": probe_action}


def regression(probe, name, features, x, y, x_val, y_val, options):
    """One row: fit the paper's head for `name` and score it by R^2 on the validation features."""
    kind = REGRESSORS[name]
    head = fit_head(kind, x, y, y.shape[-1], F.mse_loss, options)
    with torch.inference_mode():
        scores = r2(head(x_val).flatten(0, 1), y_val.flatten(0, 1))
    return dict(probe=probe, predicts=name, features=features, head=kind, unit="R2", value=scores.mean().item(),
                per_dimension=scores.tolist())


def fit_head(kind, x, y, d_out, loss, options):
    epochs = options.probe_epochs or EPOCHS[kind]
    return fit(HEADS[kind](x.shape[-1], d_out), x, y, loss, epochs, seed=options.seed, device=options.device).cpu()


def settle_batchnorm(model, views, M):
    """Give an untrained model the BatchNorm statistics of its own activations; no weight moves.

    Without this the comparison would flatter training: an untrained encoder under eval() is not normalised at all."""
    model.train()
    with torch.no_grad():
        for i in range(CALIBRATION_BATCHES):
            seed_all(i)
            batch = views(torch.randint(len(views), (256,)), M)
            model(batch.views, batch.actions)
    return model


def measure(model, views, options):
    """All rows of one model.  views: {"train": sampler, "val": sampler}."""
    features = {split: extract(model, v, options.views, options.device, samplings=options.samplings if split == "train" else 1,
                               seed=options.seed + (split == "val"), what=f"{split} features") for split, v in views.items()}
    for probe in options.probe:
        for row in PROBES[probe](features["train"], features["val"], options):
            yield row | dict(n_train=len(views["train"]), n_val=len(views["val"]), samplings=options.samplings,
                             epochs=options.probe_epochs or EPOCHS[row["head"]])


def evaluate(options):
    """Load the checkpoint, probe it and a randomly initialised twin, print and keep the table."""
    started = time.monotonic()
    checkpoint = load_checkpoint(options.checkpoint)
    changes = {k: v for k in ("data_dir", "limit") if (v := getattr(options, k)) is not None}
    config = config_of(checkpoint, **changes)
    options.device, options.seed = pick_device(options.device), config.seed
    options.views = sorted(set(options.views or VIEWS[config.mode]))
    views = {split: build_views(config, split, options.device) for split in ("train", "val")}
    options.groups = views["train"].groups

    model = build_model(config, options.groups)
    model.load_state_dict(checkpoint["model"])
    rows = list(measure(model.to(options.device), views, options))
    untrained = settle_batchnorm(build_model(config, options.groups).to(options.device), views["train"], config.views)
    for row, other in zip(rows, measure(untrained, views, options)):
        row["untrained"] = other["value"]
        row["paper"] = PAPER.get((config.dataset, config.mode, config.condition, config.views), {}).get((row["probe"], row["features"]))
    result = dict(checkpoint=str(options.checkpoint), step=checkpoint["step"], config=checkpoint["config"], device=str(options.device),
                  seconds=round(time.monotonic() - started, 1), rows=rows)
    print(table(rows))
    path = options.json or Path(options.checkpoint).parent / "probes.json"
    save_atomically(Path(path), lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
    if options.figures:
        for figure in figures.draw_all(model, views["val"], config, Path(options.checkpoint).parent):
            print(f"drew {figure}")
    return 0


def table(rows):
    """Rows as aligned text."""
    lines = [("probe", "predicts", "from", "head", "epochs", "train/val", "unit", "trained", "untrained", "paper")]
    for r in rows:
        digits = 1 if r["unit"] == "top-1 %" else 3
        paper = "-" if r["paper"] is None else f"{r['paper']:.{digits}f}"
        lines.append((r["probe"], r["predicts"], r["features"], r["head"], str(r["epochs"]), f"{r['n_train']}/{r['n_val']}",
                      r["unit"], f"{r['value']:.{digits}f}", f"{r['untrained']:.{digits}f}", paper))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def parse(argv=None):
    p = argparse.ArgumentParser(prog="evaluate.py", description="Probe a trained model.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's last.pt; settings come from it")
    p.add_argument("--probe", nargs="+", choices=PROBES, default=list(PROBES), help="which probes")
    p.add_argument("--views", nargs="+", type=int, metavar="M", help="inference lengths M_val (default: the paper's for the mode)")
    p.add_argument("--probe-epochs", type=int, default=0, help="override the protocol's epochs; 0 = protocol")
    p.add_argument("--samplings", type=int, default=4, help="view samplings per training sample")
    p.add_argument("--data-dir", help="where the data is now, if it moved")
    p.add_argument("--limit", type=int, metavar="N", help="use N images or objects of each split")
    p.add_argument("--device", default="auto", help="auto | cpu | cuda | mps")
    p.add_argument("--json", metavar="FILE", help="where the numbers go (default: probes.json in the run's folder)")
    p.add_argument("--figures", action="store_true", help="draw the figures into the run's folder")
    options = p.parse_args(argv)
    if options.views and min(options.views) < 1:
        raise BadInput(f"--views {min(options.views)}: M_val must be at least 1")
    if options.samplings < 1 or options.probe_epochs < 0:
        raise BadInput("--samplings must be at least 1 and --probe-epochs at least 0")
    return options


def main(argv=None):
    try:
        return evaluate(parse(argv))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
