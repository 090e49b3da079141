"""What does not fit into memory goes to a file, and nothing else changes by it."""
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plumbing import scratch
from plumbing.errors import BadInput


@pytest.fixture
def on_disk(monkeypatch):
    """All arrays go to the disk, into the folder that is given."""
    monkeypatch.setattr(scratch, "IN_MEMORY", 0)
    monkeypatch.delenv("TMPDIR", raising=False)


def batches_of(arrays, b):
    """A function of s to batches of b rows of {name: (S, N, ...)}."""
    N = len(next(iter(arrays.values()))[0])

    def batches(s):
        for rows in torch.arange(N).split(b):
            yield {name: array[s, rows] for name, array in arrays.items()}

    return batches


@pytest.fixture
def arrays():
    return dict(z=torch.randn(3, 10, 2, 5), labels=torch.rand(3, 10))


def files_of_this_process():
    """Names, as the system has them, of the files that this process has mapped."""
    return {line.split(maxsplit=5)[-1] for line in open("/proc/self/maps") if "(deleted)" in line}


def test_in_memory_every_number_is_as_it_came(arrays):
    found = scratch.gather(batches_of(arrays, 4), 3, 10)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], array)


def test_on_disk_numbers_are_those_in_half_precision_and_exact_ones_as_they_came(
        arrays, on_disk, tmp_path):
    found = scratch.gather(batches_of(arrays, 4), 3, 10, folder=tmp_path, exact=("labels",))
    assert found["z"].dtype == torch.float16
    assert torch.equal(found["z"], arrays["z"].half())
    assert torch.equal(found["labels"], arrays["labels"])
    rows = torch.tensor([7, 0, 7])
    for name in arrays:
        got = scratch.read(found[name][1], rows)
        assert got.dtype == torch.float32
        assert torch.equal(got, found[name][1, rows].float())


def test_the_bound_is_of_all_arrays_together(arrays, monkeypatch, tmp_path):
    size = 4 * sum(array.numel() for array in arrays.values())
    for bound, dtype in ((size, torch.float32), (size - 1, torch.float16)):
        monkeypatch.setattr(scratch, "IN_MEMORY", bound)
        found = scratch.gather(batches_of(arrays, 4), 3, 10, folder=tmp_path)
        assert found["z"].dtype == dtype and found["labels"].dtype == dtype


def test_content_outlives_being_let_go(on_disk, tmp_path):
    x = torch.randn(1, 3000, 64)
    found = scratch.gather(batches_of(dict(x=x), 700), 1, 3000, folder=tmp_path)["x"]
    for _ in range(2):
        scratch.let_go()
        assert torch.equal(found, x.half())
    view = found[0, :, :3]                              # keeps the file, as a view keeps its tensor
    del found
    assert torch.equal(scratch.read(view, torch.arange(3000)), x[0, :, :3].half().float())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_the_file_has_no_name_and_goes_with_its_tensor(arrays, on_disk, tmp_path):
    before = files_of_this_process()
    found = scratch.gather(batches_of(arrays, 4), 3, 10, folder=tmp_path)
    mapped = files_of_this_process() - before
    assert len(mapped) == 2 and all(name.startswith(str(tmp_path)) for name in mapped)
    assert list(tmp_path.iterdir()) == []
    del found
    assert files_of_this_process() <= before


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is mapped")
def test_a_failure_leaves_no_file(arrays, on_disk, tmp_path):
    def failing(s):
        yield from batches_of(arrays, 4)(0)
        raise KeyboardInterrupt

    before = files_of_this_process()
    with pytest.raises(KeyboardInterrupt):
        scratch.gather(failing, 3, 10, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert files_of_this_process() <= before


def test_a_killed_process_leaves_no_file(tmp_path):
    code = ("import time, torch; from plumbing import scratch; scratch.IN_MEMORY = 0\n"
            "x = scratch.gather(lambda s: [dict(x=torch.ones(9, 9))], 1, 9, folder='.')\n"
            "print('there', flush=True); time.sleep(60)")
    root = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    environment["PYTHONPATH"] = str(root)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"there\n"
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_tmpdir_is_preferred_to_the_folder(arrays, on_disk, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(scratch, "_on_disk", lambda *args: asked.append(args[2]) or
                        torch.empty(args[0], dtype=args[1]))
    scratch.gather(batches_of(arrays, 4), 3, 10, folder=tmp_path)
    monkeypatch.setenv("TMPDIR", "elsewhere")
    scratch.gather(batches_of(arrays, 4), 3, 10, folder=tmp_path)
    assert asked == [tmp_path, tmp_path, "elsewhere", "elsewhere"]


def test_a_disk_without_room_is_refused_in_one_line(on_disk, tmp_path):
    one = dict(z=torch.zeros(1, 1, 1000))
    with pytest.raises(BadInput) as refused:
        scratch.gather(batches_of(one, 1), 1, 10 ** 13, folder=tmp_path)
    message = str(refused.value)
    assert str(tmp_path) in message and "TMPDIR" in message and os.strerror(errno.ENOSPC) in message
    assert "20,000,000.0 GB" in message and "\n" not in message
    with pytest.raises(BadInput, match="no room|nowhere"):
        scratch.gather(batches_of(one, 1), 1, 1, folder=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_finite_is_refused_by_name_when_it_comes(arrays):
    arrays["z"][0, 5, 1, 2] = float("nan")
    scratch.gather(batches_of(arrays, 4), 3, 10)                    # nobody asked
    seen = []

    def watched(s):
        for batch in batches_of(arrays, 4)(s):
            seen.append(s)
            yield batch

    with pytest.raises(BadInput, match="^--probe: z of train features not finite; [^\n]*$"):
        scratch.gather(watched, 3, 10, what="train features")
    assert seen == [0, 0]                                           # rows 0-3, then 4-7


def test_what_half_precision_cannot_hold_is_refused(arrays, on_disk, tmp_path):
    arrays["z"][2, 9, 0, 0] = 1e5
    with pytest.raises(BadInput, match="z of it not finite"):
        scratch.gather(batches_of(arrays, 4), 3, 10, folder=tmp_path, what="it")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_holds_a_batch_and_not_the_file(on_disk, tmp_path):
    """64 MB are written and read again; memory grows by far less."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    x = scratch.gather(lambda s: (dict(x=torch.ones(1000, 512)) for _ in range(64)), 1, 64_000,
                       folder=tmp_path)["x"]
    highest = resident()
    for rows in torch.randperm(64_000).split(1000):
        assert scratch.read(x[0], rows).sum() == 1000 * 512
        highest = max(highest, resident())
    assert x.nbytes == 65_536_000
    assert highest - before < 30e6
