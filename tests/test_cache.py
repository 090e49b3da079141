"""cache.py: an array is made once, made again when it must be, and never left half-made."""
import collections
import errno
import json
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from plumbing import cache
from plumbing.errors import BadInput

KEY = dict(files="abc", size=4)
WANTED = np.arange(24, dtype=np.int16).reshape(6, 4)
Usage = collections.namedtuple("Usage", "total used free")


class Maker:
    """A `fill` that writes `wanted` two rows at a time, counts its calls, and may stop on the
    way."""

    def __init__(self, wanted=WANTED, error=None, watch=lambda: None):
        self.wanted, self.error, self.watch, self.calls = wanted, error, watch, 0

    def __call__(self, array):
        self.calls += 1
        for start in range(0, len(self.wanted), 2):
            array[start:start + 2] = self.wanted[start:start + 2]
            yield start + 2
            self.watch()
            if self.error and start == 2:
                raise self.error


def get(path, maker, key=KEY):
    return cache.cached(path, key, maker.wanted.shape, maker.wanted.dtype, maker, "counting")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "here" / "x.npy"


def names(path):
    return sorted(f.name for f in path.parent.iterdir())


# ---------------------------------------------------------------- made once, made again

def test_array_is_made_once_and_reads_back_as_an_ordinary_npy_file(path):
    maker = Maker()
    for _ in range(3):
        array = get(path, maker)
        assert isinstance(array, np.memmap) and array.dtype == np.int16
        np.testing.assert_array_equal(array, WANTED)
    assert maker.calls == 1 and names(path) == ["x.json", "x.npy"]
    np.testing.assert_array_equal(np.load(path), WANTED)


def test_a_key_with_tuples_is_the_same_key_after_a_round_trip_through_json(path):
    maker = Maker()
    for _ in range(2):
        get(path, maker, key=dict(mean=(0.1, 0.2), nested=dict(shape=(1, 2))))
    assert maker.calls == 1


@pytest.mark.parametrize("key, wanted", [
    (dict(KEY, files="abd"), WANTED), (dict(KEY, extra=1), WANTED), (dict(files="abc"), WANTED),
    (KEY, WANTED[:4]), (KEY, WANTED.reshape(6, 2, 2)), (KEY, WANTED.astype(np.uint16)),
], ids=["changed", "longer", "shorter", "fewer rows", "another shape", "another dtype"])
def test_another_key_shape_or_dtype_is_made_again_and_says_so(path, capsys, key, wanted):
    get(path, Maker())
    assert capsys.readouterr().out == ""
    maker = Maker(wanted)
    array = get(path, maker, key)
    assert maker.calls == 1 and array.dtype == wanted.dtype and str(path) in capsys.readouterr().out
    np.testing.assert_array_equal(array, wanted)
    get(path, maker, key)
    assert maker.calls == 1


def cut(file, keep):
    with open(file, "r+b") as f:
        f.truncate(keep)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: cut(p, p.stat().st_size - 1),
        lambda p: cut(p, 100),
        lambda p: cut(p, 0),
        lambda p: p.unlink(),
        lambda p: np.save(p, WANTED[:5]),
        lambda p: p.with_suffix(".json").unlink(),
        lambda p: cut(p.with_suffix(".json"), 9),
        lambda p: p.with_suffix(".json").write_bytes(b"\xff\xfe"),
        lambda p: p.with_suffix(".json").write_text("[1]"),
    ],
    ids=[
        "one byte short",
        "header only",
        "empty",
        "array gone",
        "other rows",
        "key gone",
        "key cut",
        "key binary",
        "key a list",
    ],
)
def test_damage_on_disk_is_noticed_and_mended(path, damage):
    maker = Maker()
    get(path, maker)
    damage(path)
    np.testing.assert_array_equal(get(path, maker), WANTED)
    assert maker.calls == 2


# ---------------------------------------------------------------- killed on the way

@pytest.mark.parametrize(
    "error",
    [BadInput("bad image"), RuntimeError("no memory"), KeyboardInterrupt(), SystemExit(143)],
    ids=repr,
)
def test_a_run_killed_in_the_middle_leaves_nothing(path, error):
    with pytest.raises(type(error)):
        get(path, Maker(error=error))
    assert names(path) == []
    np.testing.assert_array_equal(get(path, Maker()), WANTED)


def test_the_old_array_stays_whole_until_the_new_one_is_complete(path):
    def old_is_there():
        np.testing.assert_array_equal(np.load(path), WANTED)
        assert json.loads(path.with_suffix(".json").read_text())["files"] == "abc"

    first = Maker()
    get(path, first)
    with pytest.raises(RuntimeError):
        get(path, Maker(-WANTED, RuntimeError("killed"), old_is_there), dict(KEY, files="new"))
    old_is_there()
    get(path, first)
    assert first.calls == 1 and names(path) == ["x.json", "x.npy"]
    np.testing.assert_array_equal(
        get(path, Maker(-WANTED, watch=old_is_there), dict(KEY, files="new")), -WANTED
    )


