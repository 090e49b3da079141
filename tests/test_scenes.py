"""Collages: what is pasted, hidden, labelled and kept."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sources import scenes, solids


@pytest.fixture(scope="module")
def block():
    objects, latents = scenes.sample(20, "train")
    return scenes.compose_block(objects, latents, 16, "train", 48)


@pytest.fixture
def config(make_config):
    return make_config("solids", "regions", image_size=32, patch_size=8, limit=20)


def test_cut_outs_over_the_render_s_own_floor_are_the_render():
    objects, latents = scenes.sample(3, "val")
    latents = latents[:3]
    index = torch.arange(3)
    cut = solids.cut_outs(objects, index, latents, 40)
    share = solids.object_masks(objects, index, latents, 40)
    whole = solids.render(objects, index, latents, 40).float()
    assert (cut[:, 3] / 255 - share).abs().max() < 1 / 255
    inside, outside = share == 1, share == 0
    for image, piece, full, none in zip(whole, cut, inside, outside):
        assert torch.equal(image[:, full], piece[:3, full].float()) and piece[:, none].sum() == 0


def test_labels_masks_and_classes_agree(block):
    split = scenes.Scenes(block)
    for i in range(len(split)):
        image, instance, classes = split[i]
        again, label = split.labelled(i)
        n = int(instance.max())
        assert 1 <= n <= 4 and classes.shape == (n,) and len(classes.unique()) == n
        assert torch.equal(image, again) and image.dtype == label.dtype == torch.uint8
        named = torch.cat([torch.zeros(1, dtype=torch.long), classes + 1])
        assert torch.equal(label.long(), named[instance.long()])
        assert set(instance.unique().tolist()) == set(range(n + 1))


def test_merged_scenes_have_one_class_and_the_same_objects(block):
    split = scenes.Scenes(block)
    merged = split.merged()
    assert merged.digest() != split.digest() and len(merged) == len(split)
    for i in range(len(split)):
        image, found = merged.objects(i)
        before, objects = split.objects(i)
        assert torch.equal(image, before) and np.array_equal(found.masks, objects.masks)
        assert (found.classes == 0).all() and np.array_equal(found.boxes, objects.boxes)
        _, label = merged.labelled(i)
        assert torch.equal(label, split.labelled(i)[1].clamp(max=1))


def test_objects_are_as_large_as_promised_and_background_has_no_edges(block):
    split = scenes.Scenes(block)
    for i in range(len(split)):
        image, instance, _ = split[i]
        for k in range(1, int(instance.max()) + 1):
            rows, columns = (instance == k).nonzero().unbind(1)
            assert max(rows.max() - rows.min(), columns.max() - columns.min()) < 0.75 * 48 + 1
        floor = torch.nn.functional.max_pool2d((instance > 0).float()[None], 5, 1, 2)[0] == 0
        step = image.float().diff(dim=2).abs().amax(0)
        # parts thinner than half a pixel are shown and not labelled
        assert (step[floor[:, 1:] & floor[:, :-1]] > 16).float().mean() < 0.01
    covered = (block[:, 3] > 0).mean()
    assert 0.1 < covered < 0.3                      # about 80 % background


def test_no_object_hides_more_than_three_quarters_of_another():
    """Squares: a later one lies elsewhere or not at all."""
    renders = torch.zeros(16, 4, 36, 36, dtype=torch.uint8)
    renders[:] = torch.full((4, 36, 36), 255, dtype=torch.uint8)
    for seed in range(30):
        scene = scenes.compose(renders, np.random.default_rng(seed), 48)
        _, instance, _ = scenes.Scenes(scene[None].numpy())[0]
        areas = [(instance == k + 1).sum().item() for k in range(int(instance.max()))]
        assert areas[-1] >= (0.4 * 48) ** 2 - 48                        # the last is whole
        assert min(areas) >= 0.25 * (0.4 * 48 - 1) ** 2


def test_a_scene_does_not_depend_on_how_many_there_are(config):
    few = scenes.load(config, "train")
    many = scenes.load(replace(config, limit=36), "train")
    assert len(few) == 20 and len(many) == 36 and few.array.shape[1:] == (4, 128, 128)
    assert np.array_equal(few.array, many.array[:20])
    val = scenes.load(config, "val")
    assert len(val) == 16 and not np.array_equal(val.array[:16], few.array[:16])
    assert len(few.label_names) == 17 and few.label_names[0] == "background"
    kept = sorted(path.name for path in Path(config.data_dir).glob(".cache/*.npy"))
    assert kept == ["scenes-train-128px-20.npy", "scenes-train-128px-36.npy",
                    "scenes-val-128px-16.npy"]
