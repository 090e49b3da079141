"""The loop of dense tasks: rates, layers, exact resume, the same samples whoever draws them, two
processes as one."""
import itertools
import math

import pytest
import torch
from same import same
from test_distributed import spawn
from torch import nn
from torch.utils.data import default_collate

from dense import loop
from dense.loop import Recipe
from encoder import ViT
from plumbing import distributed
from plumbing.errors import BadInput
from probes import Setup


class Data:
    """What the probes' Setup holds: whose images these are, and where."""

    def __init__(self, name="data", in_memory=True):
        self.name = name
        self.in_memory = in_memory

    def digest(self):
        return self.name


def setup_of(folder=None, quick=False, **data):
    return Setup({"train": Data(**data)}, torch.device("cpu"), 3, 1, tag="data", folder=folder,
                 quick=quick)


SETUP = setup_of()
RECIPE = Recipe(steps=6, batch_size=4, lr=1e-2, warmup=2, layer_decay=0.5, drop_path=0.3,
                save_every=2)


class Net(nn.Module):
    """A ViT, a BatchNorm, dropout and a linear head: learns the mean of an image's first
    channel."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.vit = ViT("vit-nano", image_size=16, patch_size=4)
        self.vit.blocks = self.vit.blocks[:2]
        self.vit.depth = 2
        # So that images differ by more than rounding, which BatchNorm would blow up.
        nn.init.normal_(self.vit.patch_embed.proj.weight, std=0.3)
        self.norm = nn.BatchNorm1d(128)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(128, 1)

    def forward(self, images, targets):
        tokens, = self.vit(images)
        features = self.norm(tokens[:, 1:].mean(1).relu())
        return (self.head(self.drop(features))[:, 0] - targets).square().mean()


class Pictures:
    """Ten fixed images; each look adds noise of the moment."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = torch.full((3, 16, 16), index / 10)
        return image + torch.randn(3, 16, 16), index / 10


def build(seed=0, **how):
    torch.manual_seed(seed)
    return Net(**how)


def batches_of(recipe, setup=SETUP):
    return loop.from_files(Pictures(), recipe, setup, default_collate)


def train(net, recipe, batches, setup=SETUP):
    loop.train(net, net.vit, recipe, batches, setup, "net")


# ---------------------------------------------------------------- rates and groups

def test_rate_warms_up_and_falls():
    recipe = Recipe(steps=12, batch_size=1, lr=8.0, lr_end=2.0, warmup=4)
    cosine = [loop.rate(recipe, step) for step in range(12)]
    assert cosine[:4] == [2, 4, 6, 8] and cosine[4] == 8
    assert cosine[8] == pytest.approx(5) and cosine[11] == pytest.approx(
        2 + 6 * (1 + math.cos(math.pi * 7 / 8)) / 2)
    linear = recipe._replace(shape="linear")
    assert [loop.rate(linear, step) for step in (4, 6, 8)] == [8, 6.5, 5]


def test_recipe_of_other_length():
    recipe = Recipe(steps=100, batch_size=8, lr=1.0, warmup=10)
    assert recipe.epochs(40) == 20
    assert recipe.lasting(5, 80)[:2] == (50, 8) and recipe.lasting(5, 80).warmup == 5