@pytest.mark.parametrize("nth", [1, 2])
def test_killed_between_its_two_renames_no_key_vouches_for_the_wrong_array(path, monkeypatch, nth):
    get(path, Maker())
    real, renames = os.replace, []

    def replace(*arguments):
        renames.append(arguments)
        if len(renames) == nth:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(cache.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        get(path, Maker(-WANTED), dict(KEY, files="new"))
    monkeypatch.undo()
    assert not list(path.parent.glob("*.part"))
    # whatever is there now, each key gets its own array
    np.testing.assert_array_equal(get(path, Maker()), WANTED)
    np.testing.assert_array_equal(get(path, Maker(-WANTED), dict(KEY, files="new")), -WANTED)


def test_parts_of_a_killed_process_go_when_the_next_array_is_made_and_those_of_a_living_one_stay(
    path,
):
    path.parent.mkdir(parents=True)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = cache.part_of(path)
    ours, key, theirs = (
        mine.with_name(mine.name.replace(str(os.getpid()), str(pid)).replace("x.npy", name))
        for pid, name in ((dead.pid, "old.npy"), (dead.pid, "old.json"), (os.getppid(), "x.npy"))
    )
    unfinished = path.with_name("y.npy.part")                       # of a resumable array
    for part in (ours, key, theirs, unfinished):
        part.write_text("half")
    get(path, Maker())
    assert names(path) == sorted(["x.json", "x.npy", theirs.name, unfinished.name])
    ours.write_text("half")
    # nothing to make: a reader does not tidy up
    get(path, Maker())
    assert ours.exists()


# ---------------------------------------------------------------- resumable

class Resumable:
    """A resumable `fill`: one row at a time from the first it is told to write, noting which it
    wrote."""

    def __init__(self, stop_after=None):
        self.stop_after, self.rows = stop_after, []

    def __call__(self, array, start):
        for row in range(start, len(WANTED)):
            array[row] = WANTED[row]
            self.rows.append(row)
            if len(self.rows) == self.stop_after:
                # this row is written but not yet reported
                raise KeyboardInterrupt
            yield row + 1


def get_resumable(path, maker, key=KEY):
    return cache.cached(path, key, WANTED.shape, WANTED.dtype, maker, "counting", resumable=True)


@pytest.fixture
def interrupted(path):
    """Rows 0 to 3 written, the first three of them reported."""
    with pytest.raises(KeyboardInterrupt):
        get_resumable(path, Resumable(stop_after=4))
    assert not path.exists() and not path.with_suffix(".json").exists()
    return path


def check_resumed(path, rows, key=KEY):
    maker = Resumable()
    np.testing.assert_array_equal(get_resumable(path, maker, key), WANTED)
    assert maker.rows == rows
    get_resumable(path, maker, key)
    assert maker.rows == rows and not [n for n in names(path) if n.endswith((".part", ".progress"))]


def test_resumable_goes_on_from_the_first_row_not_reported(interrupted):
    check_resumed(interrupted, rows=[3, 4, 5])


def test_resumable_survives_several_interruptions(interrupted):
    with pytest.raises(KeyboardInterrupt):
        get_resumable(interrupted, Resumable(stop_after=2))
    check_resumed(interrupted, rows=[4, 5])


def test_resumable_does_not_go_on_from_rows_of_another_key(interrupted):
    check_resumed(interrupted, rows=[0, 1, 2, 3, 4, 5], key=dict(KEY, files="new"))


@pytest.mark.parametrize(
    "end, keep", [(".part", -1), (".part", 0), (".progress", 5), (".progress", 0)]
)
def test_resumable_starts_again_when_what_is_left_is_damaged(interrupted, end, keep):
    file = interrupted.with_name(interrupted.name + end)
    cut(file, file.stat().st_size + keep if keep < 0 else keep)
    check_resumed(interrupted, rows=[0, 1, 2, 3, 4, 5])


# ---------------------------------------------------------------- room and permission

@pytest.mark.parametrize("free, enough", [(0, False), (48, False), (1000, True)])
def test_room_is_checked_before_anything_is_written(path, monkeypatch, free, enough):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: Usage(10**6, 0, free))
    maker = Maker()
    if enough:
        get(path, maker)
    else:
        with pytest.raises(BadInput, match="x.npy.*free.*--limit"):
            get(path, maker)
    assert maker.calls == enough and names(path) == ["x.json", "x.npy"] * enough


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be reserved here")
def test_room_is_taken_before_rows_are_written_so_that_a_full_disk_is_one_line(path, monkeypatch):
    """A mapped file that finds no room later ends the process by SIGBUS."""
    asked = []

    def full(_, start, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    maker = Maker()
    with pytest.raises(
        BadInput,
        match=r"x.npy: no room for 0.0 kB \(No space left on device\); "
              r"make room or choose another --data-dir",
    ):
        get(path, maker)
    assert maker.calls == 0 and names(path) == [] and asked == [WANTED.nbytes + 128]
    monkeypatch.undo()
    get(path, maker)
    assert path.stat().st_blocks * 512 >= WANTED.nbytes


def test_full_disk_does_not_hinder_reading_what_is_there(path, monkeypatch):
    get(path, Maker())
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: Usage(10**6, 10**6, 0))
    np.testing.assert_array_equal(get(path, Maker()), WANTED)


