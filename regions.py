"""Regions on the patch grid (DSeq-JEPA Sec. 3.2): where to predict, and in what order.

    [CLS] (B, D), patches (B, P, D)  ->  saliency (B, P) in [0, 1]: Eq. 1, or Eq. 8
    saliency (B, H, W), P = H * W    ->  rank (B, H, W) int64, which region a patch is in: Eqs. 2-4

Ranks 1, 2, ... are R_1, R_2, ... in order of prediction and N is R_N, the rest of the image. Every
patch has one rank. An image with fewer than N - 1 discriminative regions lacks the ranks between:
it has fewer steps, no other change. Rank 0 means no part in anything, and only order "truncated"
gives it.

Rule "otsu" is the paper's words: one Otsu threshold, its 8-connected components of at least 10
patches, best mean saliency first. One threshold rarely yields N - 1 = 4 components, so rule
"otsu-refill", ours and the default, thresholds what was below the threshold again and again, and
appends the components that come up. Of both, a component that is too large is cut into layers
(`layers`). Why, and what it costs, stands over `otsu`.

Beside them, with the same shapes: random blocks for the curriculum, I-JEPA's masks, and the orders
of Table 5. Last, mode `regions` itself (0.A.1.2): one random resized crop of each image, and the
step's random blocks.

    index (B,)  ->  Batch.views    (B, 1, 3, S, S), normalised: a crop of area 0.3 to 1 and
                                   nothing else
                    Batch.actions  random blocks over the P patches, int64:
                                   (B, 1, P) ranks 1..N of the curriculum's regions, or
                                   (B, 5, P) 0 or 1: I-JEPA's context, then its four targets
                    Batch.params   (B, 1) uniform in [0, 1): below the curriculum's probability,
                                   Batch.progress, salient regions are used

All randomness of a step is drawn with its batch, so that the model is a function of that (but for
--order random). `Crops` cuts small images, stored as S x S, `PictureCrops` whole photographs, as
the paper does (images.Pictures: how they are held).

All is batched, of fixed shapes, and never waits for the device. Thresholds equal OpenCV's,
components SciPy's. Differs from the authors' code, which drops regions under 30 patches and leaves
an image whose regions run out without them. I-JEPA's code never places a block on the last row or
column; here every place that fits is as likely. Checked in tests/test_regions.py.
"""
import hashlib
import math

import torch
import torch.nn.functional as F

from augmentations import Ranges, resized_crop_flip, resized_middle, sample
from images import DIGESTED, Batch, Views

RULES = ("otsu", "otsu-refill")
ORDERS = ("discriminative", "random", "spatial", "inverse", "truncated")
LEVELS = 256                    # OpenCV's Otsu sees uint8(255 x)
ROUNDS = 8                      # thresholds of "otsu-refill"; a fixed number keeps shapes fixed
TOP = 3                         # regions that order "truncated" keeps
TARGETS = 4                     # I-JEPA: target blocks per image
TARGET_SCALE = (0.15, 0.2)      # of the image's area
TARGET_ASPECT = (0.75, 1.5)     # height / width
CONTEXT_SCALE = (0.85, 1.0)
CONTEXT_ASPECT = (1.0, 1.0)
TRIES = 32                      # placements drawn at once, of which the best is used
# What the linear probe and fine-tuning train on: crops of 0.08 to 1, torchvision's default, flipped
# or not.
LABELLED = Ranges(scale=(0.08, 1.0), flip=0.5, jitter=0.0, grey=0.0, blur=0.0)

TEST_SIDE = 256 / 224           # shorter side of a picture in testing, over that of its middle


def _wide(device):
    """float64, in which the sums and quotients below are exact; MPS has only float32."""
    return torch.float32 if device.type == "mps" else torch.float64


# ---- Saliency: Eq. 1, or Eq. 8.

def cls_similarity(cls, patches):
    """Cosine similarity of [CLS] tokens (B, D) and patch tokens (B, P, D).  ->  (B, P) float32"""
    return F.cosine_similarity(cls.float()[:, None], patches.float(), dim=2)


