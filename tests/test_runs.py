"""A run's folder: atomic writes, checkpoints that cannot run code, clear refusals."""
import copy
import dataclasses
import errno
import os
import pickle
import random
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import pytest
import torch

from build import build_model
from config import config_of
from plumbing import files, runs
from plumbing.errors import BadInput
from plumbing.files import save_atomically
from plumbing.runs import append_metrics, drop_metrics_after, load_checkpoint, read_metrics


@pytest.fixture
def saved(make_config):
    config = make_config(width=2, action_dim=4)
    model = build_model(config, {"position": slice(0, 2)})
    runs.create_run(config)
    runs.save_checkpoint(
        config, model, torch.optim.AdamW(model.parameters()), 7, dict(loss_sum=1.0)
    )
    return config, model


def test_checkpoint_round_trip(saved):
    config, model = saved
    checkpoint = load_checkpoint(config.run_dir / "last.pt")
    assert checkpoint["step"] == 7 and config_of(checkpoint) == config
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in checkpoint["model"].items())
    encoder = torch.load(config.run_dir / "encoder.pt", weights_only=True)
    assert encoder.keys() == model.encoder.state_dict().keys()
    assert not list(config.run_dir.glob("*.part"))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["config", "model", "optimizer", "meters", "step"])
def test_a_checkpoint_with_code_is_refused_and_does_not_run(
    where, legacy, saved, tmp_path, monkeypatch
):
    """Code anywhere in what is otherwise a sound checkpoint; loaded without our care, each would
    have run it."""
    monkeypatch.chdir(tmp_path)
    path = saved[0].run_dir / "last.pt"
    torch.save(
        load_checkpoint(path) | {where: Trap()}, path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(BadInput, match="last.pt: contains more than tensors and was not loaded"):
        runs.open_run(dataclasses.replace(saved[0], resume=True))
    assert not (tmp_path / "sprung").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "sprung").exists()


