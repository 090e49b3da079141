"""Mode `regions`: crops against torchvision, blocks in range, everything a function of the seed."""
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

import augmentations
from regions import Crops


@pytest.fixture
def views(make_config, make_split):
    def make(n=12, size=48, **changes):
        config = make_config("folder", "regions", image_size=size, patch_size=8, encoder="vit-nano", min_patches=2, **changes)
        return Crops(make_split(n, size), config, torch.device("cpu"))
    return make


def test_batch_is_one_normalised_crop_as_torchvision_makes_it(views, monkeypatch):
    sampler, drawn = views(), []
    original = augmentations.sample
    monkeypatch.setattr("regions.sample", lambda *args, **kwargs: drawn.append(original(*args, **kwargs)) or drawn[-1])
    batch = sampler(torch.tensor([3, 0, 7]))
    assert batch.views.shape == (3, 1, 3, 48, 48) and batch.labels.tolist() == [1, 0, 1]
    for view, i, crop in zip(batch.views[:, 0], [3, 0, 7], drawn[0].crop.long().tolist()):
        image = sampler.images[torch.tensor([i])][0].float() / 255
        expected = TF.resized_crop(image, *crop, size=[48, 48], interpolation=TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(view, TF.normalize(expected, sampler.mean, sampler.std), atol=1e-4, rtol=1e-4)


def test_crops_cover_at_least_the_share_asked_for(views):
    areas = []
    for scale in (0.3, 0.9):
        sampler = views(crop_scale=scale)
        drawn = augmentations.sample(4000, 48, sampler.recipe)
        areas.append(drawn.crop[:, 2] * drawn.crop[:, 3] / 48 ** 2)
        assert not drawn.flip.any()
    assert 0.27 < areas[0].min() < 0.33 and 0.84 < areas[1].min() < 0.92              # whole pixels


def test_blocks_of_each_method(views):
    ranks = views(method="dseq-jepa", region_count=4)(torch.arange(12)).actions
    assert ranks.shape == (12, 1, 36) and ranks.min() == 1 and ranks.max() == 4
    blocks = views(method="i-jepa")(torch.arange(12)).actions
    assert blocks.shape == (12, 5, 36) and set(blocks.unique().tolist()) == {0, 1}
    assert not (blocks[:, :1] & blocks[:, 1:]).any() and blocks.sum(2).min() > 0


def test_a_batch_is_a_function_of_the_seed(views):
    sampler = views()
    torch.manual_seed(5)
    one = sampler(torch.arange(6))
    torch.manual_seed(5)
    two = sampler(torch.arange(6))
    torch.manual_seed(6)
    other = sampler(torch.arange(6))
    for a, b, c in zip(one[:3], two[:3], other[:3]):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert one.params.shape == (6, 1) and 0 <= one.params.min() and one.params.max() < 1


def test_clean_is_the_image_itself(views):
    sampler = views()
    image = sampler.images[torch.tensor([4])].float() / 255
    torch.testing.assert_close(sampler.clean(torch.tensor([4])), TF.normalize(image, sampler.mean, sampler.std), atol=1e-5, rtol=1e-5)
