"""saliency.py against SciPy, PIL and hand-made maps; DeepGaze through a stand-in with the published
call format."""
import math
import shutil
import sys
import tracemalloc
import types
import warnings
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates
from scipy.special import logsumexp

import build
import saliency as S
from datasets import load
from images import Part, Split, Store
from plumbing.errors import BadInput

CPU = torch.device("cpu")


# ---------------------------------------------------------------- the two matrices

@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_dct_matrix_is_scipys_orthonormal_dct(n):
    x, C = np.random.default_rng(0).normal(size=(3, n, n)), S.dct_matrix(n).double()
    np.testing.assert_allclose(
        C @ torch.from_numpy(x) @ C.T, dctn(x, axes=(1, 2), norm="ortho"), atol=1e-6
    )
    np.testing.assert_allclose(C.T @ C, np.eye(n), atol=1e-6)


@pytest.mark.parametrize("n, sigma", [(64, 3.2), (33, 1.0), (9, 4.0)])
def test_gaussian_matrix_blurs_as_scipy_does(n, sigma):
    x, G = np.random.default_rng(0).normal(size=(n, 5)), S.gaussian_matrix(n, sigma).double()
    np.testing.assert_allclose(G.sum(1), np.ones(n), atol=1e-6)

    def blur(values):
        return gaussian_filter1d(values, sigma, axis=0, mode="constant", radius=n)

    # Beyond the border there is nothing, and what is there is weighted to one.
    np.testing.assert_allclose(G @ torch.from_numpy(x), blur(x) / blur(np.ones_like(x)), atol=1e-5)
    r = math.ceil(4 * sigma)
    if 2 * r < n:  # in the interior: the plain filter
        np.testing.assert_allclose(
            (G @ torch.from_numpy(x))[r:-r],
            gaussian_filter1d(x, sigma, axis=0, truncate=8)[r:-r],
            atol=1e-3,
        )


# ---------------------------------------------------------------- the image signature

def centre_prior(n):
    y, x = (np.mgrid[:n, :n] + 0.5) / n - 0.5
    return np.exp(-(x ** 2 + y ** 2) / (2 * 0.35 ** 2))


def slow_signature(image):
    """Hou, Harel & Koch's formula for one image (3, n, n) uint8, in float64: opponent channels of a
    64-pixel
    thumbnail, sign of the DCT, squared, summed, blurred, brought back to size, weighted by the
    centre prior."""
    size, thumbnail = image.shape[-1], 64
    r, g, b = (
        np.asarray(
            Image.fromarray(c.astype(np.float32) / 255).resize(
                (thumbnail, thumbnail), Image.BILINEAR
            ),
            float,
        )
        for c in image
    )
    energy = 0
    for channel in ((r + g + b) / 3, r - g, b - (r + g) / 2):
        spectrum = dctn(channel, norm="ortho")
        energy = (
            energy
            + idctn(np.where(np.abs(spectrum) > 1e-3, np.sign(spectrum), 0), norm="ortho") ** 2
        )
    blurred, ones = (
        gaussian_filter(x, 0.05 * thumbnail, mode="constant", radius=thumbnail)
        for x in (energy, np.ones_like(energy))
    )
    position = (np.arange(size) + 0.5) / size * thumbnail - 0.5
    resized = map_coordinates(
        blurred / ones, np.meshgrid(position, position, indexing="ij"), order=1, mode="nearest"
    )
    result = (resized + 1e-6) * centre_prior(size)
    return result / result.sum()


