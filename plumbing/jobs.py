"""Commands side by side: some processes at once, a log file each, one progress bar for all.

Several processes of one thread use a CPU's cores better than one process with several threads
(results/README.md, "Speed", has the measurement). Nothing in here is about JEPA. Checked in
tests/test_jobs.py.
"""
import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from plumbing.errors import BadInput

POLL_SECONDS = 0.5
LAST_SECONDS = 30           # that a process which is asked to end has for it: training saves first


class Job(NamedTuple):
    """Commands that run one after another."""
    name: str
    commands: tuple         # of argument lists
    log: Path               # where what they print goes
    total: int              # units of work
    done: Callable          # () -> units that are done


def run_side_by_side(jobs, at_once, threads, unit):
    """Run all jobs, `at_once` of them at a time, each with `threads` threads.

    Leaves no process behind, unless it is killed by a signal that cannot be caught.
    Raises: BadInput with the last words of the first command that failed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    waiting = list(jobs)
    running = {}                                            # {process: (job, commands to come)}

    def start(job, commands):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "a") as log:
            process = subprocess.Popen(commands[0], stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT, env=environment)
        running[process] = job, commands[1:]

    try:
        with tqdm(total=sum(job.total for job in jobs), unit=unit) as bar:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    start(job, job.commands)
                time.sleep(POLL_SECONDS)
                for process in [each for each in running if each.poll() is not None]:
                    job, to_come = running.pop(process)
                    if process.returncode:
                        raise BadInput(f"{job.name}: {last_words(job.log)} (all of it: {job.log})")
                    if to_come:
                        start(job, to_come)
                bar.set_postfix_str(", ".join(job.name for job, _ in running.values()), False)
                bar.update(sum(min(job.done(), job.total) for job in jobs) - bar.n)
    finally:
        stop(running)


def stop(processes):
    """Ask processes to end, wait for them, and end those that do not."""
    for process in processes:
        process.terminate()
    last = time.monotonic() + LAST_SECONDS
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, last - time.monotonic()))
        process.kill()
        process.wait()


def last_words(log):
    """The last line of a log that is no progress bar."""
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    said = [line for line in lines if line.strip() and "it/s" not in line and "|" not in line]
    return said[-1] if said else "ended without a word"
