"""How much arithmetic a training step is: FLOPs of forward and backward pass.

    count(model, batch)         FLOPs per sample of a real step
    region_costs(split, ...)    {way to choose regions: Cost}, ViT-B/16 at 224 px by default:
                                DSeq-JEPA beside I-JEPA (Table 8)

Counted by torch.utils.flop_counter. One multiply-add is two FLOPs, as it has it; beware of papers
that count it as one (Table 8 does, at inference).
Matrix products and convolutions are counted, nothing else. Attention counts as the two products it
is, whatever kernel runs it: one that computes its scores again in the backward pass does more
arithmetic, but not more of the model.
Checked in tests/test_bench.py.
"""
import contextlib
import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import config as settings
from build import build_model, views_of
from dseq_jepa import RegionJEPA
from images import Part, Split

PARTS = ("target_encoder", "encoder", "predictor")
ENCODER_ATTRIBUTES = ("dim", "grid", "positions", "cls_token")      # those that RegionJEPA reads


class Way(NamedTuple):
    """One way to choose regions."""
    method: str             # --method
    regions: str            # --regions
    progress: float         # of the curriculum; 0: always random blocks, 1: always salient regions
    max_region: float = 1.0     # --max-region


WAYS = {
    "i-jepa": Way("i-jepa", "otsu", 0.0),
    "dseq-jepa, random blocks": Way("dseq-jepa", "otsu", 0.0),
    "dseq-jepa, otsu": Way("dseq-jepa", "otsu", 1.0),
    "dseq-jepa, otsu, cut": Way("dseq-jepa", "otsu", 1.0, 0.2),
    "dseq-jepa, otsu-refill": Way("dseq-jepa", "otsu-refill", 1.0),
    "dseq-jepa, otsu-refill, cut": Way("dseq-jepa", "otsu-refill", 1.0, 0.2),       # the default
}


class Cost(NamedTuple):
    """Of one way to choose regions; means over images."""
    flops: dict             # {part: FLOPs per image}, PARTS and "total"
    steps: float            # regions predicted per image; I-JEPA: target blocks
    seen: float             # patches in the context encoder
    predicted: float        # mask tokens in the predictor


