"""Whole files or none: how a file is written so that no crash leaves half of it.

A process may be killed at any instant. So every file is written under another name,
NAME.HOST-PID.part, flushed to the disk, and renamed when whole. `lock` keeps a folder for one
process.
Checked in tests/test_runs.py and, by kill -9, in tests/test_kill.py.
"""
import contextlib
import os
import platform
import re

try:
    import fcntl
except ImportError:                     # Windows: nothing is locked there
    fcntl = None

from plumbing.errors import BadInput

LOCK = ".lock"

def save_atomically(path, write, keep=None):
    """Call write(temporary path), flush it to disk, then rename it to `path` in one step.

    keep: a path that what was at `path` before gets as its second name.
    Raises: OSError, naming `path`, if it cannot be written; what was there before stays."""
    part = part_of(path)
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        if keep and path.exists():
            link(path, keep)
        os.replace(part, path)
    except OSError as error:
        error.filename = str(path)      # a failed write names none, a failed open the temporary one
        raise
    finally:
        part.unlink(missing_ok=True)


def link(path, keep):
    """Let `keep` name the file at `path` too. Nothing is copied; at no moment it has no name."""
    part = part_of(keep)
    try:
        os.link(path, part)
        os.replace(part, keep)
    except OSError:
        os.replace(path, keep)          # no hard links here: for a moment `path` has no file
    finally:
        part.unlink(missing_ok=True)    # a rename does nothing if both were one file already


def part_of(path):
    """The name under which this process, and no other, writes what will be `path`."""
    return path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.part")


def collect_parts(folder):
    """Remove what killed processes of this machine left half-written in `folder`.

    What living ones write is left alone."""
    for part in folder.glob("*.part"):
        writer = re.fullmatch(rf".*\.{re.escape(platform.node())}-(\d+)\.part", part.name)
        if writer and not _alive(int(writer[1])):
            part.unlink(missing_ok=True)


def _alive(pid):
    """Whether a process of this machine with this id runs."""
    if os.name != "posix":
        return True                             # elsewhere signal 0 is no question but Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:                     # another user's
        pass
    return True


# ---------------------------------------------------------------- one process at a time

_locks = {}         # {folder: its open lock file}


def lock(folder):
    """Keep `folder` for this process until `unlock`, or until the process ends, however it does.

    Where the file system knows no locks, nothing happens.
    Raises: BadInput, naming the process that has it; OSError if the folder cannot be written."""
    if fcntl is None or folder in _locks:
        return
    file = open(folder / LOCK, "a+", encoding="utf-8", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        who = file.read(100) or "another process"
        file.close()
        raise BadInput(f"{folder}: is being written by {who}; let it end or stop it, or choose "
                       "another --name") from None
    except OSError:
        file.close()
        return
    _locks[folder] = file
    with contextlib.suppress(OSError):          # no room for it: locked all the same
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}".encode())


def unlock():
    """Let go of all folders that this process has locked."""
    while _locks:
        _locks.popitem()[1].close()
