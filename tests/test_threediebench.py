"""3DIEBench folders in the published format, small ones made on the spot: what is packed, resumed,
and refused."""
import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from build import build_views
from datasets import load
from plumbing.cache import cache_path
from plumbing.errors import BadInput
from sources import threediebench
from sources.prepare import decode

VIEWS = 5        # per object; only test_published_form writes all 50
SYNSETS = ("02691156", "02747177", "02808440")
CPU = torch.device("cpu")


def write_object(folder, rng, side, views=VIEWS):
    folder.mkdir(parents=True)
    low, high = np.array(
        [[-np.pi / 2] * 3 + [0] * 4, [np.pi / 2] * 3 + [1, np.pi / 4, 2 * np.pi, 1]]
    )
    for v in range(views):
        colour = torch.from_numpy(rng.integers(0, 256, (3, 1, 1), dtype=np.uint8))
        Image.fromarray(colour.expand(3, side, side).permute(1, 2, 0).numpy()).save(
            folder / f"image_{v}.jpg"
        )
        np.save(folder / f"latent_{v}.npy", low + rng.random(7) * (high - low))


def write_split(root, name, names, labels):
    np.save(root / f"{name}_images.npy", np.array(names))
    np.save(root / f"{name}_labels.npy", np.array(labels))


@pytest.fixture
def root(tmp_path):
    """Six training objects, two of each class, and three for validation, 12 px."""
    root, rng = tmp_path / "data" / "3DIEBench", np.random.default_rng(0)
    for name, count in (("train", 6), ("val", 3)):
        names = [f"/{SYNSETS[i % 3]}/{name}{i}/" for i in range(count)]
        for folder in names:
            write_object(root / folder.strip("/"), rng, 12)
        write_split(root, name, names, [i % 3 for i in range(count)])
    return root


@pytest.fixture
def config(make_config, monkeypatch):
    monkeypatch.setattr(threediebench, "OBJECTS_AT_ONCE", 1)
    monkeypatch.setattr(threediebench, "VIEWS", VIEWS)
    return make_config("3diebench", "rotation", image_size=8)


@pytest.fixture
def decoded(monkeypatch):
    """Object folders in the order in which an image of theirs was first decoded; may be told to
    break down."""
    class Log(list):
        break_at, calls = None, 0

    log = Log()

    def spy(file, size):
        if file.parent.name == log.break_at:
            raise KeyboardInterrupt
        log.calls += 1
        if file.parent.name not in log:
            log.append(file.parent.name)
        return decode(file, size)

    monkeypatch.setattr(threediebench, "decode", spy)
    return log


def leftovers(config):
    return sorted(
        f.name
        for f in cache_path(config, "train").parent.iterdir()
        if f.suffix not in (".npy", ".json", ".lock")
    )


# ---------------------------------------------------------------- what is read

def test_pack_holds_every_view_with_its_latents(config, root):
    split = load(config, "val")
    images = split.parts[0].images
    assert images.shape == (3, VIEWS, 3, 8, 8) and images.dtype == np.uint8
    assert split.latents.shape == (3, VIEWS, 7) and split.latents.dtype == np.float32
    for i in range(3):
        for v in range(VIEWS):
            folder = root / SYNSETS[i] / f"val{i}"
            np.testing.assert_array_equal(images[i, v], decode(folder / f"image_{v}.jpg", 8))
            np.testing.assert_array_equal(
                split.latents[i, v], np.load(folder / f"latent_{v}.npy").astype(np.float32)
            )
    assert split.labels.tolist() == [0, 1, 2] and split.classes == list(SYNSETS)


