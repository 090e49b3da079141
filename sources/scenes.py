"""Embedded data for dense tasks: collages of solids, with masks, boxes and labels, in place of COCO
and ADE20K where nothing is to be downloaded.

    split = load(config, "train")
    split[i]            image uint8 (3, S, S); instance uint8 (S, S): 0 background, k the k-th
                        object; classes int64 (n,): classes[k - 1] is that of object k
    split.labelled(i)   image; label uint8 (S, S): 0 background, 1 + class

One to four solids are pasted on a gradient of floor colours, one over the other: renders of
solids.py cut out by the renderer's own opacity, resized to 0.4 to 0.75 of the scene's side, half of
them mirrored. One that would leave less than a quarter of an earlier one visible is left out.
Sixteen scenes share sixteen renders, one of each class, which no other scene shows. Scene i of a
split is the same whatever the number of scenes; all are made once and kept under DATA_DIR/.cache.
Checked in tests/test_scenes.py.
"""
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.cache import cached
from sources import shapes, solids
from sources.masks import Objects, enclosing

SEED = 1                        # solids themselves have 0: what is pasted, no run was trained on
SCENES = 2000                   # for training, without --limit; a quarter as many for val
DIGESTED = 64                   # scenes that tell a split from another
SMALLEST_SIDE = 128             # pixels
MOST_OBJECTS = 4
SIDES = (0.4, 0.75)             # of an object's square, in scenes
HIDDEN = 0.75                   # the most of an object that all others may hide
BLOCK = len(shapes.CLASSES)     # scenes that share as many renders


class Scenes:
    """Scenes of one split; see the module."""

    classes = list(shapes.CLASSES)
    label_names = ["background", *classes]
    mean = (0.5, 0.5, 0.5)      # as of solids
    std = (0.2, 0.2, 0.2)
    in_memory = True            # nothing is decoded: no reading processes are needed

    def __init__(self, array):
        self.array = array      # (N, 4, S, S) uint8: colours, then BLOCK * (k - 1) + class + 1

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        image, code = self._read(index)
        instance = (code + BLOCK - 1) // BLOCK
        classes = (code.unique()[-int(instance.max()):] - 1) % BLOCK
        return image, instance, classes.long()

    def digest(self):
        """A text that tells these scenes from others: of some of them."""
        some = np.linspace(0, len(self) - 1, min(DIGESTED, len(self))).astype(int)
        return hashlib.sha256(self.array[some].tobytes()).hexdigest()

    def labelled(self, index):
        """image uint8 (3, S, S), label uint8 (S, S)"""
        image, code = self._read(index)
        return image, torch.where(code > 0, (code - 1) % BLOCK + 1, 0).to(torch.uint8)

    def objects(self, index):
        """image uint8 (3, S, S), masks.Objects: as detectors learn from them."""
        image, instance, classes = self[index]
        masks = instance.numpy() == np.arange(1, len(classes) + 1)[:, None, None]
        boxes = np.array([enclosing(mask) for mask in masks], dtype=np.float64).reshape(-1, 4)
        return image, Objects(masks, classes.numpy(), np.zeros(len(masks), dtype=bool), boxes,
                              masks.sum((1, 2), dtype=np.float64))

    def merged(self):
        """The same scenes, whose objects are all of one class."""
        array = np.array(self.array)
        objects = array[:, 3] > 0
        array[:, 3][objects] -= (array[:, 3][objects] - 1) % BLOCK
        scenes = Scenes(array)
        scenes.classes = ["object"]
        scenes.label_names = ["background", "object"]
        return scenes

    def _read(self, index):
        pixels = torch.from_numpy(np.array(self.array[index]))
        return pixels[:3], pixels[3]


def load(config, split):
    """Scenes of "train" or "val", --limit of them (val: a quarter as many, at least 16).

    Their side is the run's image size, or the least multiple of it from 128 pixels up."""
    count = config.limit or SCENES
    if split == "val":
        count = max(BLOCK, count // 4)
    size = config.image_size * math.ceil(SMALLEST_SIDE / config.image_size)
    path = Path(config.data_dir) / ".cache" / f"scenes-{split}-{size}px-{count}.npy"
    code = [hashlib.sha256(Path(file).read_bytes()).hexdigest()
            for file in (__file__, solids.__file__, shapes.__file__)]

    def fill(array):
        objects, latents = sample(count, split)
        for first in range(0, count, BLOCK):
            scenes = compose_block(objects, latents, first, split, size)
            array[first:first + BLOCK] = scenes[:count - first]
            yield min(count, first + BLOCK)

    return Scenes(cached(path, dict(dataset="scenes", part=split, code=code, seed=SEED),
                         (count, 4, size, size), np.uint8, fill, f"composing {split} scenes"))


def sample(count, split):
    """Solids and latents (n, 7) for `count` scenes; n is a multiple of BLOCK."""
    n = BLOCK * math.ceil(count / BLOCK)
    return solids.sample_objects(n, SEED, split), solids.sample_latents(n, 1, SEED, split)[:, 0]


def compose_block(objects, latents, first, split, size):
    """Scenes first to first + 15: (16, 4, size, size) uint8, as in Scenes.array."""
    index = torch.arange(first, first + BLOCK)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    side = round(SIDES[1] * size)
    renders = solids.cut_outs(objects, index, latents[index].to(device), side).cpu()
    scenes = [compose(renders, solids.generator(2, SEED, split, int(i)), size) for i in index]
    return torch.stack(scenes).numpy()


def compose(renders, rng, size):
    """One scene (4, size, size) uint8 of some of the renders (16, 4, R, R), of classes 0 to 15."""
    image = background(rng, size)
    code = torch.zeros(size, size, dtype=torch.uint8)
    areas = []                                              # of the objects so far, unhidden
    wanted = rng.integers(1, MOST_OBJECTS + 1)
    for label in rng.permutation(BLOCK)[:wanted]:
        render = renders[label].float() / 255
        if rng.random() < 0.5:
            render = render.flip(2)
        side = round(rng.uniform(*SIDES) * size)
        top, left = rng.integers(0, size - side + 1, 2)
        render = F.interpolate(render[None], (side, side), mode="bilinear", antialias=True)[0]
        margins = (left, size - side - left, top, size - side - top)
        render = F.pad(render, [int(margin) for margin in margins])
        shown = render[3] > 0.5
        number = (code + BLOCK - 1) // BLOCK
        remaining = [int(((number == k + 1) & ~shown).sum()) for k in range(len(areas))]
        if any(now < (1 - HIDDEN) * area for now, area in zip(remaining, areas)):
            continue
        image = render[:3] + (1 - render[3]) * image
        code[shown] = BLOCK * len(areas) + int(label) + 1
        areas.append(int(shown.sum()))
    return torch.cat([(image * 255).round().clamp(0, 255).to(torch.uint8), code[None]])


def background(rng, size):
    """A gradient between two floor colours in any direction: (3, size, size) in [0, 1]."""
    angle = rng.uniform(0, 2 * math.pi)
    hues = torch.from_numpy(rng.uniform(0, 1, 2)).float()
    ends = solids.hsv_to_rgb(hues, solids.FLOOR_SATURATION, solids.FLOOR_VALUE)         # (2, 3)
    place = torch.linspace(-0.5, 0.5, size)
    along = place[None] * math.cos(angle) + place[:, None] * math.sin(angle)
    share = (along + 0.71) / 1.42
    return ends[0, :, None, None] * (1 - share) + ends[1, :, None, None] * share
