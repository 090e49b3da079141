"""The fast path computes what the plain one does: bf16 autocast and torch.compile follow float32
for 50 steps of every mode.

On CUDA where there is one, else on the CPU; tiny models. The tolerances are a few times what was
measured (on a CPU)."""
import os

import numpy as np
import pytest
import torch

import attention
from build import build_model
from config import MODES
from dseq_jepa import vicreg_terms
from jepa import prediction_loss
from plumbing.device import compile_all, place, seed_all, under_autocast
from regions import cls_similarity, discriminative_regions, min_max
from train import Rates, build_optimizer, training_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS, BATCH, SAMPLES = 50, 8, 64
RESNET = dict(width=4, stem="strided", action_dim=16, agg_hidden=32, batch_size=BATCH, views=2)
VIT = dict(
    image_size=32,
    patch_size=8,
    encoder="vit-nano",
    min_patches=1,
    predictor_width=32,
    predictor_depth=1,
    batch_size=BATCH,
    lr=3e-4,
)
CASES = {                   # name: mode, changed settings
    "saccade": ("saccade", dict(RESNET, image_size=24, patch_size=12, saliency="uniform")),
    "rotation": ("rotation", dict(RESNET, image_size=16)),
    "augment": ("augment", dict(RESNET, image_size=16)),
    "dseq-jepa": ("regions", dict(VIT, method="dseq-jepa")),
    "i-jepa": ("regions", dict(VIT, method="i-jepa")),
}
# of the loss of any step; measured: 0.0014 for ResNets, 0.0007 for ViTs, of losses from 1 down to
# 0.2
TOLERANCE = 0.01


@pytest.fixture
def build(make_config, make_split):
    """name -> config, views, untrained model of a case, on DEVICE."""
    def build(name, **changes):
        mode, values = CASES[name]
        config = make_config("solids" if mode == "rotation" else "folder", mode, **values | changes)
        latents = (
            np.random.default_rng(0).uniform(-1, 1, (SAMPLES, 6, 7)).astype(np.float32)
            if mode == "rotation"
            else None
        )
        split = make_split(
            SAMPLES, config.image_size, views=None if latents is None else 6, latents=latents
        )
        views = MODES[mode](split, config, DEVICE)
        model = place(build_model(config, views.groups), DEVICE).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                # kernels draw different masks under one seed, which says nothing of precision
                module.p = 0.0
            if isinstance(module, torch.nn.MultiheadAttention):
                module.dropout = 0.0
        return config, views, model
    return build


def draw(views, config, step):
    """The batch of a step, a function of the step alone."""
    seed_all(0, step)
    index = torch.arange(BATCH * step, BATCH * (step + 1)) % len(views)
    return views(index, config.views)._replace(progress=torch.tensor(step / STEPS, device=DEVICE))