def test_every_parameter_has_its_layer_once():
    net = build()
    net.vit.cls_token.requires_grad_(False)
    groups = loop.parameter_groups(net, net.vit, RECIPE)
    found = {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["scale"], group["weight_decay"]
    names = {name: found.get(id(p)) for name, p in net.named_parameters()}
    assert names.pop("vit.cls_token") is None
    assert names["vit.patch_embed.proj.weight"] == (0.125, 0.05)
    assert names["vit.blocks.0.mlp.fc1.weight"] == (0.25, 0.05)
    assert names["vit.blocks.1.mlp.fc1.bias"] == (0.5, 0)
    assert names["vit.norm.weight"] == names["norm.weight"] == (1, 0)
    assert names["head.weight"] == (1, 0.05) and None not in names.values()


# ---------------------------------------------------------------- samples

def test_samples_do_not_depend_on_where_one_starts_nor_on_workers(monkeypatch):
    before = torch.get_rng_state()
    whole = list(batches_of(RECIPE)(0))
    assert torch.equal(before, torch.get_rng_state()) and len(whole) == 6
    assert same(whole[3:], list(batches_of(RECIPE)(3)))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert same(whole, list(batches_of(RECIPE, setup_of(in_memory=False))(0)))
    labels = torch.cat([targets for _, targets in whole])
    assert sorted(labels[:10].tolist()) == pytest.approx([i / 10 for i in range(10)])
    assert not torch.equal(labels[:10], labels[10:20])


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_bad_file_stays_one_line(in_memory):
    class Bad(Pictures):
        def __getitem__(self, index):
            raise BadInput(f"{index}.png: not readable")

    batches = loop.from_files(Bad(), RECIPE, setup_of(in_memory=in_memory), default_collate)
    with pytest.raises(BadInput, match=r"^\d.png: not readable$"):
        next(batches(0))


def test_ranks_share_a_batch(monkeypatch):
    alone = loop.chosen(10, 4, 3, step=2)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = []
    predicted = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        found += loop.chosen(10, 4, 3, step=2)
        predicted += loop.shared(7)
    assert found == alone and [epoch for epoch, _ in alone] == [0, 0, 1, 1]
    assert sorted(predicted) == list(range(7))


# ---------------------------------------------------------------- training

def test_it_learns():
    net = build(dropout=0)
    batch = next(batches_of(RECIPE)(0))
    before = net.eval()(*batch)
    recipe = RECIPE._replace(steps=1, warmup=0, lr=1e-3, drop_path=0.0)
    train(net, recipe, lambda first: iter([batch]))
    assert net(*batch) < before and not net.training


def stopping(batches, at):
    return lambda first: itertools.islice(batches(first), at - first)


def test_resumes_exactly(tmp_path):
    setup = setup_of(tmp_path)
    whole = build()
    train(whole, RECIPE, batches_of(RECIPE))
    cut = build()
    train(cut, RECIPE, stopping(batches_of(RECIPE), 5), setup)
    assert not same(whole.state_dict(), cut.state_dict())
    again = build()
    torch.manual_seed(99)
    train(again, RECIPE, batches_of(RECIPE), setup)
    assert same(whole.state_dict(), again.state_dict())
    done = build()                          # nothing is left to do
    train(done, RECIPE, lambda first: iter([]), setup)
    assert same(whole.state_dict(), done.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["net-data.pt"]


def test_a_quick_one_keeps_nothing(tmp_path):
    net = build()
    train(net, RECIPE, batches_of(RECIPE), setup_of(tmp_path, quick=True))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("change", [dict(lr=0.5), dict(steps=7), None])
def test_refuses_what_another_training_kept(tmp_path, change):
    setup = setup_of(tmp_path)
    net = build()
    train(net, RECIPE, batches_of(RECIPE), setup)
    other = build(seed=0 if change else 1)
    with pytest.raises(BadInput, match="other weights or by another recipe"):
        train(other, RECIPE._replace(**change or {}), batches_of(RECIPE), setup)


def test_refuses_what_was_kept_of_other_images(tmp_path):
    train(build(), RECIPE, batches_of(RECIPE), setup_of(tmp_path))
    with pytest.raises(BadInput, match="on other images"):
        train(build(), RECIPE, batches_of(RECIPE), setup_of(tmp_path, name="others"))


def test_refuses_a_damaged_checkpoint(tmp_path):
    setup = setup_of(tmp_path)
    (tmp_path / "net-data.pt").write_bytes(b"PK of no use")
    net = build()
    with pytest.raises(BadInput, match="damaged"):
        train(net, RECIPE, batches_of(RECIPE), setup)


def test_a_loss_gone_bad_is_said_and_the_checkpoint_before_kept(tmp_path):
    setup = setup_of(tmp_path)

    def spoilt(first):
        for step, (images, targets) in enumerate(batches_of(RECIPE)(first)):
            yield images, targets * (math.nan if step == 2 else 1)

    net = build()
    with pytest.raises(BadInput, match="not finite at step 3"):
        train(net, RECIPE, spoilt, setup)
    assert torch.load(tmp_path / "net-data.pt")["step"] == 2


# ---------------------------------------------------------------- two processes

def first_step(folder):
    """What one step without chance leaves: tenths of the gradients, and BatchNorm's buffers."""
    setup = setup_of(folder / str(distributed.world_size()))
    setup.folder.mkdir(exist_ok=True)
    recipe = RECIPE._replace(steps=1, drop_path=0.0)
    net = build(dropout=0)
    train(net, recipe, batches_of(recipe), setup)
    moments = torch.load(setup.file("net", ".pt"))["optimizer"]["state"].values()
    buffers = [net.norm.running_mean, net.norm.running_var]
    return [moment["exp_avg"] for moment in moments] + buffers, net.state_dict()


def write_first_step(folder):
    distributed.start()
    torch.save(first_step(folder), folder / f"{distributed.rank()}.pt")
    with pytest.raises(BadInput, match="cannot be split"):
        loop.train(None, None, RECIPE._replace(batch_size=3), None, SETUP, "net")
    distributed.finish()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    alone, _ = first_step(tmp_path)
    spawn(write_first_step, tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert same(*ranks)
    for found, expected in zip(ranks[0][0], alone, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-8
