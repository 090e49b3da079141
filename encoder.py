"""Encoders f_theta: a ResNet-18 turns a view into a vector, a ViT turns an image into tokens.

    ResNet18   seq-JEPA Secs. 2.2, 4.2
               x (B, 3, H, W), any H and W  ->  z (B, D),  D = 8 * width = 512
    ViT        DSeq-JEPA Sec. 3.1, 0.A.1.1
               x (B, 3, H, W)  ->  (B, C+P, D): C [CLS] tokens (1 or 0), P patches
                               or packed (T, D): only the tokens of a Layout (attention.py)

No projector follows: z itself is what is predicted and probed. Parameters of the ResNet are named
as in torchvision, so `encoder.pt` of a full-width run with the standard stem loads into
`torchvision.models.resnet18` whose `fc` is an Identity; those of the ViT as in timm.

Not in the paper's text but in the authors' code: the last BatchNorm of every residual branch starts
at zero, so each block starts as the identity. Ours, off by default: `z_norm` (see ResNet18).
Checked in tests/test_encoder.py against torchvision's ResNet-18 and ViT, weight by weight.
"""
import torch
import torch.nn.functional as F
from torch import nn

from attention import TransformerBlock, initialise, sincos_positions


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
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

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
        z = x.mean((2, 3)).float()          # fp32 from here on: z enters a cosine and a BatchNorm
        return self.norm(z)


VITS = {            # D, blocks, heads;  nano is ours, for laptops
    "vit-nano": (128, 6, 4),
    "vit-tiny": (192, 12, 3),
    "vit-small": (384, 12, 6),
    "vit-base": (768, 12, 12),
    "vit-large": (1024, 24, 16),
    "vit-huge": (1280, 32, 16),
}


class ViT(nn.Module):
    """Vision transformer with fixed sin-cos positions (0.A.1.1).

    name: a key of VITS.  image_size, patch_size: pixels; the first a multiple of the second.
    cls: whether [CLS] stands before the patches. It has no position of its own."""

    def __init__(self, name, *, image_size, patch_size, cls=True):
        super().__init__()
        self.dim, self.depth, heads = VITS[name]
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.own_grid = self.grid
        self.learned_positions = None       # (P, D) of the own grid, if weights came with their own
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(3, self.dim, patch_size, patch_size)
        self.register_buffer("positions", sincos_positions(self.dim, *self.grid), persistent=False)
        self.cls_token = nn.Parameter(torch.zeros(self.dim)) if cls else None
        self.blocks = nn.ModuleList(TransformerBlock(self.dim, heads) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        initialise(self)
        if cls:
            nn.init.trunc_normal_(self.cls_token, std=0.02)

    def regrid(self, height, width):
        """From now on see images of height x width patches. Parameters and state dict stay.

        Positions are those of the own grid, spread over the image as its patches were: sines and
        cosines at places between (equal to bicubic interpolation, as MAE's followers do, to a
        cosine of 0.9999), learned ones interpolated."""
        g_height, g_width = self.own_grid
        if self.learned_positions is not None:
            own = self.learned_positions.T.reshape(1, self.dim, g_height, g_width)
            resized = F.interpolate(own, (height, width), mode="bicubic")
            positions = resized.flatten(2)[0].T.contiguous()
        else:
            rows = (torch.arange(height) + 0.5) * (g_height / height) - 0.5
            columns = (torch.arange(width) + 0.5) * (g_width / width) - 0.5
            positions = sincos_positions(self.dim, height, width, rows, columns)
        self.positions = positions.to(self.positions)
        self.grid = (height, width)

    def drop_paths(self, highest):
        """In train mode, leave out a sample's branches at random (stochastic depth).

        With probability 0 in the first block, rising in proportion to `highest` in the last; what
        is kept is scaled up. Not for passes with a layout, whose rows are no samples."""
        from torchvision.ops import StochasticDepth  # a second, which pre-training need not wait
        for i, block in enumerate(self.blocks):
            p = highest * i / max(1, self.depth - 1)
            block.drop_path = StochasticDepth(p, "row") if p > 0 else nn.Identity()

    def tokens(self, x, copies=1):
        """What enters the first block: (B, copies + P, D), copies of [CLS] before the patches."""
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.positions
        if self.cls_token is None:
            return patches
        cls = self.cls_token.expand(len(x), copies, -1).to(patches.dtype)
        return torch.cat([cls, patches], dim=1)

    def forward(self, x, layout=None, copies=1, keep=()):
        """[*outputs of the blocks numbered `keep`, from 1 up and in order; output after the last
        LayerNorm], each (B, C+P, D).

        layout: use only its tokens, each seeing what the layout lets it see; outputs are then
        packed, (T, D)."""
        outputs = []
        x = self.tokens(x, copies)
        if layout is not None:
            x = x.flatten(0, 1).index_select(0, layout.order)
        for number, block in enumerate(self.blocks, 1):
            x = block(x, layout)
            if number in keep:
                outputs.append(x)
        return [*outputs, self.norm(x)]


def load_pretrained(vit, state):
    """Fill `vit`, in place, from the state dict of a timm-style or I-JEPA-style ViT of its shape.

    Prefixes ("module.", "encoder.", ...) are dropped, as are heads. [CLS] may be missing.
    Raises: KeyError if any other weight is missing, ValueError if its positions are not our fixed
    ones."""
    first = "patch_embed.proj.weight"
    prefix = next((k for k in state if k.endswith(first)), first).removesuffix(first)
    positions = state.get(prefix + "pos_embed")
    if positions is not None:
        of_patches = positions.reshape(-1, vit.dim)[-len(vit.positions):]       # [CLS]'s come first
        if not torch.allclose(of_patches, vit.positions, atol=1e-4):
            raise ValueError("the weights were trained with other positions than fixed 2-D "
                             "sine-cosine ones of this grid")
    weights = {}
    for name, ours in vit.state_dict().items():
        missing_cls = name == "cls_token" and prefix + name not in state
        weights[name] = ours if missing_cls else state[prefix + name].reshape(ours.shape)
    vit.load_state_dict(weights)
