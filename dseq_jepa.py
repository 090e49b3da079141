"""DSeq-JEPA (Secs. 3.2-3.4): find the telling regions of an image, predict them one after another. And its relatives.

    x (B, 3, S, S) -> P patches;  h = target encoder's patch tokens (B, P, D), layer-normalised

    saliency   similarity of [CLS] and patches at block l of the target encoder, Eq. 1         regions.py
    R_1..R_N   the most salient components, then the rest of the image, Eqs. 2-4               regions.py
    z_hat_k+1  = predictor(context encoder's tokens of R_1..R_k, positions of R_{k+1}), Eq. 5
    loss       = smooth-L1(z_hat_k+1, h of R_{k+1}), averaged over tokens, steps, images, Eqs. 6, 7

All steps k of an image come from one pass of the context encoder and one of the predictor, under a mask by rank: a
token of R_k sees R_1..R_k, a mask token of R_{k+1} sees R_1..R_k and its own region's mask tokens. R_N is never
context, so its patches do not enter the context encoder. [CLS] would carry what comes late to what came early: it has
one copy per rank, which sees and is seen as that region's tokens are.

A `Plan` says who is context from when on and who is predicted when; the methods differ in their plans only:

    dseq-jepa    sequential(regions)              i-jepa      multi-block masks: one context, four targets apart
    --order flat: the rest of the image predicts every region at once             c-jepa, dseq-c-jepa: + VICReg terms

Differs from the authors' code, whose predictor cannot see its context. Checked in tests/test_dseq_jepa.py.
"""
import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from attention import arrange, sizes
from jepa import Output
from plumbing.distributed import gather
from regions import cls_similarity, discriminative_regions, grad_cam, min_max, reorder

VICREG_WEIGHT, INVARIANCE, VARIANCE, COVARIANCE = 0.001, 25, 25, 1          # C-JEPA


class Plan(NamedTuple):
    """Who sees and who is seen. Steps count from 1; 0 = never."""
    context: torch.Tensor   # (B, P) int64: the step from which on a patch is context
    target: torch.Tensor    # (B, V, P) int64: the step at which it is predicted; V predictions that know nothing of each other


def sequential(rank, N):
    """Step k predicts R_{k+1} from R_1..R_k (Eq. 5).  rank (B, P) in 1..N, 0 = takes no part.

    An absent region is no step, nor is the first one present: there is nothing to predict it from. The last is never context."""
    first, last = torch.where(rank > 0, rank, N).amin(1, keepdim=True), rank.amax(1, keepdim=True)
    return Plan(torch.where(rank < last, rank, 0), torch.where(rank > first, rank - 1, 0)[:, None])


def flat(rank, N):
    """Table 5's "flat": every region R_1..R_{N-1} is predicted from the rest of the image, R_N, and from nothing else."""
    context = (rank == N).long()
    return Plan(context, (torch.where(rank < N, rank, 0) * context.any(1, keepdim=True))[:, None])


class Discriminative:
    """Batch -> Plan of DSeq-JEPA: salient regions with probability `progress`, else random blocks (the curriculum of Sec. 3.2).

    source: "otsu", "otsu-refill", or "random" (Table 4's "uniform": random blocks always). order: Table 5.
    proxy: "cls", or "grad-cam" (Eq. 8)."""
    apart = False               # all steps of an image share one row of the predictor, under the mask by rank

    def __init__(self, *, N, source, order, proxy, min_patches):
        self.N, self.source, self.order, self.min_patches = N, source, order, min_patches
        self.proxy = "none" if source == "random" else proxy                 # nobody would look at the saliency
        self.steps = self.copies = N - 1

    def __call__(self, batch, saliency, grid):
        rank = batch.actions[:, 0]                                           # (B, P), random blocks
        if self.source != "random":
            found = discriminative_regions(saliency.unflatten(1, grid), self.N, self.source, self.min_patches).flatten(1)
            rank = torch.where(batch.params < batch.progress, found, rank)
        if self.order == "flat":
            return flat(rank, self.N)
        return sequential(reorder(rank.unflatten(1, grid), self.N, self.order).flatten(1), self.N)


class MultiBlock:
    """Batch -> Plan of I-JEPA: one context, four target blocks, each predicted on its own."""
    apart, steps, copies, proxy = True, 1, 1, "none"

    def __call__(self, batch, saliency, grid):
        return Plan(batch.actions[:, 0], batch.actions[:, 1:])