def test_folder_without_write_permission(path, monkeypatch):
    path.parent.mkdir(parents=True)
    # the tests may run as root, who may write anywhere
    monkeypatch.setattr(cache.os, "access", lambda *_: False)
    with pytest.raises(BadInput, match=f"{path.parent}.*--data-dir"):
        get(path, Maker())
    assert names(path) == []


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "made").write_text("I am a file")
    with pytest.raises(BadInput, match="made.*--data-dir"):
        get(tmp_path / "made" / "here" / "x.npy", Maker())


# ---------------------------------------------------------------- reading

def test_writing_into_the_mapping_does_not_reach_the_file(path):
    before = get(path, Maker())
    with warnings.catch_warnings():
        # torch warns about arrays it may not write to
        warnings.simplefilter("error")
        torch.from_numpy(before).fill_(-7)
    assert (before == -7).all()
    np.testing.assert_array_equal(np.load(path), WANTED)
    np.testing.assert_array_equal(get(path, Maker()), WANTED)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: None,
        lambda p: p.write_text("maps"),
        lambda p: p.touch(),
        lambda p: p.mkdir(),
        lambda p: np.save(p, np.array([{}, 1], dtype=object), allow_pickle=True),
        lambda p: np.savez(p.open("wb"), a=WANTED),
        lambda p: (np.save(p, WANTED), cut(p, p.stat().st_size - 1)),
    ],
    ids=["absent", "text", "empty", "a folder", "pickled objects", "npz", "cut short"],
)
def test_what_is_no_readable_array_is_named_in_one_line(tmp_path, write):
    file = tmp_path / "maps.npy"
    write(file)
    with pytest.raises(BadInput, match="maps.npy") as caught:
        cache.open_array(file)
    assert "\n" not in str(caught.value)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_an_array_that_carries_code_does_not_run_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("maps.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "plain.npy").write_bytes(pickle.dumps(Trap()))
    for name in ("maps.npy", "plain.npy"):
        with pytest.raises(BadInput, match=name):
            cache.open_array(tmp_path / name)
        assert not (tmp_path / "sprung").exists()
        np.load(name, allow_pickle=True)
        # loaded without our care, it does run
        (tmp_path / "sprung").rmdir()


def test_cache_path_tells_apart_all_that_can_be_cached_side_by_side(make_config):
    configs = [make_config("stl10"), make_config("stl10", limit=5), make_config("stl10", limit=6),
               make_config("stl10", image_size=64), make_config("folder")]
    paths = {
        cache.cache_path(c, what) for c in configs for what in ("train", "val", "train-signature")
    }
    assert len(paths) == 15
    assert {p.parent for p in paths} == {cache.Path(configs[0].data_dir) / ".cache"}


@pytest.mark.parametrize("size, words", [
    (0, "0.0 kB"), (5_760, "5.8 kB"), (45_000_000, "45.0 MB"), (3_210_000_000, "3.2 GB"),
    (10**16, "10,000,000.0 GB"),
])
def test_sizes_in_words(size, words):
    assert cache.in_words(size) == words


def test_more_bytes_than_fit_an_integer_do_not_fit_the_disk(path):
    with pytest.raises(BadInput, match="needs .* GB and"):
        cache.cached(path, {}, (10**9, 10**9, 10**9), np.uint8, None, "making")


@pytest.mark.parametrize("ending", [".npy", ".json"])
def test_a_pipe_in_the_cache_is_never_opened(path, ending):
    get(path, Maker())
    place = path.with_suffix(ending)
    place.unlink()
    os.mkfifo(place)
    np.testing.assert_array_equal(get(path, Maker()), WANTED)


@pytest.mark.parametrize("change", [
    lambda a: a.astype(np.int32), lambda a: a.astype(a.dtype.newbyteorder()), np.asfortranarray,
])
def test_an_array_of_another_type_or_layout_is_made_again(path, change):
    get(path, Maker())
    np.save(path, change(WANTED))
    again = get(path, Maker())
    np.testing.assert_array_equal(again, WANTED)
    assert again.flags.c_contiguous and again.dtype == WANTED.dtype


def test_an_array_larger_than_memory_is_mapped_read_only(path, monkeypatch):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, WANTED)
    original = np.lib.format.open_memmap

    def refused_to_copies(path, mode):                          # as Linux does
        if mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return original(path, mode=mode)

    monkeypatch.setattr(np.lib.format, "open_memmap", refused_to_copies)
    array = cache.open_array(path)
    np.testing.assert_array_equal(array, WANTED)
    assert not array.flags.writeable
