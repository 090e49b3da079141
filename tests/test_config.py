"""Presets are the paper's, flags override them, impossible settings are refused in one line."""
import dataclasses

import pytest

import config as settings
from config import Config, from_command_line
from plumbing.errors import BadInput
from train import main


def parsed(line):
    return from_command_line(line.split())


def test_the_command_of_the_readme_is_the_paper_s_stl10_experiment():
    c = parsed("--dataset stl10 --mode saccade")
    assert (c.image_size, c.patch_size, c.views, c.condition) == (96, 32, 4, "position")
    assert (c.encoder, c.width, c.action_dim, c.epochs, c.batch_size) == (
        "resnet18",
        64,
        128,
        2000,
        512,
    )
    assert (c.lr, c.lr_end, c.warmup_epochs, c.weight_decay, c.ema) == (4e-4, 1e-5, 20, 1e-3, 0.996)
    assert c.ior and c.amp and not c.z_norm and c.saliency == "signature"


@pytest.mark.parametrize(
    "line, expected",
    [
        (
            "--dataset 3diebench --mode rotation",
            dict(image_size=128, views=3, epochs=1000, condition="rotation"),
        ),
        (
            "--dataset cifar100 --mode augment",
            dict(image_size=32, views=2, epochs=2000, condition="all"),
        ),
        ("--dataset tiny-imagenet --mode augment", dict(image_size=64, views=2, epochs=2000)),
        ("--dataset imagenet --mode saccade", dict(image_size=224, patch_size=84, views=4)),
        (
            "--dataset imagenet --mode regions",
            dict(
                method="dseq-jepa",
                image_size=224,
                patch_size=16,
                encoder="vit-base",
                regions="otsu-refill",
                region_count=5,
                min_patches=10,
                max_region=0.2,
                polarity="paper",
                cls=True,
                epochs=600,
                batch_size=2048,
                lr_start=2e-4,
                lr=1e-3,
                lr_end=1e-6,
                warmup_epochs=15,
                weight_decay=0.04,
                weight_decay_end=0.4,
                ema=0.996,
                predictor_width=384,
                predictor_depth=6,
                crop_scale=0.3,
            ),
        ),
        ("--dataset imagenet --mode regions --max-region 1", dict(max_region=1.0)),
        ("--dataset imagenet --mode regions --method i-jepa", dict(cls=False)),
        ("--dataset imagenet --mode regions --method c-jepa --cls", dict(cls=True)),
        (
            "--dataset imagenet --mode regions --encoder vit-large",
            dict(predictor_width=384, predictor_depth=12),
        ),
    ],
)
def test_presets(line, expected):
    c = dataclasses.asdict(parsed(line))
    assert {k: c[k] for k in expected} == expected


@pytest.mark.parametrize(
    "line, least",
    [
        ("imagenet", 10),
        ("imagenet --image-size 448", 10),
        ("tiny-imagenet", 3),
        ("stl10", 7),
        ("folder --image-size 64", 2),
    ],
)
def test_least_region_is_10_of_196_patches_in_proportion(line, least):
    assert parsed(f"--mode regions --dataset {line}").min_patches == least


@pytest.mark.parametrize("flags, noted", [("--regions otsu --order spatial", True),
                                          ("--regions otsu --region-count 3", True),
                                          ("--regions otsu", False), ("--order spatial", False)])
def test_one_line_says_that_one_threshold_leaves_little_to_order(flags, noted, capsys):
    parsed(f"--dataset imagenet --mode regions {flags}")
    printed = capsys.readouterr().out
    assert printed.count("\n") == printed.startswith("note: with --regions otsu") == noted


def test_random_blocks_take_the_orders_that_mean_something_to_them():
    for order in ("flat", "spatial", "truncated"):
        line = f"--dataset imagenet --mode regions --regions random --order {order}"
        assert parsed(line).order == order


def test_the_authors_recipe_differs_from_the_paper_s_in_four_numbers_and_its_name():
    paper = dataclasses.asdict(parsed("--dataset imagenet --mode regions"))
    authors = parsed("--dataset imagenet --mode regions --recipe authors")
    found = dataclasses.asdict(authors)
    changed = {name: found[name] for name in found if found[name] != paper[name]}
    assert changed == dict(recipe="authors", lr=8e-4, lr_end=1e-4, predictor_width=768,
                           saliency_block=11, name="imagenet-regions-authors")
    assert (authors.lr_start, authors.weight_decay, authors.weight_decay_end) == (2e-4, 0.04, 0.4)
    assert (authors.epochs, authors.batch_size, authors.warmup_epochs) == (600, 2048, 15)
    assert parsed("--dataset imagenet --mode regions --recipe authors --lr 1e-3").lr == 1e-3


