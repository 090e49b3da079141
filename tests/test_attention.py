"""Packed, masked attention against one image and one token at a time."""
import pytest
import torch
import torch.nn.functional as F

from attention import (
    Attention,
    TransformerBlock,
    arrange,
    indices_where,
    sincos_positions,
    sizes,
    unpack,
)

# the second image has no token at all
RANK = torch.tensor([[1, 0, 2, 1, 3], [0, 0, 0, 0, 0], [0, 2, 0, 2, 0]])


def layout_of(rank, group=None):
    group = torch.zeros_like(rank) if group is None else group
    return arrange(rank, group, sizes(rank > 0)[0])


def test_sizes_are_totals_and_longest_rows_rounded_up():
    assert sizes(
        RANK > 0, torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    ) == [(6, 8), (0, 8), (6, 8)]


def test_indices_where_is_nonzero():
    flags = torch.rand(7, 9) < 0.4
    assert torch.equal(indices_where(flags, int(flags.sum())), flags.flatten().nonzero()[:, 0])
    assert indices_where(torch.zeros(2, 3, dtype=torch.bool), 0).shape == (0,)


def test_the_example_that_arrange_draws():
    layout = layout_of(torch.tensor([[1, 0, 2, 1, 3], [0, 2, 0, 2, 0]]))
    assert layout.order.tolist() == [0, 2, 3, 4, 6, 8]
    assert layout.slot.tolist() == [0, 1, 2, 3, 8, 9]
    drawn = ["x.x.", "xxx.", "x.x.", "xxxx"]
    assert layout.mask[0, 0, :4, :4].tolist() == [[c == "x" for c in row] for row in drawn]


def test_order_and_slot_by_hand():
    layout = layout_of(RANK)
    assert layout.order.tolist() == [0, 2, 3, 4, 11, 13]          # row * 5 + place
    # row * 8 + rank among the row's own
    assert layout.slot.tolist() == [0, 1, 2, 3, 16, 17]
    assert layout.mask.shape == (3, 1, 8, 8)


def test_mask_by_hand():
    see = layout_of(RANK).mask[0, 0, :4, :4].int().tolist()       # tokens of ranks 1, 2, 1, 3
    assert see == [[1, 0, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 1]]


def test_mask_tokens_see_earlier_context_and_their_own_group_only():
    # context of ranks 1, 2; mask tokens of steps 1, 1, 2
    rank = torch.tensor([[1, 2, 1, 1, 2]])
    group = torch.tensor([[0, 0, 1, 1, 2]])
    see = layout_of(rank, group).mask[0, 0, :5, :5].int().tolist()
    assert see == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0],
        [1, 0, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("block", [Attention(16, 4), TransformerBlock(16, 4)])
def test_packed_is_each_image_by_itself_and_each_token_by_its_own_keys(block):
    x, layout = torch.randn(3, 5, 16), layout_of(RANK)
    packed = block(x.flatten(0, 1)[layout.order], layout)
    for token, (image, place) in zip(packed, [(0, 0), (0, 2), (0, 3), (0, 4), (2, 1), (2, 3)]):
        seen = [p for p in range(5) if 0 < RANK[image, p] <= RANK[image, place] or p == place]
        # a row in which everybody sees what this token sees; only its own output is looked at
        alone = one_layer(block, x[image, seen], seen.index(place))
        torch.testing.assert_close(token, alone, atol=1e-5, rtol=1e-5)


def one_layer(block, x, query):
    """The output for x[query], all of x (n, D) as keys, written out."""
    attention = block.attn if isinstance(block, TransformerBlock) else block
    y = block.norm1(x) if isinstance(block, TransformerBlock) else x
    q, k, v = attention.qkv(y).view(len(x), 3, 4, 4).unbind(1)
    weight = torch.einsum("hd,nhd->hn", q[query], k).div(2).softmax(1)         # sqrt(4)
    out = attention.proj(torch.einsum("hn,nhd->hd", weight, v).flatten())
    if isinstance(block, TransformerBlock):
        out = x[query] + out
        out = out + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(out))))
    return out


def test_full_layout_is_no_layout():
    block, x = TransformerBlock(16, 2), torch.randn(2, 7, 16)
    layout = layout_of(torch.ones(2, 7, dtype=torch.long))
    torch.testing.assert_close(
        block(x.flatten(0, 1), layout).view_as(x), block(x), atol=1e-5, rtol=1e-5
    )


def test_no_token_at_all_is_finite():
    rank = torch.zeros(2, 3, dtype=torch.long)
    out = TransformerBlock(8, 2)(torch.randn(6, 8)[:0], layout_of(rank))
    assert out.shape == (0, 8)


def test_unpack_puts_tokens_in_their_places():
    x = torch.tensor([[1.0], [2.0]])
    assert unpack(x, torch.tensor([3, 1]), 4).flatten().tolist() == [0, 2, 0, 1]


def test_positions_tell_every_patch_apart_and_follow_the_formula():
    positions = sincos_positions(16, 3, 5)
    assert (
        positions.shape == (15, 16)
        and torch.cdist(positions, positions).fill_diagonal_(9).min() > 0.1
    )
    # patch 2 * 5 + 3, second frequency
    row, column, i = 2, 3, 1
    angle = column / 10_000 ** (i / 4), row / 10_000 ** (i / 4)
    expected = torch.tensor([angle[0], angle[0], angle[1], angle[1]])
    got = positions[13, [i, 4 + i, 8 + i, 12 + i]]
    torch.testing.assert_close(
        got,
        torch.stack([expected[0].sin(), expected[1].cos(), expected[2].sin(), expected[3].cos()]),
    )
