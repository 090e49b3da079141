"""Segmentation: scores against scikit-learn, windows, crops, heads, a probe from end to end."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from same import same
from sklearn.metrics import confusion_matrix, jaccard_score
from test_distributed import spawn
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from build import build_model
from dense import segment
from dense.maps import FourMaps, four_blocks, last_map
from dense.segment import Crops, Preset, Segmenter
from dense.upernet import Linear, UPerNet, resize
from encoder import ViT
from plumbing import distributed
from probes import Setup


class Data:
    """Eight images whose left part is label 1 and dark, whose right part is label 0 and bright."""

    mean, std, in_memory = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), True
    label_names = ["background", "dark", "absent"]

    def __init__(self, size=32, n=8, height=None):
        self.shape = (height or size, size)
        self.n = n

    def __len__(self):
        return self.n

    def digest(self):
        return f"{self.n} of {self.shape}"

    def __getitem__(self, index):
        return self.labelled(index)

    def labelled(self, index):
        label = torch.zeros(self.shape, dtype=torch.uint8)
        label[:, :8 + 2 * index] = 1
        image = torch.where(label == 1, 30, 220).to(torch.uint8).expand(3, *self.shape)
        return image.contiguous(), label


def nano(size=32, patch=8, **how):
    torch.manual_seed(0)
    vit = ViT("vit-nano", image_size=size, patch_size=patch, **how)
    for p in vit.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    return vit.eval()


def setup(**how):
    return Setup(dict(train=Data(), val=Data()), torch.device("cpu"), 0, 1, quick=True, **how)


# ---------------------------------------------------------------- scores

def test_confusion_and_miou_agree_with_scikit_learn():
    true, predicted = torch.randint(0, 5, (2, 40, 30)).to(torch.uint8)
    true[3:7] = 255
    counted = true != 255
    matrix = segment.confusion(true, predicted, 7)
    expected = confusion_matrix(true[counted], predicted[counted], labels=range(7))
    assert np.array_equal(matrix.numpy(), expected)
    score = jaccard_score(true[counted], predicted[counted], average="macro")
    assert segment.mean_iou(matrix) == pytest.approx(100 * score)   # two labels do not occur


def test_perfect_commonest_and_against_background():
    true = torch.tensor([[0, 0, 0], [0, 1, 2]])
    matrix = segment.confusion(true, true, 3)
    assert segment.mean_iou(matrix) == 100
    assert segment.mean_iou(segment.commonest(matrix)) == pytest.approx(100 * (4 / 6) / 3)
    true, predicted = torch.randint(0, 4, (2, 20, 20))
    merged = segment.confusion(true.clamp(max=1), predicted.clamp(max=1), 2)
    assert torch.equal(segment.against_background(segment.confusion(true, predicted, 4)), merged)


# ---------------------------------------------------------------- windows

class Fixed(nn.Module):
    """Scores that depend on the absolute brightness of a pixel alone, whatever the window."""

    def scores(self, images):
        bright = images.mean(1)
        return torch.stack([bright, -bright, -5 + 0 * bright], 1)


@pytest.mark.parametrize("length, starts", [(10, [0]), (8, [0]), (25, [0, 7, 14, 15]),
                                            (24, [0, 7, 14])])
def test_windows_cover_the_side_and_stay_inside(length, starts):
    assert segment.window_starts(length, 10, 7) == starts


@pytest.mark.parametrize("height, width", [(32, 32), (32, 75), (51, 32), (20, 70)])
def test_windows_of_a_local_net_are_the_net_on_the_whole(height, width):
    data = Data(width, height=height)
    image, label = data.labelled(3)
    predicted = segment.predict(Fixed(), image, data, Preset(32, 21, 16, 8), setup())
    assert predicted.shape == (height, width) and predicted.dtype == torch.uint8
    edge = (predicted != label).float().mean()
    assert edge == 0 if height == 32 else edge < 0.05           # resized: a pixel at the border


def test_one_window_is_the_net_itself():
    net, data = Segmenter(FourMaps(nano()), UPerNet(128, 3, 16, 8)).eval(), Data()
    image, _ = data.labelled(2)
    expected = net.scores(segment.prepared(image, data)[None])[0].argmax(0)
    assert torch.equal(segment.predict(net, image, data, Preset(32, 21, 16, 8), setup()), expected)


def test_logits_are_averaged_where_windows_overlap():
    class Positioned(nn.Module):
        calls = 0

        def scores(self, images):
            self.calls += 1
            first = torch.full((1, 1, 8, 8), 3.0 if self.calls == 1 else -1.0)
            return torch.cat([first, torch.full((1, 1, 8, 8), 0.5)], 1)

    data = Data(12, height=8)                                   # windows at 0 and 4
    found = segment.predict(Positioned(), data.labelled(0)[0], data, Preset(8, 4, 16, 8), setup())
    assert found[0].tolist() == 8 * [0] + 4 * [1]               # (3 - 1) / 2 > 0.5 > -1


# ---------------------------------------------------------------- crops

def test_crops_keep_image_and_label_together():
    data = Data(40, height=30)
    crops = Crops(data, 32)
    crops.distort = nn.Identity()
    mirrored = []
    for i in range(30):
        image, label = crops[i % 8]
        assert image.shape == (3, 32, 32) and label.shape == (32, 32)
        assert image.dtype == torch.float32 and label.dtype == torch.int64
        padded = label == 255
        assert (image[:, padded].abs() < 0.02).all() and {0, 1} <= set(label.unique().tolist())
        agrees = (image[0] < 0) == (label == 1)
        assert agrees[~padded].float().mean() > 0.9             # but for blurred borders
        middle = label[16][label[16] != 255]
        mirrored.append(bool(middle[0] == 0))
    assert 5 < sum(mirrored) < 25


def test_labels_are_resized_as_their_images():
    """A border between two halves stays where it is, however large they become."""
    data = Data(40, n=1)
    image, label = data.labelled(0)
    for factor in (0.5, 1.7, 2.0, 3.3):
        bright = segment.scaled(image, factor)[0] > 125
        dark = segment.scaled(label[None], factor, v2.InterpolationMode.NEAREST_EXACT)[0] == 1
        assert torch.equal(bright, ~dark)


def test_crops_avoid_what_is_of_one_label_alone():
    data = Data(200, height=40)
    crops = Crops(data, 40)
    image, label = data.labelled(4)                             # dark on the left 16 of 200
    image, label = tv_tensors.Image(image), tv_tensors.Mask(label[None])
    shares = [crops.cropped(image, label)[1].float().mean() for _ in range(200)]
    # one window in 23 shows enough of both; ten tries find it with a chance of 0.36
    assert 45 < sum(0.25 <= share <= 0.75 for share in shares) < 100


def test_colours_are_changed_and_stay_colours():
    crops = Crops(Data(), 32)
    image, _ = Data().labelled(0)
    found = torch.stack([crops.distort(image) for _ in range(20)])
    assert found.dtype == torch.uint8 and len(found.flatten(1).unique(dim=0)) > 5


# ---------------------------------------------------------------- networks

def test_maps_lie_where_patches_do_at_any_size():
    vit = nano(cls=True)
    images = torch.randn(2, 3, 48, 32)
    found = last_map(vit, images)
    assert found.shape == (2, 128, 6, 4) and vit.grid == (6, 4)
    tokens, = vit(images)
    assert torch.equal(found[1, :, 2, 3], tokens[1, 1 + 2 * 4 + 3])
    assert torch.equal(last_map(vit, images[:, :, :32]), last_map(vit, images[:, :, :32]))


@pytest.mark.parametrize("patch, sides", [(4, (16, 8, 4, 2)), (8, (16, 8, 4, 2)),
                                          (16, (16, 8, 4, 2))])
def test_four_maps_have_four_strides(patch, sides):
    maps = FourMaps(nano(64, patch))(torch.randn(1, 3, 64, 64))
    assert [tuple(x.shape) for x in maps] == [(1, 128, side, side) for side in sides]
    assert four_blocks(12) == (4, 6, 8, 12) and four_blocks(6) == (2, 3, 4, 6)


def test_every_weight_of_both_networks_learns_and_a_step_lowers_the_loss():
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, 3, (4, 64, 64))
    vit = nano()
    frozen = Segmenter(segment.Frozen(copy.deepcopy(vit)), Linear(128, 3))
    for net, learn in ((Segmenter(FourMaps(vit), UPerNet(128, 3, 16, 8)), None),
                       (frozen, "head")):
        net.train()
        torch.manual_seed(1)
        before = net(images, labels)
        before.backward()
        for name, p in net.named_parameters():
            assert (p.grad is not None) == (learn is None or name.startswith(learn)), name
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.02 * p.grad
        torch.manual_seed(1)
        assert net(images, labels) < before


def test_upernet_has_as_many_weights_as_it_should():
    """768 wide, 150 labels, 512 channels: counted by hand, layer for layer."""
    with torch.device("meta"):
        head = UPerNet(768, 150, 512, 256)
    pools = 4 * (768 * 512 + 2 * 512)
    coarsest = 9 * (768 + 4 * 512) * 512 + 1024
    levels = 3 * (768 * 512 + 1024) + 3 * (9 * 512 * 512 + 1024)
    fuse = 9 * 4 * 512 * 512 + 1024 + 512 * 150 + 150
    auxiliary = 9 * 768 * 256 + 512 + 256 * 150 + 150
    found = sum(p.numel() for p in head.parameters())
    assert found == pools + coarsest + levels + fuse + auxiliary


def test_loss_ignores_255_and_weighs_the_auxiliary_head():
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 4, 4))
    plain = nn.functional.cross_entropy(logits, labels)
    assert segment.loss_of([logits, logits], labels) == pytest.approx(1.4 * plain.item(), rel=1e-5)
    labels[0] = 255
    half = nn.functional.cross_entropy(logits[1:], labels[1:])
    assert segment.loss_of([logits], labels) == pytest.approx(half.item() / 2, rel=1e-5)
    assert segment.loss_of([logits], labels.fill_(255)) == 0


def test_ranks_losses_average_to_that_of_the_batch_whatever_each_ignores():
    """As DDP averages gradients: no rank may divide by a number of its own."""
    logits = torch.randn(4, 3, 4, 4)
    labels = torch.randint(0, 3, (4, 4, 4))
    labels[0] = 255
    halves = [segment.loss_of([logits[half]], labels[half]) for half in ([0, 1], [2, 3])]
    torch.testing.assert_close(sum(halves) / 2, segment.loss_of([logits], labels))


@pytest.mark.parametrize("classes", [1, 2, 10, 11, 25])
def test_labels_in_parts_are_the_highest_of_all(classes):
    logits = torch.randn(1, classes, 7, 5).round(decimals=1)            # with ties
    logits[:, :, :2] = 5.0
    found = segment.labels_at(logits, (20, 13))
    assert found.dtype == torch.uint8 and (found[0] == 0).all()         # the first of equals
    whole = resize(logits, (20, 13))[0]
    chosen = whole.gather(0, found.long()[None])[0]
    torch.testing.assert_close(chosen, whole.amax(0), atol=1e-6, rtol=0)


# ---------------------------------------------------------------- the probes

def quickly(monkeypatch, steps=40):
    for name, recipe in segment.QUICK_RECIPES.items():
        recipe = recipe._replace(steps=steps, batch_size=8, warmup=0)
        monkeypatch.setitem(segment.QUICK_RECIPES, name, recipe)


@pytest.fixture
def model(make_config):
    config = make_config("solids", "regions", image_size=32, patch_size=8, encoder="vit-nano")
    return build_model(config, {})


def test_linear_probe_learns_dark_from_bright_and_leaves_the_model(model, monkeypatch, tmp_path):
    quickly(monkeypatch)
    before = copy.deepcopy(model.state_dict())
    rows = list(segment.probe_segment_linear(model, None, None, setup(folder=tmp_path, tag="d")))
    assert [row["predicts"] for row in rows] == 2 * ["3 classes"] + 2 * ["objects, background"]
    assert rows[0]["value"] > rows[1]["value"] + 10 and rows[2]["value"] > rows[3]["value"] + 10
    assert same(before, model.state_dict()) and model.representation.grid == (4, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["segment-linear-d.png"]
    assert (tmp_path / "segment-linear-d.png").read_bytes()[:4] == b"\x89PNG"


def test_sizes_are_whole_patches_and_scenes_are_seen_whole():
    data, vit = Data(64), nano(64)
    vit.patch_embed.proj.kernel_size = (14, 14)
    small = setup()
    sizes, recipe = segment.preset("segment", data, vit, small)
    assert (sizes.crop, sizes.stride) == (56, 64) and recipe.steps == 400
    data.in_memory = False
    sizes, recipe = segment.preset("segment", data, vit, replace(small, quick=False))
    assert (sizes.crop, sizes.stride) == (504, 341) and recipe.steps == 160_000
    _, recipe = segment.preset("segment", data, vit, replace(small, quick=False, probe_epochs=6))
    assert recipe.steps == 3 and recipe.warmup == 0


def test_upernet_probe(model, monkeypatch):
    quickly(monkeypatch, steps=30)
    best, constant, *_ = segment.probe_segment(model, None, None, setup())
    assert best["value"] > constant["value"] + 10 and best["unit"] == "mIoU"


def write_score(folder):
    distributed.start()
    matrix = segment.score(Fixed(), Data(n=5), Preset(32, 21, 16, 8), setup())
    torch.save(matrix, folder / f"{distributed.rank()}.pt")
    distributed.finish()


def test_two_processes_score_each_image_once(tmp_path):
    spawn(write_score, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(*ranks) and ranks[0].sum() == 5 * 32 * 32
    assert torch.equal(ranks[0], segment.score(Fixed(), Data(n=5), Preset(32, 21, 16, 8), setup()))
