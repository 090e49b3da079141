"""The aggregator against Eq. 3: which token carries what, and what may be reordered."""
import pytest
import torch

from aggregator import Aggregator

B, M, D, E = 5, 4, 24, 8


@pytest.fixture
def aggregator():
    aggregator = Aggregator(dim=D, action_dim=E).eval()
    torch.nn.init.normal_(aggregator.agg)
    return aggregator


def views_and_actions(m=M):
    return torch.randn(B, m, D), torch.randn(B, m - 1, E)


def test_token_sequence_is_that_of_eq_3(aggregator):
    z, a = views_and_actions()
    tokens = aggregator.tokens(z, a)
    assert tokens.shape == (B, 1 + M, D + E)
    # [AGG], (z_1, a_1), ..., (z_M, 0), written out
    for b in range(B):
        assert torch.equal(tokens[b, 0], aggregator.agg)
        for i in range(M - 1):
            assert torch.equal(tokens[b, 1 + i], torch.cat([z[b, i], a[b, i]]))
        assert torch.equal(tokens[b, M], torch.cat([z[b, M - 1], torch.zeros(E)]))


def test_agg_token_starts_at_zero_and_is_learned():
    agg = Aggregator(dim=D, action_dim=E).agg
    assert (agg == 0).all() and agg.requires_grad


def test_pairs_before_the_last_may_be_permuted_views_alone_may_not(aggregator):
    z, a = views_and_actions()
    order = [2, 0, 1]
    z_permuted = torch.cat([z[:, order], z[:, -1:]], dim=1)
    expected = aggregator(z, a)
    torch.testing.assert_close(aggregator(z_permuted, a[:, order]), expected, atol=1e-5, rtol=1e-5)
    assert (aggregator(z_permuted, a) - expected).abs().max() > 1e-3


def test_every_view_and_action_counts(aggregator):
    z, a = views_and_actions()
    z.requires_grad_(), a.requires_grad_()
    aggregator(z, a).square().sum().backward()
    assert (z.grad.norm(dim=2) > 0).all() and (a.grad.norm(dim=2) > 0).all()


@pytest.mark.parametrize("m", [1, 2, 7])
def test_same_weights_any_length(aggregator, m):
    z, a = views_and_actions(m)
    z_agg = aggregator(z, a)
    assert z_agg.shape == (B, D + E) and z_agg.isfinite().all()


def test_one_sequence_does_not_see_another(aggregator):
    z, a = views_and_actions()
    torch.testing.assert_close(aggregator(z[:1], a[:1]), aggregator(z, a)[:1], atol=1e-5, rtol=1e-5)


def test_paper_shape():
    aggregator = Aggregator(dim=512, action_dim=128)
    layers = aggregator.transformer.layers
    assert (
        len(layers) == 3
        and layers[0].self_attn.num_heads == 4
        and not layers[0].norm_first
        and aggregator.dim == 640
    )


def test_wrong_number_of_actions_is_said():
    z, a = views_and_actions()
    with pytest.raises(AssertionError, match="4 views need 3 actions"):
        Aggregator(dim=D, action_dim=E)(z, a[:, :-1])
