"""DSeq-JEPA (Secs. 3.2-3.4): find the telling regions of an image, predict them one by one.

    x (B, 3, S, S) -> P patches;  h = target encoder's patch tokens (B, P, D), layer-normalised

    saliency   similarity of [CLS] and patches at block l of the target encoder, Eq. 1    regions.py
    R_1..R_N   the most salient components, then the rest of the image, Eqs. 2-4          regions.py
    z_hat_k+1  = predictor(context encoder's tokens of R_1..R_k, positions of R_{k+1}), Eq. 5
    loss       = smooth-L1(z_hat_k+1, h of R_{k+1}), averaged over tokens, steps, images, Eqs. 6, 7

All steps k of an image come from one pass of the context encoder and one of the predictor, under a
mask by rank: a token of R_k sees R_1..R_k, a mask token of R_{k+1} sees R_1..R_k and its own
region's mask tokens. R_N is never context, so its patches do not enter the context encoder. A
single [CLS] would leak later regions into earlier ones: it has one copy per rank, which sees and is
seen as that region's tokens are. That is within the context encoder. The predictor sees patches
alone, as Eq. 5 has it: [CLS] "is used only as an anchor to compute saliency maps" (Sec. 4.3.3).

A `Plan` says who is context from when on and who is predicted when; the methods, DSeq-JEPA and its
relatives, differ in their plans only:

    dseq-jepa               sequential(regions)
    --order flat            the rest of the image predicts every region at once
    i-jepa                  multi-block masks: one context, four targets apart
    c-jepa, dseq-c-jepa     as i-jepa and dseq-jepa, + VICReg terms

Differs from the authors' code, whose predictor cannot see its context.
Checked in tests/test_dseq_jepa.py.
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attention import arrange, indices_where, sizes
from jepa import Output
from plumbing.distributed import average, gather, world_size
from regions import (
    away_from_border,
    cls_similarity,
    discriminative_regions,
    grad_cam,
    min_max,
    reorder,
    where_salient,
)

# Weight of C-JEPA's regulariser (Mo & Tong, 2024, arXiv:2410.19560: beta_vicreg), and within it of
# the three terms. Taken from public re-implementations, which agree; that paper was not at hand.
VICREG_WEIGHT = 0.001
INVARIANCE = 25
VARIANCE = 25
COVARIANCE = 1


class Plan(NamedTuple):
    """Who is seen and who is predicted, and when. Steps count from 1; 0 = never.

    One image with P = 6 patches in N = 3 regions, of which R_3 is the rest of the image:

        region                1 1 2 3 3 3
        sequential  context   1 1 2 0 0 0    R_1 is seen from step 1 on, R_2 from step 2 on
                    target    0 0 1 2 2 2    step 1 predicts R_2, step 2 predicts R_3
        flat        context   0 0 0 1 1 1    the rest is seen from step 1 on
                    target    1 1 2 0 0 0    step 1 predicts R_1, step 2 predicts R_2
    """
    context: torch.Tensor   # (B, P) int64: the step from which on a patch is context
    target: torch.Tensor    # (B, V, P) int64: the step at which it is predicted, in each of
                            # V predictions that know nothing of each other (4 in I-JEPA, else 1)


def sequential(rank, N):
    """Step k predicts R_{k+1} from R_1..R_k (Eq. 5).  rank (B, P) in 1..N, 0 = takes no part.

    An absent region is no step, nor is the first one present: there is nothing to predict it from.
    The last is never context."""
    first = torch.where(rank > 0, rank, N).amin(1, keepdim=True)
    last = rank.amax(1, keepdim=True)
    context = torch.where(rank < last, rank, 0)
    target = torch.where(rank > first, rank - 1, 0)
    return Plan(context, target[:, None])


def flat(rank, N):
    """Table 5's "flat": the rest of the image, R_N, predicts every region R_1..R_{N-1}.

    They are predicted from nothing else, and where there is no rest not at all."""
    rest = rank == N
    has_rest = rest.any(1, keepdim=True)
    target = torch.where(has_rest & ~rest, rank, 0)
    return Plan(rest.long(), target[:, None])


class Discriminative:
    """Batch -> Plan of DSeq-JEPA: salient regions with probability `progress`, else random blocks
    (the curriculum of Sec. 3.2).

    source: "otsu", "otsu-refill", or "random" (Table 4's "uniform": random blocks always).
    order: Table 5.  proxy: where saliency comes from, "cls" or "grad-cam" (Eq. 8).
    polarity: "paper", or "border" for `regions.away_from_border`.
    min_patches, max_patches: bounds of a region's size; see regions.discriminative_regions."""
    region_causal = True        # mask tokens are seen by those of their own region alone

    def __init__(self, *, N, source, order, proxy, min_patches, max_patches=None,
                 polarity="paper"):
        self.N = N
        self.steps = N - 1                                          # if all regions are there
        self.source = source
        self.order = order
        self.proxy = "none" if source == "random" else proxy        # nobody would look at it
        self.min_patches = min_patches
        self.max_patches = max_patches
        self.polarity = polarity

    def regions(self, saliency, grid):
        """Salient regions: saliency (B, P)  ->  rank (B, P)."""
        rank = discriminative_regions(saliency.unflatten(1, grid), self.N, self.source,
                                      self.min_patches, self.max_patches)
        return rank.flatten(1)

    def __call__(self, batch, saliency, grid):
        rank = batch.actions[:, 0]                                  # (B, P): random blocks
        if self.source != "random":
            coin = batch.params                                     # (B, 1), uniform in [0, 1)
            rank = torch.where(coin < batch.progress, self.regions(saliency, grid), rank)
        if self.order == "flat":
            return flat(rank, self.N)
        rank = reorder(rank.unflatten(1, grid), self.N, self.order).flatten(1)
        return sequential(rank, self.N)


class MultiBlock:
    """Batch -> Plan of I-JEPA: one context, four target blocks, each predicted on its own."""
    region_causal = False       # all tokens of a prediction see each other
    steps = 1                   # of each of the four predictions
    proxy = "none"              # no saliency
    polarity = "paper"

    def __call__(self, batch, saliency, grid):
        return Plan(context=batch.actions[:, 0], target=batch.actions[:, 1:])


# ---- Who stands where: a row of places in the context encoder, and one in the predictor.

def encoder_places(context, copies):
    """An image's row in the context encoder: C copies of [CLS], then P patches.

    context (B, P) of a Plan  ->  rank (B, C + P) int64: the step from which on the token there is
    seen; 0 = nobody is there. Copy k of [CLS] goes with the patches that are seen from step k on
    and is absent where there are none. The example of `Plan`, "sequential", with C = 2:

        place     0 1 | 2 3 4 5 6 7
                 [CLS]| patches
        rank      1 2 | 1 1 2 0 0 0
    """
    steps = torch.arange(1, copies + 1, device=context.device)
    present = (context[:, :, None] == steps).any(1)                             # (B, C)
    return torch.cat([torch.where(present, steps, 0), context], dim=1)


def predictor_places(context, copies, target, region_causal):
    """A prediction's row in the predictor: the image's row as above, where no [CLS] is, then P
    places of mask tokens.

    context (B, P) and target (B, V, P) of a Plan  ->  rank and group as attention.arrange wants
    them, (B * V, C + P + P) int64 each. The same example:

        place     0 1 | 2 3 4 5 6 7 | 8 9 10 11 12 13
                 [CLS]| patches     | mask tokens
        rank      0 0 | 1 1 2 0 0 0 | 0 0  1  2  2  2
        group     0 0 | 0 0 0 0 0 0 | 0 0  1  2  2  2

    The mask token at place 10 (step 1) sees places 2, 3 and itself; those at places 11 to 13
    (step 2) see places 2 to 4 and each other. If not region_causal, mask tokens are of group 0 as
    context is, and seen like it: I-JEPA, whose ranks are all 1, then has full attention."""
    V = target.shape[1]
    seen = F.pad(context, (copies, 0)).repeat_interleave(V, dim=0)
    target = target.flatten(0, 1)
    rank = torch.cat([seen, target], dim=1)
    group = torch.zeros_like(rank)
    if region_causal:
        group[:, seen.shape[1]:] = target
    return rank, group


class RegionJEPA(nn.Module):
    """DSeq-JEPA, I-JEPA, C-JEPA or DSeq-C-JEPA. Parts are injected.

    plan: Discriminative or MultiBlock.  vicreg: weight of C-JEPA's terms.
    block: l, the target encoder's block that saliency is read from, from 1 up. The authors' code
        counts blocks from 0, and its settings say depth 10: there that is our block 11."""

    revision = 2        # 1: the predictor was given [CLS] as well; see runs.refuse_other_revision

    def __init__(self, encoder, predictor, plan, block, vicreg=0.0):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.plan = plan
        self.block = block
        self.vicreg = vicreg
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.copies = 0 if encoder.cls_token is None else plan.steps        # C: a [CLS] per step

    @property
    def representation(self):
        """What is evaluated: as I-JEPA, the target encoder."""
        return self.target_encoder

    def compile(self, *args, **kwargs):
        """Compile the parts: between them the host reads how many tokens there are."""
        for part in (self.encoder, self.target_encoder, self.predictor):
            part.compile(*args, **kwargs)

    def forward(self, batch):
        images = batch.views[:, 0]
        with torch.no_grad():
            tokens, h, saliency = self.look(batch)                          # Eq. 1
            plan = self.plan(batch, saliency, self.encoder.grid)            # Eqs. 2-4
        z_hat, index = self.predict(images, plan)                           # Eq. 5
        step_loss, predicted = self.step_losses(z_hat, index, plan, h)
        steps = predicted.sum(1)                                            # that an image has
        image_loss = step_loss.sum(1) / steps.clamp(min=1)                  # Eqs. 6, 7
        learned_from = images_with_a_step(steps)
        loss = image_loss.sum() / learned_from.clamp(min=1 / world_size())
        weight = learned_from / len(steps)
        if self.vicreg:
            weight = None
            x, y, counts = self.image_means(z_hat, index, plan, h)
            terms = vicreg_terms(gather(x), gather(y), gather(counts))      # of the global batch
            loss = loss + self.vicreg * terms
        logs = dict(steps=steps.float().mean())
        if saliency is not None:
            logs |= where_salient(saliency, self.encoder.grid)
        return Output(loss, tokens, tokens.mean(1), logs, weight)

    def look(self, batch):
        """What the target encoder sees in whole images.

        -> its patch tokens (B, P, D); h, the same layer-normalised; saliency (B, P) in [0, 1], or
        None if the plan does not ask for it."""
        middle, last = self.target_encoder(batch.views[:, 0], keep=(self.block,))
        P = len(self.encoder.positions)
        tokens = last[:, -P:].float()
        h = F.layer_norm(tokens, tokens.shape[-1:])
        saliency = None
        if self.plan.proxy == "cls":
            saliency = self.cls_saliency(middle)
        if self.plan.proxy == "grad-cam":
            saliency = self.gradient_saliency(batch, h)
        return tokens, h, saliency

    def cls_saliency(self, middle):
        """Eq. 1 of block l's tokens (B, 1 + P, D), of the sign that the plan asks for: (B, P)."""
        saliency = min_max(cls_similarity(middle[:, 0], middle[:, 1:]))
        if self.plan.polarity == "border":
            saliency = away_from_border(saliency, self.encoder.grid)
        return saliency

    def gradient_saliency(self, batch, h):
        """Eq. 8: Grad-CAM of the prediction loss with random blocks, on its targets h.

        The paper takes the last block's tokens; h are these, layer-normalised."""
        plan = sequential(batch.actions[:, 0], self.plan.N)
        z_hat, index = self.predict(batch.views[:, 0], plan)
        with torch.enable_grad():
            tokens = h.detach().requires_grad_()
            step_loss, _ = self.step_losses(z_hat, index, plan, tokens)
            gradient = torch.autograd.grad(step_loss.sum(), tokens)[0]
        return min_max(grad_cam(h, gradient))

    def predict(self, images, plan):
        """Eq. 5 for all steps of all images: context encoder and predictor run once each.

        -> z_hat (n, D), predictions at all mask tokens; index (n,), which patch of which prediction
        each is: (image * V + v) * P + patch, an index into plan.target (B, V, P), flattened."""
        seen = encoder_places(plan.context, self.copies)                    # (B, C + P)
        rank, group = predictor_places(plan.context, self.copies, plan.target,
                                       self.plan.region_causal)
        wanted = plan.target.flatten(0, 1) > 0                              # (B * V, P)
        encoder_size, predictor_size, (n, _) = sizes(seen > 0, rank > 0, wanted)
        encoder_layout = arrange(seen, torch.zeros_like(seen), encoder_size)
        predictor_layout = arrange(rank, group, predictor_size)

        place = predictor_layout.order % rank.shape[1]          # of each packed token
        masks = indices_where(place >= seen.shape[1], n)        # those that are mask tokens
        torch._dynamo.maybe_mark_dynamic(masks, 0)              # compile for any n, as in `arrange`
        # Both lists go row by row and patch by patch: z_hat[i] is of the patch that index[i] names.
        index = indices_where(wanted, n)

        context = self.encoder(images, encoder_layout, self.copies)[-1]
        z_hat = self.predictor(context, encoder_layout.order, seen.shape, predictor_layout, masks)
        return z_hat, index

    def step_losses(self, z_hat, index, plan, h):
        """Smooth-L1 of each step, averaged over its tokens and dimensions, fp32: (B, V * steps).

        And whether the image has that step, (B, V * steps) bool."""
        B, V, P = plan.target.shape
        G = self.plan.steps
        error = F.smooth_l1_loss(z_hat.float(), targets(h, index, plan), reduction="none").mean(1)
        prediction = index // P                             # image * V + v
        step = plan.target.flatten()[index]                 # from 1 to G
        cell = prediction * G + step - 1                    # in (B, V, G), flattened
        total = sum_by(cell, error, B * V * G)
        count = sum_by(cell, torch.ones_like(error), B * V * G)
        mean = total / count.clamp(min=1)
        return mean.view(B, V * G), (count > 0).view(B, V * G)

    def image_means(self, z_hat, index, plan, h):
        """Means over an image's mask tokens, of predictions and of targets, (B, D) each; fp32.

        And whether it has any, (B,) 1 or 0."""
        B, V, P = plan.target.shape
        image = index // (V * P)
        ones = torch.ones(len(image), device=image.device)  # fp32: bf16 cannot count beyond 256
        count = sum_by(image, ones, B)
        divisor = count.clamp(min=1)[:, None]
        x = sum_by(image, z_hat.float(), B) / divisor
        y = sum_by(image, targets(h, index, plan), B) / divisor
        return x, y, (count > 0).float()

    @torch.no_grad()
    def update_target(self, tau):
        """theta_target <- tau * theta_target + (1 - tau) * theta, in place."""
        target = list(self.target_encoder.parameters())
        torch._foreach_lerp_(target, list(self.encoder.parameters()), 1 - tau)


def images_with_a_step(steps):
    """How many images of the batch have a step to learn from; steps (B,) of each.

    Of several processes: the mean of their numbers. DDP averages gradients over processes, which
    with this divisor gives the mean over all images of the global batch that have a step."""
    return average(dict(count=(steps > 0).sum().float()))["count"]


def targets(h, index, plan):
    """What mask tokens are to predict: h (B, P, D), index (n,) from `predict`  ->  (n, D)."""
    _, V, P = plan.target.shape
    image = index // (V * P)
    patch = index % P
    return h[image, patch]


def sum_by(key, x, n):
    """Sums of the x[i] of equal key: key (T,) in 0..n-1, x (T, ...)  ->  (n, ...)."""
    return x.new_zeros(n, *x.shape[1:]).index_add(0, key, x)


def vicreg_terms(x, y, counts):
    """C-JEPA's regulariser: VICReg (Bardes et al., 2022) on an image's mean prediction x and mean
    target y, (B, D) each.

    counts (B,): 1 for images that were predicted at all, 0 for the others, which take no part.
    Invariance pulls x and y together; variance and covariance act on x, since y has no gradient.
    In fp32."""
    with torch.autocast(x.device.type, enabled=False):
        D = x.shape[1]
        n = counts.sum()
        counts = counts[:, None]
        mean = (counts * x).sum(0) / n.clamp(min=1)
        centred = (x - mean) * counts
        covariance = centred.T @ centred / (n - 1).clamp(min=1)
        variances = covariance.diagonal()
        invariance = (counts * (x - y).square()).sum() / (n.clamp(min=1) * D)
        variance = F.relu(1 - (variances + 1e-4).sqrt()).mean()
        off_diagonal = (covariance.square().sum() - variances.square().sum()) / D
        return INVARIANCE * invariance + VARIANCE * variance + COVARIANCE * off_diagonal
