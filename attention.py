"""Transformer blocks over ragged sets of tokens: the parts of the ViT and of the region predictor.

    x (R, L, D), every token sees every token                            layout None
    x (T, D), the T tokens that R sequences hold between them,           layout = arrange(...)
              each seeing what its region may see

DSeq-JEPA's context encoder sees 40 to 65 % of an image's patches, and how many differs from image
to image. So tokens travel packed, without padding, through the linear layers, which are 95 %
of the work, and are laid out in rows only where they meet: in attention. This is what keeps one
region-causal pass (Sec. 3.3) at about the cost of I-JEPA; with all patches in the context encoder
it costs twice as much.

Blocks are those of ViT (Dosovitskiy et al., 2021): pre-norm, GELU, four times as wide inside.
Parameters are named as in timm. Checked in tests/test_attention.py.
"""
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Layout(NamedTuple):
    """Where T packed tokens come from, where they meet, and which see which. See `arrange`."""
    order: torch.Tensor     # (T,) their indices among all R * S places, row by row
    slot: torch.Tensor      # (T,) their indices among the R * L slots where they meet
    mask: torch.Tensor      # (R, 1, L, L) bool, True: the query (dim 2) sees the key (dim 3)


def sizes(*present):
    """(T, L) for each (R, S) bool: tokens in all, and slots a row needs, those of the longest row.

    L is a multiple of 8: fast attention wants that of a mask.

    The only place in a training step where the host waits for the device: both must be known to
    leave out what nobody sees, and they differ from step to step. One wait, whatever the number
    of arguments."""
    counts = []
    for flags in present:
        tokens = flags.sum(1)                                   # of each row
        counts.append(torch.stack([tokens.sum(), tokens.max()]))
    counts = torch.stack(counts).tolist()                       # the wait
    return [(T, 8 * math.ceil(max(1, longest) / 8)) for T, longest in counts]


def indices_where(flags, n):
    """Indices (n,) of the n True in `flags`, flattened: nonzero() for a known n, without a wait.

    A stable sort brings the True to the front, in their order."""
    return (~flags).flatten().int().argsort(stable=True)[:n]


def arrange(rank, group, size):
    """Layout of the tokens with rank > 0.

    rank (R, S) int64: 0 = absent.  size: (T, L) from `sizes`.
    group (R, S) int64: 0 = context, g > 0 = mask tokens of one target.
    A token of rank k sees the context of ranks 1..k; mask tokens also see their own group, and only
    that. An example, all of it context:

        R = 2 rows of S = 5 places     T = 6 packed tokens         R = 2 rows of L = 8 slots
            rank  1 0 2 1 3                   a b c d e f              a b c d . . . .
                  0 2 0 2 0            order  0 2 3 4 6 8              e f . . . . . .
                                       slot   0 1 2 3 8 9

        mask of row 1      keys  a b c d    of ranks 1 2 1 3
                  query a        x . x .
                        b        x x x .
                        c        x . x .
                        d        x x x x
    """
    R = len(rank)
    T, L = size
    present = rank > 0
    order = indices_where(present, T)
    first_slot = L * torch.arange(R, device=rank.device)[:, None]           # of each row
    slot = (first_slot + present.cumsum(1) - 1).flatten()[order]

    rank = unpack(rank.flatten()[order], slot, R * L).view(R, L)
    group = unpack(group.flatten()[order], slot, R * L).view(R, L)
    query_rank, key_rank = rank[:, :, None], rank[:, None, :]
    query_group, key_group = group[:, :, None], group[:, None, :]
    sees_context = (key_rank > 0) & (key_rank <= query_rank)
    mask = torch.where(key_group == 0, sees_context, key_group == query_group)
    itself = torch.eye(L, dtype=torch.bool, device=rank.device)
    mask = (mask | itself)[:, None]         # a query that saw nothing, as padding would, gives NaN

    # Sizes differ from step to step: compile for any at once.
    torch._dynamo.maybe_mark_dynamic(order, 0)
    torch._dynamo.maybe_mark_dynamic(slot, 0)
    torch._dynamo.maybe_mark_dynamic(mask, (2, 3))
    return Layout(order, slot, mask)


def unpack(x, index, places):
    """Packed tokens (T, ...) to their places, zeros elsewhere: (places, ...)."""
    return x.new_zeros(places, *x.shape[1:]).index_copy(0, index, x)


class Attention(nn.Module):
    """Multi-head self-attention: (R, L, D) -> (R, L, D), or packed (T, D) -> (T, D)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, layout=None):
        qkv = self.qkv(x)
        mask = None
        if layout is not None:
            mask = layout.mask
            R, L = mask.shape[0], mask.shape[3]
            qkv = unpack(qkv, layout.slot, R * L).unflatten(0, (R, L))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x.transpose(1, 2).flatten(2)                        # heads side by side: (R, L, D)
        if layout is not None:
            x = x.flatten(0, 1).index_select(0, layout.slot)
        return self.proj(x)


class TransformerBlock(nn.Module):
    """x + attention, then x + MLP.

    drop_path: what either branch passes on its way back; ViT.drop_paths puts more there than the
    identity."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))
        self.drop_path = nn.Identity()

    def forward(self, x, layout=None):
        x = x + self.drop_path(self.attn(self.norm1(x), layout))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def initialise(module):
    """As ViT: truncated normal weights of std 0.02, zero biases.

    (I-JEPA means to scale them down by depth, then overwrites that.)"""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)


def sincos_positions(dim, height, width, rows=None, columns=None):
    """Fixed 2-D sine-cosine positions (height * width, dim), row by row.

    The first half of dim codes the column (as MAE).
    rows (height,), columns (width,): coordinates, where they are not 0, 1, 2, ..."""
    rows = torch.arange(height) if rows is None else rows
    columns = torch.arange(width) if columns is None else columns
    frequency = 10_000 ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    of_column = column.flatten()[:, None] * frequency
    of_row = row.flatten()[:, None] * frequency
    return torch.cat([of_column.sin(), of_column.cos(), of_row.sin(), of_row.cos()], dim=1)
