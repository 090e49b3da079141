"""Every baseline's loss by hand, what its terms may and may not depend on, its size at the paper's
width; and that it trains, resumes and is probed as far as it has what a probe reads."""
import dataclasses
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from same import same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import baselines
import config as settings
import dseq_jepa
import evaluate
import train
from aggregator import Aggregator
from build import METHODS, build_model, build_views
from evaluate import paper_numbers
from images import INVARIANT_METHODS, PAIR_METHODS, Batch
from jepa import ActionEmbedding
from plumbing.health import collapsed, health
from plumbing.runs import load_checkpoint
from train import Rates, build_optimizer, training_step

CPU = torch.device("cpu")
TOLD = ("sen", "equimod", "sie", "cond-byol")       # pairs, and the action between them
ROTATION = dict(dataset="solids", mode="rotation", image_size=16, limit=16, object_views=4)
SACCADE = dict(dataset="folder", mode="saccade", image_size=20, patch_size=8, views=3)
SMALL = dict(width=4, action_dim=8, agg_hidden=32, batch_size=8)


def make(method, projector="mlp", folder=".", **changes):
    """A tiny Config of a method."""
    values = dict(SACCADE if method == "conv-jepa" else ROTATION)
    preset = settings.preset(values["dataset"], values["mode"], method=method, projector=projector)
    values = preset | values | SMALL | dict(data_dir=str(folder)) | changes
    return settings.check(settings.Config(**values))


@pytest.fixture(scope="module")
def batches(tmp_path_factory, photos):
    """mode -> a Batch of 8 samples and the groups of its actions."""
    made = {}
    for method in ("sen", "conv-jepa"):
        folder = photos if method == "conv-jepa" else tmp_path_factory.mktemp("solids")
        config = make(method, folder=folder)
        views = build_views(config, "pretrain", CPU)
        made[config.mode] = views(torch.arange(8), config.views), views.groups
    return made


@pytest.fixture
def built(batches):
    """method -> its model, moved away from the zeros that residual branches begin with; a Batch."""
    def build(method, projector="mlp", **changes):
        config = make(method, projector, **changes)
        batch, groups = batches[config.mode]
        model = build_model(config, groups).train()
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        model.update_target(0.0)
        return model, batch
    return build


class Plain(nn.Identity):
    """In place of an encoder or a projector: gives back its input, (B, dim)."""

    def __init__(self, dim, *sizes, **options):
        super().__init__()
        self.dim = dim


def bare(kind, dim, columns=()):
    """A method whose "views" are z itself, (B, 2, dim), and whose projectors do nothing."""
    return kind(Plain(dim), ActionEmbedding(list(columns), 4, kind.embedding), Plain)


def pairs(x, y, actions=None):
    """A Batch of these "views" (B, dim)."""
    x = torch.as_tensor(x, dtype=torch.float32)
    y = torch.as_tensor(y, dtype=torch.float32)
    actions = torch.zeros(len(x), 1, 4) if actions is None else actions[:, None]
    return Batch(torch.stack([x, y], dim=1), actions, None, None)


# ---------------------------------------------------------------- SimCLR

@pytest.mark.parametrize("B, tau, expected", [
    (2, 0.5, 0.239545), (4, 0.5, 0.594438), (2, 0.1, 9.0796e-5), (1, 0.5, 0.0)])
def test_contrastive_loss_of_orthogonal_pairs(B, tau, expected):
    """log(1 + (2B - 2) exp(-1 / tau))"""
    u = torch.eye(B, 5)
    assert baselines.nt_xent(u, u, tau).item() == pytest.approx(expected, abs=5e-7)
    assert math.log(1 + (2 * B - 2) * math.exp(-1 / tau)) == pytest.approx(expected, abs=5e-7)


def test_contrastive_loss_of_equal_rows_and_of_wrong_partners():
    equal = torch.ones(3, 4)
    assert baselines.nt_xent(equal, 2 * equal, 0.5).item() == pytest.approx(math.log(5))
    u = torch.eye(2)
    assert baselines.nt_xent(u, u.flip(0), 0.5).item() == pytest.approx(2.239545, abs=1e-6)


def test_contrastive_loss_is_a_slow_loop_s():
    a, b = torch.randn(2, 6, 5).double()
    u = F.normalize(torch.cat([a, b]), dim=1)
    total = 0.0
    for i in range(12):
        others = [math.exp(u[i] @ u[k] / 0.3) for k in range(12) if k != i]
        total -= math.log(math.exp(u[i] @ u[(i + 6) % 12] / 0.3) / sum(others))
    assert baselines.nt_xent(a, b, 0.3).item() == pytest.approx(total / 12, rel=1e-5)