def test_published_form(make_config, tmp_path):
    """50 renders of 256 px become 128 px: every pixel the mean of four."""
    root = tmp_path / "data" / "3DIEBench"
    for name in ("train", "val"):
        write_object(root / SYNSETS[0] / name, np.random.default_rng(1), 256, views=50)
        write_split(root, name, [f"/{SYNSETS[0]}/{name}/"], [0])
    ramp = torch.arange(256, dtype=torch.uint8).expand(3, 256, 256).contiguous()
    Image.fromarray(ramp.permute(1, 2, 0).numpy()).save(
        root / SYNSETS[0] / "train" / "image_49.jpg", quality=100
    )
    split = load(make_config("3diebench", "rotation"), "pretrain")
    images = split.parts[0].images
    assert images.shape == (1, 50, 3, 128, 128) and split.latents.shape == (1, 50, 7)
    assert np.abs(images[0, 49, :, :, 2:-2] - (np.arange(128) * 2 + 0.5)[2:-2]).max() < 2


def test_labels_may_be_names_and_classes_are_those_of_training(config, root):
    write_split(
        root,
        "train",
        [f"/{SYNSETS[i % 3]}/train{i}/" for i in range(6)],
        ["plane", "can", "bag"] * 2,
    )
    write_split(root, "val", [f"/{SYNSETS[1]}/val1/"], ["can"])
    train, val = load(config, "train"), load(config, "val")
    assert train.labels.tolist() == [2, 1, 0, 2, 1, 0] and train.classes == [
        SYNSETS[2],
        SYNSETS[1],
        SYNSETS[0],
    ]
    assert val.labels.tolist() == [1] and val.classes == train.classes


def test_split_files_may_lie_in_data_dir_itself(config, root, make_config):
    inside = make_config("3diebench", "rotation", image_size=8, data_dir=str(root))
    np.testing.assert_array_equal(
        load(inside, "val").parts[0].images, load(config, "val").parts[0].images
    )


def test_limit_is_balanced_and_decodes_nothing_else(config, root, make_config, decoded):
    by_class = [0, 3, 1, 4, 2, 5]
    write_split(
        root, "train", [f"/{SYNSETS[i % 3]}/train{i}/" for i in by_class], [i % 3 for i in by_class]
    )
    split = load(make_config("3diebench", "rotation", image_size=8, limit=3), "train")
    assert split.labels.tolist() == [0, 1, 2] and len(decoded) == 3
    assert (
        split.parts[0].total == 6
        and [f"train{by_class[i]}" for i in split.parts[0].rows] == decoded
    )
    np.testing.assert_array_equal(
        split.parts[0].images[0], load(config, "train").parts[0].images[split.parts[0].rows[0]]
    )


def test_pretrain_and_train_share_one_pack(config, root, decoded):
    pretrain = load(config, "pretrain")
    decoded.clear()
    np.testing.assert_array_equal(load(config, "train").parts[0].images, pretrain.parts[0].images)
    assert (
        not decoded
        and pretrain.source == load(config, "train").source != load(config, "val").source
    )


def test_views_and_actions_end_to_end(config, root):
    views = build_views(config, "pretrain", CPU)
    batch = views(torch.arange(6), config.views)
    assert batch.views.shape == (6, 4, 3, 8, 8) and batch.actions.shape == (6, 3, 6)
    stored = torch.from_numpy(np.load(root / SYNSETS[0] / "train0" / "latent_4.npy")).float()
    assert torch.equal(views.all_views(torch.tensor([0]))[1][0, 4, 6:], stored[:3])


# ---------------------------------------------------------------- packing: disk, interruption,
# mismatch

def test_disk_is_announced_before_anything_is_decoded(config, root, decoded, capsys):
    decoded.break_at = "train0"
    with pytest.raises(KeyboardInterrupt):
        load(config, "train")
    said = capsys.readouterr().out
    assert (
        f"packing train objects: {6 * VIEWS * 3 * 8 * 8 / 1e3:.1f} kB on disk, "
        f"in {cache_path(config, 'train')}"
        in said
    )
    assert "May be interrupted" in said
    load(config, "val")
    capsys.readouterr()
    load(config, "val")
    # nothing to make, nothing to say
    assert not capsys.readouterr().out


