"""Full fine-tuning: MAE's table, by hand; mixed targets; the same steps whoever starts where; it
learns; sets that are small or of one class."""
import copy

import pytest
import torch
import torch.nn.functional as F
from same import same

from build import build_model, build_views
from dense import finetune, loop
from dense.finetune import TUNING, Classifier, augmented_batches, recipe_for
from encoder import VITS, ViT
from plumbing import distributed
from plumbing.errors import BadInput
from probes import Setup


@pytest.fixture
def setting(make_config, make_split, monkeypatch):
    """(model, {split: views}) of n random images of 32 px, which are memorised or not."""
    def make(n=20, classes=None, **changes):
        split = make_split(n, 32)
        if classes is not None:
            split = split._replace(labels=split.labels % len(classes), classes=classes)
        monkeypatch.setattr("build.load", lambda config, name: split)
        config = make_config("folder", "regions", image_size=32, patch_size=8, encoder="vit-nano",
                             min_patches=2, **changes)
        views = build_views(config, "train", torch.device("cpu"))
        return build_model(config, {}), {"train": views, "val": views}
    return make


def setup_of(views, **changes):
    return Setup(views, torch.device("cpu"), 0, 1, **changes)


# ---------------------------------------------------------------- the network and the recipe

@pytest.mark.parametrize("cls", (True, False))
def test_the_head_is_on_the_mean_patch_before_the_encoder_s_own_norm(cls):
    vit = ViT("vit-nano", image_size=16, patch_size=4, cls=cls)
    vit.norm.weight.data.fill_(5.0)
    net = Classifier(vit, 3).eval()
    assert net.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)
    net.head.weight.data.normal_()
    images = torch.randn(2, 3, 16, 16)
    last, _ = vit(images, keep=(vit.depth,))
    mean = last[:, int(cls):].mean(1)
    expected = F.linear(F.layer_norm(mean, (128,), eps=1e-6), net.head.weight, net.head.bias)
    torch.testing.assert_close(net(images), expected)
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    smooth = 0.9 * targets + 0.1 / 3                                        # as timm smooths
    loss = -(smooth * expected.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(net(images, targets), loss)
    loss = net(images, targets)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())                # DDP asks for that
    assert net.vit.blocks[0].mlp.fc1.weight is not vit.blocks[0].mlp.fc1.weight


def test_every_encoder_has_its_tuning_and_base_large_and_huge_are_mae_s():
    assert TUNING.keys() == {dim for dim, _, _ in VITS.values()}
    assert [TUNING[dim] for dim in (768, 1024, 1280)] == [
        (5e-4, 0.65, 0.1), (1e-3, 0.75, 0.2), (1e-3, 0.75, 0.3)]


def test_the_recipe_on_imagenet_by_hand():
    vit = ViT("vit-nano", image_size=16, patch_size=4)
    vit.dim = 768
    recipe = recipe_for(vit, 1_281_167, 50)
    assert recipe.batch_size == 512 and recipe.steps == 50 * 1_281_167 // 512 == 125_113
    assert recipe.warmup == 12_511 and recipe.save_every == 2502 and recipe.lr == 1e-3
    assert loop.rate(recipe, 0) < 1e-7 and loop.rate(recipe, 12_510) == 1e-3
    assert loop.rate(recipe, 125_112) == pytest.approx(1e-6, abs=1e-11)
    middle = (12_511 + 125_113) // 2
    assert loop.rate(recipe, middle) == pytest.approx((1e-3 + 1e-6) / 2, rel=1e-3)


def test_rates_and_decay_of_every_layer():
    vit = ViT("vit-nano", image_size=16, patch_size=4)
    net = Classifier(vit, 2)
    recipe = recipe_for(vit, 512, 10)._replace(layer_decay=0.65)
    found = {}
    for group in loop.parameter_groups(net, net.vit, recipe):
        for parameter in group["params"]:
            found[id(parameter)] = (pytest.approx(group["scale"]), group["weight_decay"])
    of = {name: found[id(parameter)] for name, parameter in net.named_parameters()}
    assert len(of) == len(found)
    assert of["head.weight"] == (1, 0.05) and of["head.bias"] == of["fc_norm.weight"] == (1, 0)
    assert of["vit.blocks.5.attn.qkv.weight"] == (0.65, 0.05)
    assert of["vit.blocks.0.mlp.fc1.bias"] == (0.65**6, 0)
    assert of["vit.patch_embed.proj.weight"] == (0.65**7, 0.05)
    assert of["vit.cls_token"] == (0.65**7, 0) and not hasattr(net.vit.norm, "weight")


