"""A run's folder, runs/NAME/: what is kept, and how it is written so that no crash leaves it half-written.

    config.json   the settings            metrics.csv   one line an epoch
    last.pt       all that --resume needs encoder.pt    f_theta alone, a plain state dict
    curves.png    metrics.csv, drawn

Checkpoints hold tensors, numbers and strings only and are read with weights_only=True: loading one never
runs code. Checked in tests/test_runs.py.
"""
import csv
import dataclasses
import json
import os
from pathlib import Path

import torch

from config import BadInput, Config

FORMAT, VERSION = "seq-jepa checkpoint", 1
MAY_CHANGE = {"resume", "workers", "device", "amp", "compile", "data_dir", "download", "out", "probe_every"}   # between a run and its --resume


def save_atomically(path, write):
    """Call write(temporary path), flush it to disk, then rename it to `path` in one step."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def open_run(config):
    """Check that the run may start: returns its checkpoint if --resume, else None. Nothing is written yet.

    A folder without a checkpoint, left by a run that died at once, may be used again.
    Raises: BadInput if the run exists without --resume, or --resume finds another run's settings."""
    folder = config.run_dir
    if not config.resume:
        if (folder / "last.pt").exists():
            raise BadInput(f"{folder}: this run exists already; continue it with --resume, choose another --name, or delete it")
        return None
    checkpoint = load_checkpoint(folder / "last.pt")
    before, now = checkpoint["config"], dataclasses.asdict(config)
    changed = [k for k in now if k not in MAY_CHANGE and before[k] != now[k]]
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} {before[k]} (now {now[k]})" for k in changed)
        raise BadInput(f"--resume: {folder} was started with {flags}; repeat its command line, or start a new --name")
    return checkpoint


def create_run(config):
    """Make the folder and write config.json."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=1)
    save_atomically(config.run_dir / "config.json", lambda part: part.write_text(text + "\n"))


def save_checkpoint(config, model, optimizer, step, meters):
    """Write last.pt and encoder.pt.  step: optimiser steps done.  meters: what an unfinished epoch has summed up."""
    state = dict(format=FORMAT, version=VERSION, config=dataclasses.asdict(config), step=step, meters=meters,
                 model=model.state_dict(), optimizer=optimizer.state_dict())
    save_atomically(config.run_dir / "last.pt", lambda part: torch.save(state, part))
    save_atomically(config.run_dir / "encoder.pt", lambda part: torch.save(model.encoder.state_dict(), part))


def load_checkpoint(path):
    """Read a checkpoint onto the CPU; checkpoint["config"] is a plain dict.

    Raises: BadInput if it is absent, damaged, not ours, or of another version."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint there; expected the last.pt of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # what torch.load raises on a damaged or foreign file has no common type
        why = "contains more than tensors" if "Unsupported" in str(error) or "Weights only" in str(error) else "is damaged"
        raise BadInput(f"{path}: {why} and was not loaded; expected the last.pt of a run of this project") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise BadInput(f"{path}: not a checkpoint of this project; expected the last.pt of a run")
    if checkpoint["version"] != VERSION:
        raise BadInput(f"{path}: checkpoint version {checkpoint['version']}, this code reads {VERSION}; use the code it was made with")
    return checkpoint


def config_of(checkpoint, **changes):
    """The Config stored in a checkpoint, with `changes`."""
    return dataclasses.replace(Config(**checkpoint["config"]), **changes)


def append_metrics(path, row):
    """Add one line to metrics.csv; the first line names the columns."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_metrics(path):
    """metrics.csv as a list of {column: float}."""
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def drop_metrics_after(path, step):
    """Forget epochs that ended after `step`: a resumed run will write them again."""
    if not path.exists():
        return
    header, *lines = path.read_text().splitlines(keepends=True)
    column = header.strip().split(",").index("step")
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[column]) <= step]
    save_atomically(path, lambda part: part.write_text("".join([header, *kept])))