def test_a_bare_pickle_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BadInput, match="plain.pt"):
        load_checkpoint("plain.pt")
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage, words", [
    (lambda p: p.unlink(), "no checkpoint there"),
    (lambda p: p.write_bytes(p.read_bytes()[:-2000]), "is damaged"),
    (lambda p: p.write_bytes(b"hello"), "is damaged"),
    (lambda p: p.write_bytes(b""), "is damaged"),
    (lambda p: torch.save({"state_dict": {}}, p), "not a checkpoint of this project"),
    (lambda p: torch.save([1, 2], p), "not a checkpoint of this project"),
    (lambda p: torch.save(dict(format=runs.FORMAT, version=99), p), "checkpoint version 99"),
])
def test_foreign_and_damaged_checkpoints_are_named(saved, damage, words):
    path = saved[0].run_dir / "last.pt"
    damage(path)
    with pytest.raises(BadInput, match=words) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_interrupted_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "last.pt"
    path.write_text("before")

    def write(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        save_atomically(path, write)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_existing_run_is_not_overwritten(saved):
    with pytest.raises(BadInput, match="exists already; continue it with --resume"):
        runs.open_run(saved[0])


def test_resume_needs_the_same_settings(saved):
    same = dataclasses.replace(saved[0], resume=True, device="cpu", probe_every=3)
    assert runs.open_run(same)["step"] == 7
    with pytest.raises(BadInput, match=r"started with --lr 0.0004 \(now 0.1\)"):
        runs.open_run(dataclasses.replace(same, lr=0.1))


def test_resume_begins_where_there_is_no_checkpoint_yet(make_config, capsys):
    """No folder, or one whose run was killed before its first checkpoint; said, for the name may be
    a slip of the pen."""
    config = make_config(resume=True)
    assert runs.open_run(config) is None and not config.run_dir.exists()
    runs.create_run(config)
    assert runs.open_run(config) is None
    assert (
        capsys.readouterr().out.count(
            f"--resume: {config.run_dir} has no checkpoint yet, beginning at step 0\n"
        )
        == 2
    )


def test_settings_newer_than_the_checkpoint_count_as_their_defaults(saved):
    path = saved[0].run_dir / "last.pt"
    checkpoint = load_checkpoint(path)
    del checkpoint["config"]["ema"]
    torch.save(checkpoint, path)
    assert runs.open_run(dataclasses.replace(saved[0], resume=True))["step"] == 7
    with pytest.raises(BadInput, match=r"--ema 0.996 \(now 0.5\)"):
        runs.open_run(dataclasses.replace(saved[0], resume=True, ema=0.5))


# ---------------------------------------------------------------- the checkpoint before the last

@pytest.fixture
def saved_twice(saved):
    config, model = saved
    runs.save_checkpoint(
        config, model, torch.optim.AdamW(model.parameters()), 8, dict(loss_sum=1.0)
    )
    return dataclasses.replace(config, resume=True)


def test_the_checkpoint_before_the_last_is_kept_and_not_copied(saved):
    config, model = saved
    optimizer, last, previous = (
        torch.optim.AdamW(model.parameters()),
        saved[0].run_dir / "last.pt",
        saved[0].run_dir / "previous.pt",
    )
    assert not previous.exists()
    for step in (8, 9):
        before = last.stat()
        runs.save_checkpoint(config, model, optimizer, step, {})
        assert (
            previous.stat().st_ino == before.st_ino
            and load_checkpoint(previous)["step"] == step - 1
        )
        assert load_checkpoint(last)["step"] == step
    previous.unlink()
    # killed between the two renames: both are one file
    os.link(last, previous)
    runs.save_checkpoint(config, model, optimizer, 10, {})
    assert [load_checkpoint(p)["step"] for p in (previous, last)] == [9, 10] and not list(
        config.run_dir.glob("*.part")
    )


def test_without_hard_links_the_checkpoint_before_is_kept_too(saved, monkeypatch):
    config, model = saved
    monkeypatch.setattr(
        files.os,
        "link",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "Operation not supported")),
    )
    runs.save_checkpoint(config, model, torch.optim.AdamW(model.parameters()), 8, {})
    assert [
        load_checkpoint(config.run_dir / f"{name}.pt")["step"] for name in ("previous", "last")
    ] == [7, 8]
    (config.run_dir / "last.pt").unlink()  # killed between the two renames
    for resume, words in (
        (True, "no checkpoint there; the checkpoint before it is intact: mv"),
        (False, "exists already"),
    ):
        with pytest.raises(BadInput, match=words):
            runs.open_run(dataclasses.replace(config, resume=resume))


def flip(path, bit):
    with open(path, "rb+") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: flip(p, 8 * 5000),
        lambda p: os.truncate(p, p.stat().st_size // 2),
        lambda p: os.truncate(p, 0),
    ],
    ids=["a flipped bit", "cut in half", "empty"],
)
def test_a_damaged_last_checkpoint_is_named_and_the_previous_one_offered(damage, saved_twice):
    last, previous = saved_twice.run_dir / "last.pt", saved_twice.run_dir / "previous.pt"
    damage(last)
    with pytest.raises(BadInput) as error:
        runs.open_run(saved_twice)
    assert str(error.value) == (
        f"{last}: is damaged and was not loaded; "
        f"the checkpoint before it is intact: mv {previous} {last}, "
        "then --resume"
    )
    # does as it is told
    subprocess.run(str(error.value).split("intact: ")[1].split(",")[0], shell=True, check=True)
    assert runs.open_run(saved_twice)["step"] == 7
    damage(last)
    with pytest.raises(
        BadInput, match="last.pt: is damaged and was not loaded; expected the last.pt"
    ):
        runs.open_run(saved_twice)


