"""How a command that does not train begins and ends: in its result, or in one line that says why.

    run(work, parse, argv)      main of evaluate.py, figures/regions.py and the benchmarks; that of
                                train.py, which may be several processes, is loop.launch
    refuse_unwritable(path, what_to_do)
                                said before the work whose result would go there

Nothing in here is about JEPA. Checked in tests/test_hostile_evaluate.py.
"""
import signal
import sys
from pathlib import Path

from plumbing.device import is_out_of_memory
from plumbing.errors import BadInput, printable
from plumbing.files import part_of

COMPILER = ("torch._dynamo", "torch._inductor")         # whose errors have no common type


def run(work, parse, argv=None, less="give it less to do at once"):
    """Do work(parse(argv)).  less: advice where memory does not suffice.

    -> exit status: that of `work`, 2 for bad input, 128 + signal if stopped."""
    signal.signal(signal.SIGTERM, _leave)
    hang_up = getattr(signal, "SIGHUP", None)           # a closed terminal; nohup ignores it
    if hang_up and signal.getsignal(hang_up) == signal.SIG_DFL:
        signal.signal(hang_up, _leave)
    if hasattr(sys.stdout, "reconfigure"):              # a terminal that lacks a letter of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    status = 2
    try:
        return work(parse(argv))
    except BadInput as error:
        message = f"error: {error}"
    except OSError as error:
        message = f"error: {error}"
        if error.filename:
            message = f"error: {error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        message = "interrupted"
        status = 128 + signal.SIGINT
    except Exception as error:
        if is_out_of_memory(error):
            message = f"error: out of memory; {less}"
        elif type(error).__module__.startswith(COMPILER):
            message = f"error: --compile: torch.compile failed ({error!s:.100}); leave it out"
        else:
            raise
    # Not in the `except`: it keeps progress bars alive, which would then wipe out the line.
    print(printable(message), file=sys.stderr)
    return status


def _leave(number, frame):
    sys.exit(128 + number)              # by way of every `finally`, so that nothing is half-written


def refuse_unwritable(path, what_to_do, holds=""):
    """Raises BadInput unless a file of this name can be written and nothing else is lost by it.

    Tried, not asked: a folder may be full, read-only or another user's.
    what_to_do: in words.  holds: what an earlier file of this kind has in its first 100 bytes."""
    path = Path(path)
    try:
        if not path.absolute().parent.is_dir():
            raise BadInput(f"{path}: its folder does not exist; make it first")
        if path.is_symlink() or path.exists() and not path.is_file():
            raise BadInput(f"{path}: is no plain file, and will not be replaced; {what_to_do}")
        if path.exists() and path.stat().st_size:
            with open(path, "rb") as file:
                if holds.encode() not in file.read(100):
                    raise BadInput(f"{path}: holds something else than an earlier result, "
                                   f"and will not be replaced; {what_to_do}")
        part = part_of(path)
        part.touch()
        part.unlink()
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror}); {what_to_do}") from None
