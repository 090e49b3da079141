"""Heads that say what is at each place of a map: from one map of a ViT (dense/maps.py) or four.

    Linear(dim, C)(map)         (B, D, h, w) -> [logits (B, C, h, w)]
    UPerNet(...)(maps)          four maps, fine to coarse -> [logits (B, C, h_0, w_0), the auxiliary
                                head's (B, C, h_2, w_2)]

UPerNet is that of Xiao et al., 2018: means over the coarsest map at four scales, then sums from
coarse to fine, and all levels joined. Checked in tests/test_segment.py.
"""
import torch
import torch.nn.functional as F
from torch import nn

POOLS = (1, 2, 3, 6)            # cells a side, of which means of the coarsest map are taken


def conv(c_in, c_out, kernel):
    """Convolution, BatchNorm, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False),
                         nn.BatchNorm2d(c_out), nn.ReLU())


def resize(x, size):
    """(B, C, h, w) -> (B, C, *size)"""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class Linear(nn.Module):
    """BatchNorm and a linear classifier of each vector: (B, D, h, w) -> [(B, C, h, w)]."""

    def __init__(self, dim, classes):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.classify = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x):
        return [self.classify(self.norm(x))]


class UPerNet(nn.Module):
    """See the module.  channels: of every level.  auxiliary: of the FCN beside it, in training."""

    def __init__(self, dim, classes, channels, auxiliary):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(cells), conv(dim, channels, 1)) for cells in POOLS)
        self.coarsest = conv(dim + len(POOLS) * channels, channels, 3)
        self.lateral = nn.ModuleList(conv(dim, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(conv(channels, channels, 3) for _ in range(3))
        self.fuse = conv(4 * channels, channels, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(channels, classes, 1))
        self.auxiliary = nn.Sequential(conv(dim, auxiliary, 3), nn.Dropout2d(0.1),
                                       nn.Conv2d(auxiliary, classes, 1))

    def forward(self, maps):
        *finer, coarsest = maps
        pooled = [resize(pool(coarsest), coarsest.shape[2:]) for pool in self.pools]
        down = self.coarsest(torch.cat([coarsest, *pooled], dim=1))
        levels = [down]
        for x, lateral, smooth in list(zip(finer, self.lateral, self.smooth))[::-1]:
            down = lateral(x) + resize(down, x.shape[2:])
            levels.append(smooth(down))
        finest = levels[-1].shape[2:]
        fused = self.fuse(torch.cat([resize(level, finest) for level in levels[::-1]], dim=1))
        return [self.classify(fused), self.auxiliary(maps[2])]
