"""Shared by all tests: the project root on the path, and data small enough to make on the spot."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as settings
from images import Part, Split


def pytest_collection_modifyitems(items):
    """The notebook, which takes longest, comes first: another process does the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_tutorial.py")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def make_config(tmp_path):
    """Config of a data set and mode with a few fields changed; its data and runs live in
    tmp_path."""
    def make(dataset="folder", mode="saccade", **changes):
        values = (
            settings.preset(dataset, mode)
            | dict(data_dir=str(tmp_path / "data"), out=str(tmp_path / "runs"))
            | changes
        )
        return settings.check(settings.Config(**values))
    return make


@pytest.fixture
def make_split():
    """A images.Split of random images (n, 3, size, size) with labels 0, 1, 0, 1, ..."""
    def make(n=12, size=24, seed=0, views=None, latents=None):
        shape = (n, 3, size, size) if views is None else (n, views, 3, size, size)
        images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        return Split(
            [Part(images, "train", None, n)],
            np.arange(n) % 2,
            ["even", "odd"],
            (0.5, 0.4, 0.3),
            (0.2, 0.25, 0.3),
            dict(seed=seed, shape=shape),
            latents,
        )
    return make


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of 40 small PNG pictures in two classes that differ in colour and pattern."""
    from PIL import Image
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    ramp = np.linspace(0, 255, 20)[None, None, :] * np.ones((3, 20, 1))
    for i in range(40):
        kind = ("ramp", "noise")[i % 2]
        image = (
            ramp * rng.uniform(0.5, 1, (3, 1, 1))
            if i % 2 == 0
            else rng.uniform(0, 255, (3, 20, 20))
        )
        (root / kind).mkdir(exist_ok=True)
        Image.fromarray(image.astype(np.uint8).transpose(1, 2, 0)).save(root / kind / f"{i:02}.png")
    return root
