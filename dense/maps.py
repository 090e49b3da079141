"""A ViT's tokens as maps, for heads that look at images: (B, 3, H, W) -> (B, D, H/p, W/p).

    last_map(vit, images)       of the last norm, for a linear probe
    FourMaps(vit)(images)       of four blocks, at 4, 8, 16 and 32 pixels between neighbours

Images may have any size that is a multiple of the patch size. The authors take blocks 4, 6,
8, 12 of 12 and rescale by 4, 2, 1, 1/2; how, they leave open. Checked in tests/test_segment.py.
"""
import math

from torch import nn
from torchvision.models.convnext import LayerNorm2d

BLOCKS = (4, 6, 8, 12)          # of 12
STRIDES = (4, 8, 16, 32)        # pixels between neighbours on the four maps


def patch_size(vit):
    """Pixels."""
    return vit.patch_embed.proj.kernel_size[0]


def token_maps(vit, images, blocks=()):
    """Maps of these blocks and, after the last norm, of the last: a list of (B, D, H/p, W/p)."""
    p = patch_size(vit)
    grid = (images.shape[2] // p, images.shape[3] // p)
    if grid != vit.grid:
        vit.regrid(*grid)
    C = int(vit.cls_token is not None)
    outputs = vit(images, keep=blocks)
    return [tokens[:, C:].transpose(1, 2).unflatten(2, grid) for tokens in outputs]


def last_map(vit, images):
    """The patch tokens of the last norm (B, D, H/p, W/p)."""
    return token_maps(vit, images)[0]


def four_blocks(depth):
    """Numbers of the blocks that are looked at: 4, 6, 8, 12 of 12, others in proportion."""
    return tuple(round(depth * block / 12) for block in BLOCKS)


def rescale(dim, patch, stride):
    """Layers from a map of one vector a patch to one of about this stride, in pixels.

    Twice as fine per transposed convolution, half as fine per halving by maxima."""
    doublings = round(math.log2(patch / stride))
    layers = []
    for _ in range(doublings):
        if layers:
            layers += [LayerNorm2d(dim, eps=1e-6), nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, dim, 2, 2))
    if doublings < 0:
        layers.append(nn.MaxPool2d(2 ** -doublings))
    return nn.Sequential(*layers)


class FourMaps(nn.Module):
    """images (B, 3, H, W) -> four maps, fine to coarse: (B, D, H/s, W/s) for s of STRIDES.

    The last block's come after the ViT's last norm, so that all of its weights are trained."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit
        self.rescale = nn.ModuleList(rescale(vit.dim, patch_size(vit), s) for s in STRIDES)

    def forward(self, images):
        maps = token_maps(self.vit, images, four_blocks(self.vit.depth)[:3])
        return [rescale(each) for rescale, each in zip(self.rescale, maps)]
