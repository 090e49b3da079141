"""Where would a person look? Saliency maps that fixations are drawn from (seq-JEPA Secs. 2.3, A.1).

    images (N, 3, S, S) uint8  ->  maps (N, S, S), float16 or float32, >= 0, any scale per image

Chosen by --saliency:
  signature   embedded: the image signature of Hou, Harel & Koch (TPAMI 2012) with a centre prior,
              a bottom-up method in a few matrix products; computed once and cached
  DIR         published maps, one file a split: DIR/saliency_SPLIT.npy or
              DIR/SPLIT/saliency_SPLIT.npy, (N, 1, S, S) or (N, S, S), in the data set's order
  deepgaze    the paper's: DeepGaze IIE through the package deepgaze_pytorch; computed once, cached
  uniform     none: every pixel alike (Table 3, "no saliency")
Checked in tests/test_saliency.py.
"""
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from plumbing.cache import cache_path, cached, open_array
from plumbing.errors import BadInput
from sources.saliency_files import first_look, published

SIGNATURE_SIZE = 64           # Hou et al. work on a thumbnail of about 64 x 48
SIGNATURE_BLUR = 0.05         # of the image side; their best setting is 0.045 of the width
CENTRE_PRIOR = 0.35           # standard deviation of the Gaussian centre prior, image sides
DEEPGAZE_SIZE = 512           # A.1


def saliency_maps(source, split, config, device):
    """Maps for every image of an images.Split: a list of arrays whose rows line up with its images.

    source: "signature", "uniform", "deepgaze" or a folder, as --saliency.
    Raises: BadInput if published maps do not fit the images or deepgaze_pytorch is not there."""
    if source == "uniform":
        return [_uniform(_flat(part.images)) for part in split.parts]
    if source in ("signature", "deepgaze"):
        return [_computed(source, part, split, config, device) for part in split.parts]
    return [published(Path(source), part, config.image_size) for part in split.parts]


def check(config, names):
    """Say now, not when all images are decoded, what is wrong with --saliency.

    names: those of the parts whose maps will be asked for.
    Raises: BadInput if there is no such method, or a folder's maps are absent or look wrong."""
    source = config.saliency
    if source == "deepgaze":
        if not all(cache_path(config, f"{name}-deepgaze").exists() for name in names):
            _find_deepgaze()
    elif source not in ("signature", "uniform"):
        kinds = {name: first_look(Path(source), name, config.image_size) for name in names}
        if len(set(kinds.values())) > 1:
            words = ", ".join(f"{kind} for {name}" for name, kind in kinds.items())
            raise BadInput(f"--saliency {source}: maps are {words}; store them as one type")


def _flat(images):
    return images.reshape(-1, *images.shape[-3:])


def _uniform(images):
    """images (N, 3, S, S) -> ones (N, S, S), a single number in memory."""
    one = torch.ones(1, dtype=torch.float16)
    return one.expand(len(images), *images.shape[-2:]).numpy()


def _computed(name, part, split, config, device):
    """Maps of one part by the method of this name, cached.

    They are scaled to a maximum of 1 per image, as float16 then holds them well."""
    images = _flat(part.images)
    N = len(images)
    S = images.shape[-1]
    bias = centre_bias_file(config)
    key = dict(source=split.source, part=part.name, method=name, version=1)
    if name == "deepgaze" and bias.exists():
        key["bias"] = [bias.stat().st_size, bias.stat().st_mtime_ns]

    def fill(array):
        method = image_signature if name == "signature" else deepgaze(config, device)
        for start in range(0, N, 64):
            batch = torch.from_numpy(np.ascontiguousarray(images[start:start + 64])).to(device)
            maps = method(batch)
            maps = maps / maps.amax((1, 2), keepdim=True)
            after = start + len(batch)
            array[start:after] = maps.half().cpu().numpy()
            yield after

    path = cache_path(config, f"{part.name}-{name}")
    what = f"saliency of {N:,} {part.name} images"
    return cached(path, key, (N, S, S), np.float16, fill, what)