@pytest.mark.parametrize("n, ranks, batch_size, steps", [
    (10_000, 1, 512, 97), (300, 1, 300, 5), (7, 2, 6, 5), (1, 1, 1, 5), (1, 2, 2, 2)])
def test_small_sets_have_small_batches(monkeypatch, n, ranks, batch_size, steps):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    recipe = recipe_for(ViT("vit-nano", image_size=16, patch_size=4), n, 5)
    assert (recipe.batch_size, recipe.steps) == (batch_size, steps)
    assert recipe.lr == pytest.approx(TUNING[128].lr * batch_size / 256)
    assert loop.rate(recipe, 0) > 0


# ---------------------------------------------------------------- what a step sees

def test_mixed_targets_by_hand(setting, monkeypatch):
    """Flat images of two colours: how much of which is in an image says what its target is."""
    monkeypatch.setattr(finetune, "augment", lambda images, mean, std, operation: images)
    _, views = setting(classes=["a", "b"])
    views = views["train"]
    labels = torch.arange(20) % 2
    views.augmented = lambda index: labels[index].float().view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    views.labels_of = lambda index: labels[index]
    recipe = recipe_for(ViT("vit-nano", image_size=16, patch_size=4), 20, 150)
    kept = []
    boxes = 0
    for images, targets in augmented_batches(views, recipe, 0)(0):
        torch.testing.assert_close(targets.sum(1), torch.ones(20))
        share = images.mean((1, 2, 3))                          # of class b, in pixels
        torch.testing.assert_close(targets[:, 1], share, atol=1e-5, rtol=0)
        boxes += int(((images == 0) | (images == 1)).all())
        mixed = targets[(targets > 0).all(1)]
        if len(mixed):
            kept.append(mixed.unique()[-1].item())
    assert 0.35 < boxes / 150 < 0.65                            # the others are mixup
    assert min(kept) >= 0.5 and max(kept) < 1 and len(set(kept)) > 30       # one lambda a batch


