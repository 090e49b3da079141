"""Predictors h_psi: from what has been seen to what will be seen next.

    Predictor         z_agg (B, D+E),  a_M (B, E)  ->  z_hat (B, D), the predicted embedding of
                      view M+1: seq-JEPA Secs. 2.2, 4.2
    RegionPredictor   context tokens of R_1..R_k and the positions of R_{k+1}  ->  the tokens of
                      R_{k+1}, for all k in one pass: DSeq-JEPA Eq. 5

The first is an MLP with one hidden layer of 1024 and ReLU. From the authors' code: BatchNorm after
the hidden layer, which therefore needs no bias. The second is a narrow ViT.
Checked in tests/test_predictor.py and tests/test_dseq_jepa.py.
"""
import torch
from torch import nn

from attention import TransformerBlock, initialise, sincos_positions, unpack


class Predictor(nn.Module):
    """MLP on the concatenation (z_agg, a_M)."""

    def __init__(self, *, dim, action_dim, hidden=1024):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear((dim + action_dim) + action_dim, hidden, bias=False),     # z_agg, a_M
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim))

    def forward(self, z_agg, a_last):
        return self.mlp(torch.cat([z_agg, a_last], dim=1))


class RegionPredictor(nn.Module):
    """Narrow transformer over context tokens and mask tokens (DSeq-JEPA Eq. 5; I-JEPA's predictor).

    dim: D of the encoder.  width: its own; heads are 32 wide.
    grid: rows and columns of patches."""

    def __init__(self, *, dim, width, depth, grid):
        super().__init__()
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(width, *grid), persistent=False)
        heads = max(1, width // 32)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.project = nn.Linear(width, dim)
        initialise(self)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context, context_order, places, layout, masks):
        """Packed context (T, D) -> predictions (n, D) of the mask tokens.

        places: (B, C + P), B rows of C copies of [CLS], which no layout takes up, then P patches.
        context_order (T,): where in these rows the context tokens belong.
        layout: of R rows of C + P context places, then P mask places; R is a multiple V of B:
            V predictions per image.
        masks (n,): which of the packed tokens are mask tokens."""
        B, S = places
        P = len(self.positions)
        R = len(layout.mask)
        x = self.embed(context)
        no_position = self.positions.new_zeros(S - P, x.shape[1])           # [CLS] has none
        x = unpack(x, context_order, B * S).view(B, S, -1)                  # to their places
        x = x + torch.cat([no_position, self.positions])
        x = x.repeat_interleave(R // B, dim=0)                              # for each prediction
        queries = (self.mask_token + self.positions).expand(R, P, -1)
        x = torch.cat([x, queries], dim=1)                                  # (R, C + P + P, width)
        x = x.flatten(0, 1).index_select(0, layout.order)                   # packed again
        for block in self.blocks:
            x = block(x, layout)
        return self.project(self.norm(x.index_select(0, masks)))