def grad_cam(tokens, gradients):
    """Eq. 8, the label-free Grad-CAM proxy.  ->  (B, P) float32, >= 0

    tokens (B, P, D), gradients (B, P, D) of the loss there."""
    weights = gradients.float().mean(1, keepdim=True)
    return (weights * tokens.float()).sum(2).relu()


def min_max(similarity):
    """Eq. 1: each row of (B, P) stretched to [0, 1]; a constant row becomes 0."""
    low, high = similarity.aminmax(dim=1, keepdim=True)
    span = high - low
    return (similarity - low) / torch.where(span > 0, span, 1)


def _ring(grid, device):
    """The outermost patches: (P,) bool."""
    H, W = grid
    rows = torch.arange(H, device=device)[:, None]
    columns = torch.arange(W, device=device)
    inside = (rows > 0) & (rows < H - 1) & (columns > 0) & (columns < W - 1)
    return ~inside.flatten()


def _centre_half(grid, device):
    """The patches in the middle half of the rows and of the columns: (P,) bool."""
    H, W = grid
    rows = torch.arange(H, device=device)[:, None] + 0.5
    columns = torch.arange(W, device=device) + 0.5
    return ((2 * rows - H).abs() < H / 2).logical_and((2 * columns - W).abs() < W / 2).flatten()


def where_salient(saliency, grid):
    """What share of an image's saliency lies in its centre and in its border ring, on average.

    saliency (B, P) >= 0  ->  {column of metrics.csv: scalar}. Saliency that is alike everywhere
    gives the shares that these have of the image: of 14 x 14 patches 0.18 and 0.27, of 8 x 8 0.25
    and 0.44. Nothing tells the first principal direction of the patches from its opposite, so
    saliency may leave the object for what surrounds it (docs/experiments.md): this shows it."""
    share = saliency / saliency.sum(1, keepdim=True).clamp(min=1e-12)
    inside = dict(saliency_centre=_centre_half(grid, saliency.device),
                  saliency_ring=_ring(grid, saliency.device))
    return {name: (share * where).sum(1).mean() for name, where in inside.items()}


def away_from_border(saliency, grid):
    """Rule of ours for the sign of saliency (B, P) in [0, 1]: upside down where the border ring is
    more salient, on average, than what is inside it. For photographs, whose makers put what matters
    in the middle.  ->  (B, P)"""
    ring = _ring(grid, saliency.device).to(saliency.dtype)
    of_ring = (saliency * ring).sum(1) / ring.sum()
    of_inside = (saliency * (1 - ring)).sum(1) / (1 - ring).sum()           # grids: 4 x 4 and more
    return torch.where((of_ring > of_inside)[:, None], 1 - saliency, saliency)


# ---- Discriminative regions: Eqs. 2-4.
#
# Defaults of mode `regions`: "otsu-refill", and max_patches a fifth of the image. The paper says
# that sizes are bounded ("sampled with scales between ... and ...", 0.A.1.2; the numbers are lost
# from our copy, and 0.15 to 0.2 is the only range in the authors' settings), and it presupposes
# chains of N regions: later steps are "clearly harder", and truncating them costs half a point
# (Sec. 4.3.2). What each rule yields: results/README.md, "What the rules cost".