@contextlib.contextmanager
def counting():
    """A FlopCounterMode under the only attention backend whose products it sees one by one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count(model, batch):
    """FLOPs per sample of one forward and backward pass.

    Leaves gradients behind, and BatchNorms that have seen the batch."""
    with counting() as counter:
        model(batch).loss.backward()
    return counter.get_total_flops() / len(batch.views)


class BySize(nn.Module):
    """Stands for a part of a model: computes nothing and returns zeros of the part's sizes.

    `log` gets the FLOPs of every call: forward, and with gradients enabled also backward.
    part: a module on the meta device, where tensors have sizes and no content.
    device: where the zeros are.  attributes: names of those of the part that others read."""

    def __init__(self, part, device, attributes=()):
        super().__init__()
        self.part = part
        self.device = device
        self.log = []
        for name in attributes:
            setattr(self, name, getattr(part, name))

    def forward(self, *args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, self._sizes_of, (args, kwargs))
        with counting() as counter:
            outputs = self.part(*args, **kwargs)
            if torch.is_grad_enabled():
                total = sum(x.sum() for x in tree_leaves(outputs))
                total.backward()
        self.log.append(counter.get_total_flops())
        return tree_map_only(torch.Tensor, self._zeros_like, outputs)

    def _sizes_of(self, x):
        return x.detach().to("meta").requires_grad_(x.requires_grad)

    def _zeros_like(self, x):
        return torch.zeros(x.shape, device=self.device, requires_grad=x.requires_grad)


def by_size(config, device):
    """The RegionJEPA of this Config with parts that count instead of computing; see `plan_cost`."""
    with torch.device("meta"):
        model = build_model(config, {})
    encoder = BySize(model.encoder, device, ENCODER_ATTRIBUTES)
    predictor = BySize(model.predictor, device)
    return RegionJEPA(encoder, predictor, model.plan, model.block)


def blurred_noise(n, size, seed=0):
    """(n, 3, size, size) uint8: noise of five scales, the coarse ones strongest as in photographs.

    For when there are none."""
    generator = torch.Generator().manual_seed(seed)
    image = 0
    for side in (4, 8, 16, 32, 64):
        noise = torch.randn(n, 3, side, side, generator=generator)
        image = image + F.interpolate(noise, (size, size), mode="bicubic") / side
    return (128 + 60 * image / image.std()).clamp(0, 255).byte().numpy()


def noise_split(n, size):
    """A Split of blurred noise."""
    part = Part(blurred_noise(n, size), "train", rows=None, total=n)
    return Split([part], labels=np.zeros(n, dtype=np.int64), classes=["?"],
                 mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), source=dict(noise=size))


def region_costs(split, device, batch_size=64, **changes):
    """{way: Cost} for every entry of WAYS, averaged over the images of `split`.

    Weights are untrained. Only the target encoder computes, since regions come from what it sees;
    the rest is counted from its sizes, in no time.
    changes: fields of Config that differ from the preset of (imagenet, regions): ViT-B/16, 224 px,
    N = 5."""
    values = settings.preset("imagenet", "regions") | changes
    costs = {name: [] for name in WAYS}
    for method in ("i-jepa", "dseq-jepa"):
        config = settings.check(settings.Config(**values | dict(method=method)))
        ways = {name: way for name, way in WAYS.items() if way.method == method}
        counted = {}
        for name, way in ways.items():
            changed = dict(regions=way.regions, max_region=way.max_region)
            counted[name] = by_size(dataclasses.replace(config, **changed), device)
        views = views_of(split, config, device)
        model = build_model(config, {}).to(device).train()
        for index in torch.arange(len(views)).split(batch_size):
            batch = views(index)
            saliency = None                             # I-JEPA asks for none
            if method == "dseq-jepa":
                with torch.no_grad():
                    _, _, saliency = model.look(batch)
            for name, way in ways.items():
                batch = batch._replace(progress=torch.tensor(way.progress, device=device))
                plan = counted[name].plan(batch, saliency, model.encoder.grid)
                costs[name].append(plan_cost(counted[name], batch.views[:, 0], plan))
    return {name: average(found) for name, found in costs.items()}


def plan_cost(model, images, plan):
    """Cost of a step on images (B, 3, S, S) with this plan.  model: from `by_size`."""
    with torch.no_grad():
        model.target_encoder(images)
    z_hat, index = model.predict(images, plan)
    h = images.new_zeros(*plan.context.shape, model.encoder.dim)
    _, predicted = model.step_losses(z_hat, index, plan, h)
    flops = {part: getattr(model, part).log.pop() / len(images) for part in PARTS}
    flops["total"] = sum(flops.values())
    return Cost(flops,
                steps=mean_count(predicted),
                seen=mean_count(plan.context > 0),
                predicted=mean_count(plan.target.flatten(1) > 0))


def mean_count(chosen):
    """(B, n) bool -> how many are True in a row, on average."""
    return chosen.sum(1).float().mean().item()


def average(costs):
    """The mean of several Costs, of batches of one size."""
    def mean(field):
        return sum(field(cost) for cost in costs) / len(costs)
    flops = {}
    for part in costs[0].flops:
        flops[part] = mean(lambda cost: cost.flops[part])
    return Cost(flops,
                steps=mean(lambda cost: cost.steps),
                seen=mean(lambda cost: cost.seen),
                predicted=mean(lambda cost: cost.predicted))


def curricula(costs):
    """What whole trainings cost.

    The share of salient regions rises linearly from 0 to 1, so half of all images have random
    blocks."""
    blocks = costs["dseq-jepa, random blocks"]
    return {f"{name}, all epochs": average([blocks, costs[name]])
            for name, way in WAYS.items() if way.progress}
