"""Tensors that may be larger than memory: features that are computed once and read many times.

    gather(batches, S, N)           {name: (b, ...)} after {name: (b, ...)}  ->  {name: (S, N, ...)}
    read(x, index)                  rows of such a tensor, in memory

Up to IN_MEMORY bytes these are plain float32 tensors. What is larger goes, in half precision, into
memory-mapped files. These have no name, so nothing is left of them however the process ends; the
room they take is reserved beforehand. They lie in TMPDIR if that is set, else in the folder that is
given, and not in /tmp, which may itself be memory.

What was written or read is let go at once: the process holds one batch, not the file (and what the
operating system maps around each row, up to 2 MB). As much of the file as there is free memory for
stays in the operating system's cache. So rows in a random order cost next to nothing while the
cache holds the file, and a disk access each where it does not.

Nothing in here is about JEPA. Checked in tests/test_scratch.py.
"""
import errno
import math
import mmap
import os
import shutil
import tempfile
import weakref

import torch

from plumbing.cache import in_words
from plumbing.errors import BadInput

IN_MEMORY = 6e9         # bytes: what the papers' data sets need, but for ImageNet and iNat21

_maps = weakref.WeakSet()


def gather(batches, S, N, *, folder=None, exact=(), what=None):
    """Rows that come batch by batch, S times N of them, each written where it will stay.

    batches: s -> iterator of {name: (b, ...) float}, N rows in all.
    folder: for files, if it comes to that.  exact: names that are never halved.
    what: in words.  ->  {name: (S, N, ...)} on the CPU
    Raises: BadInput if `what` is given and a number is not finite, or if the disk has no room."""
    arrays = {}
    for s in range(S):
        done = 0
        for batch in batches(s):
            if not arrays:
                arrays = _allocate(batch, (S, N), folder, exact)
            bad = []
            for name, rows in batch.items():
                rows = rows.to("cpu", arrays[name].dtype)
                arrays[name][s, done:done + len(rows)] = rows
                if what and not rows.isfinite().all():
                    bad.append(name)
            if bad:
                raise BadInput(f"--probe: {', '.join(bad)} of {what} not finite; if the run "
                               "diverged, probe a checkpoint from before that")
            done += len(rows)
            let_go()
    return arrays


def read(x, index):
    """x[index] as a tensor in memory, in float32 if x is in half precision.

    x (n, ...), index (b,) on x's device"""
    rows = x.index_select(0, index)
    let_go()
    return rows.float() if x.dtype == torch.float16 else rows


def _allocate(batch, shape, folder, exact):
    """Uninitialised tensors (*shape, ...) for rows such as those of a batch."""
    shapes = {name: (*shape, *rows.shape[1:]) for name, rows in batch.items()}
    if 4 * sum(map(math.prod, shapes.values())) <= IN_MEMORY:
        return {name: torch.empty(shape) for name, shape in shapes.items()}
    arrays = {}
    for name, shape in shapes.items():
        dtype = torch.float32 if name in exact else torch.float16
        arrays[name] = _on_disk(shape, dtype, os.environ.get("TMPDIR") or folder)
    return arrays


def _on_disk(shape, dtype, folder):
    """A tensor of zeros that is a file without a name; it goes with the tensor."""
    size = math.prod(shape) * dtype.itemsize
    try:
        if shutil.disk_usage(folder or tempfile.gettempdir()).free < 1.05 * size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):          # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise BadInput(f"{folder}: no room for {in_words(size)} of features ({error.strerror}); "
                       "let TMPDIR name a folder on a larger disk, or lower --samplings or --limit"
                       ) from None
    _maps.add(pages)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def let_go():
    """Give back the memory that holds pages of the files. Their content stays."""
    if hasattr(mmap, "MADV_DONTNEED"):                  # not on Windows
        for pages in list(_maps):
            pages.madvise(mmap.MADV_DONTNEED)