def test_interrupted_pack_goes_on_with_the_remaining_objects(
    config, root, make_config, decoded, capsys
):
    decoded.break_at = "train3"
    with pytest.raises(KeyboardInterrupt):
        load(config, "train")
    assert decoded == ["train0", "train1", "train2"] and not cache_path(config, "train").exists()
    assert leftovers(config) == ["3diebench-train-8px.npy.part", "3diebench-train-8px.npy.progress"]
    decoded.clear()
    decoded.break_at = None
    resumed = load(config, "train")
    assert decoded == ["train3", "train4", "train5"] and leftovers(config) == []
    assert "as this one does from 3 of 6" in capsys.readouterr().out
    undisturbed = load(
        make_config("3diebench", "rotation", image_size=8, data_dir=str(root)), "train"
    )
    np.testing.assert_array_equal(resumed.parts[0].images, undisturbed.parts[0].images)
    np.testing.assert_array_equal(resumed.latents, undisturbed.latents)


def test_two_at_once_make_one_pack(config, root, decoded):
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda split: load(config, split), ("pretrain", "train"))
    assert decoded.calls == 6 * VIEWS
    np.testing.assert_array_equal(first.parts[0].images, second.parts[0].images)


def interrupt(config, decoded, at="train3"):
    decoded.break_at = at
    with pytest.raises(KeyboardInterrupt):
        load(config, "train")
    decoded.clear()
    decoded.break_at = None
    part = cache_path(config, "train")
    return part.with_name(part.name + ".part"), part.with_name(part.name + ".progress")


def test_progress_never_runs_ahead_of_the_rows(config, root, decoded):
    """Rows past the noted number are written again: here they hold rubbish."""
    part, progress = interrupt(config, decoded)
    assert json.loads(progress.read_text())["rows"] == 3
    array = np.lib.format.open_memmap(part, mode="r+")
    array[3:] = 77
    array.flush()
    images = load(config, "train").parts[0].images
    np.testing.assert_array_equal(
        images[3, 0], decode(root / SYNSETS[0] / "train3" / "image_0.jpg", 8)
    )


@pytest.mark.parametrize("damage", ["cut short", "gone", "progress unreadable", "other objects"])
def test_unfinished_pack_that_cannot_be_trusted_starts_anew(config, root, decoded, damage):
    part, progress = interrupt(config, decoded)
    if damage == "cut short":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "gone":
        part.unlink()
    elif damage == "progress unreadable":
        progress.write_text("{")
    else:
        names = np.load(root / "train_images.npy")
        np.save(root / "train_images.npy", names[[3, 1, 2, 0, 4, 5]])
    first = str(np.load(root / "train_images.npy")[0]).strip("/")
    interrupt(config, decoded, at=first.split("/")[1])
    # no old note may vouch for the empty array
    assert not progress.exists()
    images = load(config, "train").parts[0].images
    assert len(decoded) == 6
    np.testing.assert_array_equal(images[0, 4], decode(root / first / "image_4.jpg", 8))


def test_finished_pack_of_another_size_or_other_objects_is_not_used(
    config, root, make_config, decoded
):
    load(config, "train")
    assert (
        load(make_config("3diebench", "rotation", image_size=10), "train").parts[0].images.shape[-1]
        == 10
    )
    write_split(root, "train", [f"/{SYNSETS[i % 3]}/train{i}/" for i in (1, 0, 2)], [1, 0, 2])
    images = load(config, "train").parts[0].images
    assert len(images) == 3
    np.testing.assert_array_equal(
        images[0, 0], decode(root / SYNSETS[1] / "train1" / "image_0.jpg", 8)
    )


@pytest.mark.parametrize("damage", ["cut short", "wrong shape"])
def test_finished_pack_that_was_damaged_is_made_again(config, root, decoded, damage):
    whole = np.array(load(config, "train").parts[0].images)
    path = cache_path(config, "train")
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        np.save(path, whole[:, :-1])
    decoded.clear()
    np.testing.assert_array_equal(load(config, "train").parts[0].images, whole)
    assert len(decoded) == 6