def test_contrastive_loss_ignores_scale_order_of_views_and_order_of_samples():
    a, b = torch.randn(2, 6, 5)
    loss = baselines.nt_xent(a, b, 0.5)
    order = torch.randperm(6)
    for other in ((a * torch.rand(6, 1), 3 * b), (b, a), (a[order], b[order])):
        torch.testing.assert_close(baselines.nt_xent(*other, 0.5), loss)
    assert not torch.isclose(baselines.nt_xent(a, b[order], 0.5), loss)


def test_contrastive_gradient_is_orthogonal_to_each_row():
    a, b = torch.randn(2, 6, 5)
    a.requires_grad_()
    baselines.nt_xent(a, b, 0.5).backward()
    assert a.grad.norm() > 0.01
    assert (a.grad * a).sum(1).abs().max() < 1e-6


def test_contrastive_loss_is_in_fp32_under_autocast():
    a, b = torch.randn(2, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(baselines.nt_xent(a, b, 0.1), baselines.nt_xent(a, b, 0.1).float())
        within = baselines.nt_xent(a, b, 0.1), baselines.variance(a), baselines.covariance(a)
    outside = baselines.nt_xent(a, b, 0.1), baselines.variance(a), baselines.covariance(a)
    assert all(map(torch.equal, within, outside))


def test_simclr_takes_both_views_alike():
    x, y = torch.randn(2, 6, 8)
    model = bare(baselines.SimCLR, 8)
    out = model(pairs(x, y))
    assert torch.equal(out.loss, baselines.nt_xent(x, y, 0.5)) and torch.equal(out.z_agg, x)
    torch.testing.assert_close(model(pairs(y, x)).loss, out.loss)
    assert torch.equal(out.z, torch.stack([x, y], 1))


# ---------------------------------------------------------------- BYOL and Conditional BYOL

def test_byol_by_hand():
    """2 - 2 cos is 0.08 and 2: mean 1.04 in one direction, 2.08 in both."""
    batch = pairs([[3, 4], [1, 0]], [[4, 3], [0, 2]])
    both = bare(baselines.BYOL, 2)
    one = bare(baselines.ConditionalBYOL, 2)
    both.predictor = nn.Identity()
    one.predictor = Cut(2)
    assert both(batch).loss.item() == pytest.approx(2.08)
    assert one(batch).loss.item() == pytest.approx(1.04)


class Cut(nn.Module):
    """In place of a predictor: what it was given of the projection."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, given):
        return given[:, :self.dim]


@pytest.mark.parametrize("method", ["byol", "cond-byol", "conv-jepa"])
def test_targets_follow_encoder_and_projector_alone(built, method):
    model, batch = built(method)
    for p in [*model.encoder.parameters(), *model.projector.parameters()]:
        p.data += 1
    predictor = [p.clone() for p in model.predictor.parameters()]
    before = [p.clone() for p in model.target_projector.parameters()]
    model.update_target(0.75)
    for p, q, old in zip(model.projector.parameters(), model.target_projector.parameters(), before):
        torch.testing.assert_close(q, 0.75 * old + 0.25 * p.data)
    model.update_target(0.0)
    for part in ("encoder", "projector"):
        online = getattr(model, part).parameters()
        target = getattr(model, f"target_{part}").parameters()
        assert all(map(torch.equal, online, target))
    assert all(map(torch.equal, model.predictor.parameters(), predictor))
    assert not any("target" in name for name, p in model.named_parameters() if p.requires_grad)


def test_target_runs_in_train_mode_with_buffers_of_its_own(built):
    model, batch = built("byol")
    mean = model.target_encoder.bn1.running_mean.clone()
    model(batch)
    assert not torch.equal(model.target_encoder.bn1.running_mean, mean)
    online = model.encoder.bn1.running_mean.clone()
    model.update_target(0.0)
    assert torch.equal(model.encoder.bn1.running_mean, online)


def test_byol_is_the_same_both_ways(built):
    model, batch = built("byol")
    model.eval()
    swapped = batch._replace(views=batch.views.flip(1))
    torch.testing.assert_close(model(swapped).loss, model(batch).loss)


def test_conditional_byol_that_ignores_actions_is_one_direction_of_byol(built):
    model, batch = built("cond-byol")
    model.eval()
    P = model.projector.dim
    model.predictor[0].weight.data[:, P:] = 0
    x, y = batch.views.unbind(1)
    given = F.pad(model.projector(model.encoder(x)), (0, model.embed.dim))
    cosine = F.cosine_similarity(model.predictor(given), model.target(y))
    torch.testing.assert_close(model(batch).loss, (2 - 2 * cosine).mean())


def test_conv_jepa_with_one_view_is_conditional_byol(built):
    model, batch = built("conv-jepa")
    model.eval()
    pair = batch._replace(views=batch.views[:, -2:], actions=batch.actions[:, -1:])
    h = model.projector(model.encoder(batch.views[:, -2]))
    given = torch.cat([h, model.embed(batch.actions[:, -1:])[:, 0]], dim=1)
    cosine = F.cosine_similarity(model.predictor(given), model.target(batch.views[:, -1]))
    torch.testing.assert_close(model(pair).loss, (2 - 2 * cosine).mean())
    assert METHODS["conv-jepa"].args == METHODS["cond-byol"].args


def test_conv_jepa_is_the_mean_over_patches_of_the_pairs_with_the_last(built):
    model, batch = built("conv-jepa")
    model.eval()
    losses = []
    for i in range(3):
        to_last = (batch.params[:, -1] - batch.params[:, i])[:, None]
        pair = batch._replace(views=batch.views[:, [i, -1]], actions=to_last)
        losses.append(model(pair).loss)
    torch.testing.assert_close(model(batch).loss, torch.stack(losses).mean())


def test_conv_jepa_does_not_know_the_order_of_patches(built):
    model, batch = built("conv-jepa")
    model.eval()
    order = torch.tensor([2, 0, 1, 3])
    params = batch.params[:, order]
    shuffled = batch._replace(views=batch.views[:, order], params=params,
                              actions=params[:, 1:] - params[:, :-1])
    torch.testing.assert_close(model(shuffled).loss, model(batch).loss)
    torch.testing.assert_close(baselines.to_last(batch.actions),
                               batch.params[:, -1:] - batch.params[:, :-1])


# ---------------------------------------------------------------- VICReg

PLUS_MINUS = {"ones": [[1, 1], [-1, -1]], "one": [[1, 0], [-1, 0]], "zeros": [[0, 0], [0, 0]]}


@pytest.mark.parametrize("x, y, expected", [
    ("ones", "zeros", 18.95), ("ones", "ones", 8.0), ("one", "one", 4.95), ("zeros", "zeros", 9.9)])
def test_vicreg_by_hand(x, y, expected):
    out = bare(baselines.VICReg, 2)(pairs(PLUS_MINUS[x], PLUS_MINUS[y]))
    assert out.loss.item() == pytest.approx(expected)


def test_vicreg_s_terms_by_hand():
    x, y = PLUS_MINUS["ones"], PLUS_MINUS["zeros"]
    logs = bare(baselines.VICReg, 2)(pairs(x, y)).logs
    assert logs["invariance"] == 1 and logs["covariance"] == 4
    assert logs["variance"].item() == pytest.approx(0.99 / 2)


def test_turning_all_projections_leaves_vicreg_s_invariance():
    x, y = torch.randn(2, 6, 5)
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    model = bare(baselines.VICReg, 5)
    before = model(pairs(x, y)).logs
    after = model(pairs(x @ turn, y @ turn)).logs
    torch.testing.assert_close(after["invariance"], before["invariance"])
    assert not torch.isclose(after["covariance"], before["covariance"])


def test_variance_and_covariance_are_those_of_c_jepa():
    """dseq_jepa.vicreg_terms, written for other inputs, agrees on x alone."""
    x = 0.5 * torch.randn(6, 5)
    expected = dseq_jepa.vicreg_terms(x, x, torch.ones(6))
    found = (dseq_jepa.VARIANCE * baselines.variance(x)
             + dseq_jepa.COVARIANCE * baselines.covariance(x))
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- SEN and EquiMod

def test_sen_whose_predictor_ignores_the_action_is_simclr(built):
    model, batch = built("sen")
    model.predictor = Cut(model.projector.dim)
    h_x, h_y = (model.projector(model.encoder(view)) for view in batch.views.unbind(1))
    torch.testing.assert_close(model(batch).loss, baselines.nt_xent(h_x, h_y, 0.5))


def test_equimod_without_its_equivariant_term_is_simclr(built):
    model, batch = built("equimod")
    h_x, h_y = (model.invariant(model.encoder(view)) for view in batch.views.unbind(1))
    simclr = baselines.nt_xent(h_x, h_y, 0.1)
    torch.testing.assert_close(model(batch).logs["invariance"], simclr)
    model.weight = 0.0
    torch.testing.assert_close(model(batch).loss, simclr)
    model.weight = 1.0
    model.equivariant = model.invariant
    model.predictor = Cut(model.invariant.dim)
    torch.testing.assert_close(model(batch).loss, 2 * simclr)


@pytest.mark.parametrize("method", ["equimod", "sie"])
def test_invariant_terms_do_not_see_the_action(built, method):
    model, batch = built(method)
    before = model(batch).logs
    after = model(batch._replace(actions=batch.actions.flip(0))).logs
    torch.testing.assert_close(after["invariance"], before["invariance"])
    assert not torch.isclose(after["equivariance"], before["equivariance"])


@pytest.mark.parametrize("method", ["sen", "equimod"])
def test_without_its_action_columns_a_predictor_is_blind(built, method):
    model, batch = built(method)
    model.predictor[0].weight.data[:, -model.embed.dim:] = 0
    other = batch._replace(actions=batch.actions.flip(0))
    torch.testing.assert_close(model(other).loss, model(batch).loss)


# ---------------------------------------------------------------- SIE

def grad_of_z(model, batch, term):
    """Gradient of a term of SIE's loss to z of both views: (B, 2, D)."""
    z = torch.randn(len(batch.views), 2, model.encoder.dim, requires_grad=True)
    model.eval()                            # a BatchNorm's gradients are tiny, not zero, elsewhere
    invariant_x, equivariant_x = model.project(z[:, 0])
    invariant_y, equivariant_y = model.project(z[:, 1])
    if term == "invariance":
        loss = F.mse_loss(invariant_x, invariant_y)
    else:
        loss = F.mse_loss(model.turn(equivariant_x, batch.actions[:, 0, :4]), equivariant_y)
    loss.backward()
    return z.grad


def test_each_half_of_sie_has_its_own_term(built):
    model, batch = built("sie")
    half = model.encoder.dim // 2
    invariance = grad_of_z(model, batch, "invariance")
    equivariance = grad_of_z(model, batch, "equivariance")
    assert (invariance[..., half:] == 0).all() and (invariance[..., :half] != 0).any(dim=0).all()
    assert (equivariance[..., :half] == 0).all() and (equivariance[..., half:] != 0).any(0).all()


def test_sie_s_predictor_is_linear_in_both_and_equals_explicit_matrices(built):
    model, _ = built("sie")
    A, P, _ = model.hypernetwork.shape
    h, other = torch.randn(2, 6, P)
    a, b = torch.randn(2, 6, A)
    torch.testing.assert_close(model.turn(h + 2 * other, a),
                               model.turn(h, a) + 2 * model.turn(other, a))
    torch.testing.assert_close(model.turn(h, a + 2 * b), model.turn(h, a) + 2 * model.turn(h, b))
    hypernetwork = nn.Linear(A, P * P, bias=False)
    hypernetwork.weight.data = model.hypernetwork.data.flatten(1).T
    matrices = hypernetwork(a).view(6, P, P)
    torch.testing.assert_close(model.turn(h, a), (matrices @ h[..., None])[..., 0],
                               atol=1e-5, rtol=1e-4)
    bilinear = nn.Bilinear(A, P, P, bias=False)
    bilinear.weight.data = model.hypernetwork.data.transpose(0, 1)
    torch.testing.assert_close(model.turn(h, a), bilinear(a, h), atol=1e-5, rtol=1e-4)


class Largest(TorchDispatchMode):
    """Remembers the most numbers in a tensor that was made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_no_sample_has_a_matrix_of_its_own(built):
    """Forward and backward; explicit matrices would take B P P numbers."""
    model, _ = built("sie")
    A, P, _ = model.hypernetwork.shape
    B = 4 * A
    h = torch.randn(B, P, requires_grad=True)
    with Largest() as largest:
        model.turn(h, torch.randn(B, A)).sum().backward()
    assert largest.numbers == A * P * P < B * P * P


def test_sie_starts_as_a_linear_layer_from_the_raw_action_does(batches):
    for condition, A in (("rotation", 4), ("color", 2), ("rotation+color", 6)):
        model = build_model(make("sie", condition=condition), batches["rotation"][1])
        assert model.hypernetwork.shape[0] == A
        assert model.hypernetwork.abs().max().item() == pytest.approx(A ** -0.5, rel=1e-2)
        assert not [name for name, _ in model.named_parameters() if "embed" in name]


def test_without_an_action_sie_predicts_zero(built):
    """4.95 is what the variance term costs where a prediction never varies."""
    model, batch = built("sie")
    model.eval()
    still = batch._replace(actions=0 * batch.actions)
    logs = model(still).logs
    halves = [model.project(model.encoder(view)) for view in batch.views.unbind(1)]
    joined = [torch.cat(half, dim=1) for half in halves]
    torch.testing.assert_close(logs["equivariance"], halves[1][1].square().mean())
    spread = (baselines.variance(joined[0]) + baselines.variance(joined[1])) / 2
    assert 10 * (logs["variance"] - spread).item() == pytest.approx(4.95, abs=1e-4)


def test_sie_has_nothing_to_learn_where_nothing_changes_and_w_is_the_identity():
    model = bare(baselines.SIE, 8, columns=[0])
    model.invariant.dim = model.equivariant.dim = 4
    model.hypernetwork = nn.Parameter(torch.eye(4)[None])
    x = torch.randn(6, 8)
    logs = model(pairs(x, x, torch.ones(6, 4))).logs
    assert logs["invariance"] == 0 and logs["equivariance"] < 1e-12


def test_sie_s_covariance_sees_what_one_half_copies_from_the_other():
    """Two entries of 1 in each view's covariance matrix, over 8: 0.5 in all."""
    model = bare(baselines.SIE, 8, columns=[0])
    x = torch.randn(50, 8)
    x = 7 * torch.linalg.qr(x - x.mean(0)).Q            # no covariance, and variances of 49 / 49
    copied = x.clone()
    copied[:, 4] = x[:, 0]
    found = [model(pairs(z, z, torch.ones(50, 4))).logs["covariance"].item() for z in (x, copied)]
    assert found == pytest.approx([0, 0.5], abs=1e-5)
    assert baselines.covariance(copied[:, 4:]).item() < 1e-5        # one half alone is blind to it


def test_sie_s_loss_is_the_weighted_sum_of_its_terms(built):
    model, batch = built("sie")
    out = model(batch)
    t = out.logs
    expected = (10 * t["invariance"] + 4.5 * t["equivariance"] + 10 * t["variance"]
                + t["covariance"])
    torch.testing.assert_close(out.loss, expected)


# ---------------------------------------------------------------- sizes

N, PLAIN = 9_445_376, 9_449_472             # projectors 2048-2048-2048, without and with biases
SIZES = {                                   # trained parameters but the encoder's; 128 A: embedding
    "simclr": N,
    "byol": N + 2_100_224,
    "vicreg": PLAIN,
    "sen": N + 4_456_448 + 128 * 4,
    "equimod": 2 * 1_708_032 + 32_768 + 128 * 4,
    "sie": 2 * 2_365_440 + 1_048_576 * 4,
    "cond-byol": N + 2_165_760 + 128 * 4,
}
AGG = 9_458_688                             # the aggregator at D = 512
TRANSFORMER_SIZES = {"simclr": AGG, "vicreg": AGG, "sie": 2 * 3_945_984 + 256 * 256 * 4}


@pytest.mark.parametrize("method, projector, size", [
    *((method, "mlp", size) for method, size in SIZES.items()),
    *((method, "transformer", size) for method, size in TRANSFORMER_SIZES.items())])
def test_sizes_at_the_paper_s_width(method, projector, size):
    preset = settings.preset("3diebench", "rotation", method=method, projector=projector)
    config = settings.check(settings.Config(**preset))
    groups = settings.MODES["rotation"].groups
    with torch.device("meta"):
        model = build_model(config, groups)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    encoder = sum(p.numel() for p in model.encoder.parameters())
    assert (encoder, trained - encoder) == (11_176_512, size)


def test_conv_jepa_has_the_cifar_stem():
    config = settings.check(settings.Config(**settings.preset("stl10", "saccade",
                                                              method="conv-jepa")))
    with torch.device("meta"):
        model = build_model(config, settings.MODES["saccade"].groups)
    assert sum(p.numel() for p in model.encoder.parameters()) == 11_168_832


def test_a_transformer_projector_is_the_aggregator_on_one_view():
    projector = baselines.Transformer(8, 999, 999, normed=False, feed_forward=32).eval()
    aggregator = Aggregator(dim=8, action_dim=0, hidden=32).eval()
    aggregator.load_state_dict(projector.state_dict())
    z = torch.randn(5, 8)
    assert torch.equal(projector(z), aggregator(z[:, None], torch.zeros(5, 0, 0)))
    assert projector.dim == 8 and projector(z).shape == (5, 8)


# ---------------------------------------------------------------- every method

EVERY = [(method, projector) for method in settings.BASELINES for projector in settings.PROJECTORS]


@pytest.mark.parametrize("method, projector", EVERY)
def test_every_trained_weight_learns_and_targets_do_not(built, method, projector):
    model, batch = built(method, projector)
    views = batch.views.clone()
    actions = batch.actions.clone()
    out = model(batch)
    out.loss.backward()
    assert torch.equal(batch.views, views) and torch.equal(batch.actions, actions)
    for name, p in model.named_parameters():
        if "target" in name:
            assert p.grad is None and not p.requires_grad, name
        else:
            assert p.grad is not None and p.grad.isfinite().all(), name
    grads = [p.grad.norm() for p in model.encoder.parameters()]
    assert all(norm > 0 for norm in grads)
    observed = {"conv-jepa": 3, "cond-byol": 1}.get(method, 2)
    assert out.z.shape == (8, observed, 32) and out.z_agg.shape[0] == 8 and out.loss.ndim == 0


@pytest.mark.parametrize("method", settings.BASELINES)
def test_who_sees_the_actions(built, method):
    model, batch = built(method)
    loss = model(batch).loss
    other = model(batch._replace(actions=batch.actions.flip(0))).loss
    assert torch.equal(loss, other) == (method in INVARIANT_METHODS)


@pytest.mark.parametrize("method", TOLD)
@pytest.mark.parametrize("condition", ["rotation", "color"])
def test_only_the_columns_of_the_condition_are_read(built, method, condition):
    model, batch = built(method, condition=condition)
    loss = model(batch).loss
    for name, columns in (("rotation", slice(0, 4)), ("color", slice(4, 6))):
        actions = batch.actions.clone()
        actions[..., columns] = actions[..., columns].flip(0)
        other = model(batch._replace(actions=actions)).loss
        assert torch.equal(loss, other) == (name != condition)


@pytest.mark.parametrize("method", [m for m in TOLD if m != "sie"])
def test_an_equivariant_method_may_be_told_nothing(built, method):
    model, batch = built(method, condition="none")
    loss = model(batch).loss
    assert torch.equal(model(batch._replace(actions=batch.actions.flip(0))).loss, loss)


@pytest.mark.parametrize("method", settings.BASELINES)
def test_a_few_steps_lower_the_loss_and_nothing_collapses(batches, method):
    config = make(method, lr=1e-3, z_norm=True)
    batch, groups = batches[config.mode]
    model = build_model(config, groups).train()
    again = build_model(config, groups)
    assert same(model.state_dict(), again.state_dict())         # one seed, the same weights
    optimizer = build_optimizer(model, config, CPU)
    losses = []
    for _ in range(30):
        out = training_step(model, batch, optimizer, Rates(1e-3, 0.0, 0.99))
        losses.append(out.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert out.z_agg.isfinite().all() and collapsed(dict(health(out), epoch=1)) is None


# ---------------------------------------------------------------- settings

def parsed(line):
    return settings.from_command_line(line.split())


def test_each_projector_has_its_optimisation():
    """Sec. 4.2: Adam at a constant 1e-3, no decay; or as seq-JEPA."""
    mlp = parsed("--dataset 3diebench --mode rotation --method sie")
    assert (mlp.lr, mlp.lr_start, mlp.lr_end, mlp.weight_decay) == (1e-3, 1e-3, 1e-3, 0)
    rates = [train.rates_at(step, mlp, 10) for step in (0, 7, 5000, 9999)]
    assert {rate.lr for rate in rates} == {1e-3} and {rate.weight_decay for rate in rates} == {0}
    other = parsed("--dataset 3diebench --mode rotation --method sie --projector transformer")
    ours = parsed("--dataset 3diebench --mode rotation")
    for field in ("lr", "lr_start", "lr_end", "warmup_epochs", "weight_decay", "epochs"):
        assert getattr(other, field) == getattr(ours, field)
    assert mlp.epochs == ours.epochs == 1000 and mlp.views == other.views == 1


def test_adamw_without_decay_is_adam(built):
    model, batch = built("simclr")
    twin, _ = built("simclr")
    twin.load_state_dict(model.state_dict())
    config = make("simclr")
    optimizer = build_optimizer(model, config, CPU)
    adam = torch.optim.Adam([p for p in twin.parameters() if p.requires_grad], 1e-3, fused=True)
    for _ in range(3):
        training_step(model, batch, optimizer, Rates(1e-3, 0.0, 1.0))
        adam.zero_grad()
        twin(batch).loss.backward()
        adam.step()
    assert same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("line, condition, views, name", [
    ("--dataset cifar100 --mode augment --method simclr", "none", 1, "cifar100-augment-simclr"),
    ("--dataset cifar100 --mode augment --method equimod --condition crop", "crop", 1,
     "cifar100-augment-crop-equimod"),
    ("--dataset stl10 --mode saccade --method conv-jepa", "position", 4, "stl10-saccade-conv-jepa"),
    ("--dataset solids --mode rotation --method sen --projector transformer", "rotation", 1,
     "solids-rotation-sen-transformer"),
    ("--dataset solids --mode rotation --method sie --quick", "rotation", 1,
     "quick-solids-rotation-sie")])
def test_what_a_method_is_told_and_shown_unless_asked_otherwise(line, condition, views, name):
    c = parsed(line)
    assert (c.condition, c.views, c.name) == (condition, views, name)
    assert not c.aggregates and parsed("--dataset solids --mode rotation").aggregates


@pytest.mark.parametrize("line, words", [
    ("--method simclr --condition rotation", "--condition rotation: method simclr is told no"),
    ("--method sie --condition none", "--condition none: method sie predicts by the action alone"),
    ("--method sen --views 3", "--views 3: method sen learns from pairs of views"),
    ("--method conv-jepa", "--method conv-jepa: mode rotation offers seq-jepa, simclr"),
    ("--method byol --action-dim 64", "--action-dim: method byol does not read it"),
    ("--method sie --action-dim 64", "--action-dim: method sie does not read it"),
    ("--method vicreg --ema 0.9", "--ema: method vicreg does not read it"),
    ("--method sen --agg-hidden 64", "--agg-hidden: projector mlp does not read it, only transf"),
    ("--method sen --action-in none", "--action-in: method sen does not read it, only seq-jepa"),
    ("--projector mlp", "--projector: method seq-jepa does not read it, only simclr"),
    ("--mode saccade --method byol", "--method byol: mode saccade offers seq-jepa, conv-jepa")])
def test_what_does_not_go_together_is_refused_in_one_line(line, words, capsys):
    assert train.main(["--dataset", "solids", "--mode", "rotation", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {words}") and error.count("\n") == 1


@pytest.mark.parametrize("projector", settings.PROJECTORS)
def test_the_paper_s_numbers_stand_beside_both_projectors(projector):
    def published(dataset, mode, method, **changes):
        preset = settings.preset(dataset, mode, method=method, projector=projector)
        return paper_numbers(settings.check(settings.Config(**preset | changes)))

    table_1 = {("classify", "class", "z"): 77.49, ("action", "rotation", "z_1, z_2"): 0.58,
               ("parameters", "rotation", "z_1"): 0.62}
    assert published("3diebench", "rotation", "sie") == table_1
    table_5 = published("3diebench", "rotation", "sie", condition="rotation+color")
    assert list(table_5.values()) == [75.34, 0.46, 0.97]
    crop = published("tiny-imagenet", "augment", "equimod", condition="crop")
    assert list(crop.values()) == [36.83, 0.26, 0.12, 0.30]
    assert list(published("stl10", "augment", "simclr").values()) == [85.23]
    assert list(published("stl10", "saccade", "conv-jepa", saliency="deepgaze").values()) == [80.04]
    assert published("stl10", "saccade", "conv-jepa") == {}                 # other saliency
    assert published("3diebench", "rotation", "sie", lr=2e-3) == {}


def test_every_baseline_is_a_method_and_every_cell_of_the_tables_is_there():
    for method in settings.BASELINES:
        assert METHODS[method].args[0].__module__ == "baselines"
    for method in PAIR_METHODS:
        preset = settings.preset("3diebench", "rotation", method=method)
        assert len(paper_numbers(settings.check(settings.Config(**preset)))) == 3
        for dataset in ("cifar100", "tiny-imagenet"):
            conditions = ("all", "crop", "jitter", "blur")
            for condition in ("none",) if method in INVARIANT_METHODS else conditions:
                preset = settings.preset(dataset, "augment", method=method)
                config = settings.Config(**preset | dict(condition=condition))
                assert len(paper_numbers(settings.check(config))) == 4


# ---------------------------------------------------------------- runs

FLAGS = {
    "pair": "--dataset solids --mode rotation --image-size 16 --limit 16 --object-views 4",
    "conv-jepa": "--dataset folder --mode saccade --image-size 20 --patch-size 8 --views 2",
    "augment": "--dataset folder --mode augment --image-size 20",
}
TINY = "--width 2 --batch-size 8 --epochs 2 --device cpu"


@pytest.fixture
def run(photos, tmp_path, monkeypatch):
    """A training of a method; returns its folder."""
    monkeypatch.setattr(train, "draw_curves", lambda folder: None)

    def start(kind, *more):
        data = tmp_path / "data" if kind == "pair" else photos
        command = [*FLAGS[kind].split(), *TINY.split(), "--data-dir", str(data),
                   "--out", str(tmp_path), *more]
        assert train.main(command) == 0
        return tmp_path / command[command.index("--name") + 1]
    return start


@pytest.mark.parametrize("method", settings.BASELINES)
def test_a_resumed_run_is_bit_identical(run, method, tmp_path):
    """Stopped after the first of two epochs."""
    kind = "conv-jepa" if method == "conv-jepa" else "pair"
    flags = ["--method", method, "--keep-every", "1"]
    if method in ("byol", "sie"):
        flags += ["--projector", "transformer", "--agg-hidden", "16"]
    straight = run(kind, *flags, "--name", "straight")
    (tmp_path / "resumed").mkdir()
    shutil.copy(straight / "epoch-1.pt", tmp_path / "resumed" / "last.pt")
    resumed = run(kind, *flags, "--name", "resumed", "--resume")
    a, b = (load_checkpoint(folder / "last.pt") for folder in (straight, resumed))
    assert a["step"] == b["step"] > load_checkpoint(straight / "epoch-1.pt")["step"] > 0
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])


@pytest.mark.parametrize("kind, method, left_out, probes", [
    ("pair", "simclr", "rows of z_agg, path, invariance, retrieval",
     ["classify", "knn", "action", "action", "parameters", "parameters"]),
    ("augment", "sie", "rows of z_agg", ["classify", "knn", *["action"] * 3, *["parameters"] * 3]),
    ("conv-jepa", "conv-jepa", "rows of z_agg, path", ["classify", "knn", "action", "parameters"])])
def test_a_method_is_probed_on_what_it_has(run, kind, method, left_out, probes, capsys):
    folder = run(kind, "--method", method, "--name", "run", "--probe-every", "2")
    last = (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    columns = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    online = dict(zip(columns, map(float, last)))
    assert math.isnan(online["knn_z_agg"])
    assert math.isfinite(online["knn_z"]) and math.isfinite(online["action_r2"])
    assert math.isfinite(online["z_agg_rank"])

    fast = ["--probe-epochs", "1", "--samplings", "1"]
    checkpoint = str(folder / "last.pt")
    assert evaluate.main([checkpoint, *fast, "--figures"]) == 0
    result = json.loads((folder / "probes.json").read_text())
    assert [row["probe"] for row in result["rows"]] == probes
    assert {row["from"] for row in result["rows"]} <= {"z", "z_1", "z_1, z_2"}
    assert all(math.isfinite(row["value"] + row["untrained"]) for row in result["rows"])
    note = f"left out, for method {method} gathers no views into z_agg: {left_out}"
    assert result["remarks"][0] == note
    out = capsys.readouterr().out
    assert f"note: {note}\n" in out and "lengths.png" not in out and "path.png" not in out
    assert {"views.png", "maps.png", "retrieval.png"} <= {path.name for path in folder.iterdir()}

    for flags, words in ((["--views", "3"], "--views 3: method"),
                         (["--probe", "transfer", "--dataset", "folder"], "--probe transfer: "),
                         (["--probe", "classify", "path"], "--probe path: ")):
        assert evaluate.main([checkpoint, *fast, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {words}") and error.count("\n") == 1


def test_a_config_of_a_method_survives_being_stored(tmp_path):
    config = make("sie", "transformer")
    stored = dict(config=json.loads(json.dumps(dataclasses.asdict(config))))
    assert settings.config_of(stored) == config
