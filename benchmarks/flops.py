"""How much arithmetic a training step is: FLOPs of forward and backward pass, counted by torch.utils.flop_counter.

    count(model, batch)         FLOPs per sample of a real step
    region_costs(split, ...)    {way to choose regions: Cost}, ViT-B/16 at 224 px by default: DSeq-JEPA beside I-JEPA (Table 8)

One multiply-add is two FLOPs, as the counter has it; beware of papers that count it as one (Table 8 does, at inference).
Matrix products and convolutions are counted, nothing else. Attention counts as the two products it is, whatever kernel runs it: one
that computes its scores again in the backward pass does more arithmetic, but not more of the model.
Checked in tests/test_bench.py.
"""
import contextlib
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import config as settings
from build import build_model
from images import Part, Split
from regions import Crops

PARTS = ("target_encoder", "encoder", "predictor")
WAYS = {                    # name: method, rule, progress of the curriculum (0: random blocks always, 1: salient regions always)
    "i-jepa": ("i-jepa", "otsu-refill", 0.0),
    "dseq-jepa, random blocks": ("dseq-jepa", "otsu-refill", 0.0),
    "dseq-jepa, otsu": ("dseq-jepa", "otsu", 1.0),
    "dseq-jepa, otsu-refill": ("dseq-jepa", "otsu-refill", 1.0),
}


class Cost(NamedTuple):
    """Of one way to choose regions; means over images."""
    flops: dict             # {part: FLOPs per image}, PARTS and "total"
    steps: float            # regions predicted per image; I-JEPA: target blocks
    seen: float             # patches in the context encoder
    predicted: float        # mask tokens in the predictor


@contextlib.contextmanager
def counting():
    """A FlopCounterMode under the only backend of attention whose products it sees one by one."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count(model, batch):
    """FLOPs per sample of one forward and backward pass. Leaves gradients behind, and BatchNorms that have seen the batch."""
    with counting() as counter:
        model(batch).loss.backward()
    return counter.get_total_flops() / len(batch.views)


def count_by_size(part):
    """Let calls of a module compute nothing and return zeros; their FLOPs, from the sizes alone, go to the list that is returned."""
    device, twin, log = next(part.parameters()).device, copy.deepcopy(part).to("meta"), []

    def forward(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.detach().to("meta").requires_grad_(x.requires_grad), (args, kwargs))
        with counting() as counter:
            outputs = twin(*args, **kwargs)
            if torch.is_grad_enabled():
                sum(x.sum() for x in tree_leaves(outputs)).backward()
        log.append(counter.get_total_flops())
        return tree_map_only(torch.Tensor, lambda x: torch.zeros(x.shape, device=device, requires_grad=x.requires_grad), outputs)

    part.forward = forward
    return log


def blurred_noise(n, size, seed=0):
    """(n, 3, size, size) uint8: noise of five scales, the coarse ones strongest as in photographs; for when there are none."""
    generator = torch.Generator().manual_seed(seed)
    noise = {side: torch.randn(n, 3, side, side, generator=generator) for side in (4, 8, 16, 32, 64)}
    image = sum(F.interpolate(x, (size, size), mode="bicubic") / side for side, x in noise.items())
    return (128 + 60 * image / image.std()).clamp(0, 255).byte().numpy()


def noise_split(n, size):
    """A Split of blurred noise."""
    labels = torch.zeros(n, dtype=torch.int64).numpy()
    return Split([Part(blurred_noise(n, size), "train", None, n)], labels, ["?"], (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), dict(noise=size))


def region_costs(split, device, batch_size=64, **changes):
    """{way: Cost} for every entry of WAYS, averaged over the images of `split`. Weights are untrained.

    Only the target encoder computes, since regions come from what it sees; the rest is counted from its sizes, in no time.
    changes: fields of Config that differ from the preset of (imagenet, regions): ViT-B/16, 224 px, N = 5."""
    costs = {way: [] for way in WAYS}
    for method in ("i-jepa", "dseq-jepa"):
        config = settings.check(settings.Config(**settings.preset("imagenet", "regions") | dict(method=method) | changes))
        views, model = Crops(split, config, device), build_model(config, {}).to(device).train()
        target = copy.deepcopy(model.target_encoder)
        logs = dict(target_encoder=count_by_size(target), encoder=count_by_size(model.encoder), predictor=count_by_size(model.predictor))
        for index in torch.arange(len(views)).split(batch_size):
            batch = views(index)
            with torch.no_grad():
                saliency = model.look(batch)[2] if method == "dseq-jepa" else None
            for way in (way for way in WAYS if WAYS[way][0] == method):
                _, model.plan.source, progress = WAYS[way]
                plan = model.plan(batch._replace(progress=torch.tensor(progress, device=device)), saliency, model.encoder.grid)
                costs[way].append(plan_cost(model, target, batch.views[:, 0], plan, logs))
    return {way: average(found) for way, found in costs.items()}


def plan_cost(model, target, images, plan, logs):
    """Cost of a step with this plan; its parts have been through count_by_size."""
    with torch.no_grad():
        target(images)
    z_hat, index = model.predict(images, plan)
    _, predicted = model.step_losses(z_hat, index, plan, images.new_zeros(*plan.context.shape, model.encoder.dim))
    flops = {part: log.pop() / len(images) for part, log in logs.items()}
    means = [x.float().mean().item() for x in (predicted.sum(1), (plan.context > 0).sum(1), (plan.target > 0).sum((1, 2)))]
    return Cost(flops | dict(total=sum(flops.values())), *means)


def average(costs):
    """The mean of several Costs, of batches of one size."""
    flops = {part: sum(c.flops[part] for c in costs) / len(costs) for part in costs[0].flops}
    return Cost(flops, *(sum(c[i] for c in costs) / len(costs) for i in (1, 2, 3)))


def curricula(costs):
    """What whole trainings cost: the share of salient regions rises linearly from 0 to 1, so half of all images have random blocks."""
    return {f"{way}, all epochs": average([costs["dseq-jepa, random blocks"], costs[way]]) for way in WAYS if WAYS[way][2]}
