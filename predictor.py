"""Predictor h_psi (seq-JEPA Secs. 2.2, 4.2): where will the next action lead?

    z_agg (B, D+E),  a_M (B, E)  ->  z_hat (B, D), the predicted embedding of view M+1

An MLP with one hidden layer of 1024 and ReLU. From the authors' code: BatchNorm after the hidden
layer, which therefore needs no bias. Checked in tests/test_predictor.py.
"""
import torch
from torch import nn


class Predictor(nn.Module):
    """MLP on the concatenation (z_agg, a_M)."""

    def __init__(self, *, dim, action_dim, hidden=1024):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim + action_dim + action_dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, dim))

    def forward(self, z_agg, a_last):
        return self.mlp(torch.cat([z_agg, a_last], dim=1))
