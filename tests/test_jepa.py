"""seq-JEPA's wiring, loss and target against Sec. 2.2 and Eq. 4."""
import copy

import pytest
import torch

from build import build_model
from images import Batch
from jepa import ActionEmbedding, prediction_loss

B, M, A = 6, 3, 5
GROUPS = {"first": slice(0, 2), "second": slice(2, 5)}


def model(make_config, condition="all", **changes):
    config = make_config(
        mode="augment", dataset="folder", width=2, action_dim=8, stem="cifar", **changes
    )
    # GROUPS above are not those of a real mode
    object.__setattr__(config, "condition", condition)
    return build_model(config, GROUPS)


def batch(m=M):
    return torch.randn(B, m + 1, 3, 16, 16), torch.randn(B, m, A)


def run(net, views, actions):
    return net(Batch(views, actions, None, None))


def test_loss_is_eq_4_by_hand():
    z_hat, z = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    by_hand = ((1 - (3 * 4 + 4 * 3) / (5 * 5)) + (1 - 0.0)) / 2
    torch.testing.assert_close(prediction_loss(z_hat, z), torch.tensor(by_hand))


def test_zero_vectors_give_a_finite_loss_and_gradient():
    z_hat = torch.zeros(2, 4, requires_grad=True)
    loss = prediction_loss(z_hat, torch.zeros(2, 4))
    loss.backward()
    assert loss == 1 and z_hat.grad.isfinite().all()


def test_forward_is_the_paper_step_by_step(make_config):
    net = model(make_config).eval()
    torch.nn.init.normal_(net.aggregator.agg)
    views, actions = batch()
    z = torch.stack([net.encoder(views[:, i]) for i in range(M)], dim=1)
    a = torch.stack([net.embed(actions[:, i:i + 1])[:, 0] for i in range(M)], dim=1)
    z_agg = net.aggregator(z, a[:, :M - 1])
    z_hat, target = net.predictor(z_agg, a[:, M - 1]), net.target_encoder(views[:, M])
    loss = sum(1 - (p @ t) / (p.norm() * t.norm()) for p, t in zip(z_hat, target)) / B
    out = run(net, views, actions)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.z, z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.z_agg, z_agg, atol=1e-5, rtol=1e-5)


def test_encoder_learns_target_does_not(make_config):
    net = model(make_config)
    run(net, *batch()).loss.backward()
    for part in (net.encoder, net.embed, net.aggregator, net.predictor):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in part.parameters())
        assert sum(p.grad.norm() for p in part.parameters()) > 0
    assert all(p.grad is None and not p.requires_grad for p in net.target_encoder.parameters())


def test_target_moves_by_exactly_one_minus_tau(make_config):
    net = model(make_config)
    for p in net.encoder.parameters():
        p.data.normal_()
    before = copy.deepcopy(net.target_encoder)
    net.update_target(0.75)
    for new, old, online in zip(
        net.target_encoder.parameters(), before.parameters(), net.encoder.parameters()
    ):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * online)
    frozen = copy.deepcopy(net.target_encoder)
    net.update_target(1.0)
    assert all(
        torch.equal(a, b) for a, b in zip(net.target_encoder.parameters(), frozen.parameters())
    )
    net.update_target(0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(net.target_encoder.parameters(), net.encoder.parameters())
    )


def test_target_normalises_with_its_own_batch(make_config):
    net = model(make_config)
    before = net.target_encoder.bn1.running_mean.clone()
    run(net, *batch())
    assert not torch.equal(net.target_encoder.bn1.running_mean, before)
    assert not torch.equal(net.target_encoder.bn1.running_mean, net.encoder.bn1.running_mean)


def test_one_observed_view(make_config):
    net = model(make_config)
    out = run(net, *batch(1))
    out.loss.backward()
    assert (
        out.loss.isfinite()
        and out.z.shape == (B, 1, 16)
        and net.encoder.conv1.weight.grad.norm() > 0
    )


def test_inputs_are_not_modified(make_config):
    net, (views, actions) = model(make_config), batch()
    copies = views.clone(), actions.clone()
    run(net, views, actions).loss.backward()
    assert torch.equal(views, copies[0]) and torch.equal(actions, copies[1])


@pytest.mark.parametrize("action_in", ["both", "predictor", "aggregator", "none"])
def test_action_in_says_who_sees_the_actions(make_config, action_in):
    net = model(make_config, action_in=action_in).eval()
    views, actions = batch()
    z, a = net.encode(views[:, :-1]), net.embed(actions)
    other = net.embed(torch.randn_like(actions))
    aggregate_differs = not torch.equal(
        net.aggregate(z, a[:, :-1]), net.aggregate(z, other[:, :-1])
    )
    z_agg = net.aggregate(z, a[:, :-1])
    prediction_differs = not torch.equal(
        net.predict(z_agg, a[:, -1]), net.predict(z_agg, other[:, -1])
    )
    assert aggregate_differs == (action_in in ("both", "aggregator"))
    assert prediction_differs == (action_in in ("both", "predictor"))


@pytest.mark.parametrize(
    "condition, seen",
    [("all", {0, 1, 2, 3, 4}), ("first", {0, 1}), ("second", {2, 3, 4}), ("none", set())],
)
def test_only_the_conditioned_columns_are_read(make_config, condition, seen):
    net = model(make_config, condition).eval()
    views, actions = batch()
    base = run(net, views, actions).loss
    for column in range(A):
        changed = actions.clone()
        changed[..., column] += 1
        assert (run(net, views, changed).loss != base) == (column in seen)


def test_raw_actions_reach_the_model_unchanged():
    actions = torch.randn(B, M, A)
    embedded = ActionEmbedding([0, 3], 64, "raw")(actions)
    assert torch.equal(embedded, torch.nn.functional.pad(actions[..., [0, 3]], (0, 2)))


def test_noise_actions_do_not_repeat_and_ignore_the_action():
    embed, actions = ActionEmbedding([0, 1], 8, "noise").eval(), torch.randn(B, M, A)
    first, second = embed(actions), embed(actions)
    assert not torch.equal(first, second) and first.isfinite().all()
    torch.manual_seed(3)
    one = embed(actions)
    torch.manual_seed(3)
    assert torch.equal(one, embed(torch.zeros_like(actions)))


def test_embedding_statistics_come_from_real_actions_only():
    """Unlike in the authors' code: rows of zeros for "no action" must not enter the BatchNorm of M
    = 1."""
    embed = ActionEmbedding([0, 1], 8)
    a = embed(torch.randn(64, 1, 2))
    torch.testing.assert_close(
        a.flatten(0, 1).std(0, unbiased=False), torch.ones(8), atol=1e-2, rtol=0
    )


def test_wrong_number_of_actions_is_said(make_config):
    views, actions = batch()
    with pytest.raises(AssertionError, match="4 views need 3 actions"):
        run(model(make_config), views, actions[:, :-1])


def test_same_config_same_weights(make_config):
    one, two, other = model(make_config), model(make_config), model(make_config, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