def test_typed_flags_win_over_quick_and_quick_over_the_preset():
    c = parsed("--dataset stl10 --quick --epochs 3 --width 8")
    assert (
        c.quick and c.epochs == 3 and c.width == 8 and c.batch_size == settings.QUICK["batch_size"]
    )


def test_quick_combines_with_every_preset():
    for dataset, mode in settings.PRESETS:
        c = parsed(f"--dataset {dataset} --mode {mode} --quick")
        assert c.limit > 0 and c.width < 64 and c.encoder in ("resnet18", "vit-nano")


def test_every_preset_names_fields_of_config():
    fields = {f.name for f in dataclasses.fields(Config)}
    for values in (
        *settings.PRESETS.values(),
        settings.QUICK,
        *settings.QUICK_MODE.values(),
        *settings.QUICK_SOLIDS.values(),
    ):
        assert set(values) <= fields


def test_help_shows_the_values_of_the_chosen_preset(capsys):
    with pytest.raises(SystemExit) as leave:
        parsed("--dataset 3diebench --mode rotation --help")
    text = capsys.readouterr().out
    assert leave.value.code == 0 and "default: 1000" in text and "default: 128" in text


@pytest.mark.parametrize(
    "line, words",
    [
        ("--patch-size 97", "--patch-size 97 is larger than the image"),
        ("--views 0", "--views 0: must be at least 1"),
        ("--condition crop", "--condition crop: mode saccade offers position, none"),
        (
            "--dataset solids --mode rotation --condition crop",
            "--condition crop: mode rotation offers",
        ),
        ("--dataset solids --mode rotation --views 50", "an object has 50"),
        ("--dataset 3diebench --mode rotation --views 50", "at most 49 views"),
        ("--dataset stl10 --mode rotation", "--mode rotation does not apply to --dataset stl10"),
        ("--epochs 0", "--epochs 0"),
        ("--batch-size 1", "--batch-size 1"),
        ("--width 0", "--width 0"),
        ("--ema 1.5", "--ema 1.5"),
        ("--lr 0", "--lr 0.0: must be above 0"),
        ("--name a/b", "--name a/b: expected a plain folder name"),
        (
            "--dataset imagenet --mode regions --image-size 225",
            "--image-size 225: not a multiple of --patch-size 16",
        ),
        (
            "--dataset imagenet --mode regions --image-size 48",
            "--patch-size 16: gives 3 patches a side",
        ),
        (
            "--dataset imagenet --mode regions --image-size 8",
            "--image-size 8: not a multiple of --patch-size 16",
        ),
        ("--dataset imagenet --mode regions --region-count 1", "--region-count 1: expected 2"),
        (
            "--dataset imagenet --mode regions --saliency-block 13",
            "--saliency-block 13: vit-base has blocks 1 to 12",
        ),
        ("--dataset imagenet --mode regions --saliency-block -1", "--saliency-block -1"),
        (                                                       # nobody typed a block here
            "--dataset imagenet --mode regions --quick --recipe authors",
            "--recipe authors: is of vit-base, and the encoder is vit-nano; leave it out, or add "
            "--encoder vit-base",
        ),
        (
            "--dataset imagenet --mode regions --encoder resnet18",
            "--encoder resnet18: method dseq-jepa",
        ),
        ("--dataset imagenet --mode regions --no-cls", "--no-cls: regions come from [CLS]"),
        (
            "--dataset imagenet --mode regions --max-region 0.05",
            "--max-region 0.05: of 196 patches that is 9, and --min-patches is 10",
        ),
        ("--dataset imagenet --mode regions --max-region 0", "--max-region 0.0: must be above 0"),
        (
            "--dataset imagenet --mode regions --regions random --order inverse",
            "--order inverse: random blocks come in random order anyway",
        ),
        (
            "--dataset imagenet --mode regions --regions random --order random",
            "--order random: random blocks come in random order anyway",
        ),
        ("--encoder vit-base", "--encoder vit-base: method seq-jepa offers"),
        ("--method i-jepa", "--method i-jepa: mode saccade offers seq-jepa"),
        ("--dataset imagenet --mode regions --predictor-width 100", "--predictor-width 100"),
        (
            "--dataset imagenet --mode regions --patch-size 0",
            "--image-size 224: not a multiple of --patch-size 0",
        ),
        ("--dataset imagenet --mode regions --region-count 10", "--region-count 10"),
        ("--weight-decay-end nan", "--weight-decay-end"),
        (
            "--dataset folder --mode regions --image-size 96 --min-patches 10",
            "--min-patches 10: random blocks of 36 patches have as few as 5",
        ),
        ("--dataset imagenet --mode regions --crop-scale 0", "--crop-scale 0"),
        ("--dataset clevr-count", "does not apply to --dataset clevr-count; choose regions"),
        ("--limit -1", "--limit -1"),
        ("--seed -1", "--seed -1"),
        ("--lr nan", "--lr nan: must be above 0"),
        ("--dataset solids --hue-range 2", "--hue-range 2.0: must be at least 0 and at most 1"),
    ],
)
def test_impossible_settings_are_one_line_and_status_2(line, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line",
    [
        "--dataset mnist",
        "--mode blink",
        "--epochs many",
        "--colour red",
        "--encoder vgg",
        "--stem none",
    ],
)
def test_unknown_flags_and_values_are_refused(line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leave:
        main(line.split())
    assert leave.value.code == 2 and line.split()[0] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "line, words",
    [
        (
            "--dataset solids --mode rotation --patch-size 16",
            "--patch-size: mode rotation does not read it, only saccade, regions",
        ),
        ("--hue-range 0.5", "--hue-range: dataset stl10 does not read it, only solids"),
        (
            "--dataset imagenet --mode regions --width 16",
            "--width: method dseq-jepa does not read it, only seq-jepa",
        ),
        (
            "--dataset imagenet --mode regions --views 2",
            "--views: method dseq-jepa does not read it",
        ),
        (
            "--dataset imagenet --mode regions --method i-jepa --order flat",
            "--order: method i-jepa does not read it, only dseq-jepa",
        ),
        (
            "--dataset cifar100 --mode augment --no-ior",
            "--ior: mode augment does not read it, only saccade",
        ),
        ("--region-count 3", "--region-count: mode saccade does not read it, only regions"),
        *[
            (
                f"--dataset imagenet --mode regions --regions random {flag}",
                f"{flag.split()[0]}: regions random does not read it, only otsu, otsu-refill",
            )
            for flag in ("--max-region 0.3", "--polarity border", "--proxy grad-cam",
                         "--saliency-block 9")
        ],
        *[
            (
                f"--dataset imagenet --mode regions --proxy grad-cam {flag}",
                f"{flag.split()[0]}: proxy grad-cam does not read it, only cls",
            )
            for flag in ("--polarity border", "--saliency-block 9")
        ],
        (
            "--dataset imagenet --mode regions --method i-jepa --saliency-block 9",
            "--saliency-block: method i-jepa does not read it, only dseq-jepa, dseq-c-jepa",
        ),
        (
            "--dataset imagenet --mode regions --encoder vit-large --recipe authors",
            "--recipe: encoder vit-large does not read it, only vit-base",
        ),
        ("--recipe authors", "--recipe: method seq-jepa does not read it"),
        *[
            (
                f"--dataset imagenet --mode regions --method {method} --accumulate 2",
                f"--accumulate: method {method} does not read it, only dseq-jepa, i-jepa",
            )
            for method in ("c-jepa", "dseq-c-jepa")
        ],
        ("--accumulate 2", "--accumulate: method seq-jepa does not read it"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(line, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


class Watched:
    """A Config that remembers which of its fields were read."""

    def __init__(self, config):
        self.config, self.seen = config, set()

    def __getattr__(self, name):
        self.seen.add(name)
        return getattr(self.config, name)


@pytest.mark.parametrize("mode", settings.MODES)
def test_modes_say_which_settings_they_read(mode, make_config, make_split):
    """What a class lists in `reads`, and no other setting that belongs to some modes only, is read
    when it is built."""
    import numpy as np
    import torch
    latents = np.zeros((4, 3, 7), np.float32) if mode == "rotation" else None
    config = Watched(
        make_config(
            "solids" if mode == "rotation" else "folder",
            mode,
            image_size=32,
            patch_size=8,
            encoder="vit-nano" if mode == "regions" else "resnet18",
        )
    )
    settings.MODES[mode](
        make_split(4, 32, views=3 if mode == "rotation" else None, latents=latents),
        config,
        torch.device("cpu"),
    )
    special = {name for views in settings.MODES.values() for name in views.reads}
    assert config.seen & special == set(settings.MODES[mode].reads)


def test_methods_of_modes_are_known():
    """Every method has encoders and belongs to a mode; every condition is made of the mode's
    actions."""
    offered = {method for views in settings.MODES.values() for method in views.methods}
    assert offered == set(settings.ENCODERS) == {*settings.SEQ_METHODS, *settings.REGION_METHODS}
    for views in settings.MODES.values():
        words = {word for condition in views.conditions for word in condition.split("+")}
        assert words <= {*views.groups, "all", "none"}


def test_names_tell_runs_apart():
    assert parsed("--quick").name == "quick-stl10-saccade"
    assert parsed("--condition none").name == "stl10-saccade-none"
    with pytest.raises(BadInput):
        settings.preset("stl10", "rotation")


def test_an_object_needs_renders_for_the_probes_too():
    """Methods of two views train on two renders; the probes look at two views and the next."""
    with pytest.raises(BadInput, match="needs 3 distinct renders"):
        parsed("--dataset solids --mode rotation --method simclr --object-views 2")
    assert parsed("--dataset solids --mode rotation --method simclr --object-views 3").views == 1
