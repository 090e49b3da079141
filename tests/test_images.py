"""images.py: rows on their way to the device, normalisation."""
import gc

import numpy as np
import pytest
import torch

import images as I

CPU = torch.device("cpu")


# ---------------------------------------------------------------- Store

def strided(tmp_path, n, seed):
    """A memory-mapped array whose last two axes are swapped, as STL-10's."""
    path = tmp_path / f"{seed}.bin"
    np.random.default_rng(seed).integers(0, 256, (n, 3, 5, 7), dtype=np.uint8).tofile(path)
    return np.memmap(path, np.uint8, mode="c").reshape(n, 3, 5, 7).transpose(0, 1, 3, 2)


@pytest.mark.parametrize("fits", [False, True], ids=["per batch", "resident"])
@pytest.mark.parametrize("sizes", [[9], [4, 5], [1, 7, 1], [3, 0, 6]], ids=str)
def test_store_reads_its_parts_as_one(tmp_path, monkeypatch, sizes, fits):
    monkeypatch.setattr(I, "fits", lambda *_: fits)
    arrays = [
        strided(tmp_path, n, seed) if n else np.zeros((0, 3, 7, 5), np.uint8)
        for seed, n in enumerate(sizes)
    ]
    store, whole = I.Store(arrays, CPU), np.concatenate(arrays)
    assert len(store) == len(whole)
    for index in (
        torch.arange(len(whole)),
        torch.randint(len(whole), (50,)),
        torch.tensor([len(whole) - 1, 0, 0]),
    ):
        rows = store[index]
        assert rows.dtype == torch.uint8
        np.testing.assert_array_equal(rows, whole[index.numpy()])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8])
def test_store_keeps_the_type(dtype):
    arrays = [np.arange(6, dtype=dtype).reshape(3, 2), np.arange(4, dtype=dtype).reshape(2, 2)]
    assert I.Store(arrays, CPU)[torch.tensor([1, 4])].numpy().tolist() == [[2, 3], [2, 3]]
    assert I.Store(arrays, CPU)[torch.tensor([4])].numpy().dtype == dtype


# ---------------------------------------------------------------- normalise

@pytest.mark.parametrize("channel_dim", [0, 1, 2])
def test_normalise_finds_the_channels_and_leaves_its_input_alone(channel_dim):
    images = torch.randint(0, 256, (3, 3, 3, 4), dtype=torch.uint8)
    before, mean, std = images.clone(), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4])
    ours = I.normalise(images, mean, std, channel_dim)
    for c in range(3):
        expected = (images.select(channel_dim, c).double() / 255 - mean[c]) / std[c]
        torch.testing.assert_close(
            ours.select(channel_dim, c).double(), expected, atol=2e-6, rtol=0
        )
    assert torch.equal(images, before)


# ---------------------------------------------------------------- Store: rows fetched ahead

def batches_of(store, told):
    """Five batches as a training loop takes them; told: whether the next one is announced before
    each."""
    order = torch.randperm(len(store), generator=torch.Generator().manual_seed(3)).split(4)
    got = []
    for i, index in enumerate(order):
        if told and i + 1 < len(order):
            store.prefetch(order[i + 1])
        got.append(store[index])
    return torch.cat(got)


@pytest.mark.parametrize("sizes", [[20], [9, 4, 7]], ids=str)
def test_fetching_ahead_changes_nothing(tmp_path, sizes):
    arrays = [strided(tmp_path, n, seed) for seed, n in enumerate(sizes)]
    told = I.Store(arrays, CPU, "no")
    assert torch.equal(batches_of(told, True), batches_of(I.Store(arrays, CPU), False))
    assert told.waiting == []


def test_rows_that_were_announced_are_not_gathered_again(monkeypatch):
    store = I.Store([np.arange(10, dtype=np.float32)], CPU, "no")
    store.prefetch(torch.tensor([4, 2]))
    (_, future), = store.waiting
    future.result()
    monkeypatch.setattr(store, "_gather", None)
    assert store[torch.tensor([4, 2])].tolist() == [4, 2]


def test_announcements_that_nobody_takes_are_forgotten():
    store = I.Store([np.arange(10, dtype=np.float32)], CPU, "no")
    for i in range(8):
        store.prefetch(torch.tensor([i]))
    assert len(store.waiting) == I.AHEAD
    assert store[torch.tensor([9, 0])].tolist() == [9, 0] and store[torch.tensor([7])].tolist() == [
        7
    ]