def scenes(n, size, seed=0, noise=60):
    """Random blobs of colour on a gradient, with noise: (n, 3, size, size) uint8."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3, size, size))
    smooth = np.stack(
        [gaussian_filter(channel, size / 12) for channel in x.reshape(-1, size, size)]
    ).reshape(x.shape)
    images = 128 + 50 * smooth / smooth.std() + noise * x + np.linspace(-30, 30, size)
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


# An enlarged thumbnail has many coefficients near zero; each whose sign rounds the other way moves
# the map by half a per cent.
@pytest.mark.parametrize(
    "size, tolerance", [(96, 1e-4), (64, 1e-4), (97, 1e-4), (128, 1e-4), (33, 0.02), (32, 0.02)]
)
def test_signature_is_the_published_formula(size, tolerance):
    images = scenes(3, size)
    ours = S.image_signature(images)
    expected = np.stack([slow_signature(image.numpy()) for image in images])
    assert ours.shape == (3, size, size) and ours.dtype == torch.float32
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance * expected.max())


def ground_with_patch(row, column, side=8, size=96, dark=False):
    """A smooth ground with a small odd patch whose centre is given."""
    y, x = np.mgrid[:size, :size] / size
    image = np.stack([90 + 60 * x, 110 + 40 * y, 120 + 20 * x * y])
    image[:, row - side // 2 : row + side // 2, column - side // 2 : column + side // 2] = (
        [[[20]], [[30]], [[20]]] if dark else [[[230]], [[60]], [[40]]]
    )
    return torch.from_numpy(image.astype(np.uint8))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "row, column", [(48, 48), (20, 70), (70, 20), (30, 25), (80, 60), (14, 40)]
)
def test_signature_finds_what_is_odd(row, column, dark):
    saliency = S.image_signature(ground_with_patch(row, column, dark=dark)[None])[0]
    r, c = divmod(int(saliency.argmax()), 96)
    assert abs(r - row) <= 4 and abs(c - column) <= 4


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 90), (1, 0, 0)], ids=str)
def test_one_colour_leaves_the_centre_prior(colour):
    images = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 48, 48)
    expected = centre_prior(48) / centre_prior(48).sum()
    np.testing.assert_allclose(S.image_signature(images), np.stack([expected, expected]), rtol=2e-3)


@pytest.mark.parametrize("kind", ["noise", "black and white", "stripes", "one dot", "scene"])
@pytest.mark.parametrize("size", [8, 33, 96])
def test_maps_are_densities_whatever_the_picture(kind, size):
    rng = np.random.default_rng(0)
    image = {
        "noise": rng.integers(0, 256, (3, size, size)),
        "black and white": 255 * rng.integers(0, 2, (3, size, size)),
        "stripes": np.broadcast_to(255 * (np.arange(size) % 2), (3, size, size)),
        "one dot": np.zeros((3, size, size)),
        "scene": scenes(1, size)[0].numpy(),
    }[kind].astype(np.uint8)
    if kind == "one dot":
        image[:, size // 3, size // 2] = 255
    saliency = S.image_signature(torch.from_numpy(image)[None])
    assert saliency.shape == (1, size, size) and saliency.isfinite().all() and (saliency > 0).all()
    torch.testing.assert_close(saliency.sum(), torch.tensor(1.0))


def test_an_image_does_not_depend_on_its_batch():
    images = scenes(7, 40)
    one_by_one = torch.cat([S.image_signature(image[None]) for image in images])
    torch.testing.assert_close(S.image_signature(images), one_by_one, rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------- the cache of computed maps

@pytest.fixture
def config(make_config):
    return make_config("folder", image_size=24, patch_size=8)


@pytest.fixture
def computed(monkeypatch):
    """Number of images in each call of the signature so far."""
    calls, real = [], S.image_signature
    monkeypatch.setattr(
        S, "image_signature", lambda images: calls.append(len(images)) or real(images)
    )
    return calls


def test_maps_line_up_with_the_images_and_peak_at_one(config, make_split):
    split = make_split(n=130)                           # two full batches and a short one
    (maps,) = S.saliency_maps("signature", split, config, CPU)
    expected = S.image_signature(torch.from_numpy(split.parts[0].images))
    assert (
        maps.shape == (130, 24, 24) and maps.dtype == np.float16 and (maps.max((1, 2)) == 1).all()
    )
    np.testing.assert_allclose(maps, expected / expected.amax((1, 2), keepdim=True), atol=1e-3)


def test_maps_of_rendered_objects_one_per_render(config, make_split):
    split = make_split(n=5, views=3)
    (maps,) = S.saliency_maps("signature", split, config, CPU)
    second = S.image_signature(torch.from_numpy(split.parts[0].images[1, 2][None]))[0]
    np.testing.assert_allclose(maps[5], second / second.max(), atol=1e-3)
    assert len(maps) == len(S.saliency_maps("uniform", split, config, CPU)[0]) == 15


def test_maps_are_computed_once(config, make_split, computed):
    for _ in range(3):
        S.saliency_maps("signature", make_split(), config, CPU)
    assert computed == [12]


def test_maps_of_changed_images_are_computed_again(config, computed):
    for i in range(4):
        path = Path(config.data_dir) / "train" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (60 * i, 0, 0)).save(path)
    shutil.copytree(path.parents[1], path.parents[2] / "val")
    before = S.saliency_maps("signature", load(config, "train"), config, CPU)[0].copy()
    S.saliency_maps("signature", load(config, "pretrain"), config, CPU)
    assert computed == [4]  # `pretrain` and `train` are the same images
    Image.fromarray(ground_with_patch(12, 12, size=24, side=4).numpy().transpose(1, 2, 0)).save(
        path
    )
    after = S.saliency_maps("signature", load(config, "train"), config, CPU)[0]
    assert computed == [4, 4]
    np.testing.assert_array_equal(after[:3], before[:3])
    assert np.abs(after[3] - before[3]).max() > 0.1


def test_parts_splits_and_sizes_have_their_own_maps(config, make_split, computed):
    split = make_split()
    two = Split(
        [
            Part(split.parts[0].images[:5], "unlabeled", None, 5),
            Part(split.parts[0].images[5:], "train", None, 7),
        ],
        *split[1:],
    )
    for _ in range(2):
        maps = S.saliency_maps("signature", two, config, CPU)
        other = S.saliency_maps(
            "signature", make_split(size=16), replace(config, image_size=16), CPU
        )
    assert (
        [len(m) for m in maps] == [5, 7]
        and other[0].shape == (12, 16, 16)
        and computed == [5, 7, 12]
    )


# ---------------------------------------------------------------- published maps

def published_split(size=24, rows=None, names=("unlabeled", "train"), total=10):
    """A split whose parts have `total` images in all, of which --limit left `rows`."""
    n = total if rows is None else len(rows)
    parts = [Part(np.zeros((n, 3, size, size), np.uint8), name, rows, total) for name in names]
    return Split(parts, np.zeros(n * len(parts), np.int64), ["a"], (0.5,) * 3, (0.5,) * 3, {})


def write_maps(folder, name, shape=(10, 1, 24, 24), dtype=np.float32, sub=False):
    path = folder / name / f"saliency_{name}.npy" if sub else folder / f"saliency_{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    maps = np.random.default_rng(len(name)).random(shape).astype(dtype)
    np.save(path, maps)
    return maps


@pytest.mark.parametrize("sub", [False, True], ids=["DIR/saliency_x.npy", "DIR/x/saliency_x.npy"])
@pytest.mark.parametrize("shape", [(10, 1, 24, 24), (10, 24, 24)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_published_maps_unlabeled_then_train(tmp_path, config, sub, shape, dtype):
    written = [
        write_maps(tmp_path, name, shape, dtype, sub).reshape(10, 24, 24)
        for name in ("unlabeled", "train")
    ]
    maps = S.saliency_maps(str(tmp_path), published_split(), config, CPU)
    for ours, theirs in zip(maps, written, strict=True):
        assert isinstance(ours, np.memmap)              # the real file has 3.7 GB
        np.testing.assert_array_equal(ours, theirs)
    both = Store(maps, CPU)[torch.tensor([10, 3])]
    np.testing.assert_array_equal(both, [written[1][0], written[0][3]])


def test_published_maps_follow_limit(tmp_path, config):
    written, rows = write_maps(tmp_path, "train"), np.array([1, 4, 9])
    (maps,) = S.saliency_maps(
        str(tmp_path), published_split(rows=rows, names=["train"]), config, CPU
    )
    np.testing.assert_array_equal(maps, written[[1, 4, 9], 0])


def test_published_maps_on_stl10_itself(tmp_path, make_config):
    stl10 = make_config("stl10", limit=4)
    folder = Path(stl10.data_dir) / "stl10_binary"
    folder.mkdir(parents=True)
    for name in ("unlabeled", "train", "test"):
        # image i is all i
        np.arange(8, dtype=np.uint8).repeat(27648).tofile(folder / f"{name}_X.bin")
        (np.arange(8, dtype=np.uint8) + 1).tofile(folder / f"{name}_y.bin")
        np.save(
            tmp_path / f"saliency_{name}.npy",
            np.arange(1, 9, dtype=np.float32)[:, None, None, None].repeat(96, 2).repeat(96, 3),
        )
    for split in ("pretrain", "train", "val"):
        data = load(stl10, split)
        for maps, part in zip(
            S.saliency_maps(str(tmp_path), data, stl10, CPU), data.parts, strict=True
        ):
            assert len(maps) == 4
            # map i is all i + 1
            np.testing.assert_array_equal(maps[:, 0, 0], part.images[:, 0, 0, 0] + 1)


def cut_short(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def integers(path):
    np.save(path, np.ones((10, 24, 24), np.uint8))


def pickled(path):
    np.save(path, np.array([{}] * 10, dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: np.save(p, np.ones((9, 1, 24, 24), np.float32)),
        lambda p: np.save(p, np.ones((11, 24, 24), np.float32)),
        lambda p: np.save(p, np.ones((10, 1, 24, 23), np.float32)),
        lambda p: np.save(p, np.ones((10, 96, 96), np.float32)),
        lambda p: np.save(p, np.ones((10, 3, 24, 24), np.float32)),
        lambda p: np.save(p, np.float32(1)),
        integers,
        pickled,
        cut_short,
        Path.unlink,
        lambda p: p.write_text("not an array"),
        lambda p: np.savez(p.open("wb"), np.ones((10, 24, 24))),
    ],
    ids=[
        "too few",
        "too many",
        "not square",
        "another size",
        "three channels",
        "a number",
        "integers",
        "pickled objects",
        "cut short",
        "missing",
        "text",
        "npz",
    ],
)
def test_published_maps_that_do_not_fit_are_named(tmp_path, config, damage):
    write_maps(tmp_path, "train")
    damage(tmp_path / "saliency_train.npy")
    with pytest.raises(BadInput, match="saliency_train.npy") as caught:
        S.saliency_maps(str(tmp_path), published_split(names=["train"]), config, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value, sound", [
    (0, True), (-0.0, True), (6e4, True), (1e-7, True), (-1e-7, False), (-1, False),
    (np.nan, False), (-np.nan, False), (np.inf, False), (-np.inf, False),
])
def test_published_maps_must_be_densities(tmp_path, config, dtype, value, sound):
    maps = np.random.default_rng(0).random((600, 24, 24)).astype(dtype)
    maps[517, 3, 4] = value
    np.save(tmp_path / "saliency_train.npy", maps)
    split = published_split(names=["train"], total=600)
    others = published_split(names=["train"], total=600, rows=np.array([2, 516, 518]))
    S.saliency_maps(str(tmp_path), others, config, CPU)
    if sound:
        S.saliency_maps(str(tmp_path), split, config, CPU)
        return
    for split in (split, published_split(names=["train"], total=600, rows=np.array([2, 517]))):
        with pytest.raises(BadInput, match="saliency_train.npy: map 517 .*densities"):
            S.saliency_maps(str(tmp_path), split, config, CPU)


def test_any_scale_of_a_map_will_do_that_float32_can_hold(tmp_path, config):
    maps = np.random.default_rng(0).random((10, 24, 24), dtype=np.float32)
    maps *= np.logspace(-18, 29, 10, dtype=np.float32)[:, None, None]
    np.save(tmp_path / "saliency_train.npy", maps)
    S.saliency_maps(str(tmp_path), published_split(names=["train"]), config, CPU)


def test_a_wrong_folder_is_noticed_before_the_images_are_read(tmp_path, make_config, monkeypatch):
    def never(*_):
        raise AssertionError("the images were read first")

    monkeypatch.setattr(build, "load", never)
    config = make_config("folder", image_size=24, patch_size=8, saliency=str(tmp_path / "maps"))
    for mode, words in (("saccade", "saliency_train.npy"), ("augment", None)):
        wanted = pytest.raises(BadInput, match=words) if words else pytest.raises(AssertionError)
        with wanted:
            build.build_views(replace(config, mode=mode), "pretrain", CPU)


def test_a_missing_package_is_noticed_before_the_images_are_read(config):
    if "deepgaze_pytorch" not in sys.modules:
        with pytest.raises(BadInput, match="deepgaze_pytorch"):
            S.check(replace(config, saliency="deepgaze"), ["train"])


def test_a_misspelt_source_lists_the_choices(config):
    with pytest.raises(BadInput, match="--saliency signatur: .*signature, uniform, deepgaze"):
        S.saliency_maps("signatur", published_split(), config, CPU)


# ---------------------------------------------------------------- uniform

def test_uniform_is_all_ones_and_takes_no_memory():
    images = np.broadcast_to(np.zeros(1, np.uint8), (100_000, 3, 96, 96))
    split = Split(
        [Part(images, "unlabeled", None, 100_000)],
        np.zeros(100_000, np.int64),
        [],
        (0,) * 3,
        (1,) * 3,
        {},
    )
    tracemalloc.start()
    with warnings.catch_warnings():
        # torch warns about arrays it may not write to
        warnings.simplefilter("error")
        (maps,) = S.saliency_maps("uniform", split, None, CPU)
        rows = Store([maps], CPU)[torch.tensor([0, 99_999])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert maps.shape == (100_000, 96, 96) and not any(maps.strides) and peak < 10**6
    assert rows.shape == (2, 96, 96) and (rows == 1).all()


# ---------------------------------------------------------------- DeepGaze

@pytest.fixture
def stand_in(monkeypatch):
    """Module deepgaze_pytorch whose model prefers bright pixels; .calls records what it was
    shown."""
    class DeepGazeIIE(torch.nn.Module):
        calls = []

        def __init__(self, pretrained=False):
            super().__init__()
            assert pretrained

        def forward(self, x, centerbias):
            self.calls.append((x.clone(), centerbias.clone(), self.training))
            # (B, H, W)
            log_density = x.mean(1) / 32 + centerbias
            return log_density - log_density.flatten(1).logsumexp(1).view(-1, 1, 1)

    monkeypatch.setitem(
        sys.modules, "deepgaze_pytorch", types.SimpleNamespace(DeepGazeIIE=DeepGazeIIE)
    )
    return DeepGazeIIE


def bright_square(row, column, size=48):
    image = np.full((3, size, size), 10, np.uint8)
    image[:, row - 4:row + 4, column - 4:column + 4] = 250
    return image


def square_split(*places):
    images = np.stack([bright_square(*place) for place in places])
    return Split(
        [Part(images, "train", None, len(images))],
        np.zeros(len(images), np.int64),
        [],
        (0,) * 3,
        (1,) * 3,
        dict(places=places),
    )


def test_deepgaze_is_shown_512_pixels_of_0_to_255_and_a_normalised_bias(config, stand_in):
    config = replace(config, image_size=48)
    (maps,) = S.saliency_maps("deepgaze", square_split((12, 30), (30, 12)), config, CPU)
    (x, bias, training), = stand_in.calls
    assert (
        x.shape == (2, 3, 512, 512)
        and x.dtype == torch.float32
        and x.min() == 10
        and x.max() == 250
        and not training
    )
    assert bias.shape == (2, 512, 512)
    np.testing.assert_allclose(logsumexp(bias.numpy(), axis=(1, 2)), 0, atol=1e-3)
    # ours, for want of a file
    np.testing.assert_allclose(bias[0] - bias[0, 256, 256], np.log(centre_prior(512)), atol=1e-3)
    assert maps.shape == (2, 48, 48) and (maps >= 0).all() and (maps.max((1, 2)) == 1).all()
    for saliency, (row, column) in zip(maps, [(12, 30), (30, 12)]):
        r, c = divmod(int(saliency.argmax()), 48)
        assert abs(r - row) <= 4 and abs(c - column) <= 4


def test_deepgaze_map_is_the_density_at_image_size(config, stand_in):
    ours = S.deepgaze(config, CPU)(torch.from_numpy(bright_square(20, 40, size=64))[None])[0]
    (x, bias, _), = stand_in.calls
    log = (x.double().mean(1) / 32 + bias)[0].numpy()
    density = np.exp(log - logsumexp(log))
    # each of our pixels is the mean of 64 of theirs
    assert abs(float(ours.sum()) * 64 - 1) < 1e-3
    np.testing.assert_allclose(
        ours,
        Image.fromarray(density.astype(np.float32)).resize((64, 64), Image.BILINEAR),
        rtol=1e-3,
    )


def test_deepgaze_runs_once_and_again_when_its_centre_bias_changes(config, stand_in):
    config, split = replace(config, image_size=48), square_split((12, 30))
    for _ in range(2):
        S.saliency_maps("deepgaze", split, config, CPU)
    assert len(stand_in.calls) == 1
    bias = np.full((20, 30), -3.0)
    # people look to the left
    bias[:, :15] = -1
    np.save(Path(config.data_dir) / "centerbias_mit1003.npy", bias)
    (maps,) = S.saliency_maps("deepgaze", split, config, CPU)
    shown = stand_in.calls[1][1][0]
    assert shown.shape == (512, 512) and abs(float(shown.logsumexp((0, 1)))) < 1e-3
    np.testing.assert_allclose(shown[:, :200] - shown[:, 312:], 2, atol=1e-4)
    assert maps[0, 40, 5] > 5 * maps[0, 40, 45] > 0
    S.saliency_maps("deepgaze", split, config, CPU)
    assert len(stand_in.calls) == 2


def test_stored_deepgaze_maps_need_no_package(config, stand_in, monkeypatch):
    config, split = replace(config, image_size=48), square_split((12, 30))
    (before,) = S.saliency_maps("deepgaze", split, config, CPU)
    monkeypatch.setitem(sys.modules, "deepgaze_pytorch", None)
    np.testing.assert_array_equal(S.saliency_maps("deepgaze", split, config, CPU)[0], before)


def test_deepgaze_without_its_package(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepgaze_pytorch", None)
    with pytest.raises(BadInput, match="--saliency deepgaze: needs the package deepgaze_pytorch"):
        S.saliency_maps("deepgaze", square_split((12, 30)), config, CPU)
    assert not [f for f in Path(config.data_dir).rglob("*") if f.is_file()]


def test_deepgaze_without_its_weights(config, stand_in, monkeypatch):
    def no_network(self, pretrained):
        raise URLError("HTTP 300")

    monkeypatch.setattr(stand_in, "__init__", no_network)
    with pytest.raises(
        BadInput, match="--saliency deepgaze: could not fetch its weights .*HTTP 300"
    ):
        S.saliency_maps("deepgaze", square_split((12, 30)), config, CPU)
    assert not [f for f in Path(config.data_dir).rglob("*") if f.is_file()]


@pytest.mark.parametrize(
    "write",
    [lambda p: np.save(p, np.zeros((2, 20, 20))), lambda p: p.write_text("log density")],
    ids=["three axes", "text"],
)
def test_centre_bias_that_is_no_map_is_named(config, stand_in, write):
    Path(config.data_dir).mkdir()
    write(Path(config.data_dir) / "centerbias_mit1003.npy")
    with pytest.raises(BadInput, match="centerbias_mit1003.npy"):
        S.saliency_maps("deepgaze", square_split((12, 30)), config, CPU)


@pytest.mark.parametrize("kind, good", [(np.float32, True), (np.float16, False)])
def test_maps_of_the_parts_of_a_split_are_of_one_type(kind, good, make_config, tmp_path):
    """STL-10's pretrain split has two parts, whose rows are gathered into one batch."""
    np.save(tmp_path / "saliency_train.npy", np.ones((2, 96, 96), np.float32))
    np.save(tmp_path / "saliency_unlabeled.npy", np.ones((2, 96, 96), kind))
    config = make_config("stl10", "saccade", saliency=str(tmp_path))
    if good:
        S.check(config, ("unlabeled", "train"))
    else:
        with pytest.raises(BadInput, match="float16 for unlabeled, float32 for train"):
            S.check(config, ("unlabeled", "train"))
