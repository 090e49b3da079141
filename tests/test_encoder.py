"""The encoders against torchvision's ResNet-18 and VisionTransformer."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from attention import arrange, sincos_positions, sizes
from encoder import Block, ResNet18, ViT


def torchvision_twin(encoder):
    """torchvision's ResNet-18 without classifier, with our weights, as docs/weights.md tells users
    to load encoder.pt."""
    twin = torchvision.models.resnet18()
    twin.fc = nn.Identity()
    twin.load_state_dict(encoder.state_dict(), strict=True)
    return twin


def shaken(encoder):
    """Random norms, so that zero-initialised branches and unit statistics cannot hide a
    difference."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return encoder


@pytest.mark.parametrize("size", [64, 75, 33])
@pytest.mark.parametrize("training", [True, False])
def test_standard_stem_equals_torchvision(size, training):
    encoder = shaken(ResNet18()).train(training)
    twin = torchvision_twin(encoder).train(training)
    x = torch.randn(3, 3, size, size)
    torch.testing.assert_close(encoder(x), twin(x), atol=1e-4, rtol=1e-4)


def test_cifar_stem_equals_torchvision_with_its_stem_replaced():
    encoder = shaken(ResNet18(stem="cifar")).eval()
    twin = torchvision.models.resnet18()
    twin.conv1, twin.maxpool, twin.fc = (
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.Identity(),
        nn.Identity(),
    )
    twin.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), twin.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stem", ["cifar", "imagenet", "strided"])
def test_width_and_any_size(stem):
    encoder = ResNet18(width=4, stem=stem).eval()
    for size in ((32, 32), (17, 40), (96, 96)):
        assert encoder(torch.randn(2, 3, *size)).shape == (2, 32)


def test_blocks_start_as_the_identity():
    block = ResNet18(width=8).layer1[0].eval()
    x = torch.rand(2, 8, 5, 5)
    assert torch.equal(block(x), x)
    assert all(
        (m.bn2.weight == 0).all() for m in ResNet18(width=4).modules() if isinstance(m, Block)
    )


def test_z_norm_standardises_and_is_off_by_default():
    x = torch.randn(16, 3, 32, 32)
    z = ResNet18(width=4, stem="cifar", z_norm=True)(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    plain = ResNet18(width=4, stem="cifar")
    assert (plain(x) >= 0).all() and not any("norm" in key for key in plain.state_dict())


# ---------------------------------------------------------------- ViT

def torchvision_vit(vit):
    """torchvision's VisionTransformer with the same weights; an independent implementation of
    attention and MLP."""
    theirs = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=vit.depth,
        num_heads=vit.blocks[0].attn.heads,
        hidden_dim=vit.dim,
        mlp_dim=4 * vit.dim,
    )
    state = {
        "class_token": vit.cls_token.view(1, 1, -1),
        "conv_proj.weight": vit.patch_embed.proj.weight,
        "conv_proj.bias": vit.patch_embed.proj.bias,
        "encoder.pos_embedding": torch.cat([torch.zeros(1, vit.dim), vit.positions])[None],
        "encoder.ln.weight": vit.norm.weight,
        "encoder.ln.bias": vit.norm.bias,
    }
    names = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.proj": "self_attention.out_proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    }
    for i, block in enumerate(vit.blocks):
        for ours, other in names.items():
            for kind in ("weight", "bias"):
                state[f"encoder.layers.encoder_layer_{i}.{other}.{kind}"] = block.get_parameter(
                    f"{ours}.{kind}"
                )
        state[f"encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight"] = (
            block.attn.qkv.weight
        )
        state[f"encoder.layers.encoder_layer_{i}.self_attention.in_proj_bias"] = block.attn.qkv.bias
    keys = theirs.load_state_dict(state, strict=False)
    assert not keys.unexpected_keys and all(k.startswith("heads") for k in keys.missing_keys)
    return theirs.eval()


def test_vit_agrees_with_torchvision():
    vit, x = ViT("vit-nano", image_size=32, patch_size=8), torch.randn(2, 3, 32, 32)
    for p in vit.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    theirs = torchvision_vit(vit)
    tokens = theirs.encoder(
        torch.cat([theirs.class_token.expand(2, -1, -1), theirs._process_input(x)], dim=1)
    )
    torch.testing.assert_close(vit(x)[0], tokens, atol=1e-4, rtol=1e-4)