def deepgaze(config, device):
    """DeepGaze IIE as a function of images (B, 3, S, S) uint8 -> maps (B, S, S).

    Images are shown at 512x512 (A.1). Its centre bias is DATA_DIR/centerbias_mit1003.npy (log
    density, any size) if there, else our Gaussian prior.
    Raises: BadInput if the package or its weights are absent."""
    try:
        model = _find_deepgaze()(pretrained=True).to(device).eval()
    except OSError as error:                            # no network, a moved address, no room
        raise BadInput(f"--saliency deepgaze: could not fetch its weights ({error}); "
                       "see github.com/matthias-k/DeepGaze or use --saliency signature") from None
    n = DEEPGAZE_SIZE
    bias_file = centre_bias_file(config)
    if bias_file.exists():
        bias = open_array(bias_file)
        number = bias.dtype.kind in "iuf"
        if bias.ndim != 2 or not number or not bias.size or not np.isfinite(bias).all():
            raise BadInput(f"{bias_file}: expected one map (H, W) of finite log densities, "
                           f"found {bias.dtype} of shape {bias.shape}")
        bias = torch.from_numpy(bias.astype(np.float32))[None, None]
        bias = F.interpolate(bias, size=(n, n), mode="bilinear", align_corners=False)[0, 0]
    else:
        bias = centre_prior(n).log()
    bias = (bias - bias.flatten().logsumexp(0)).to(device)

    @torch.inference_mode()
    def density(images):
        # Pixels stay between 0 and 255, as the model expects.
        x = F.interpolate(images.float(), size=(n, n), mode="bilinear", align_corners=False)
        log_density = model(x, bias.expand(len(x), n, n)).reshape(len(x), 1, n, n)
        maps = F.interpolate(log_density.exp(), size=images.shape[-2:], mode="bilinear",
                             antialias=True, align_corners=False)
        return maps[:, 0]

    return density


def _find_deepgaze():
    """The class of the model."""
    try:
        from deepgaze_pytorch import DeepGazeIIE
    except ImportError:
        raise BadInput("--saliency deepgaze: needs the package deepgaze_pytorch "
                       "(github.com/matthias-k/DeepGaze); "
                       "install it or use --saliency signature") from None
    return DeepGazeIIE


def centre_bias_file(config):
    """Where MIT1003's centre bias is looked for."""
    return Path(config.data_dir) / "centerbias_mit1003.npy"


def centre_prior(n, device=None):
    """Gaussian centre prior (n, n), 1 in the middle: people look there whatever the picture."""
    position = (torch.arange(n, device=device) + 0.5) / n - 0.5
    g = torch.exp(-0.5 * (position / CENTRE_PRIOR) ** 2)
    return g[:, None] * g


def dct_matrix(n):
    """Orthonormal DCT-II as a matrix (n, n).

    C @ x transforms the columns of x, and C.T @ (C @ x) = x."""
    i = torch.arange(n, dtype=torch.float64)    # float32 is too coarse for angles of 200 radians
    C = torch.cos(math.pi * (i + 0.5) * i[:, None] / n) * math.sqrt(2 / n)
    C[0] /= math.sqrt(2)
    return C.float()


def gaussian_matrix(n, sigma):
    """Blur along one axis as a matrix (n, n); rows sum to 1, so borders do not darken."""
    i = torch.arange(n, dtype=torch.float32)
    G = torch.exp(-0.5 * ((i[:, None] - i) / sigma) ** 2)
    return G / G.sum(1, keepdim=True)


def image_signature(images):
    """Saliency by the sign of the DCT: what stands out from a smooth ground survives the sign.

    images (B, 3, S, S) uint8 -> (B, S, S) float32, sums to 1 per image.
    Per opponent channel x_hat = IDCT(sign(DCT(x))).
    Saliency = blur(sum of x_hat^2 over channels) * centre prior."""
    S = images.shape[-1]
    n = SIGNATURE_SIZE
    x = F.interpolate(images.float() / 255, size=(n, n), mode="bilinear", antialias=True,
                      align_corners=False)
    r, g, b = x.unbind(1)
    opponent = torch.stack([(r + g + b) / 3, r - g, b - (r + g) / 2], dim=1)
    C = dct_matrix(n).to(x)
    spectrum = C @ opponent @ C.T
    # Rounding noise has a sign too: without a threshold a one-colour image would get a random map.
    sign = torch.where(spectrum.abs() > 1e-3, spectrum.sign(), 0.0)
    energy = (C.T @ sign @ C).square().sum(1)                   # (B, n, n)
    G = gaussian_matrix(n, SIGNATURE_BLUR * n).to(x)
    blurred = (G @ energy @ G.T)[:, None]                       # (B, 1, n, n)
    blurred = F.interpolate(blurred, size=(S, S), mode="bilinear", align_corners=False)[:, 0]
    saliency = (blurred + 1e-6) * centre_prior(S, x.device)
    return saliency / saliency.sum((1, 2), keepdim=True)
