"""Arrays on disk that are made once: decoded images, rendered solids, saliency maps.

`cached(path, key, shape, dtype, fill)` returns a memory-mapped array. The first time, `fill` writes
it batch by batch into a temporary file that takes its final name only when complete, so no
half-written array is ever read; what a killed process left of one goes when the next array is made.
Beside `x.npy` lies `x.json` with the `key`: what the array was made from. When the key no longer
fits (a changed folder, another size) the array is made again.

The 3DIEBench pack, which takes hours, is `resumable`: the unfinished `x.npy.part` stays,
`x.npy.progress` says how many of its rows are on the disk and for which key, and the next run goes
on from there.
"""
import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.errors import BadInput, printable
from plumbing.files import collect_parts, part_of, save_atomically


def cached(path, key, shape, dtype, fill, what, resumable=False, unit="row"):
    """Memory-mapped array of `shape` at `path`, made by `fill` if absent or out of date.

    key: JSON-able description of everything the content depends on.
    fill: (array) -> iterator that yields the number of rows written so far; if resumable, it takes
    (array, first row to write).
    what: words for the progress bar, such as "decoding 200 images".
    resumable: keep what an interrupted run wrote, and say beforehand how much disk the array takes.
    unit: what a row is, for the progress bar.
    Raises: BadInput if the folder cannot be written or has no room."""
    path = Path(path)
    key = json.loads(json.dumps(dict(key, shape=shape, dtype=np.dtype(dtype).name)))
    if _fresh(path, key):
        return open_array(path)
    if path.exists():
        print(f"{printable(path)} does not fit the present data or settings: making it again")
    if resumable:
        _make_resumably(path, key, fill, what, unit)
    else:
        _make(path, key, fill, what, unit)
    return open_array(path)


def _make(path, key, fill, what, unit):
    """Fill a new array under another name, then give it its own."""
    _make_room(path, _size(key))
    part = part_of(path)
    try:
        array = _reserve(part, path, key)
        with tqdm(total=len(array), desc=what, unit=unit, unit_scale=unit == "B",
                  leave=False) as bar:
            for done in fill(array):
                bar.update(done - bar.n)
        array.flush()
        _publish(part, path, key)
    finally:
        part.unlink(missing_ok=True)


