"""A run's folder, runs/NAME/: what is kept, and how, so that no crash leaves it half-written.

    config.json   the settings            metrics.csv   one line an epoch
    last.pt       all that --resume needs encoder.pt    f_theta alone, a plain state dict
    previous.pt   the last.pt before it   curves.png    metrics.csv, drawn
    epoch-K.pt    last.pt as it was after epoch K, if --keep-every asks for it

A process may be killed at any instant: every file is written under another name,
NAME.HOST-PID.part, and renamed when whole. Checkpoints hold tensors, numbers and strings only and
are read with weights_only=True: loading one never runs code.
Checked in tests/test_runs.py and, by kill -9, in tests/test_kill.py.
"""
import csv
import dataclasses
import json
import shutil
import zipfile
from pathlib import Path

import torch

from plumbing.errors import BadInput
from plumbing.files import collect_parts, save_atomically

FORMAT = "seq-jepa checkpoint"
VERSION = 1
# Settings that may change between a run and its --resume.
MAY_CHANGE = {"resume", "workers", "device", "amp", "compile", "data_dir", "download", "out",
              "probe_every", "keep_every", "resident"}


# ---------------------------------------------------------------- the run and its checkpoints

def open_run(config):
    """Check that the run may start.  -> its checkpoint if --resume, else None.  Writes nothing.

    A folder without a checkpoint, left by a run that died at once, may be used again, and --resume
    begins at step 0 where there is no checkpoint yet: a job that a scheduler starts again and again
    has one command line.
    Raises: BadInput if the run exists without --resume, or --resume finds another run's settings or
    a damaged checkpoint."""
    folder = config.run_dir
    exists = (folder / "last.pt").exists() or (folder / "previous.pt").exists()
    if not config.resume:
        if exists:
            raise BadInput(f"{folder}: this run exists already; continue it with --resume, "
                           "choose another --name, or delete it")
        return None
    if not exists:
        print(f"--resume: {folder} has no checkpoint yet, beginning at step 0")
        return None
    checkpoint = load_checkpoint(folder / "last.pt")
    defaults = dataclasses.asdict(type(config)())           # for settings newer than the checkpoint
    before = defaults | checkpoint["config"]
    now = dataclasses.asdict(config)
    changed = [k for k in now if k not in MAY_CHANGE and before[k] != now[k]]
    if changed:
        flags = ", ".join(f"--{k.replace('_', '-')} {before[k]} (now {now[k]})" for k in changed)
        raise BadInput(f"--resume: {folder} was started with {flags}; repeat its command line, "
                       "or start a new --name")
    return checkpoint


def create_run(config):
    """Make the folder, or clear it of what a killed process left of a file; write config.json."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    collect_parts(config.run_dir)
    text = json.dumps(dataclasses.asdict(config), indent=1)
    save_atomically(config.run_dir / "config.json", lambda part: part.write_text(text + "\n"))


def save_checkpoint(config, model, optimizer, step, meters):
    """Write encoder.pt and last.pt, whose predecessor becomes previous.pt.

    step: optimiser steps done.  meters: what an unfinished epoch has summed up.
    Raises: BadInput if the disk is full or the like; the checkpoint before stays last.pt."""
    folder = config.run_dir
    encoder = model.representation.state_dict()
    state = dict(format=FORMAT, version=VERSION, config=dataclasses.asdict(config),
                 step=step, meters=meters,
                 model=model.state_dict(), optimizer=optimizer.state_dict())
    try:        # encoder.pt first: once last.pt says that the run is done, nothing may be missing
        save_atomically(folder / "encoder.pt", lambda part: _torch_save(encoder, part))
        save_atomically(folder / "last.pt", lambda part: _torch_save(state, part),
                        keep=folder / "previous.pt")
    except OSError as error:
        last = folder / "last.pt"
        kept = "there was no checkpoint before"
        if last.exists():
            kept = f"{last}, the checkpoint before, is kept"
        raise BadInput(f"{error.filename}: step {step} could not be saved "
                       f"({error.strerror or error}); {kept}: mend this, then --resume") from None


def _torch_save(state, path):
    """torch.save that reports a full disk as OSError.

    By itself it reports that its positions in the file do not add up."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error


def load_checkpoint(path):
    """Read a checkpoint onto the CPU; checkpoint["config"] is a plain dict.

    Raises: BadInput if it is absent, damaged, not ours, or of another version."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint there; {_advice(path)}")
    try:
        _verify(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:          # what torch.load raises on such files has no common type
        has_code = "Unsupported" in str(error) or "Weights only" in str(error)
        why = "contains more than tensors" if has_code else "is damaged"
        raise BadInput(f"{path}: {why} and was not loaded; {_advice(path)}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise BadInput(f"{path}: not a checkpoint of this project; expected the last.pt of a run")
    if checkpoint.get("version") != VERSION:
        raise BadInput(f"{path}: checkpoint version {checkpoint.get('version')}, this code reads "
                       f"{VERSION}; use the code it was made with")
    return checkpoint


def _verify(path):
    """Raise if a single bit of a checkpoint, which is a zip file, has changed anything in it.

    torch.load does not look at the checksums. What is marked as a folder it does not read at all,
    and leaves whatever was in memory. A third of a second for 500 MB."""
    if zipfile.is_zipfile(path):                # if not, torch.load will say so
        with zipfile.ZipFile(path) as file:
            if file.testzip() or any(record.external_attr for record in file.infolist()):
                raise zipfile.BadZipFile


def _advice(path):
    """What to do where a checkpoint cannot be loaded."""
    previous = path.parent / "previous.pt"
    if path.name != "last.pt" or not previous.is_file():
        return "expected the last.pt of a run of this project"
    try:
        load_checkpoint(previous)
    except BadInput:
        return f"nor can {previous} be, the checkpoint before it; delete the run and start it again"
    return f"the checkpoint before it is intact: mv {previous} {path}, then --resume"


def restore(model, checkpoint):
    """Fill `model` with the checkpoint's weights. Raises: BadInput if they do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise BadInput("the checkpoint's weights do not fit the model that its settings describe; "
                       "use the code it was made with") from None


# ---------------------------------------------------------------- metrics.csv

def append_metrics(path, row):
    """Add one line to metrics.csv; the first line names the columns."""
    def write(part):
        new = not path.exists()
        if not new:
            shutil.copyfile(path, part)         # small, once an epoch
        with open(part, "a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    save_atomically(path, write)


def read_metrics(path):
    """metrics.csv as a list of {column: float}."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column, value in row.items():
            row[column] = float(value)
    return rows


def drop_metrics_after(path, step):
    """Forget epochs that ended after `step`, and a line cut short: a resumed run rewrites them."""
    if not path.exists():
        return
    header, *lines = path.read_text().splitlines(keepends=True) or [""]
    lines = [line for line in lines if line.endswith("\n")]
    kept = []
    if lines:
        column = header.strip().split(",").index("step")
        kept = [line for line in lines if int(line.split(",")[column]) <= step]
    if kept:
        save_atomically(path, lambda part: part.write_text("".join([header, *kept])))
    else:
        path.unlink()                           # the first line to come will bring its header
