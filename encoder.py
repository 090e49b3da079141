"""Encoder f_theta (seq-JEPA Secs. 2.2, 4.2): a ResNet-18 that turns a view into a vector.

    x (B, 3, H, W), any H and W  ->  z (B, D),  D = 8 * width = 512

No projector follows: z itself is what is predicted and probed. Parameters are named as in
torchvision, so `encoder.pt` of a full-width run with the standard stem loads into
`torchvision.models.resnet18` whose `fc` is an Identity.

Not in the paper's text but in the authors' code: the last BatchNorm of every residual branch starts
at zero, so each block starts as the identity. Ours, off by default: `z_norm` (see ResNet18).
Checked in tests/test_encoder.py against torchvision's ResNet-18, weight by weight.
"""
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, C_in, H, W) -> (B, C_out, H/stride, W/stride)."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(shortcut + self.bn2(self.conv2(x)))


class ResNet18(nn.Module):
    """ResNet-18 without a classifier (He et al., 2016).

    width: channels of the first stage; the paper's is 64.
    stem: "imagenet", 7x7 stride 2 and max-pooling; "cifar", 3x3 stride 1 without pooling, for 32x32
        images and foveal patches (Sec. 4.2); "strided", 3x3 stride 2, ours, a quarter of the work.
    z_norm: standardise z over the batch (BatchNorm without affine). Pooled ReLU features share a
        large mean, which makes cosine similarity cheap and lets a short run learn little."""

    def __init__(self, *, width=64, stem="imagenet", z_norm=False):
        super().__init__()
        kernel, stride = {"imagenet": (7, 2), "cifar": (3, 1), "strided": (3, 2)}[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, padding=kernel // 2, bias=False)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1), Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2), Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(Block(4 * width, 8 * width, 2), Block(8 * width, 8 * width, 1))
        self.dim = 8 * width
        self.norm = nn.BatchNorm1d(self.dim, affine=False) if z_norm else nn.Identity()
        self._initialise()

    def _initialise(self):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Block):
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.norm(x.mean((2, 3)).float())       # fp32 from here on: z enters a cosine and a BatchNorm
