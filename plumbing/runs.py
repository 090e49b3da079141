"""A run's folder, runs/NAME/: what is kept, and how, so that no crash leaves it half-written.

    config.json   the settings            metrics.csv   one line an epoch
    last.pt       all that --resume needs encoder.pt    f_theta alone, a plain state dict
    previous.pt   the last.pt before it   curves.png    metrics.csv, drawn
    epoch-K.pt    last.pt as it was after epoch K, if --keep-every asks for it
    .lock         which process writes here; only one may

A process may be killed at any instant: every file is written under another name,
NAME.HOST-PID.part, and renamed when whole. Checkpoints hold tensors, numbers and strings only and
are read with weights_only=True: loading one never runs code. What is read is looked at: anybody
may have edited it.
Checked in tests/test_runs.py, by kill -9 in tests/test_kill.py, and on damaged and edited files in
tests/test_hostile_runs.py.
"""
import csv
import dataclasses
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import torch

from plumbing import flags
from plumbing.errors import BadInput
from plumbing.files import LOCK, collect_parts, lock, save_atomically

FORMAT = "seq-jepa checkpoint"
VERSION = 1
# Settings that may change between a run and its --resume.
MAY_CHANGE = {"resume", "workers", "device", "amp", "compile", "data_dir", "download", "out",
              "probe_every", "keep_every", "resident", "name", "accumulate"}
FILES = ("config.json", "metrics.csv", "encoder.pt", "last.pt", "previous.pt", "curves.png", LOCK)
PARTS = dict(config=dict, step=int, meters=dict, model=dict, optimizer=dict)    # of a checkpoint
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# ---------------------------------------------------------------- the run and its checkpoints

def open_run(config, main=True):
    """Check that the run may start.  -> its checkpoint if --resume, else None.

    A folder without a checkpoint, left by a run that died at once, may be used again, and --resume
    begins at step 0 where there is no checkpoint yet: a job that a scheduler starts again and again
    has one command line.
    main: whether this process is the one that writes. It locks a run that is there already;
    otherwise nothing is written.
    Raises: BadInput if the run exists without --resume, another process writes it, its folder
    cannot be used, or --resume finds another run's settings or damaged files."""
    folder = config.run_dir
    refuse_unusable(folder)
    exists = (folder / "last.pt").exists() or (folder / "previous.pt").exists()
    if main and ((folder / LOCK).exists() or exists and config.resume):
        lock(folder)
    kept = sorted(folder.glob("epoch-*.pt"))
    if kept and not exists:
        raise BadInput(f"{folder}: has {kept[-1].name} and no last.pt; mv {kept[-1]} "
                       f"{folder / 'last.pt'}, then --resume, or choose another --name")
    if not config.resume:
        if exists:
            raise BadInput(f"{folder}: this run exists already; continue it with --resume, "
                           "choose another --name, or delete it")
        return None
    if not exists:
        print(f"--resume: {folder} has no checkpoint yet, beginning at step 0")
        return None
    checkpoint = load_checkpoint(folder / "last.pt")
    try:
        stored = flags.restored(type(config), checkpoint["config"])
    except BadInput as error:
        raise BadInput(f"{folder / 'last.pt'}: has {error}") from None
    before = dataclasses.asdict(stored)
    now = dataclasses.asdict(config)
    # What nobody reads may differ: older code let it be typed, this code refuses it.
    changed = [k for k in now
               if k not in MAY_CHANGE and config.reads(k) and before[k] != now[k]]
    if changed:
        words = ", ".join(f"{flags.name_of(k)} {before[k]} (now {now[k]})" for k in changed)
        raise BadInput(f"--resume: {folder} was started with {words}; repeat its command line, "
                       "or start a new --name")
    if (folder / "metrics.csv").exists():
        read_metrics(folder / "metrics.csv")
    return checkpoint


