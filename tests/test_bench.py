"""bench.py: the command runs, and what flops.py counts is what one can count by hand."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from augmentations import resized_crop_flip
from benchmarks import bench, crops, flops
from build import build_model
from regions import Crops

CPU = torch.device("cpu")
TINY = dict(
    image_size=32,
    patch_size=4,
    encoder="vit-nano",
    min_patches=3,
    predictor_width=32,
    predictor_depth=1,
)


def test_views_and_regions_are_timed_both_ways(tmp_path, capsys):
    assert (
        bench.main(
            f"views regions --device cpu --repeats 1 "
            f"--batch-size 4 --json {tmp_path / 'b.json'}".split()
        )
        == 0
    )
    printed = capsys.readouterr().out
    kept = json.loads((tmp_path / "b.json").read_text())
    assert kept["tables"] == printed.splitlines()[1:] and {
        "command",
        "commit",
        "device",
        "seconds",
    } < set(kept)
    # both ways find the same regions
    assert all(name in printed for name in bench.VIEWS) and printed.count("100.0%") == 3


def test_both_ways_see_the_same_uneven_saliency(make_config):
    config = make_config(image_size=20, patch_size=8)
    views, split = bench.make_views(config, 3, CPU)
    slow = bench.per_image(views, split, config)
    assert slow.saliency.shape == (3, 20, 20) and slow.saliency.std() > 0.1
    assert torch.equal(slow.saliency, views.saliency[torch.arange(3)])


def test_crops_are_timed_from_files_and_from_what_is_kept(photos, capsys):
    arguments = f"crops --device cpu --repeats 1 --batch-size 4 --images 3 --data-dir {photos}"
    for line in (arguments, "crops --device cpu --repeats 1 --batch-size 4 --images 2"):
        assert bench.main(line.split()) == 0
        printed = capsys.readouterr().out
        assert "files of" in printed and "decode alone" in printed
        assert all(f"kept at {side}: cut, resize" in printed for side in crops.SIDES)


def test_both_ways_cut_the_same_crop(tmp_path):
    """From a file kept as it is, the usual way and ours see the same but for rounding."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((400, 300), Image.BICUBIC)
    smooth.save(tmp_path / "x.png")
    crop = [31, 57, 203, 251]
    theirs = crops.decode_crop((tmp_path / "x.png", crop), scaled=False)
    pictures = crops.kept([tmp_path / "x.png"], 384)
    canvas = pictures[torch.tensor([[0, *crop]])].float() / 255
    ours = resized_crop_flip(canvas, torch.tensor([[0, 0, *crop[2:]]]), torch.tensor([False]), 224)
    ours = 255 * ours[0].permute(1, 2, 0).numpy()
    assert abs(ours - theirs).max() < 1.5


@pytest.mark.parametrize("case", ["saccade", "i-jepa"])
def test_training_steps_are_timed_along_the_fast_path(case, capsys):
    arguments = (
        f"train --device cpu --only {case} --repeats 1 "
        "--batch-size 4 --compare torchvision --workers 0"
    )
    assert bench.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert (
        all(stage in printed for stage in ("float32", "+ channels_last", "torchvision"))
        and "bf16" not in printed
    )


@pytest.mark.parametrize(
    "arguments", ["everything", "--repeats 0", "--batch-size 1", "--device nonsense"]
)
def test_bad_input_gets_one_line(arguments, capsys):
    assert bench.main(arguments.split()) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "method, rule", [("i-jepa", "otsu"), ("dseq-jepa", "random"), ("dseq-jepa", "otsu-refill")]
)
def test_sizes_alone_give_the_count_of_a_real_step(method, rule, make_config):
    config = make_config("imagenet", "regions", **TINY, method=method, regions=rule)
    views, model = Crops(flops.noise_split(6, 32), config, CPU), build_model(config, {}).train()
    batch = views(torch.arange(6))._replace(progress=torch.ones(()))
    real = flops.count(model, batch)
    with torch.no_grad():
        plan = model.plan(batch, model.look(batch)[2], model.encoder.grid)
    cost = flops.plan_cost(flops.by_size(config, CPU), batch.views[:, 0], plan)
    assert cost.flops["total"] == pytest.approx(real, rel=1e-6)
    assert (
        cost.seen == (plan.context > 0).sum() / 6 and cost.predicted == (plan.target > 0).sum() / 6
    )


def test_a_linear_layer_costs_six_times_its_weights():
    """Two FLOPs a multiply-add, three products a layer: forward, gradient of the input, gradient of
    the weights."""
    layer = flops.BySize(torch.nn.Linear(8, 4, device="meta"), CPU)
    found = layer(torch.randn(5, 8, requires_grad=True))
    assert found.shape == (5, 4) and found.requires_grad and layer.log == [6 * 5 * 8 * 4]


def test_region_costs_of_every_way_and_of_whole_trainings():
    costs = flops.region_costs(flops.noise_split(4, 32), CPU, 2, **TINY)
    assert list(costs) == list(flops.WAYS)
    of_i_jepa, *of_others = [cost.flops["target_encoder"] for cost in costs.values()]
    assert len(set(of_others)) == 1 and of_i_jepa < of_others[0]            # it has no [CLS]
    whole = flops.curricula(costs)["dseq-jepa, otsu, all epochs"]
    assert 2 * whole.steps == pytest.approx(
        costs["dseq-jepa, random blocks"].steps + costs["dseq-jepa, otsu"].steps
    )
