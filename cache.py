"""Arrays on disk that are made once: decoded images, rendered solids, saliency maps.

`cached(path, key, shape, dtype, fill)` returns a memory-mapped array. The first time, `fill` writes it
batch by batch into a temporary file that takes its final name only when complete, so a killed run leaves
nothing half-written. Beside `x.npy` lies `x.json` with the `key`: what the array was made from. When the
key no longer fits (a changed folder, another size) the array is made again.
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import BadInput


def cached(path, key, shape, dtype, fill, what):
    """Memory-mapped array of `shape` at `path`, made by `fill` if absent or stale.

    key: JSON-able description of everything the content depends on.
    fill: (array) -> iterator that yields the number of rows written so far.
    what: words for the progress bar, such as "decoding 200 images".
    Raises: BadInput if the folder cannot be written or has no room."""
    path = Path(path)
    key = json.loads(json.dumps(dict(key, shape=shape, dtype=np.dtype(dtype).name)))
    if _fresh(path, key):
        return open_array(path)
    if path.exists():
        print(f"{path} does not fit the present data or settings: making it again")
    _make_room(path, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        array = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=tuple(shape))
        with tqdm(total=shape[0], desc=what, unit="row", leave=False) as bar:
            for done in fill(array):
                bar.update(done - bar.n)
        array.flush()
        key_file = path.with_suffix(".json")
        key_file.unlink(missing_ok=True)                 # no moment at which an old key vouches for a new array
        os.replace(part, path)
        part_key = key_file.with_name(part.name)
        part_key.write_text(json.dumps(key, indent=1))
        os.replace(part_key, key_file)
    finally:
        part.unlink(missing_ok=True)
    return open_array(path)


def cache_path(config, what):
    """Where `what` of this data set at this size is kept, one file per --limit."""
    limit = f"-{config.limit}" if config.limit else ""
    return Path(config.data_dir) / ".cache" / f"{config.dataset}-{what}-{config.image_size}px{limit}.npy"


def open_array(path):
    """Memory-map an .npy file. Copy-on-write, so that torch may wrap it; the file is never changed."""
    try:
        return np.lib.format.open_memmap(path, mode="c")             # unlike np.load, takes .npy and nothing else
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path}: not a readable .npy array ({error}); was it cut short? Fetch or make it again") from None


def _fresh(path, key):
    try:
        return json.loads(path.with_suffix(".json").read_text()) == key and list(open_array(path).shape) == key["shape"]
    except (OSError, ValueError, BadInput):
        return False


def _make_room(path, size):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"no permission to write in {path.parent}")
    except OSError as error:
        raise BadInput(f"{path.parent}: cannot keep prepared data there ({error}); choose another --data-dir") from None
    if free < size * 1.05:
        raise BadInput(f"{path}: needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room or lower --limit")
