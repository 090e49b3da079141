"""Jobs really run side by side, one command after another in each, and leave nothing behind."""
import os
import sys
import time

import pytest

from plumbing import jobs
from plumbing.errors import BadInput
from plumbing.jobs import Job, last_words, run_side_by_side, stop


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.01)


def python(code, *argv):
    return [sys.executable, "-c", code, *map(str, argv)]


def job(folder, name, *commands):
    return Job(name, commands, folder / f"{name}.log", 1, lambda: 1)


MEET = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
until = time.time() + 20
while not other.exists():
    assert time.time() < until
    time.sleep(0.01)
"""


def test_two_jobs_run_at_the_same_time(tmp_path):
    """Each waits until the other is there."""
    a = tmp_path / "a"
    b = tmp_path / "b"
    run_side_by_side([job(tmp_path, "first", python(MEET, a, b)),
                      job(tmp_path, "second", python(MEET, b, a))], 2, 1, "x")
    assert a.exists() and b.exists()


ALONE = """
import os, pathlib, sys, time
place = pathlib.Path(sys.argv[1])
place.mkdir()
time.sleep(0.05)
place.rmdir()
print(sys.argv[2], os.environ["OMP_NUM_THREADS"])
"""


def test_no_more_than_asked_for_run_at_once_and_commands_take_turns(tmp_path):
    """mkdir fails if another command is in the same place."""
    place = tmp_path / "place"
    todo = [job(tmp_path, f"job{i}", python(ALONE, place, "one"), python(ALONE, place, "two"))
            for i in range(3)]
    run_side_by_side(todo, 1, 7, "x")
    for each in todo:
        assert each.log.read_text().split("\n") == ["one 7", "two 7", ""]


def test_a_failure_is_said_in_its_own_last_words_and_ends_the_others(tmp_path):
    slow = python("import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\n"
                  "time.sleep(60)", tmp_path / "pid")
    fails = python("import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists():\n"
                   "    time.sleep(0.01)\nprint('error: no such thing')\nsys.exit(2)",
                   tmp_path / "pid")
    never = python("import sys\nopen(sys.argv[1], 'w')", tmp_path / "never")
    started = time.monotonic()
    with pytest.raises(BadInput, match="bad: error: no such thing"):
        run_side_by_side([job(tmp_path, "slow", slow), job(tmp_path, "bad", fails, never)],
                         2, 1, "x")
    assert time.monotonic() - started < 30
    assert not (tmp_path / "never").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text() or 0), 0)


def test_who_does_not_end_is_ended(tmp_path, monkeypatch):
    import subprocess
    monkeypatch.setattr(jobs, "LAST_SECONDS", 0.3)
    deaf = subprocess.Popen(python("import signal, time\nsignal.signal(signal.SIGTERM, "
                                   "signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(60)"),
                            stdout=subprocess.PIPE)
    deaf.stdout.readline()
    stop([deaf])
    assert deaf.returncode == -9


@pytest.mark.parametrize("text, words", [
    ("", "ended without a word"),
    ("a: 10%|█ | 1/9 [00:01<00:02, 3.3it/s]\r", "ended without a word"),
    ("hello\na: 10%|█ | 1/9\rerror: disk full\n\n", "error: disk full"),
])
def test_last_words_are_no_progress_bar(tmp_path, text, words):
    log = tmp_path / "x.log"
    log.write_text(text)
    assert last_words(log) == words