def test_a_damaged_previous_checkpoint_is_not_offered(saved_twice):
    for name in ("last.pt", "previous.pt"):
        flip(saved_twice.run_dir / name, 8 * 5000)
    with pytest.raises(
        BadInput,
        match="last.pt: is damaged and was not loaded; nor can .*previous.pt be.*start it again$",
    ):
        runs.open_run(saved_twice)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Every bit of the zip's directory, and 3000 others at random: refused, or what is loaded is
    what was saved."""
    path = tmp_path / "last.pt"
    wanted = dict(
        format=runs.FORMAT,
        version=runs.VERSION,
        config={},
        meters={},
        optimizer={},
        step=7,
        model=dict(w=torch.randn(900), b=torch.randn(9)),
    )
    runs.save_atomically(path, lambda part: runs._torch_save(wanted, part))
    end, data = 8 * path.stat().st_size, zipfile.ZipFile(path)
    bits = set(range(8 * data.start_dir, end)) | set(random.Random(0).sample(range(end), 3000))
    tensors = [
        (r.header_offset, r.header_offset + r.file_size)
        for r in data.infolist()
        if "/data/" in r.filename
    ]
    refused = 0
    for bit in bits:
        flip(path, bit)
        try:
            assert same(load_checkpoint(path), wanted), f"bit {bit % 8} of byte {bit // 8}"
        except BadInput:
            refused += 1
        flip(path, bit)
    assert refused > 2000 and same(load_checkpoint(path), wanted)
    # past the name in front of it, a tensor's every bit counts
    for start, stop in tensors:
        for bit in random.Random(start).sample(range(8 * (stop - 4), 8 * stop), 10):
            flip(path, bit)
            with pytest.raises(BadInput, match="is damaged"):
                load_checkpoint(path)
            flip(path, bit)


# ---------------------------------------------------------------- a full disk, a killed process

@contextmanager
def files_no_larger_than(size):
    """What a full disk does to a write, by the kernel's hand; Python ignores the signal that comes
    with it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97, 0.9999])
def test_a_full_disk_keeps_the_checkpoint_and_is_one_line(share, saved_twice, make_config):
    config = saved_twice
    model = build_model(make_config(width=2, action_dim=4), {"position": slice(0, 2)})
    size, names = (
        (config.run_dir / "last.pt").stat().st_size,
        sorted(p.name for p in config.run_dir.iterdir()),
    )
    with pytest.raises(BadInput) as error, files_no_larger_than(int(size * share)):
        runs.save_checkpoint(
            config, model, torch.optim.AdamW(model.parameters()), 9, dict(loss_sum=1.0)
        )
    kept = f"{config.run_dir / 'last.pt'}, the checkpoint before, is kept"
    assert f"step 9 could not be saved (File too large); {kept}: mend this, then --resume" in str(
        error.value
    )
    assert "\n" not in str(error.value) and str(error.value).startswith(str(config.run_dir))
    assert sorted(p.name for p in config.run_dir.iterdir()) == names
    assert (
        runs.open_run(config)["step"] == 8
        and load_checkpoint(config.run_dir / "previous.pt")["step"] == 7
    )


