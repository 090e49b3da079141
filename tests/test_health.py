"""Meters and the signs of collapse, on features whose spread and rank are known."""
import numpy as np
import pytest
import torch

from plumbing.errors import BadInput
from plumbing.health import Meters, collapsed, effective_rank, feature_std


def test_effective_rank_and_spread_of_known_features():
    spread = torch.randn(4000, 8)
    assert effective_rank(spread) == pytest.approx(8, abs=0.1) and feature_std(
        spread
    ) == pytest.approx(1, abs=0.05)
    line = torch.randn(400, 1) * torch.ones(1, 8)
    assert effective_rank(line) == pytest.approx(1, abs=0.01)
    collapsed = torch.ones(400, 8) + 1e-4 * torch.randn(400, 8)
    assert feature_std(collapsed) < 0.01
    assert effective_rank(torch.zeros(5, 3)) < 4 and np.isfinite(feature_std(torch.zeros(5, 3)))


def test_meters_average_and_go_on_from_what_was_saved():
    meters = Meters(torch.device("cpu"), when=str)
    for step, loss in enumerate((1.0, 2.0)):
        meters.add(step, loss=torch.tensor(loss), steps=torch.tensor(3.0))
    again = Meters(torch.device("cpu"), when=str, saved=meters.saved())
    again.add(2, loss=torch.tensor(6.0), steps=torch.tensor(0.0))
    assert again.means() == dict(loss=3.0, steps=2.0)


def test_meters_name_the_first_step_whose_loss_was_not_finite():
    meters = Meters(torch.device("cpu"), when=lambda step: f"({step})")
    for step, loss in enumerate((1.0, float("nan"), float("inf"))):
        meters.add(step, loss=torch.tensor(loss))
    with pytest.raises(BadInput, match=r"not finite at step 1 \(1\)"):
        meters.means()


@pytest.mark.parametrize("z_std, agg_rank, name", [(0.01, 9.0, "z"), (0.9, 1.2, "z_agg")])
def test_collapse_is_named(z_std, agg_rank, name):
    row = dict(epoch=3, z_std=z_std, z_rank=9.0, z_agg_std=0.9, z_agg_rank=agg_rank)
    assert collapsed(row).startswith(f"warning: {name} has collapsed at epoch 3")
    assert collapsed(row | dict(z_std=0.9, z_agg_rank=9.0)) is None