def otsu(level, rounds=1):
    """Otsu's threshold (Eq. 2), again and again.  level (B, P) int64 in 0..255  ->  (B, rounds)

    The first is over all patches, each later one over those that are not above the one before it.
    Foreground is level > threshold, as in OpenCV. Patches all alike: 0.

    With n patches of level sum S, and n1 and S1 up to a level, the variance between classes is
    (n S1 - n1 S)^2 / (n1 n2), times a constant. Its parts are integers below 2^53 for n up to
    1,200, so equal variances compare equal, and of these the lowest level wins. (torch.argmax
    promises that too, but not on every device.) One histogram serves all rounds: what is left are
    the patches up to some level."""
    bins = torch.arange(LEVELS, device=level.device)
    histogram = torch.zeros(len(level), LEVELS, dtype=torch.int64, device=level.device)
    histogram.scatter_add_(1, level, torch.ones_like(level))
    n1 = histogram.cumsum(1)
    S1 = (histogram * bins).cumsum(1)
    highest = torch.full_like(level[:, :1], LEVELS - 1)                     # level that is left
    thresholds = []
    for _ in range(rounds):
        n = n1.gather(1, highest)
        S = S1.gather(1, highest)
        between = (n * S1 - n1 * S).to(_wide(level.device)).square()
        variance = between / (n1 * (n - n1)).clamp(min=1)
        variance = torch.where(bins <= highest, variance, -1)
        is_best = variance == variance.amax(1, keepdim=True)
        highest = torch.where(is_best, bins, LEVELS).amin(1, keepdim=True)
        thresholds.append(highest)
    return torch.cat(thresholds, dim=1)


def _neighbours(values):
    """The 8 neighbours of every patch, 0 beyond the border: (B, H, W)  ->  (B, 8, P)"""
    H, W = values.shape[1:]
    padded = F.pad(values, (1, 1, 1, 1))
    shifts = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]       # (1, 1): itself
    return torch.stack([padded[:, r:r + H, c:c + W] for r, c in shifts], dim=1).flatten(2)


def components(group):
    """8-connected components: of each patch, the number of its component's first patch.

    group (B, H, W): a bool mask, or integers of which only equal ones connect and 0 is background
    ->  (B, P) int64, patches numbered 0..P-1 in raster order; P = background

    Boruvka's algorithm. A tree is a set of connected patches, named by its first. In a round every
    tree hooks onto the one of smallest name among those of its group that it touches. Choosing the
    smallest allows no cycle but two trees choosing one another; of these the smaller, which is the
    smallest of all that hang on them, becomes the root. Within a block of 2 x 2 patches those of a
    group all touch, so at the start a component has at most as many trees as there are blocks. In
    a round every tree that is not yet its whole component joins another: their number halves, at
    least. So the number of rounds, and in each the length of the longest chain of hooks, are known
    beforehand, and nothing waits for the device. (Repeated 3x3 dilation is simpler, but a spiral
    takes it P / 2 passes.)

    The work is in comparing 8 neighbours. There, small integers are fastest, and a name counts from
    the last patch up, so that 0 is nobody."""
    B, H, W = group.shape
    P = H * W
    group = group.int()
    patch = torch.arange(P, device=group.device).expand(B, P)
    joined = (_neighbours(group) == group.flatten(1)[:, None]) & (group != 0).flatten(1)[:, None]
    joined = joined.short()                                                 # (B, 8, P), 1 or 0
    tree = _first_in_block(joined, H, W)
    trees = math.ceil(H / 2) * math.ceil(W / 2)
    while trees > 1:
        name = (P - tree).short()
        across = _neighbours(name.view(B, H, W))
        others = across * joined * (across != name[:, None]).short()
        smallest = P - others.amax(1).long()                                # P: touches no other
        chosen = torch.full_like(tree, P).scatter_reduce(1, tree, smallest, "amin")
        parent = torch.where(chosen < P, chosen, patch)
        mutual = parent.gather(1, parent) == patch
        parent = torch.where(mutual, torch.minimum(parent, patch), parent)
        for _ in range((trees - 2).bit_length()):       # a chain has at most trees - 1 hooks
            parent = parent.gather(1, parent)
        tree = parent.gather(1, tree)
        trees //= 2
    return torch.where(group.flatten(1) != 0, tree, P)


