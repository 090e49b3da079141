"""Aggregator g_phi (seq-JEPA Eq. 3): gathers the observed views and the actions between them.

    z (B, M, D) views,  a (B, M-1, E) embedded actions, a[:, i] leads from view i to view i+1
    ->  z_agg (B, D+E), the output at the [AGG] token

The token sequence is  [AGG], (z_1, a_1), ..., (z_{M-1}, a_{M-1}), (z_M, 0):  the last view has no
outgoing action yet, and a_M goes to the predictor. There is no positional encoding: order is known
only through the actions, so any M works on the same weights.

Paper, Secs. 2.2 and 4.2: transformer encoder, 3 layers, 4 heads, post-norm, learned [AGG]. From the
authors' code: [AGG] starts at zero, a final LayerNorm, and PyTorch's own defaults for the rest
(feed-forward width 2048, dropout 0.1). Checked in tests/test_aggregator.py.
"""
import torch
from torch import nn


class Aggregator(nn.Module):
    """Transformer over (view, action) tokens.

    dim: D, width of z.  action_dim: E, width of an action embedding.
    D+E must be a multiple of heads."""

    def __init__(self, *, dim, action_dim, layers=3, heads=4, hidden=2048, dropout=0.1):
        super().__init__()
        self.dim = dim + action_dim
        self.agg = nn.Parameter(torch.zeros(self.dim))
        layer = nn.TransformerEncoderLayer(self.dim, heads, hidden, dropout, norm_first=False,
                                           batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(self.dim),
                                                 enable_nested_tensor=False)

    def tokens(self, z, a):
        """The sequence of Eq. 3: (B, M, D), (B, M-1, E) -> (B, 1+M, D+E)."""
        B, M, D = z.shape
        assert a.shape[:2] == (B, M - 1), \
            f"{M} views need {M - 1} actions between them, got {a.shape[1]}"
        no_action = a.new_zeros(B, 1, self.dim - D)
        pairs = torch.cat([z, torch.cat([a, no_action], dim=1)], dim=2)
        return torch.cat([self.agg.expand(B, 1, -1), pairs], dim=1)

    def forward(self, z, a):
        return self.transformer(self.tokens(z, a))[:, 0]