def refuse_unusable(folder):
    """Raises BadInput unless `folder` is one for a run's files, or one can be made there."""
    for name in FILES:
        path = folder / name
        if os.path.lexists(path) and not path.is_file():        # a folder, a pipe, a broken link
            raise BadInput(f"{path}: is no regular file; move it away or choose another --name")
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise BadInput(f"{place}: is no folder; choose another --out or --name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise BadInput(f"{place}: no permission to write there; choose another --out")


def create_run(config, checkpoint=None):
    """Make the folder, or clear it of what a killed process left of a file; write config.json.

    checkpoint: what `open_run` returned.
    Raises: BadInput if another process has begun the run since then."""
    folder = config.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    if checkpoint is None and (folder / "last.pt").exists():
        raise BadInput(f"{folder}: another process has made this run meanwhile; "
                       "choose another --name")
    collect_parts(folder)
    text = json.dumps(dataclasses.asdict(config), indent=1)
    save_atomically(folder / "config.json", lambda part: part.write_text(text + "\n"))


def save_checkpoint(config, model, optimizer, step, meters, images=None):
    """Write encoder.pt and last.pt, whose predecessor becomes previous.pt.

    step: optimiser steps done.  meters: what an unfinished epoch has summed up.
    images: a digest of what is learned from.
    Raises: BadInput if the disk is full or the like; the checkpoint before stays last.pt."""
    folder = config.run_dir
    encoder = model.representation.state_dict()
    state = dict(format=FORMAT, version=VERSION, config=dataclasses.asdict(config),
                 revision=revision_of(model), step=step, meters=meters, images=images,
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

    Raises: BadInput if it is absent, damaged, not ours, of another version, or lacks a part."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path}: no checkpoint there; {_advice(path)}")
    try:
        checkpoint = read_tensors(path)
    except BadInput as error:
        raise BadInput(f"{error}; {_advice(path)}") from None
    if not isinstance(checkpoint, dict) or str(checkpoint.get("format")) != FORMAT:
        raise BadInput(f"{path}: not a checkpoint of this project; expected the last.pt of a run")
    if str(checkpoint.get("version")) != str(VERSION):
        raise BadInput(f"{path}: checkpoint version {checkpoint.get('version')!s:.20}, this code "
                       f"reads {VERSION}; use the code it was made with")
    flaw = _flaw(checkpoint)
    if flaw:
        raise BadInput(f"{path}: {flaw}; {_advice(path)}")
    return checkpoint


def read_tensors(path, mmap=False):
    """What torch.save wrote into a file, onto the CPU; no code that it may hold is run.

    mmap: map tensors from the disk where the format allows it, for files of which a part is used.
    Raises: BadInput if it is damaged or holds more than dictionaries, tensors, numbers and text."""
    try:
        _verify(path)
        mmap = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:          # what torch.load raises on such files has no common type
        has_code = "Unsupported" in str(error) or "Weights only" in str(error)
        why = "contains more than tensors" if has_code else "is damaged"
        raise BadInput(f"{path}: {why} and was not loaded") from None


def _flaw(checkpoint):
    """Words for the first thing in a checkpoint that no run writes; None if there is none.

    Whether its tensors fit a model, and its step the data, is for `restore` and the loop to say."""
    for name, kind in PARTS.items():
        value = checkpoint.get(name)
        if value is None:
            return f"has no {name}"
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"its {name} is {value!r:.20}, expected {kind.__name__}"
    step = checkpoint["step"]
    if step < 0:
        return f"its step is {step}, expected 0 or more"
    for name in [*checkpoint["config"], *checkpoint["meters"], *checkpoint["model"]]:
        if not isinstance(name, str):
            return f"names something {name!r:.20}, expected text"
    for name, value in checkpoint["meters"].items():
        if type(value) is not float:
            return f"its meter {name} is {value!r:.20}, expected a number"
    for name, weights in checkpoint["model"].items():
        if not is_whole(weights):
            return f"its weights {name} are no plain tensor"
        if weights.dtype in FLOATS and not weights.isfinite().all():
            return f"its weights {name} are not finite"
    return None


def is_whole(value):
    """Whether this is a tensor that has, in memory, all the numbers that it claims to have."""
    return (isinstance(value, torch.Tensor) and value.layout is torch.strided
            and value.device.type == "cpu" and not value.is_quantized
            and value.nbytes <= value.untyped_storage().nbytes())


def _verify(path):
    """Raise if a single bit of a checkpoint, which is a zip file, has changed anything in it.

    torch.load does not look at the checksums. What is marked as a folder it does not read at all,
    and leaves whatever was in memory. A third of a second for 500 MB."""
    if zipfile.is_zipfile(path):                # if not, torch.load will say so
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
            if any(record.external_attr or record.compress_type for record in records):
                raise zipfile.BadZipFile
            if file.testzip():
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
    ours = _shapes(model.state_dict())
    theirs = _shapes(checkpoint["model"])
    different = sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))
    if different:
        raise BadInput("the checkpoint's weights do not fit the model that its settings describe "
                       f"({different[0]}: {theirs.get(different[0], 'absent')}, expected "
                       f"{ours.get(different[0], 'none')}); use the code it was made with")
    model.load_state_dict(checkpoint["model"])


def revision_of(model):
    """A model's own number for how it learns, 1 if it has none.

    Raise it, `revision` of its class, with every change by which a run of the same settings and
    weights would go on otherwise."""
    return getattr(model, "revision", 1)