def _make_resumably(path, key, fill, what, unit):
    """As _make, but an unfinished array stays, and a progress file says which of its rows count."""
    part = path.with_name(path.name + ".part")
    progress = path.with_name(path.name + ".progress")
    _make_room(path, 0)                         # the folder, for the lock
    with _alone(path):
        if _fresh(path, key):                   # another process made it while this one waited
            return
        start = _rows_done(part, progress, key)
        total = key["shape"][0]
        size = _size(key)
        _make_room(path, size * (total - start) // total)
        resumed = f", as this one does from {start:,} of {total:,}" if start else ""
        print(f"{what}: {in_words(size)} on disk, in {printable(path)}. "
              f"May be interrupted: the next run goes on from there{resumed}")
        if not start:
            progress.unlink(missing_ok=True)    # it must not vouch for the empty array to come
        array = _map(part, "r+" if start else "w+", key)
        with tqdm(total=total, initial=start, desc=what, unit=unit, unit_scale=unit == "B",
                  leave=False) as bar:
            for done in fill(array, start):
                array.flush()                   # first the rows, then the word that they are there
                _write_json(progress, dict(key=key, rows=done))
                bar.update(done - bar.n)
        _publish(part, path, key)
        progress.unlink()


def _rows_done(part, progress, key):
    """Leading rows of an unfinished array that can be trusted.

    0 if the array is cut short or was meant for another key."""
    try:
        array = open_array(part)
        state = _read_json(progress)
        rows = state["rows"]
        known = state["key"] == key and type(rows) is int and 0 <= rows <= len(array)
    except (OSError, ValueError, KeyError, TypeError, BadInput):
        return 0
    return rows if known and _as_key_says(array, key) else 0


@contextlib.contextmanager
def _alone(path):
    """One process at a time makes `path`; the others wait here.

    The lock goes with its process, however it ends."""
    import fcntl  # Unix only, so only where it is needed
    with open(path.with_name(path.name + ".lock"), "w+") as lock:     # "w" would wait at a pipe
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{printable(path)}: another process is making it; waiting")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(part, path, key):
    """Give a complete array its name, and only then its key."""
    key_file = path.with_suffix(".json")
    key_file.unlink(missing_ok=True)            # at no moment an old key vouches for a new array
    os.replace(part, path)
    _write_json(key_file, key)


def _read_json(path):
    """Raises: OSError or ValueError for what is not a file of JSON."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")      # to open a named pipe would hang
    try:
        return json.loads(path.read_text())
    except RecursionError:                                  # thousands of brackets
        raise ValueError(f"{path} is not JSON") from None


def _write_json(path, value):
    save_atomically(path, lambda part: part.write_text(json.dumps(value, indent=1)))


def _map(path, mode, key):
    return np.lib.format.open_memmap(path, mode=mode, dtype=key["dtype"], shape=tuple(key["shape"]))


def _reserve(part, path, key):
    """Map a new file whose room on the disk is taken.

    To write into a mapped file that finds no room kills the process (SIGBUS), without a word."""
    try:
        array = _map(part, "w+", key)
        if hasattr(os, "posix_fallocate"):               # not on macOS
            with open(part, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        return array
    except OSError as error:
        raise BadInput(f"{path}: no room for {in_words(_size(key))} ({error.strerror}); "
                       "make room or choose another --data-dir") from None


def _size(key):
    return math.prod(key["shape"]) * np.dtype(key["dtype"]).itemsize


def in_words(size):
    """A number of bytes as "3.2 GB", "45.0 MB" or "1.5 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def cache_path(config, what):
    """Where `what` of this data set at this size is kept, one file per --limit."""
    limit = f"-{config.limit}" if config.limit else ""
    name = f"{config.dataset}-{what}-{config.image_size}px{limit}.npy"
    return Path(config.data_dir) / ".cache" / name


def open_array(path):
    """Memory-map an .npy file: copy-on-write, so that torch may wrap it and no file is changed.

    Read-only where it is larger than memory, which Linux does not promise to copies."""
    if path.exists() and not path.is_file():
        raise BadInput(f"{path}: not a regular file; remove it")    # to open a pipe would hang
    try:
        try:
            return np.lib.format.open_memmap(path, mode="c")    # unlike np.load, takes .npy only
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:          # what NumPy raises on damaged headers has no common type
        raise BadInput(f"{path}: not a readable .npy array ({error}); was it cut short? "
                       "Fetch or make it again") from None


def _fresh(path, key):
    """Whether the array at `path` is whole and was made for this key."""
    try:
        made_for = _read_json(path.with_suffix(".json"))
        return made_for == key and _as_key_says(open_array(path), key)
    except (OSError, ValueError, BadInput):
        return False


def _as_key_says(array, key):
    """Whether shape, type and layout are those of the arrays made here."""
    return (list(array.shape) == key["shape"] and array.dtype == np.dtype(key["dtype"])
            and array.flags.c_contiguous)


def _make_room(path, size):
    """Make the folder of `path` and check that `size` more bytes fit there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        collect_parts(path.parent)                       # before asking how much room there is
        free = shutil.disk_usage(path.parent).free
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"no permission to write in {path.parent}")
        if path.is_dir():                                # else noticed when all has been made
            raise IsADirectoryError(f"{path.name} is a folder")
    except OSError as error:
        raise BadInput(f"{path.parent}: cannot keep prepared data there ({error}); "
                       "choose another --data-dir") from None
    if free < size * 1.05:
        raise BadInput(f"{path}: needs {in_words(size)} and {in_words(free)} are free; "
                       "make room or lower --limit")