def test_steps_do_not_depend_on_where_one_starts_and_ranks_differ(setting, monkeypatch):
    _, views = setting()
    recipe = loop.Recipe(steps=6, batch_size=8, lr=1.0)
    whole = list(augmented_batches(views["train"], recipe, 0)(0))
    assert len(whole) == 6
    assert same(whole[4:], list(augmented_batches(views["train"], recipe, 0)(4)))
    assert not torch.equal(whole[0][0], next(augmented_batches(views["train"], recipe, 1)(0))[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        halves.append(next(augmented_batches(views["train"], recipe, 0)(0)))
        assert len(halves[-1][0]) == 4
    assert not torch.equal(halves[0][0], halves[1][0])


def test_a_quarter_is_erased_by_a_box_of_noise():
    erased = torch.stack([finetune.ERASE(image) for image in torch.full((800, 3, 20, 20), 9.0)])
    changed = erased != 9
    some = changed.flatten(1).any(1)
    assert some.float().mean().item() == pytest.approx(0.25, abs=0.05)
    shares = changed[some].float().mean((1, 2, 3))
    assert 0.005 <= shares.min() and shares.max() <= 0.38                   # sides are rounded
    noise = erased[changed]
    assert noise.mean().abs() < 0.03 and noise.std().item() == pytest.approx(1, abs=0.03)


def test_augmented_pixels_stay_near_the_range_of_pixels(setting):
    """A twice clamped image: what leaves [0, 1] is the noise of erasing alone."""
    _, views = setting(n=64)
    views = views["train"]
    torch.manual_seed(0)
    images = views.augmented(torch.arange(64))
    before = images.clone()
    out = finetune.augment(images, views.mean, views.std, finetune.rand_augment(views.mean))
    assert torch.equal(images, before) and out.shape == images.shape
    pixels = out * views.std.view(3, 1, 1) + views.mean.view(3, 1, 1)
    inside = ((pixels > -1e-4) & (pixels < 1 + 1e-4)).flatten(1).all(1)
    assert 0.6 < inside.float().mean() < 0.95
    assert (out != before).flatten(1).any(1).float().mean() > 0.6


def test_each_image_has_its_own_operations_at_nine_of_ten():
    """A grey image knows brightness alone, by 0.9 x 0.9 at level 9 (timm: 1 + 0.9 x 9 / 10), and is
    posterised to a neighbour; what a warp uncovers is as grey."""
    grey = torch.full((800, 3, 16, 16), 0.5)
    operation = finetune.rand_augment(torch.full((3,), 0.5))
    found = torch.stack([operation(image) for image in grey])
    levels = found[:, 0, 8, 8]              # in the middle: at a border torchvision blends twice
    near = (levels - 0.5).abs() < 0.05
    dark = (levels - 0.5 * 0.19).abs() < 0.01
    bright = (levels - 0.5 * 1.81).abs() < 0.01
    for some in (dark, bright):             # in one of two rounds, one of 14 operations, one way
        assert some.float().mean().item() == pytest.approx(2 * 0.5 / 14 / 2, abs=0.02)
    twice = ~near & ~dark & ~bright
    assert twice.float().mean() < 0.02
    ramp = torch.linspace(0, 1, 16).expand(800, 3, 16, 16)
    changed = [not torch.equal(operation(image), image) for image in ramp]
    # A plain ramp is as it was after Identity, Equalize and the like.
    assert 0.5 < sum(changed) / 800 < 1 - (1 - 0.5 * 13 / 14) ** 2 + 0.05


# ---------------------------------------------------------------- the probe

def test_top1_is_counted_by_hand_and_by_two_ranks(setting, monkeypatch):
    _, views = setting(n=31)
    net = Classifier(ViT("vit-nano", image_size=32, patch_size=8), 2).eval()
    net.head.weight.data.normal_()
    index = torch.arange(31)
    guessed = net(views["val"].clean(index)).argmax(1)
    expected = 100 * (guessed == index % 2).float().mean().item()
    assert 0 < expected < 100
    assert finetune.top1(net, views["val"]) == pytest.approx(expected)
    means = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "average", lambda values: values)
        means.append(finetune.top1(net, views["val"]))
    assert sum(means) / 2 == pytest.approx(expected)


def test_it_learns_and_leaves_the_model_alone(setting, monkeypatch):
    """Two classes of flat images, told apart by their brightness alone."""
    monkeypatch.setattr(finetune, "augment", lambda images, mean, std, operation: images)
    monkeypatch.setattr(finetune, "BATCH_SIZE", 16)
    model, views = setting(n=32)
    views["train"].images.parts[0][0::2] //= 2
    before = copy.deepcopy(model.state_dict())
    found, = finetune.probe_finetune(model, None, None, setup_of(views, probe_epochs=10))
    assert found["value"] == 100 and found["epochs"] == 10
    assert same(before, model.state_dict())


@pytest.mark.parametrize("n, classes", [(1, ["one"]), (3, ["one"]), (3, ["a", "b", "c"])])
def test_one_class_and_fewer_images_than_a_batch(setting, n, classes):
    model, views = setting(n=n, classes=classes)
    found, = finetune.probe_finetune(model, None, None, setup_of(views, probe_epochs=1))
    assert 0 <= found["value"] <= 100
    if len(classes) == 1:
        assert found["value"] == 100


def test_how_long(setting, monkeypatch):
    model, views = setting(n=4)
    seen = []
    monkeypatch.setattr(loop, "train", lambda net, vit, recipe, *args, **how: seen.append(recipe))
    for changes, epochs in ((dict(), 50), (dict(quick=True), 10), (dict(probe_epochs=3), 3)):
        found, = finetune.probe_finetune(model, None, None, setup_of(views, **changes))
        assert found["epochs"] == epochs and seen[-1].steps == epochs
        assert seen[-1].warmup == epochs // 10


def test_stopped_and_started_again_it_ends_where_it_would_have(setting, tmp_path):
    """The checkpoint is of the second epoch of three; other images are refused."""
    model, views = setting(n=8)
    setup = setup_of(views, probe_epochs=3, folder=tmp_path, tag="folder")
    with_file = setup.file("finetune", ".pt")
    whole, = finetune.probe_finetune(model, None, None, setup)
    expected = torch.load(with_file, weights_only=True)
    with_file.unlink()
    train = loop.train

    def stopping(net, vit, recipe, batches, *rest):
        def some(first):
            for step, batch in enumerate(batches(first), first):
                if step == 2:
                    raise KeyboardInterrupt
                yield batch

        train(net, vit, recipe, some, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train", stopping)
        list(finetune.probe_finetune(model, None, None, setup))
    assert torch.load(with_file, weights_only=True)["step"] == 2
    again, = finetune.probe_finetune(model, None, None, setup)
    assert again == whole and same(torch.load(with_file, weights_only=True), expected)
    views["train"].images.parts[0].zero_()
    with pytest.raises(BadInput, match="other images"):
        list(finetune.probe_finetune(model, None, None, setup))