def _first_in_block(joined, H, W):
    """Of each patch, the first patch of its group in its block of 2 x 2.

    joined (B, 8, P), 1 or 0: which neighbours are of its group  ->  (B, P) int64"""
    P = H * W
    name = (P - torch.arange(P, device=joined.device)).short()
    rows = torch.arange(H, device=joined.device)[:, None] // 2
    columns = torch.arange(W, device=joined.device) // 2
    block = 1 + rows * W + columns                                          # its number
    in_block = (_neighbours(block[None]) == block.flatten()).short()        # (1, 8, P)
    first = (_neighbours(name.view(1, H, W)) * in_block * joined).amax(1)
    return P - torch.maximum(first, name).long()


def layers(saliency, region, most):
    """Which layer of its region a patch is in, if the most salient `most` patches are layer 0, the
    next `most` layer 1, and so on.  saliency >= 0, region: (B, P)  ->  (B, P) int64

    Equally salient patches keep raster order."""
    P = region.shape[1]
    bits = saliency.contiguous().view(torch.int32)      # those of floats >= 0 sort as the floats do
    order = ((region << 32) - bits).argsort(dim=1, stable=True)             # region by region
    sorted_region = region.gather(1, order)
    place = torch.arange(P, device=region.device)
    begins = torch.ones_like(sorted_region, dtype=torch.bool)               # a region
    begins[:, 1:] = sorted_region[:, 1:] != sorted_region[:, :-1]
    start = torch.where(begins, place, 0).cummax(1).values
    return torch.zeros_like(region).scatter(1, order, (place - start) // most)


def discriminative_regions(saliency, N, rule, min_patches=10, max_patches=None):
    """Eqs. 2-4.  saliency (B, H, W) in [0, 1], rule one of RULES  ->  rank (B, H, W) int64 in 1..N

    Which rule and bound are the defaults, and why: above.

    max_patches: none of R_1..R_{N-1} is larger (None: no bound). A larger component is cut: its
    max_patches most salient patches are one layer, the next as many another, and so on; connected
    parts of a layer are regions of their own, if they have min_patches. So a large component is cut
    to its most salient patches, and what is cut away comes later instead of being lost.

    Regions that score alike keep raster order. NaN counts as 0: the training loop is the place to
    report it. A patch of level 0 is above no threshold, so after min_max the rest is never empty.

    Thresholds do not depend on components, so all rounds' thresholds come first and cut the levels
    into bands. Components of all bands are then found at once. A band scores above every later one,
    so one sort ranks them all."""
    B, H, W = saliency.shape
    P = H * W
    rounds = {"otsu": 1, "otsu-refill": ROUNDS}[rule]
    saliency = saliency.float().nan_to_num(0).flatten(1)
    level = (255 * saliency).clamp(0, LEVELS - 1).long()
    thresholds = otsu(level, rounds).flip(1)                                # Eq. 2; rising
    band = torch.searchsorted(thresholds, level)        # how many are below the level: 0 = the rest
    region = components(band.view(B, H, W))             # P = the rest
    if max_patches is not None:
        layer = layers(saliency.clamp(min=0), region, max_patches)
        layer = torch.where(band > 0, band * P + layer, 0)
        region = components(layer.view(B, H, W))

    # Eq. 3: float32 numbers of level >= 1 add up exactly in float64, in whatever order a GPU does.
    saliency = saliency.to(_wide(saliency.device))
    size = saliency.new_zeros(B, P + 1).scatter_add(1, region, torch.ones_like(saliency))
    total = saliency.new_zeros(B, P + 1).scatter_add(1, region, saliency)
    score = torch.where(size >= min_patches, total / size.clamp(min=1), -1)
    score[:, P] = -1

    # Eq. 4: the N - 1 best become ranks, all others R_N.
    best = score.argsort(dim=1, descending=True, stable=True)[:, :N - 1]
    is_region = score.gather(1, best) > 0
    rank = torch.where(is_region, torch.arange(1, N, device=best.device), N)
    rank_of_region = torch.full_like(size, N, dtype=torch.int64).scatter(1, best, rank)
    return rank_of_region.gather(1, region).view(B, H, W)


# ---- Random blocks: the curriculum's, and I-JEPA's masks.

def _block_size(u, scale, aspect, grid):
    """I-JEPA's block sizes: one uniform number u sets both area and aspect.

    ->  height, width, int64, shaped as u"""
    H, W = grid
    u = u.to(_wide(u.device))
    area = (H * W * (scale[0] + u * (scale[1] - scale[0]))).floor()
    ratio = aspect[0] + u * (aspect[1] - aspect[0])
    height = (area * ratio).sqrt().round().clamp(1, max(H - 1, 1))
    width = (area / ratio).sqrt().round().clamp(1, max(W - 1, 1))
    return height.long(), width.long()


def _place(height, width, shape, grid, generator):
    """Blocks at uniform places.  height, width: broadcast to `shape`  ->  (*shape, H, W) bool"""
    H, W = grid
    u, v = torch.rand(2, *shape, device=height.device, generator=generator)
    top = (u * (H - height + 1)).long()[..., None]
    left = (v * (W - width + 1)).long()[..., None]
    rows = torch.arange(H, device=top.device)
    columns = torch.arange(W, device=top.device)
    in_rows = (rows >= top) & (rows < top + height[..., None])
    in_columns = (columns >= left) & (columns < left + width[..., None])
    return in_rows[..., :, None] & in_columns[..., None, :]


def random_regions(B, grid, N, min_patches=10, device=None, generator=None):
    """For the curriculum: N - 1 disjoint random blocks in random order, then the rest.

    Each block takes the first of TRIES places that is free, else the place that is least taken, and
    there only what is free; what is then under min_patches goes to the rest.
    ->  rank (B, H, W) int64"""
    u = torch.rand(B, N - 1, 1, device=device, generator=generator)
    height, width = _block_size(u, TARGET_SCALE, TARGET_ASPECT, grid)
    blocks = _place(height, width, (B, N - 1, TRIES), grid, generator)
    image = torch.arange(B, device=device)
    attempt = torch.arange(TRIES, device=device)
    rank = torch.full((B, *grid), N, device=device)
    for k in range(N - 1):
        free = rank == N
        taken = (blocks[:, k] & ~free[:, None]).flatten(2).sum(2)           # (B, TRIES): patches
        best = (taken * TRIES + attempt).argmin(1)                          # of equals the earliest
        block = blocks[image, k, best] & free
        enough = block.flatten(1).sum(1) >= min_patches
        rank = torch.where(block & enough[:, None, None], k + 1, rank)
    return reorder(rank, N, "random", generator)


def multi_block(B, grid, device=None, generator=None, min_patches=10):
    """I-JEPA's masks.  ->  context (B, H, W) bool, targets (B, 4, H, W) bool

    One size for all target blocks and one for all context blocks of the batch. Targets may overlap
    one another; the context never overlaps them. Of TRIES draws an image gets the first whose
    context has min_patches, else the one with most. I-JEPA's code then cuts all contexts to the
    batch's smallest, so that they stack; packed tokens need not."""
    u = torch.rand(2, device=device, generator=generator)
    height, width = _block_size(u[0], TARGET_SCALE, TARGET_ASPECT, grid)
    targets = _place(height, width, (B, TRIES, TARGETS), grid, generator)
    height, width = _block_size(u[1], CONTEXT_SCALE, CONTEXT_ASPECT, grid)
    context = _place(height, width, (B, TRIES), grid, generator) & ~targets.any(2)

    image = torch.arange(B, device=device)
    attempt = torch.arange(TRIES, device=device)
    patches = context.flatten(2).sum(2).clamp(max=min_patches)
    best = (patches * TRIES - attempt).argmax(1)                            # of equals the earliest
    targets = targets[image, best]
    context = context[image, best]
    empty = ~context.flatten(1).any(1)
    context = torch.where(empty[:, None, None], ~targets.any(1), context)   # any patch that is free
    return context, targets


# ---- Orders: Table 5.

def _is_rank(rank, N):
    """rank (B, H, W)  ->  (B, N, P) bool: patch p is in R_1, ..., R_N"""
    return rank.flatten(1)[:, None] == torch.arange(1, N + 1, device=rank.device)[:, None]


def _centre(inside, at):
    """Mean of the coordinate `at` (P,) over each region inside (B, N, P), halves up.  ->  (B, N)"""
    size = inside.sum(2).clamp(min=1)
    return (2 * (inside * at).sum(2) + size) // (2 * size)


def reorder(rank, N, order, generator=None):
    """The orders of Table 5 for the same regions.  rank (B, H, W)  ->  rank (B, H, W)

    order, one of ORDERS:
        discriminative  as they are
        random          R_1 ... R_{N-1} permuted, per image; the rest stays last
        spatial         sorted by the patch that holds a region's centre, in row-major order; the
                        rest stays last
        inverse         from the least salient to the most; the rest stays last (of the authors'
                        project page: 71.3, where "discriminative" has 73.5)
        truncated       the first three that exist, the rest being one of them or not; later ones
                        get rank 0: nothing predicts or sees them

    After "random", "spatial" and "inverse" the regions that exist have the lowest ranks."""
    if order == "discriminative":
        return rank
    if order == "truncated":
        exists = _is_rank(rank, N).any(2)                                   # (B, N)
        kept = exists.cumsum(1) <= TOP
        kept = kept.gather(1, rank.flatten(1) - 1).view_as(rank)            # (B, H, W)
        return torch.where(kept, rank, 0)
    H, W = rank.shape[1:]
    inside = _is_rank(rank, N)[:, :-1]                                      # (B, N - 1, P)
    exists = inside.any(2)
    if order == "random":
        key = torch.rand(exists.shape, device=rank.device, generator=generator)
    elif order == "inverse":
        key = torch.arange(N - 1, 0, -1, device=rank.device)
    else:
        patch = torch.arange(H * W, device=rank.device)
        key = _centre(inside, patch // W) * W + _centre(inside, patch % W)
    sequence = torch.where(exists, key, H * W).argsort(dim=1, stable=True)  # who comes when
    new = sequence.argsort(dim=1) + 1                                       # when each one comes
    zero = rank.new_zeros(len(rank), 1)
    new = torch.cat([zero, new, zero + N], dim=1)                           # 0 and N are kept
    return new.gather(1, rank.flatten(1)).view_as(rank)


# ---- The mode.

class Crops(Views):
    """Mode `regions`: sample indices -> Batch of one crop each, with random blocks.

    split: images.Split; renders of one object count as separate images."""

    methods = ("dseq-jepa", "i-jepa", "c-jepa", "dseq-c-jepa")
    reads = ("patch_size", "crop_scale", "min_patches", "region_count")

    def __init__(self, split, config, device):
        super().__init__(split, config, device)
        side = config.image_size // config.patch_size
        self.grid = (side, side)
        self.ranges = Ranges(scale=(config.crop_scale, 1.0),
                             flip=0.0, jitter=0.0, grey=0.0, blur=0.0)
        self.as_i_jepa = config.method in ("i-jepa", "c-jepa")
        self.N = config.region_count
        self.min_patches = config.min_patches
        self.masks = split.masks        # where the object is, of those who know; for probes only

    def __call__(self, index, M=0):
        """index (B,) int64 on the CPU -> Batch.  M: not used, an image is one view."""
        B = len(index)
        crops = self.crops(index, self.ranges)
        blocks = self.random_blocks(B)
        coin = torch.rand(B, 1, device=self.device)
        return Batch(crops[:, None], blocks, coin, self.labels_of(index))

    def augmented(self, index):
        """What a classifier trains on: one random crop of each image, (B, 3, S, S), normalised.

        Of 0.08 to 1 of its area, flipped or not, fresh in every call. `clean` is for testing."""
        return self.crops(index, LABELLED)

    def crops(self, index, ranges):
        """One random crop of each image, from these ranges: (B, 3, S, S), normalised."""
        drawn = sample(len(index), self.image_size, ranges, self.device)
        return self.to_views(self.images[index], drawn.crop, drawn.flip)

    def random_blocks(self, B):
        """I-JEPA's context and targets (B, 5, P), or the curriculum's ranks (B, 1, P)."""
        if self.as_i_jepa:
            context, targets = multi_block(B, self.grid, self.device, min_patches=self.min_patches)
            return torch.cat([context[:, None], targets], dim=1).flatten(2).long()
        rank = random_regions(B, self.grid, self.N, self.min_patches, self.device)
        return rank.flatten(1)[:, None]

    def to_views(self, images, crop, flip):
        """uint8 (B, 3, H, W), crop (B, 4), flip (B,) -> crops (B, 3, S, S) float, normalised."""
        with torch.autocast(self.device.type, enabled=False):   # bf16 has too few bits for pixels
            crops = resized_crop_flip(images.float().div_(255), crop, flip, self.image_size)
        return self.standardised(crops)

    def standardised(self, images):
        """Float images (B, 3, S, S) in [0, 1], normalised in place."""
        return images.sub_(self.mean.view(3, 1, 1)).div_(self.std.view(3, 1, 1))


class PictureCrops(Crops):
    """Mode `regions` where the data set's pictures are held whole (images.Pictures).

    Random crops are drawn on each picture's own height and width, by the host, which must know them
    to read no more than the crop. To test, a picture is resized to 8/7 S on its shorter side, 256
    pixels where S is 224, and the middle is cut out."""

    def crops(self, index, ranges):
        """One random crop of each picture, from these ranges: (B, 3, S, S), normalised."""
        drawn, boxes = self.draw(index, ranges)
        place = drawn.crop * torch.tensor([0, 0, 1, 1])         # a box lies in the upper left
        place = torch.cat([place, drawn.flip[:, None]], dim=1)
        place = place.to(self.device, non_blocking=True)
        return self.to_views(self.images[boxes], place[:, :4], place[:, 4].bool())

    def draw(self, index, ranges):
        """Params of random crops, on the CPU, and the boxes (B, 5) to read for them."""
        height, width = self.images.sizes[index].float().split(1, dim=1)
        drawn = sample(len(index), (height, width), ranges)
        return drawn, torch.cat([index[:, None], drawn.crop.long()], dim=1)

    def prefetch(self, index, M=0):
        """Say that self(index) comes soon."""
        _, boxes = self.draw(index, self.ranges)
        self.images.prefetch(boxes)

    def clean(self, index):
        """The picture, its shorter side at 8/7 S, of that the middle: (B, 3, S, S), normalised."""
        boxes = self.middle(index)
        rows, columns = self.test_window(boxes).to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, enabled=False):
            pixels = self.images[boxes].float().div_(255)
            return self.standardised(resized_middle(pixels, rows, columns, self.image_size))

    def middle(self, index):
        """As much of the middle of each picture as is read at once: boxes (B, 5)."""
        size = self.images.sizes[index]                                     # (B, 2)
        box = size.clamp(max=self.images.side)
        return torch.cat([index[:, None], (size - box) // 2, box], dim=1)

    def test_window(self, boxes):
        """What `clean` wants of boxes (B, 5): (2, B, 4) for resized_middle, rows and columns."""
        size = self.images.sizes[boxes[:, 0]]
        shorter = size.amin(1, keepdim=True)
        whole = round(TEST_SIDE * self.image_size) * size // shorter        # torchvision's rounding
        first = ((whole - self.image_size) / 2).round()
        return torch.stack([-boxes[:, 1:3], size, whole, first], dim=2).transpose(0, 1)

    def digest(self):
        """As Views.digest: of all labels, all sizes and some pictures' pixels."""
        some = torch.linspace(0, len(self) - 1, min(DIGESTED, len(self))).long()
        pixels = self.images[self.middle(some)].cpu().numpy().tobytes()
        sizes = self.images.sizes.numpy().tobytes()
        return hashlib.sha256(pixels + sizes + self.labels.numpy().tobytes()).hexdigest()