def curve(config, views, model, bf16=False, steps=STEPS):
    """Losses of the first steps: (steps,)."""
    optimizer = build_optimizer(model, config, DEVICE)
    rates = Rates(lr=config.lr, weight_decay=config.weight_decay, tau=0.996)
    forward = under_autocast(model, DEVICE, bf16)
    losses = []
    for step in range(steps):
        out = training_step(model, draw(views, config, step), optimizer, rates, forward)
        losses.append(out.loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("name", CASES)
def test_bf16_follows_float32(name, build):
    plain, bf16 = curve(*build(name)), curve(*build(name), bf16=True)
    # something was learned: agreement at the start would be easy
    assert plain[-5:].mean() < 0.8 * plain[0]
    torch.testing.assert_close(bf16, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", ["saccade", "augment", "dseq-jepa"])
def test_compiled_follows_eager(name, build):
    """One case of each kind of model, and of each kind of work on pixels.

    On a CPU all but code generation, which takes minutes there: COMPILE=1 includes it."""
    generate = DEVICE.type == "cuda" or os.environ.get("COMPILE")
    steps = STEPS if generate else 3
    plain, (config, views, model) = curve(*build(name), steps=steps), build(name)
    torch._dynamo.reset()
    compile_all(model, views, backend="inductor" if generate else "aot_eager", fullgraph=True)
    torch.testing.assert_close(curve(config, views, model, steps=steps), plain, atol=1e-3, rtol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("name", CASES)
def test_losses_norms_and_weights_stay_float32_under_bf16(name, build):
    config, views, model = build(name)
    inputs = {}
    for part, module in model.named_modules():
        # z_norm and the action embedding
        if isinstance(module, torch.nn.BatchNorm1d) and not module.affine:
            module.register_forward_hook(
                lambda m, args, out, part=part: inputs.update({part: (args[0].dtype, out.dtype)})
            )
    batch = draw(views, config, 0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = model(batch)
    assert batch.views.dtype == out.loss.dtype == out.z.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in out.logs.values())
    assert set(inputs.values()) == (
        set() if config.mode == "regions" else {(torch.float32, torch.float32)}
    )
    out.loss.backward()
    optimizer = build_optimizer(model, config, DEVICE)
    optimizer.step()
    kept = [
        *model.parameters(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        *model.buffers(),
    ]
    kept += [value for state in optimizer.state.values() for value in state.values()]
    assert {x.dtype for x in kept if x.is_floating_point()} == {torch.float32}


# ---------------------------------------------------------------- inputs that divide by zero if one
# lets them

def finite(model, batch):
    """Whether loss and all gradients are."""
    out = model(batch)
    out.loss.backward()
    return out.loss.isfinite() and all(
        p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_constant_images_give_no_nan(name, bf16, build):
    config, views, model = build(name)
    batch = draw(views, config, STEPS)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        assert finite(
            model,
            batch._replace(
                views=torch.full_like(batch.views, 0.3), actions=torch.zeros_like(batch.actions)
            ),
        )


@pytest.mark.parametrize("name", ["dseq-jepa", "i-jepa"])
@pytest.mark.parametrize("absent", ["context", "target", "both"])
def test_images_without_context_or_target_give_no_nan(name, absent, build):
    config, views, model = build(name)
    plan = model.plan

    def cut(*args):
        made = plan(*args)
        made.context[:BATCH // 2] *= absent == "target"
        made.target[:BATCH // 2] *= absent == "context"
        return made

    cut.__dict__.update(
        vars(plan), region_causal=plan.region_causal, steps=plan.steps, proxy=plan.proxy
    )
    model.plan = cut
    assert finite(model, draw(views, config, STEPS))


def test_rows_that_see_nothing_give_no_nan():
    rank = torch.zeros(2, 6, dtype=torch.int64, device=DEVICE)
    rank[1, 2:4] = 1
    block = attention.TransformerBlock(16, 2).to(DEVICE)
    for rank in (rank, rank * 0):
        layout = attention.arrange(rank, torch.zeros_like(rank), attention.sizes(rank > 0)[0])
        x = torch.randn(len(layout.order), 16, device=DEVICE, requires_grad=True)
        block(x, layout).sum().backward()
        assert x.grad.isfinite().all()


def test_zero_vectors_give_no_nan():
    zero = torch.zeros(4, 8, device=DEVICE, requires_grad=True)
    for loss in (
        prediction_loss(zero, zero.detach()),
        prediction_loss(zero, torch.randn(4, 8, device=DEVICE)),
        vicreg_terms(zero, torch.zeros(4, 8, device=DEVICE), torch.ones(4, device=DEVICE)),
    ):
        gradient, = torch.autograd.grad(loss, zero)
        assert loss.isfinite() and gradient.isfinite().all()
    saliency = min_max(
        cls_similarity(torch.zeros(2, 8, device=DEVICE), torch.zeros(2, 16, 8, device=DEVICE))
    )
    assert (saliency == 0).all()
    assert (discriminative_regions(saliency.view(2, 4, 4), 5, "otsu-refill") == 5).all()