# Published counts of DeiT-Ti, DeiT-S and torchvision's vit_b_16, vit_l_16, vit_h_14, less
# classifier and learned positions.
@pytest.mark.parametrize(
    "name, count",
    [
        ("vit-tiny", 5_717_416 - 193 * 1000 - 197 * 192),
        ("vit-small", 22_050_664 - 385 * 1000 - 197 * 384),
        ("vit-base", 86_567_656 - 769 * 1000 - 197 * 768),
        ("vit-large", 304_326_632 - 1025 * 1000 - 197 * 1024),
        ("vit-huge", 632_045_800 - 1281 * 1000 - 257 * 1280),
    ],
)
def test_vit_sizes(name, count):
    with torch.device("meta"):
        vit = ViT(name, image_size=224, patch_size=14 if name == "vit-huge" else 16)
    assert sum(p.numel() for p in vit.parameters()) == count


@pytest.mark.parametrize("cls", [True, False])
def test_vit_keeps_blocks_and_counts_tokens(cls):
    vit, x = ViT("vit-nano", image_size=32, patch_size=8, cls=cls), torch.randn(2, 3, 32, 32)
    second, last, normed = vit(x, keep=(2, 6))
    assert second.shape == last.shape == normed.shape == (2, 16 + cls, 128)
    torch.testing.assert_close(vit.norm(last), normed)
    shorter = ViT("vit-nano", image_size=32, patch_size=8, cls=cls)
    shorter.load_state_dict(vit.state_dict())
    shorter.blocks = shorter.blocks[:2]
    torch.testing.assert_close(shorter(x, keep=(2,))[0], second)


def test_hidden_tokens_cannot_reach_visible_ones():
    vit, x = (
        ViT("vit-nano", image_size=32, patch_size=8),
        torch.randn(1, 3, 32, 32, requires_grad=True),
    )
    rank = torch.zeros(1, 17, dtype=torch.long)
    rank[0, [0, 1, 2, 6]] = 1                                       # [CLS] and patches 0, 1, 5
    tokens, = vit(x, arrange(rank, torch.zeros_like(rank), sizes(rank > 0)[0]))
    tokens.square().sum().backward()
    seen = F.max_pool2d(x.grad.abs().sum(1), 8).flatten() > 0
    assert tokens.shape == (4, 128) and seen.nonzero().flatten().tolist() == [0, 1, 5]


# ---------------------------------------------------------------- other grids, stochastic depth

def test_own_grid_again_is_what_it_was():
    vit = ViT("vit-nano", image_size=32, patch_size=8)
    before, state = vit.positions.clone(), vit.state_dict()
    vit.regrid(7, 3)
    assert vit.grid == (7, 3) and vit(torch.randn(1, 3, 56, 24))[0].shape == (1, 22, 128)
    vit.regrid(4, 4)
    torch.testing.assert_close(vit.positions, before, atol=1e-6, rtol=0)
    assert vit.state_dict().keys() == state.keys()


@pytest.mark.parametrize("own, height, width", [(14, 32, 32), (14, 64, 64), (14, 32, 21)])
def test_positions_of_a_larger_grid_are_those_interpolated(own, height, width):
    vit = ViT("vit-tiny", image_size=own * 4, patch_size=4)
    plain = sincos_positions(192, own, own).T.reshape(1, 192, own, own)
    expected = F.interpolate(plain, (height, width), mode="bicubic").flatten(2)[0].T
    vit.regrid(height, width)
    cosine = F.cosine_similarity(vit.positions, expected, dim=1)
    assert cosine.mean() > 0.9998 and cosine.min() > 0.99
    naive = F.cosine_similarity(sincos_positions(192, height, width), expected, dim=1)
    assert naive.mean() < 0.85


def test_learned_positions_are_interpolated_not_replaced():
    vit = ViT("vit-nano", image_size=32, patch_size=8)
    vit.learned_positions = torch.randn(16, 128)
    vit.regrid(4, 4)
    torch.testing.assert_close(vit.positions, vit.learned_positions)
    vit.regrid(8, 8)
    vit.regrid(4, 4)
    torch.testing.assert_close(vit.positions, vit.learned_positions)


def test_drop_path_leaves_out_branches_in_proportion_to_depth():
    vit, x = ViT("vit-nano", image_size=32, patch_size=8), torch.randn(20, 3, 8, 8)
    vit.regrid(1, 1)
    names = list(vit.state_dict())
    expected = vit(x)[0]
    vit.drop_paths(0.5)
    assert torch.equal(vit.eval()(x)[0], expected) and list(vit.state_dict()) == names
    assert vit.blocks[0].drop_path(x) is x
    vit.train()
    for block, p in zip(vit.blocks[1:], (0.1, 0.2, 0.3, 0.4, 0.5)):
        kept = block.drop_path(torch.ones(4000, 2, 3))
        assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        assert torch.equal(kept, kept[:, :1, :1].expand_as(kept))           # whole samples
        assert (kept == 0).float().mean().item() == pytest.approx(p, abs=0.04)
    vit.drop_paths(0.0)
    assert torch.equal(vit(x)[0], expected)