# ---------------------------------------------------------------- bad input

def refuse(config, message, split="train"):
    with pytest.raises(BadInput) as error:
        load(config, split)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    assert not cache_path(config, "train").exists()


@pytest.mark.parametrize("file", ["train_images", "train_labels", "val_images", "val_labels"])
def test_missing_split_file_is_named_before_anything_is_packed(config, root, decoded, file):
    (root / f"{file}.npy").unlink()
    refuse(config, f"3DIEBench/{file}.npy: not found; .*facebookresearch/SIE.*--data-dir")
    assert not decoded and not (root.parent / ".cache").exists()


def test_missing_folder_says_where_it_looked(make_config):
    refuse(
        make_config("3diebench", "rotation"),
        "data/train_images.npy: not found, nor is there a folder .*data/3DIEBench",
    )


@pytest.mark.parametrize("content, message", [
    (None, "image_3.jpg: not found"),
    (b"", "image_3.jpg: not a readable image"),
    (b"not a jpeg", "image_3.jpg: not a readable image"),
])
def test_missing_or_unreadable_image_is_named(config, root, content, message):
    image = root / SYNSETS[1] / "train1" / "image_3.jpg"
    image.unlink() if content is None else image.write_bytes(content)
    refuse(config, f"{SYNSETS[1]}/train1/{message}")


def write_latent(path, latent):
    path.unlink() if latent is None else path.write_bytes(latent) if isinstance(
        latent, bytes
    ) else np.save(path, latent)


@pytest.mark.parametrize("latent, message", [
    (None, "not found"),
    (np.zeros(6), r"float64 \(6,\), expected 7 finite numbers"),
    (np.full(7, np.nan), ".*expected 7 finite numbers"),
    (b"\x93NUMPY cut", "not a readable .npy array"),
])
def test_missing_or_wrong_latent_is_named_before_images_are_decoded(
    config, root, decoded, latent, message
):
    write_latent(root / SYNSETS[2] / "train5" / "latent_2.npy", latent)
    refuse(config, f"train5/latent_2.npy: {message}")
    assert not decoded


@pytest.mark.parametrize(
    "file, content, message",
    [
        (
            "train_images",
            np.array(["/a/b/"], dtype=object),
            "holds pickled objects.*convert it once",
        ),
        ("train_images", np.arange(6), "expected a list of object folders"),
        (
            "train_labels",
            np.arange(5),
            r"int64 \(5,\), expected one label, a number or a name, for each of 6 objects",
        ),
        ("val_labels", np.array([0, 9, 1]), "label 9 does not occur in train_labels.npy"),
    ],
)
def test_split_files_that_do_not_fit_are_named(config, root, decoded, file, content, message):
    np.save(root / f"{file}.npy", content, allow_pickle=True)
    refuse(config, f"{file}.npy: .*{message}", split=file.split("_")[0])
    assert not decoded


def test_mended_folder_goes_on_where_the_fault_was(config, root, decoded):
    image = root / SYNSETS[1] / "train4" / "image_0.jpg"
    good = image.read_bytes()
    image.write_bytes(b"")
    refuse(config, "train4/image_0.jpg")
    decoded.clear()
    image.write_bytes(good)
    load(config, "train")
    assert decoded == ["train4", "train5"]


def test_too_little_disk_is_said_before_decoding(config, root, decoded, monkeypatch):
    monkeypatch.setattr(
        "plumbing.cache.shutil.disk_usage", lambda path: type("Usage", (), dict(free=5_000))()
    )
    refuse(config, "needs 5.8 kB and 5.0 kB are free; make room or lower --limit")
    assert not decoded


def test_too_many_views_are_refused_before_anything_is_loaded(make_config):
    with pytest.raises(
        BadInput, match="--views 50: 3DIEBench has 50 renders per object, so at most 49"
    ):
        make_config("3diebench", "rotation", views=50)
