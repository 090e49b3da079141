"""The predictor is the MLP of Sec. 4.2, written out."""
import torch
import torch.nn.functional as F

from predictor import Predictor


def test_equals_the_formula():
    predictor = Predictor(dim=12, action_dim=4).eval()
    hidden, norm, _, out = predictor.mlp
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    z_agg, a = torch.randn(6, 16), torch.randn(6, 4)
    x = torch.cat([z_agg, a], dim=1) @ hidden.weight.T
    x = F.relu(
        (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    )
    torch.testing.assert_close(
        predictor(z_agg, a), x @ out.weight.T + out.bias, atol=1e-5, rtol=1e-5
    )


def test_paper_sizes_and_no_bias_before_the_norm():
    hidden, _, _, out = Predictor(dim=512, action_dim=128).mlp
    assert (
        hidden.weight.shape == (1024, 768)
        and hidden.bias is None
        and out.weight.shape == (512, 1024)
    )


def test_the_last_action_changes_the_prediction():
    predictor = Predictor(dim=12, action_dim=4).eval()
    z_agg = torch.randn(3, 16)
    assert (
        predictor(z_agg, torch.randn(3, 4)) - predictor(z_agg, torch.randn(3, 4))
    ).abs().max() > 1e-3