def refuse_other_revision(model, checkpoint, folder):
    """Raises BadInput if a run would go on as one that learns otherwise than it did so far."""
    before = checkpoint.get("revision", 1)
    now = revision_of(model)
    if before != now:
        raise BadInput(f"--resume: {folder} was begun by code whose {type(model).__name__} learns "
                       f"otherwise (revision {before!s:.20}, here {now}); go on with that code, or "
                       "start a new --name")


def _shapes(state):
    """{name: words for a tensor's type and shape}"""
    return {name: f"{value.dtype} {tuple(value.shape)}" for name, value in state.items()}


def restore_optimizer(optimizer, checkpoint):
    """Fill the AdamW of `train.build_optimizer` with what a checkpoint's has gathered.

    Its settings stay this run's own, which are the checkpoint's; rates are set at every step.
    Raises: BadInput if that was gathered for other parameters."""
    own = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = checkpoint["optimizer"]
    try:
        grouped = [group["params"] for group in saved["param_groups"]]
        fits = grouped == [group["params"] for group in own["param_groups"]]
        for index, moments in saved["state"].items():
            shape = parameters[index].shape
            expected = dict(step=torch.Size(), exp_avg=shape, exp_avg_sq=shape)
            fits &= {name: tensor.shape for name, tensor in moments.items()} == expected
            for tensor in moments.values():
                fits &= is_whole(tensor) and bool(tensor.isfinite().all())
    except (AttributeError, IndexError, KeyError, TypeError):       # not even of the right kind
        fits = False
    if not fits or not saved["state"] and checkpoint["step"]:
        raise BadInput("the checkpoint's optimizer does not fit the model that its settings "
                       "describe; it was damaged, or made with other code")
    optimizer.load_state_dict(dict(state=saved["state"], param_groups=own["param_groups"]))
    # Fused AdamW pairs numbers by their place in memory, and a checkpoint of another device or of
    # older code may have another memory format: moments are laid out as their parameters are.
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


# ---------------------------------------------------------------- metrics.csv

def append_metrics(path, row):
    """Add one line to metrics.csv; the first line names the columns.

    Raises: BadInput if it has other columns."""
    def write(part):
        new = not path.exists()
        if not new:
            shutil.copyfile(path, part)         # small, once an epoch
        with open(part, "a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)

    refuse_other_columns(path, row)
    save_atomically(path, write)


def refuse_other_columns(path, row):
    """Raises BadInput if metrics.csv is there and has other columns than this row, {column: ...}"""
    header, _ = _metrics(path)
    different = [name for name in (*header, *row) if (name in header) != (name in row)]
    if header and header != list(row):
        words = ", ".join(different) or "in another order"
        raise BadInput(f"{path}: has other columns than this code writes ({words:.80}); move the "
                       "file away, then --resume")


def read_metrics(path):
    """metrics.csv as a list of {column: float}.

    Raises: BadInput, naming the line, if it is absent or not what runs write."""
    if not path.exists():
        raise BadInput(f"{path}: not found; a run writes it at the end of each epoch")
    header, lines = _metrics(path)
    return [dict(zip(header, map(float, line.split(",")))) for line in lines]


def drop_metrics_after(path, step):
    """Forget epochs that ended after `step`, and a line cut short: a resumed run rewrites them."""
    if not path.exists():
        return
    header, lines = _metrics(path)
    kept = [line for line in lines if float(line.split(",")[header.index("step")]) <= step]
    if kept:
        text = "\n".join([",".join(header), *kept]) + "\n"
        save_atomically(path, lambda part: part.write_text(text))
    else:
        path.unlink()                           # the first line to come will bring its header


def _metrics(path):
    """(columns, lines of numbers) of metrics.csv, both empty if there is no line of numbers.

    A last line without its end was cut short by a kill and does not count.
    Raises: BadInput if a line is no line of ours, or the steps do not rise."""
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return [], []
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file; delete it, and curves begin anew") from None
    if len(lines) < 2:
        return [], []
    header = lines[0].split(",")
    last = -1
    for number, line in enumerate(lines[1:], start=2):
        step = _step(header, line)
        if not step > last:
            raise BadInput(f"{path}: line {number} is {line!r:.40}, expected {len(header)} numbers "
                           "and a step after the line before's; mend or delete the file")
        last = step
    return header, lines[1:]


def _step(header, line):
    """The step in a line of metrics.csv; NaN if it is no line of numbers under this header."""
    try:
        row = dict(zip(header, map(float, line.split(",")), strict=True))
        return row["step"] if len(row) == len(header) else math.nan
    except (KeyError, ValueError):
        return math.nan