def test_a_full_disk_before_the_first_checkpoint(make_config, monkeypatch):
    config = make_config(width=2, action_dim=4)
    model = build_model(config, {"position": slice(0, 2)})
    runs.create_run(config)
    monkeypatch.setattr(
        torch,
        "save",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(
        BadInput,
        match=r"step 3 could not be saved \(No space left on device\); "
              r"there was no checkpoint before",
    ):
        runs.save_checkpoint(config, model, torch.optim.AdamW(model.parameters()), 3, {})
    assert {p.name for p in config.run_dir.iterdir()} == {".lock", "config.json"}


def test_what_torch_cannot_save_for_other_reasons_is_no_full_disk(tmp_path):
    with pytest.raises(Exception) as error:
        runs._torch_save(dict(x=lambda: None), tmp_path / "x.pt")
    assert not isinstance(error.value, OSError)


def test_a_full_disk_while_metrics_are_written_keeps_those_there_are(tmp_path):
    path = tmp_path / "metrics.csv"
    append_metrics(path, dict(epoch=1, step=10))
    with pytest.raises(OSError) as error, files_no_larger_than(path.stat().st_size + 1):
        append_metrics(path, dict(epoch=2, step=20))
    assert error.value.filename == str(path) and read_metrics(path) == [dict(epoch=1, step=10)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_parts_of_killed_processes_are_collected_and_no_others(make_config):
    config = make_config()
    runs.create_run(config)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = files.part_of(config.run_dir / "last.pt")
    ours, theirs = (
        mine.with_name(mine.name.replace(str(os.getpid()), str(pid)))
        for pid in (dead.pid, os.getppid())
    )
    elsewhere = mine.with_name(f"last.pt.another.host-{dead.pid}.part")
    foreign = mine.with_name("last.pt.part")
    for part in (mine, ours, theirs, elsewhere, foreign):
        part.write_text("half")
    runs.create_run(config)
    assert {p for p in config.run_dir.iterdir() if p.suffix == ".part"} == {
        mine,
        theirs,
        elsewhere,
        foreign,
    }


# ---------------------------------------------------------------- metrics.csv

def test_metrics_of_repeated_epochs_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    for epoch in (1, 2, 3):
        append_metrics(path, dict(epoch=epoch, step=10 * epoch, loss=0.5 / epoch))
    with open(path, "a") as file:
        file.write("4,40")                                   # a line cut short by a kill
    drop_metrics_after(path, 20)
    assert read_metrics(path) == [
        dict(epoch=1, step=10, loss=0.5),
        dict(epoch=2, step=20, loss=0.25),
    ]
    drop_metrics_after(tmp_path / "absent.csv", 5)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epo",
        "epoch,step,loss\n",
        "epoch,step,loss\n1,1",
        "epoch,step,loss\n1,10,0.5\n2,20,0.4\n",
    ],
)
def test_metrics_that_lost_every_line_begin_anew(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    drop_metrics_after(path, 5)
    append_metrics(path, dict(epoch=1, step=10, other=0.5))
    assert read_metrics(path) == [dict(epoch=1, step=10, other=0.5)]


def test_a_checkpoint_of_other_code_is_named_not_a_traceback(saved, capsys):
    """Settings this code does not know; weights of another shape: one line each from
    evaluate.py."""
    path = saved[0].run_dir / "last.pt"
    checkpoint = load_checkpoint(path)
    for change, words in (
        (
            dict(config=checkpoint["config"] | dict(colour="red")),
            "settings that this code does not know (colour)",
        ),
        (
            dict(model=checkpoint["model"] | {"encoder.conv1.weight": torch.zeros(3)}),
            "weights do not fit the model",
        ),
    ):
        with pytest.raises(BadInput) as error:
            torch.save(checkpoint | change, path, _use_new_zipfile_serialization=True)
            other = load_checkpoint(path)
            runs.restore(build_model(config_of(other), {"position": slice(0, 2)}), other)
        assert words in str(error.value)


@pytest.mark.parametrize("saved_as", [torch.contiguous_format, torch.channels_last])
def test_moments_take_the_memory_format_of_their_weights(saved_as):
    """Fused AdamW pairs by address: after a change of format it would update the wrong weights."""
    other = {torch.contiguous_format: torch.channels_last}.get(saved_as, torch.contiguous_format)

    def build(memory_format):
        torch.manual_seed(0)
        conv = torch.nn.Conv2d(4, 6, 3).to(memory_format=memory_format)
        return conv, torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)

    def step(conv, optimizer):
        grad = torch.Generator().manual_seed(1)
        for p in conv.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=grad))
        optimizer.step()

    conv, optimizer = build(saved_as)
    step(conv, optimizer)
    again, restored = build(other)
    again.load_state_dict(conv.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())           # or both would count one `step`
    runs.restore_optimizer(restored, dict(optimizer=saved, step=1))
    step(conv, optimizer)
    step(again, restored)
    torch.testing.assert_close(again.weight, conv.weight, atol=1e-6, rtol=0)
