"""Transformer blocks over ragged sets of tokens: what the ViT encoder and the region predictor are made of.

    x (R, L, D), every token sees every token                            layout None
    x (T, D), the T tokens that R sequences hold between them,           layout = arrange(...)
              each seeing what its region may see

DSeq-JEPA's context encoder sees less than half of an image's patches, and how many differs from image to image.
So tokens travel packed, without padding, through the linear layers, which are 95 % of the work, and are laid
out in rows only where they meet: in attention. This is what keeps one region-causal pass (Sec. 3.3) at about the
cost of I-JEPA; with all patches in the context encoder it costs twice as much.

Blocks are those of ViT (Dosovitskiy et al., 2021): pre-norm, GELU, four times as wide inside. Parameters are named
as in timm. Checked in tests/test_attention.py.
"""
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Layout(NamedTuple):
    """Where T packed tokens come from, where they meet, and which see which."""
    order: torch.Tensor     # (T,) their indices among all R * S places, row by row
    slot: torch.Tensor      # (T,) their indices in R rows of length L
    mask: torch.Tensor      # (R, 1, L, L) bool, True: the query (dim 2) sees the key (dim 3)


def sizes(*present):
    """(T, L) for each (R, S) bool: tokens in all, and in the longest row, up to a multiple of 8: fast attention wants that of a mask.

    The only place in a training step where the host waits for the device: both must be known to leave out what
    nobody sees, and they differ from step to step. One wait, whatever the number of arguments."""
    counts = [p.sum(1) for p in present]
    numbers = torch.stack([n for c in counts for n in (c.sum(), c.max())]).tolist()
    return [(T, -(-max(1, L) // 8) * 8) for T, L in zip(numbers[::2], numbers[1::2])]


def arrange(rank, group, size):
    """Layout of the tokens with rank > 0.

    rank (R, S) int64: 0 = absent.  group (R, S) int64: 0 = context, g > 0 = mask tokens of one target.
    A token of rank k sees the context of ranks 1..k; mask tokens also see their own group, and only that.
    size: (T, L) from `sizes`."""
    (R, S), (T, L) = rank.shape, size
    present = rank > 0
    order = (~present).flatten().int().argsort(stable=True)[:T]
    row = torch.arange(R, device=rank.device)[:, None]
    slot = (present.cumsum(1) - 1 + row * L).flatten()[order]
    rank, group = (x.new_zeros(R * L).index_copy(0, slot, x.flatten()[order]).view(R, L) for x in (rank, group))
    ranks_seen = (rank[:, None, :] > 0) & (rank[:, None, :] <= rank[:, :, None])
    mask = torch.where(group[:, None, :] == 0, ranks_seen, group[:, None, :] == group[:, :, None])
    mask |= torch.eye(L, dtype=torch.bool, device=rank.device)      # a row that sees nothing, as padding would, turns to NaN
    layout = Layout(order, slot, mask[:, None])
    for x, dims in zip(layout, (0, 0, (2, 3))):         # sizes differ from step to step: compile for any at once
        torch._dynamo.maybe_mark_dynamic(x, dims)
    return layout


def unpack(x, index, places):
    """Packed tokens (T, D) to their places, zeros elsewhere: (places, D)."""
    return x.new_zeros(places, x.shape[1]).index_copy(0, index, x)


class Attention(nn.Module):
    """Multi-head self-attention: (R, L, D) -> (R, L, D), or packed (T, D) -> (T, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, layout=None):
        qkv, mask = self.qkv(x), None
        if layout is not None:
            mask, (R, _, L, _) = layout.mask, layout.mask.shape
            qkv = unpack(qkv, layout.slot, R * L).unflatten(0, (R, L))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return self.proj(x if layout is None else x.flatten(0, 1).index_select(0, layout.slot))


class TransformerBlock(nn.Module):
    """x + attention, then x + MLP."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x, layout=None):
        x = x + self.attn(self.norm1(x), layout)
        return x + self.mlp(self.norm2(x))


def initialise(module):
    """As ViT: truncated normal weights of std 0.02, zero biases. (I-JEPA means to scale them down by depth, then overwrites that.)"""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


def sincos_positions(dim, height, width):
    """Fixed 2-D sine-cosine positions (height * width, dim), row by row; the first half of dim codes the column (as MAE)."""
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (column, row)]
    return torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)