class RegionJEPA(nn.Module):
    """DSeq-JEPA, I-JEPA, C-JEPA or DSeq-C-JEPA. Parts are injected.

    plan: Discriminative or MultiBlock.  block: l, the target encoder's block that saliency is read from, from 1 up.
    vicreg: weight of C-JEPA's terms."""

    def __init__(self, encoder, predictor, plan, block, vicreg=0.0):
        super().__init__()
        self.encoder, self.predictor, self.plan, self.block, self.vicreg = encoder, predictor, plan, block, vicreg
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.copies = plan.copies if encoder.cls_token is not None else 0

    @property
    def representation(self):
        """What is evaluated: as I-JEPA, the target encoder."""
        return self.target_encoder

    def compile(self, *args, **kwargs):
        """Compile the parts: between them the host reads how many tokens there are."""
        for part in (self.encoder, self.target_encoder, self.predictor):
            part.compile(*args, **kwargs)

    def forward(self, batch):
        with torch.no_grad():
            tokens, h, saliency = self.look(batch)
            plan = self.plan(batch, saliency, self.encoder.grid)
        z_hat, index = self.predict(batch.views[:, 0], plan)
        step_loss, predicted = self.step_losses(z_hat, index, plan, h)
        steps = predicted.sum(1)
        loss = (step_loss.sum(1) / steps.clamp(min=1)).mean()                # Eqs. 6, 7: over the steps an image has, then over images
        if self.vicreg:
            loss = loss + self.vicreg * vicreg_terms(*map(gather, self.image_means(z_hat, index, plan, h)))     # of the global batch
        return Output(loss, tokens, tokens.mean(1), dict(steps=steps.float().mean()))

    def look(self, batch):
        """The target encoder's patch tokens (B, P, D), the same layer-normalised, and the saliency (B, P) in [0, 1]."""
        middle, last = self.target_encoder(batch.views[:, 0], keep=(self.block,))
        C = last.shape[1] - len(self.encoder.positions)
        tokens = last[:, C:].float()
        h = F.layer_norm(tokens, tokens.shape[-1:])
        if self.plan.proxy == "cls":
            saliency = min_max(cls_similarity(middle[:, 0].float(), middle[:, 1:].float()))
        elif self.plan.proxy == "grad-cam":
            saliency = self.gradient_saliency(batch, h)
        else:
            saliency = None
        return tokens, h, saliency

    def gradient_saliency(self, batch, h):
        """Eq. 8: Grad-CAM of the prediction loss with random blocks, on h, the target encoder's last tokens as they are predicted."""
        plan = sequential(batch.actions[:, 0], self.plan.N)
        z_hat, index = self.predict(batch.views[:, 0], plan)
        with torch.enable_grad():
            tokens = h.detach().requires_grad_()
            step_loss, _ = self.step_losses(z_hat, index, plan, tokens)
            gradient, = torch.autograd.grad(step_loss.sum(), tokens)
        return min_max(grad_cam(h, gradient))

    def predict(self, images, plan):
        """Run context encoder and predictor once each.

        -> z_hat (n, D), predictions of all mask tokens, and (n,) their indices in plan.target, flattened."""
        (B, V, P), C, wanted = plan.target.shape, self.copies, plan.target.flatten(0, 1)
        ranks = torch.arange(1, C + 1, device=images.device)
        cls = ranks * (plan.context[:, :, None] == ranks).any(1)                        # (B, C): a copy for every rank that is there
        seen = torch.cat([cls, plan.context], dim=1)                                    # (B, C+P)
        joint = torch.cat([seen.repeat_interleave(V, dim=0), wanted], dim=1)            # (B*V, C+P+P)
        group = torch.cat([torch.zeros_like(joint[:, :-P]), wanted * (not self.plan.apart)], dim=1)
        size, joint_size, (n, _) = sizes(seen > 0, joint > 0, wanted > 0)
        layout, joint_layout = arrange(seen, torch.zeros_like(seen), size), arrange(joint, group, joint_size)

        context, = self.encoder(images, layout, self.copies)
        row, place = joint_layout.order // (C + 2 * P), joint_layout.order % (C + 2 * P)
        masks = (place < C + P).int().argsort(stable=True)[:n]                           # which packed tokens are mask tokens
        torch._dynamo.maybe_mark_dynamic(masks, 0)
        z_hat = self.predictor(context, layout.order, seen.shape, joint_layout, masks)
        return z_hat, (row * P + place - C - P)[masks]

    def step_losses(self, z_hat, index, plan, h):
        """Smooth-L1 per step, averaged over its tokens and dimensions, fp32: (B, V * steps), and which of them were predicted."""
        (B, V, P), G = plan.target.shape, self.plan.steps
        error = F.smooth_l1_loss(z_hat.float(), h.flatten(0, 1)[self._patch(index, plan)], reduction="none").mean(1)
        step = index // P * G + plan.target.flatten()[index] - 1
        total, count = (error.new_zeros(B * V * G).index_add(0, step, x) for x in (error, torch.ones_like(error)))
        return (total / count.clamp(min=1)).view(B, V * G), (count > 0).view(B, V * G)

    def image_means(self, z_hat, index, plan, h):
        """Means over an image's mask tokens of predictions and of targets, (B, D) each, and whether it has any, (B,) 1 or 0; fp32."""
        B, V, P = plan.target.shape
        image = index // (V * P)
        count = torch.zeros(B, device=image.device).index_add(0, image, torch.ones(len(image), device=image.device))     # bf16 stops at 256
        means = [x.new_zeros(B, x.shape[1]).index_add(0, image, x) / count.clamp(min=1)[:, None]
                 for x in (z_hat.float(), h.flatten(0, 1)[self._patch(index, plan)])]
        return *means, (count > 0).float()

    @staticmethod
    def _patch(index, plan):
        """From indices into (B, V, P) to indices into (B, P)."""
        B, V, P = plan.target.shape
        return index // (V * P) * P + index % P

    @torch.no_grad()
    def update_target(self, tau):
        """theta_target <- tau * theta_target + (1 - tau) * theta, in place."""
        torch._foreach_lerp_(list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - tau)


def vicreg_terms(x, y, counts):
    """VICReg (Bardes et al., 2022) on an image's mean prediction x and mean target y, (B, D) each: C-JEPA's regulariser.

    counts (B,): 1 for images that were predicted at all, 0 for the others, which take no part.
    Invariance pulls x and y together; variance and covariance act on x, since y has no gradient. In fp32."""
    with torch.autocast(x.device.type, enabled=False):
        n, counts = counts.sum(), counts[:, None]
        centred = (x - (counts * x).sum(0) / n.clamp(min=1)) * counts
        covariance = centred.T @ centred / (n - 1).clamp(min=1)
        spread = F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean()
        off_diagonal = (covariance.square().sum() - covariance.diagonal().square().sum()) / x.shape[1]
        invariance = (counts * (x - y).square()).sum() / (n.clamp(min=1) * x.shape[1])
        return INVARIANCE * invariance + VARIANCE * spread + COVARIANCE * off_diagonal
