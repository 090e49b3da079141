"""Mask R-CNN on a ViT: maps, samples, gradients, and what is found comes back where it was."""
import json

import numpy as np
import pytest
import torch
from same import same
from test_coco import annotate, write
from test_distributed import spawn
from test_train import command
from torch import nn

import evaluate
import train
from dense import detect, loop
from dense.detect import LIGHT, Detector, Training, collate, measure, predict
from dense.maps import FourMaps, four_blocks
from encoder import ViT
from plumbing import distributed
from probes import Setup
from sources import coco, masks
from sources.masks import Objects
from sources.scenes import BLOCK, Scenes

SETUP = Setup({}, torch.device("cpu"), 0, M_train=1)
GREY = (0.5, 0.5, 0.5)
S = 64
COLOURS = torch.tensor([[230, 30, 30], [30, 200, 60], [40, 60, 220]], dtype=torch.uint8)


def picture(seed, height=S, width=S, classes=(0, 1, 1), crowd=0):
    """An image of rectangles, each of its class' colour, one over the other, and its Objects.

    crowd: how many of the first are crowds."""
    rng = np.random.default_rng(seed)
    image = torch.full((3, height, width), 128, dtype=torch.uint8)
    masks = np.zeros((len(classes), height, width), dtype=bool)
    for i, k in enumerate(classes):
        sides = rng.integers(min(height, width) // 4, min(height, width) // 2, 2)
        top, left = rng.integers(0, (height, width) - sides)
        masks[:, top:top + sides[0], left:left + sides[1]] = False
        masks[i, top:top + sides[0], left:left + sides[1]] = True
        image[:, torch.as_tensor(masks[i])] = COLOURS[k][:, None]
    boxes = [box_of(mask) for mask in masks]
    return image, Objects(masks, np.array(classes, dtype=np.int64),
                          np.arange(len(classes)) < crowd,
                          np.array(boxes, dtype=np.float64).reshape(-1, 4),
                          masks.sum((1, 2)).astype(np.float64))


def box_of(mask):
    """x1 y1 x2 y2 around the pixels of a mask, by hand."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return [0, 0, 0, 0]
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


class Data:
    """A list of (image, Objects) as a split."""
    classes = ["red", "green", "blue"]
    mean = std = GREY
    in_memory = True

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def objects(self, i):
        return self.pairs[i]


def training_on(pairs, size, scales, mean=GREY):
    data = Data(pairs)
    data.mean = mean
    return Training(data, size, scales)


def detector(classes=2, size=S, patch_size=8):
    torch.manual_seed(0)
    vit = ViT("vit-nano", image_size=64, patch_size=patch_size)
    return Detector(vit, classes, GREY, GREY, LIGHT._replace(size=size))


# ---------------------------------------------------------------- the network

def test_maps_come_from_the_blocks_of_the_paper_or_in_proportion():
    assert [four_blocks(depth) for depth in (12, 6, 24, 32)] == [
        (4, 6, 8, 12), (2, 3, 4, 6), (8, 12, 16, 24), (11, 16, 21, 32)]


@pytest.mark.parametrize("patch_size, size, strides", [
    (4, 64, (4, 8, 16, 32)), (8, 64, (4, 8, 16, 32)), (16, 64, (4, 8, 16, 32)),
    (14, 56, (3.5, 7, 14, 28))])
def test_maps_keep_their_strides_in_pixels(patch_size, size, strides):
    vit = ViT("vit-nano", image_size=size, patch_size=patch_size)
    maps = FourMaps(vit)(torch.rand(2, 3, size, size))
    assert [tuple(each.shape) for each in maps] == [
        (2, 128, int(size / s), int(size / s)) for s in strides]


def test_maps_show_patches_where_they_are():
    """A bright patch changes a map of untouched stride there most; and [CLS] is no patch."""
    vit = ViT("vit-nano", image_size=64, patch_size=16)
    tokens, = vit(torch.zeros(1, 3, 64, 64))
    maps = FourMaps(vit)
    maps.rescale[3] = nn.Identity()
    assert torch.equal(maps(torch.zeros(1, 3, 64, 64))[3][0, :, 2, 3], tokens[0, 1 + 2 * 4 + 3])


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("objects", ["all", "some", "none"])
def test_every_parameter_gets_a_gradient(objects, amp):
    """So DDP waits for none; not even where a batch, or an image of it, shows no object."""
    net = detector().train()
    data = [picture(0), picture(1, classes=())] if objects == "some" else [picture(0), picture(1)]
    if objects == "none":
        data = [picture(0, classes=()), picture(1, classes=())]
    training = training_on(data, S, (1.0, 1.0))
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = net(*collate([training[0], training[1]]))
    assert loss.dtype == torch.float32
    loss.backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None]
    assert not missing
    assert all(p.grad.isfinite().all() for p in net.parameters())
    if objects == "all":
        assert (net.vit.patch_embed.proj.weight.grad != 0).any()
        assert (net.vit.cls_token.grad != 0).any()


def test_learning_lowers_the_loss_and_leaves_the_given_vit_alone():
    vit = ViT("vit-nano", image_size=64, patch_size=8).requires_grad_(False)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    net = Detector(vit, 2, GREY, GREY, LIGHT._replace(size=S)).train()
    training = training_on([picture(0), picture(1)], S, (1.0, 1.0))
    batch = collate([training[0], training[1]])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        torch.manual_seed(0)                # of the proposals that are looked at
        loss = net(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert vit.grid == (8, 8)
    for name, value in vit.state_dict().items():
        assert torch.equal(value, before[name])


def test_full_heads_are_torchvisions_defaults():
    """Preset "coco" on a small ViT: 256 wide, anchors of 32 to 512 pixels at 1024."""
    from torchvision.models.detection import MaskRCNN
    vit = ViT("vit-nano", image_size=64, patch_size=16)
    net = Detector(vit, 80, GREY, GREY, detect.FULL)
    assert net.size == 1024
    assert net.rcnn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    plain = MaskRCNN(net.rcnn.backbone, 81)
    assert plain.rpn.anchor_generator.sizes == net.rcnn.rpn.anchor_generator.sizes
    ours = {name: value.shape for name, value in net.rcnn.state_dict().items()}
    assert ours == {name: value.shape for name, value in plain.state_dict().items()}


def test_presets():
    """The authors' numbers for COCO's 117,266 training images with objects; --quick and scenes."""
    data = Data([])
    data.pairs = range(117_266)
    data.in_memory = False
    sizes, recipe = detect.preset(data, quick=False)
    assert sizes == detect.FULL and not sizes.light and not sizes.merge
    assert recipe.batch_size == 16 and recipe.epochs(len(data)) == 25
    assert recipe.warmup == recipe.save_every == 117_266 // 16
    assert (recipe.lr, recipe.lr_end, recipe.shape) == (1e-4, 0, "cosine")
    assert (recipe.weight_decay, recipe.drop_path, recipe.layer_decay) == (0.1, 0.1, 1.0)
    for in_memory, quick, merge in ((False, True, False), (True, True, True), (True, False, False)):
        data.in_memory = in_memory
        sizes, recipe = detect.preset(data, quick)
        assert sizes.light and sizes.merge == merge and recipe.steps == (300 if quick else 4000)
        assert sizes.size == (96 if in_memory else 256)


# ---------------------------------------------------------------- samples

def test_scenes_as_objects():
    """Two objects, of classes 11 and 4, the second over the first; as scenes are stored."""
    array = np.zeros((1, 4, 20, 20), dtype=np.uint8)
    array[0, 3, 2:12, 3:9] = 11 + 1
    array[0, 3, 8:15, 5:18] = BLOCK + 4 + 1
    scenes = Scenes(array)
    image, objects = scenes.objects(0)
    assert image.shape == (3, 20, 20) and objects.classes.tolist() == [11, 4]
    assert objects.boxes.tolist() == [[3, 2, 9, 12], [5, 8, 18, 15]]
    assert objects.areas.tolist() == [60 - 16, 7 * 13] and not objects.crowd.any()
    assert np.array_equal(objects.masks[1], array[0, 3] == BLOCK + 5)
    assert not (objects.masks[0] & objects.masks[1]).any()
    merged = scenes.merged()
    assert len(merged) == 1 and merged.classes == ["object"] and merged.mean == scenes.mean
    assert merged.objects(0)[1].classes.tolist() == [0, 0]
    assert scenes.objects(0)[1].classes.tolist() == [11, 4]


@pytest.mark.parametrize("seed", range(12))
def test_objects_move_with_the_image(seed):
    """Whatever is scaled, cut, padded or mirrored: under a mask lies its class' colour, boxes
    enclose masks, and crowds are gone."""
    source = [picture(seed, 50, 90, classes=(2, 0, 1, 1), crowd=1)]
    training = training_on(source, S, (0.3, 2.0))
    torch.manual_seed(seed)
    image, target = training[0]
    assert image.shape == (3, S, S) and image.dtype == torch.uint8
    assert len(target["masks"]) == len(target["labels"]) == len(target["boxes"]) <= 3
    for mask, label, box in zip(target["masks"].bool(), target["labels"], target["boxes"]):
        assert mask.any() and label in (1, 2) and box.tolist() == box_of(mask.numpy())
        right = (image[:, mask] == COLOURS[label - 1][:, None]).all(0)
        edge = 2 * (mask.any(0).sum() + mask.any(1).sum()) / mask.sum()     # resized, so mixed
        assert right.float().mean() > 1 - 1.5 * edge


def test_views_differ_and_padding_is_the_mean():
    training = training_on([picture(0)], S, (0.3, 0.3), (0.2, 0.4, 0.6))
    images = torch.stack([training[0][0] for _ in range(8)])
    assert len(images.unique(dim=0)) > 4
    padded = (images == torch.tensor([51, 102, 153])[:, None, None]).all(1)
    assert (padded.float().mean((1, 2)) > 0.8).all()            # 0.3 of the side is left


def test_an_image_without_objects_or_with_none_in_view():
    _, target = training_on([picture(0, classes=())], S, (1.0, 1.0))[0]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, S, S)
    image, objects = picture(0, classes=(1,))
    corner = objects._replace(masks=np.zeros_like(objects.masks))
    corner.masks[0, 0, 0] = True
    training = training_on([(image, corner)], S, (2.0, 2.0))
    counts = [len(training[0][1]["labels"]) for _ in range(30)]
    assert 0 in counts


# ---------------------------------------------------------------- what is found

class Stub:
    """In place of the heads: finds one thing in what the network sees, (32, 64) of 64 x 64."""

    def __call__(self, features, proposals, sizes):
        assert sizes == [(32, 64)]
        masks = torch.zeros(1, 1, 28, 28)
        masks[:, :, :, :14] = 1                                 # its left half
        return [dict(boxes=torch.tensor([[16.0, 8.0, 48.0, 24.0]]), labels=torch.tensor([2]),
                     scores=torch.tensor([0.75]), masks=masks)], {}


def test_what_is_found_comes_back_in_the_pixels_of_the_image(monkeypatch):
    net = detector().eval()
    seen = []
    forward = net.rcnn.backbone.forward
    monkeypatch.setattr(net.rcnn.backbone, "forward", lambda x: seen.append(x) or forward(x))
    net.rcnn.__dict__["roi_heads"] = Stub()
    del net.rcnn._modules["roi_heads"]
    boxes, labels, scores, masks = predict(net, torch.full((3, 50, 100), 255, dtype=torch.uint8))
    assert boxes == pytest.approx(np.array([[25, 12.5, 75, 37.5]]), abs=1e-4)
    assert labels.tolist() == [1] and scores.tolist() == [0.75]
    assert masks.shape == (1, 50, 100)
    x1, y1, x2, y2 = box_of(masks[0])
    assert abs(x1 - 25) <= 1 and abs(x2 - 50) <= 2 and abs(y1 - 12.5) <= 1 and abs(y2 - 37.5) <= 1
    image, = seen
    assert image.shape == (1, 3, 64, 64)
    assert (image[:, :, :32] == 1).all()                        # (1 - mean) / std
    assert (image[:, :, 32:] == 0).all()                        # the mean


def test_predictions_fit_together():
    net = detector(classes=3).eval()
    net.rcnn.roi_heads.score_thresh = 0.0
    boxes, labels, scores, masks = predict(net, picture(0, 40, 70)[0])
    assert len(boxes) == len(labels) == len(scores) == len(masks) == 20
    assert masks.shape[1:] == (40, 70) and masks.dtype == bool
    assert (np.diff(scores) <= 0).all() and set(labels.tolist()) <= {0, 1, 2}
    assert (boxes[:, [0, 2]] <= 70 + 1e-4).all() and (boxes[:, [1, 3]] <= 40 + 1e-4).all()


DATA = [picture(0), picture(1, 40, 80, classes=(1,)), picture(2, classes=()),
        picture(3, classes=(2, 0, 1), crowd=1)]


def perfect(net, image):
    """Exactly what there is."""
    objects = next(o for pixels, o in DATA if torch.equal(pixels, image))
    n = len(objects.classes)
    return objects.boxes, objects.classes, np.ones(n), objects.masks


def test_a_perfect_detector_has_ap_100(monkeypatch):
    monkeypatch.setattr(detect, "predict", perfect)
    found = measure(None, Data(DATA), SETUP)
    assert found["boxes"]["AP"] == found["masks"]["AP"] == 1
    assert np.isnan(found["boxes"]["APL"])

    def other_classes(net, image):
        boxes, labels, scores, masks = perfect(net, image)
        return boxes, (labels + 1) % 3, scores, masks

    monkeypatch.setattr(detect, "predict", other_classes)
    assert measure(None, Data(DATA), SETUP)["boxes"]["AP"] < 0.6


def test_ranks_find_together_what_one_finds(monkeypatch):
    """Images are dealt out and put together in their order, which settles ties."""
    def blurred(net, image):
        boxes, labels, scores, masks = perfect(net, image)
        shift = int(image.sum()) % 5
        return boxes + shift, labels, scores, np.roll(masks, shift, (1, 2))

    monkeypatch.setattr(detect, "predict", blurred)
    alone = measure(None, Data(DATA), SETUP)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "world_size", lambda: 3)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "everyone", lambda mine: parts.append(mine) or parts[::-1])
        together = measure(None, Data(DATA), SETUP)
    assert [sorted(part) for part in parts] == [[0, 3], [1], [2]]
    for shape in ("boxes", "masks"):
        assert alone[shape] == pytest.approx(together[shape], abs=0, nan_ok=True)


# ---------------------------------------------------------------- the probe

@pytest.fixture(scope="module")
def run_dir(photos, tmp_path_factory):
    """A ViT-nano after one epoch."""
    out = tmp_path_factory.mktemp("run")
    assert train.main(command("regions", photos, out, "--name", "r", "--epochs", "1")) == 0
    return out / "runs" / "r"


@pytest.fixture
def detect_in(run_dir, monkeypatch):
    """detect_in(folder, *more): exit status of the probe, at 64 pixels."""
    sizes, recipe = detect.PRESETS[False, True]
    monkeypatch.setitem(detect.PRESETS, (False, True), (sizes._replace(size=64), recipe))

    def detect_in(data_dir, *more):
        return evaluate.main([str(run_dir / "last.pt"), "--probe", "detect", "--dataset", "coco",
                              "--data-dir", str(data_dir), "--quick", "--probe-epochs", "1", *more])
    return detect_in


def test_the_probe_on_a_folder_of_ones_own(run_dir, detect_in, tmp_path):
    write(tmp_path)
    assert detect_in(tmp_path, "--no-untrained", "--json", str(tmp_path / "d.json")) == 0
    result = json.loads((tmp_path / "d.json").read_text())
    assert [row["predicts"] for row in result["rows"]] == [
        "boxes, 3 classes", "boxes at IoU 0.5, 3 classes",
        "masks, 3 classes", "masks at IoU 0.5, 3 classes"]
    assert {row["unit"] for row in result["rows"]} == {"AP"}
    assert {row["from"] for row in result["rows"]} == {"four blocks, all weights"}
    assert {row["head"] for row in result["rows"]} == {"Mask R-CNN, light"}
    assert result["classes"] == 3 and result["n_train"] == 2 and result["n_val"] == 3
    assert (run_dir / "detect-coco-epochs1-quick.png").exists()
    assert not (run_dir / "detect-coco-epochs1-quick.pt").exists()     # of minutes nothing is kept


def test_polygons_without_pycocotools_are_said_in_the_table(detect_in, tmp_path, monkeypatch):
    """Also if only validation has some."""
    write(tmp_path)
    only_runs = annotate()
    del only_runs["annotations"][0]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(only_runs))
    monkeypatch.setattr(masks, "official", None)
    assert not coco.Coco(tmp_path, "train").nearly
    assert detect_in(tmp_path, "--no-untrained", "--json", str(tmp_path / "d.json")) == 0
    rows = json.loads((tmp_path / "d.json").read_text())["rows"]
    assert {row["head"] for row in rows} == {"Mask R-CNN, light; polygons nearly"}


def test_what_is_broken_is_one_line_also_from_a_reading_process(run_dir, detect_in, tmp_path,
                                                                capsys):
    write(tmp_path)
    (tmp_path / "train2017" / "c.png").write_bytes(b"no image")
    assert detect_in(tmp_path) == 2
    said = capsys.readouterr().err
    assert "c.png: not a readable image" in said
    assert said.count("\n") == 1 and "Traceback" not in said
    val = tmp_path / "annotations" / "instances_val2017.json"
    names = [dict(id=k, name=str(k)) for k in (2, 5, 9)]
    val.write_text(json.dumps(annotate(categories=names)))
    assert detect_in(tmp_path) == 2
    assert "other categories" in capsys.readouterr().err
    assert not (run_dir / "detect-coco.pt").exists()


# ---------------------------------------------------------------- two processes

def two_samples():
    """Two images that differ in all but the places of their boxes. So nothing differs in number,
    and losses, means over what is in a rank's images, have the mean of both."""
    torch.manual_seed(1)
    boxes = torch.tensor([[4.0, 8, 30, 40], [30, 20, 60, 60]])
    samples = []
    for labels in ([1, 2], [2, 2]):
        masks = torch.zeros(2, S, S, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int()):
            mask[y1:y2, x1:x2] = torch.randint(2, mask[y1:y2, x1:x2].shape)
        target = dict(boxes=boxes, labels=torch.tensor(labels), masks=masks)
        samples.append((torch.randint(256, (3, S, S), dtype=torch.uint8), target))
    return samples


def gradients():
    """Of both images; of several ranks each has its share."""
    net = detector().train()
    net.rcnn.rpn.fg_bg_sampler.batch_size_per_image = 10 ** 6           # all of them, none by lot
    net.rcnn.roi_heads.fg_bg_sampler.batch_size_per_image = 10 ** 6
    net.rcnn.rpn._post_nms_top_n["training"] = 20                       # as many in each image
    matcher = net.rcnn.roi_heads.proposal_matcher
    matcher.high_threshold = matcher.low_threshold = 0.999              # only the objects
    samples = two_samples()
    parallel = distributed.data_parallel(net)
    parallel(*collate([samples[i] for i in loop.shared(2)])).backward()
    return [parameter.grad for parameter in net.parameters()]


def write_gradients(folder):
    distributed.start()
    torch.save(gradients(), folder / f"{distributed.rank()}.pt")
    distributed.finish()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    spawn(write_gradients, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(*ranks)
    for found, expected in zip(ranks[0], gradients(), strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