def test_resident_rows_need_no_thread():
    for resident in ("yes", "auto"):
        store = I.Store([np.arange(10, dtype=np.float32)], CPU, resident)
        store.prefetch(torch.tensor([1]))
        assert (
            store.reader is None
            and store.waiting == []
            and store[torch.tensor([1])].tolist() == [1]
        )


def test_an_exception_of_the_thread_is_raised_where_the_rows_are_asked_for():
    store = I.Store([np.arange(10, dtype=np.float32)], CPU, "no")
    store.prefetch(torch.tensor([10]))
    with pytest.raises(IndexError):
        store[torch.tensor([10])]
    assert store[torch.tensor([3])].tolist() == [3]         # and the Store still works


def test_the_thread_ends_with_its_store():
    store = I.Store([np.arange(10, dtype=np.float32)], CPU, "no")
    store.prefetch(torch.tensor([1]))
    store[torch.tensor([1])]
    thread, = store.reader._threads
    assert thread.is_alive()
    del store
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


# ---------------------------------------------------------------- Pictures

SIZES = [(9, 30), (30, 9), (12, 12), (10, 200), (4, 5), (31, 12), (1, 1), (17, 13)]


def flat_part(sizes=SIZES, seed=0):
    """Random pictures (3, H, W) of these sizes, and the Part that holds them."""
    rng = np.random.default_rng(seed)
    pictures = [rng.integers(0, 256, (3, H, W), dtype=np.uint8) for H, W in sizes]
    tail = np.full(I.canvas_side(np.array(sizes)), 77, np.uint8)
    flat = np.concatenate([picture.ravel() for picture in pictures] + [tail])
    return pictures, I.Part(flat, "train", None, len(sizes), np.array(sizes))


def random_boxes(sizes, count, side, seed=0):
    rng = np.random.default_rng(seed)
    boxes = []
    for picture in rng.integers(0, len(sizes), count).tolist():
        H, W = sizes[picture]
        height, width = (int(rng.integers(1, min(n, side) + 1)) for n in (H, W))
        boxes.append([picture, int(rng.integers(0, H - height + 1)),
                      int(rng.integers(0, W - width + 1)), height, width])
    return torch.tensor(boxes)


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_boxes_are_cut_from_pictures_of_any_size(resident):
    pictures, part = flat_part()
    store = I.Pictures(part, CPU, resident)
    boxes = random_boxes(SIZES, 300, store.side)
    got = store[boxes]
    assert got.shape == (300, 3, store.side, store.side) and got.dtype == torch.uint8
    for canvas, (picture, top, left, height, width) in zip(got.numpy(), boxes.tolist()):
        expected = pictures[picture][:, top:top + height, left:left + width]
        np.testing.assert_array_equal(canvas[:, :height, :width], expected)


def test_boxes_told_ahead_are_the_same_boxes():
    _, part = flat_part()
    store = I.Pictures(part, CPU, "no")
    boxes = random_boxes(SIZES, 40, store.side)
    expected = I.Pictures(part, CPU, "yes")[boxes]
    store.prefetch(boxes)
    assert len(store.waiting) == 1 and torch.equal(store[boxes], expected) and store.waiting == []


def test_a_split_of_pictures_has_one_label_each():
    _, part = flat_part()
    split = I.Split([part], np.arange(8), [*"abcdefgh"], (0, 0, 0), (1, 1, 1), {})
    images, labels = I.single_images(split, CPU)
    assert isinstance(images, I.Pictures) and len(images) == 8
    assert labels.tolist() == [*range(8)]


def test_pictures_may_be_read_only_without_a_warning(recwarn):
    _, part = flat_part()
    part.images.setflags(write=False)
    I.Pictures(part, CPU)
    assert not recwarn.list


@pytest.mark.parametrize("H, W", [(12, 12), (12, 300), (300, 12), (100, 101), (7, 9), (2, 2)])
def test_no_random_crop_is_larger_than_the_side_says(H, W):
    from torchvision.transforms import RandomResizedCrop
    side = I.canvas_side(np.array([[H, W], [2, 900]]))
    for scale in ((0.08, 1.0), (0.3, 1.0), (0.99, 1.0), (3.0, 3.0)):        # the last: its fallback
        for _ in range(200):
            _, _, height, width = RandomResizedCrop.get_params(torch.empty(3, H, W), scale,
                                                               (3 / 4, 4 / 3))
            assert max(height, width) <= side
