"""The baselines of seq-JEPA's tables (Secs. 4.1, 4.2, A.3): same encoder, views and probes.

    x, y (B, 3, S, S) two views of one thing,  a (B, A) the action that takes x to y
    z = f_theta(x) (B, D) is what is probed,  h = projector(z) (B, P) what a loss sees

    class             what it wants                                           told a   EMA target
    SimCLR            h_x and h_y alike, and unlike those of other samples
    BYOL              to predict the target's h_y from h_x, and h_x from h_y              yes
    VICReg            h_x and h_y alike; dimensions that vary and do not correlate
    SEN               SimCLR between h_y and its prediction from (h_x, a)       yes
    EquiMod           SimCLR on one projector plus SEN on another               yes
    SIE               VICReg on half of z; on the other half h_y = W(a) h_x     yes
    ConditionalBYOL   to predict the target's h_y from (h_x, a)                 yes       yes
    (Conv-JEPA)       the same from each of M patches to patch M+1              yes       yes

A class says what is particular to its method and nothing else: its heads, and `objective`. Widths
are given in D, so that they shrink with it: 2048 = 4 D, 1024 = 2 D, 128 = D / 4 at the paper's
D = 512. --projector transformer puts the aggregator in every projector's place (Sec. 4.2); P is
then the width of what it is given.

Where A.3 is silent (bias, BatchNorm at the end, what SEN's predictor is) this follows the authors'
code. docs/baselines.md has each method's equation and differences, from its own paper too.
Checked in tests/test_baselines.py, for two processes in tests/test_distributed.py.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

from aggregator import Aggregator
from jepa import Output, prediction_loss
from plumbing.distributed import gather

TAU = 0.5                   # temperature of SimCLR and SEN (A.3)
TAU_EQUIMOD = 0.1
INVARIANCE = 10.0           # lambda_inv, lambda_V, lambda_C of VICReg and SIE
VARIANCE = 10.0
COVARIANCE = 1.0
EQUIVARIANCE = 4.5          # lambda_equi of SIE


# ---------------------------------------------------------------- projectors and predictors

class MLP(nn.Sequential):
    """Projector of two hidden layers: (B, d_in) -> (B, d_out), P = d_out.

    normed: whether it ends in a BatchNorm without affine; if not, hidden layers have biases."""

    def __init__(self, d_in, hidden, d_out, normed=True):
        layers = []
        for d in (d_in, hidden):
            layers += [nn.Linear(d, hidden, bias=not normed), nn.BatchNorm1d(hidden), nn.ReLU()]
        layers.append(nn.Linear(hidden, d_out, bias=False))
        if normed:
            layers.append(nn.BatchNorm1d(d_out, affine=False))
        super().__init__(*layers)
        self.dim = d_out


class Transformer(Aggregator):
    """The aggregator as projector: it reads [AGG] and one view, without an action. (B, d) -> (B, d)

    The widths and the ending that an MLP would have at this place do not matter to it."""

    def __init__(self, d_in, hidden, d_out, normed=True, *, feed_forward=2048):
        super().__init__(dim=d_in, action_dim=0, hidden=feed_forward)

    def forward(self, z):
        return super().forward(z[:, None], z.new_empty(len(z), 0, 0))


def linear_predictor(dim, action_dim):
    """(h, a) -> the h that a leads to: one linear map, normalised (SEN, EquiMod)."""
    return nn.Sequential(nn.Linear(dim + action_dim, dim, bias=False),
                         nn.BatchNorm1d(dim, affine=False))


def mlp_predictor(dim, action_dim, hidden):
    """The same with a hidden layer (BYOL, without actions, and Conditional BYOL)."""
    return nn.Sequential(nn.Linear(dim + action_dim, hidden, bias=False),
                         nn.BatchNorm1d(hidden), nn.ReLU(),
                         nn.Linear(hidden, dim))


# ---------------------------------------------------------------- losses, in fp32 as F.mse_loss is

def nt_xent(a, b, tau):
    """Contrastive loss of SimCLR: which of all rows belongs to this one?  -> scalar

    a, b (B, P): rows i of both are a pair; the other 2B - 2 rows, on all processes, are negatives.
    l_i = -log( exp(cos(u_i, u_pair(i)) / tau) / sum over k != i of exp(cos(u_i, u_k) / tau) ),
    averaged over the 2B rows u of both."""
    with torch.autocast(a.device.type, enabled=False):
        # Views are gathered one by one: joined first, rows would come by process, not by view.
        u = F.normalize(torch.cat([gather(a.float()), gather(b.float())]), dim=1)
        rows = torch.arange(len(u), device=u.device)
        itself = rows[:, None] == rows
        similarity = (u @ u.T / tau).masked_fill(itself, -torch.inf)
        return F.cross_entropy(similarity, rows.roll(len(u) // 2))


def variance(h):
    """VICReg's hinge: how far the standard deviations of h (B, P) are below 1, on average."""
    with torch.autocast(h.device.type, enabled=False):
        return F.relu(1 - (gather(h.float()).var(0) + 1e-4).sqrt()).mean()


def covariance(h):
    """Squared covariances of different dimensions of h (B, P), their sum divided by P."""
    with torch.autocast(h.device.type, enabled=False):
        h = gather(h.float())
        h = h - h.mean(0)
        C = h.T @ h / (len(h) - 1)
        return (C - C.diagonal().diag()).square().sum() / h.shape[1]


# ---------------------------------------------------------------- what all have in common

class TwoViews(nn.Module):
    """A method that learns from pairs of views: M = 1.

    encoder: f_theta.  embed: ActionEmbedding; of methods that are told nothing, a blind one.
    projector: (d_in, hidden, d_out, normed) -> MLP or Transformer; `.dim` is its P.
    Subclasses make their heads in `__init__` and write `objective`."""

    embedding = "linear"            # how actions are embedded, a kind of jepa.ActionEmbedding

    def __init__(self, encoder, embed):
        super().__init__()
        self.encoder = encoder
        self.embed = embed

    def objective(self, z_x, z_y, batch):
        """z_x, z_y (B, D) -> loss, projection of x (B, P), terms of the loss {name: scalar}."""
        raise NotImplementedError

    def action(self, batch):
        """The embedded action that takes x to y: (B, E)."""
        return self.embed(batch.actions)[:, 0]

    def encode(self, views):
        """(B, V, 3, H, W) -> z (B, V, D)."""
        return self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    @property
    def representation(self):
        """What is evaluated and kept as encoder.pt."""
        return self.encoder

    def forward(self, batch):
        assert batch.views.shape[1] == 2, f"expected pairs of views, got {batch.views.shape[1]}"
        z_x = self.encoder(batch.views[:, 0])       # a pass for each view: its own BatchNorm
        z_y = self.encoder(batch.views[:, 1])
        loss, h_x, terms = self.objective(z_x, z_y, batch)
        logs = {name: term.detach() for name, term in terms.items()}
        return Output(loss, torch.stack([z_x, z_y], dim=1), h_x, logs)

    def update_target(self, tau):
        """Nothing to do: there is no target network."""


# ---------------------------------------------------------------- told nothing: invariant methods

class SimCLR(TwoViews):
    """Chen et al., 2020: two views of a sample attract each other, all others repel."""

    def __init__(self, encoder, embed, projector):
        super().__init__(encoder, embed)
        D = encoder.dim
        self.projector = projector(D, 4 * D, 4 * D)

    def objective(self, z_x, z_y, batch):
        h_x = self.projector(z_x)
        h_y = self.projector(z_y)
        return nt_xent(h_x, h_y, TAU), h_x, {}


class BYOL(TwoViews):
    """Grill et al., 2020: predict what a slow copy of oneself makes of the other view.

    action_dim: width of an action that the predictor is told as well; 0: none."""

    def __init__(self, encoder, embed, projector, action_dim=0):
        super().__init__(encoder, embed)
        D = encoder.dim
        self.projector = projector(D, 4 * D, 4 * D)
        self.predictor = mlp_predictor(self.projector.dim, action_dim, hidden=D)
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def target(self, view):
        """view (B, 3, H, W) -> what is to be predicted (B, P), without gradient."""
        return self.target_projector(self.target_encoder(view))

    def objective(self, z_x, z_y, batch):
        x, y = batch.views.unbind(1)
        h_x = self.projector(z_x)
        h_y = self.projector(z_y)
        x_to_y = prediction_loss(self.predictor(h_x), self.target(y))
        y_to_x = prediction_loss(self.predictor(h_y), self.target(x))
        return 2 * x_to_y + 2 * y_to_x, h_x, {}                         # 2 - 2 cos, both ways

    @torch.no_grad()
    def update_target(self, tau):
        """EMA of encoder and projector, not of the predictor; parameters only, in place."""
        target = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - tau)


class VICReg(TwoViews):
    """Bardes et al., 2022: alike, and prevented from collapse by what a batch's statistics say."""

    def __init__(self, encoder, embed, projector):
        super().__init__(encoder, embed)
        D = encoder.dim
        self.projector = projector(D, 4 * D, 4 * D, normed=False)

    def objective(self, z_x, z_y, batch):
        h_x = self.projector(z_x)
        h_y = self.projector(z_y)
        invariance = F.mse_loss(h_x, h_y)
        spread = (variance(h_x) + variance(h_y)) / 2
        correlation = covariance(h_x) + covariance(h_y)
        loss = INVARIANCE * invariance + VARIANCE * spread + COVARIANCE * correlation
        return loss, h_x, dict(invariance=invariance, variance=spread, covariance=correlation)


# ---------------------------------------------------------------- told actions: equivariant methods

class SEN(SimCLR):
    """After Park et al., 2022, as in seq-JEPA: the action has to make up for what differs."""

    def __init__(self, encoder, embed, projector):
        super().__init__(encoder, embed, projector)
        self.predictor = linear_predictor(self.projector.dim, embed.dim)

    def objective(self, z_x, z_y, batch):
        h_x = self.projector(z_x)
        h_y = self.projector(z_y)
        predicted = self.predictor(torch.cat([h_x, self.action(batch)], dim=1))
        return nt_xent(predicted, h_y, TAU), h_x, {}


class EquiMod(TwoViews):
    """Devillers & Lefort, 2022, as in seq-JEPA: SimCLR, plus a module that is equivariant."""

    weight = 1.0                    # of the equivariant loss (A.3: equal weights)

    def __init__(self, encoder, embed, projector):
        super().__init__(encoder, embed)
        D = encoder.dim
        self.invariant = projector(D, 2 * D, D // 4)
        self.equivariant = projector(D, 2 * D, D // 4)
        self.predictor = linear_predictor(self.equivariant.dim, embed.dim)

    def objective(self, z_x, z_y, batch):
        h_x = self.invariant(z_x)
        h_y = self.invariant(z_y)
        given = torch.cat([self.equivariant(z_x), self.action(batch)], dim=1)
        invariance = nt_xent(h_x, h_y, TAU_EQUIMOD)
        equivariance = nt_xent(self.predictor(given), self.equivariant(z_y), TAU_EQUIMOD)
        loss = invariance + self.weight * equivariance
        return loss, h_x, dict(invariance=invariance, equivariance=equivariance)


class SIE(TwoViews):
    """Garrido et al., 2023: z is split; one half is to be invariant, the other turned by W(a).

    W(a) is linear in the action itself, not in an embedding of it: a hypernetwork without bias."""

    embedding = "raw"

    def __init__(self, encoder, embed, projector):
        super().__init__(encoder, embed)
        D = encoder.dim
        self.invariant = projector(D // 2, 2 * D, 2 * D, normed=False)
        self.equivariant = projector(D // 2, 2 * D, 2 * D, normed=False)
        A = len(embed.columns)
        P = self.equivariant.dim
        bound = A ** -0.5                                           # as nn.Linear's from A numbers
        self.hypernetwork = nn.Parameter(torch.empty(A, P, P).uniform_(-bound, bound))

    def project(self, z):
        """z (B, D) -> projections of its invariant and of its equivariant half, (B, P) each."""
        invariant, equivariant = z.chunk(2, dim=1)
        return self.invariant(invariant), self.equivariant(equivariant)

    def turn(self, h, a):
        """W(a) h for h (B, P), a (B, A).  W_1 h, ..., W_A h first: no sample needs its own W(a)."""
        A, P, _ = self.hypernetwork.shape
        turned = F.linear(h, self.hypernetwork.flatten(0, 1)).unflatten(1, (A, P))
        return (a[:, :, None] * turned).sum(1)

    def objective(self, z_x, z_y, batch):
        invariant_x, equivariant_x = self.project(z_x)
        invariant_y, equivariant_y = self.project(z_y)
        a = self.action(batch)[:, :len(self.embed.columns)]         # "raw" pads it with zeros
        predicted = self.turn(equivariant_x, a)
        # Joined, so that what one half knows is taken from the other.
        h_x = torch.cat([invariant_x, equivariant_x], dim=1)
        h_y = torch.cat([invariant_y, equivariant_y], dim=1)
        invariance = F.mse_loss(invariant_x, invariant_y)
        equivariance = F.mse_loss(predicted, equivariant_y)
        spread = (variance(h_x) + variance(h_y) + variance(predicted)) / 2
        correlation = covariance(h_x) + covariance(h_y)
        loss = (INVARIANCE * invariance + EQUIVARIANCE * equivariance
                + VARIANCE * spread + COVARIANCE * correlation)
        return loss, h_x, dict(invariance=invariance, equivariance=equivariance,
                               variance=spread, covariance=correlation)


class ConditionalBYOL(BYOL):
    """BYOL in one direction, its predictor told the action. With M > 1 views: Conv-JEPA (Sec. 4.1).

    Each of the M observed views predicts view M+1 by itself, told the action that leads there."""

    def __init__(self, encoder, embed, projector):
        super().__init__(encoder, embed, projector, embed.dim)

    def forward(self, batch):
        B, V = batch.views.shape[:2]
        z = self.encode(batch.views[:, :-1])                        # (B, M, D)
        a = self.embed(to_last(batch.actions))                      # (B, M, E)
        h = self.projector(z.flatten(0, 1))                         # (B M, P)
        predicted = self.predictor(torch.cat([h, a.flatten(0, 1)], dim=1))
        target = self.target(batch.views[:, -1]).repeat_interleave(V - 1, dim=0)
        h_1 = h.unflatten(0, (B, V - 1))[:, 0]
        return Output(2 * prediction_loss(predicted, target), z, h_1, {})


def to_last(actions):
    """Actions from each view to the next (B, M, A) -> from each view to the last (B, M, A).

    For M > 1 only where actions add up, as displacements do and quaternions do not."""
    return actions.flip(1).cumsum(1).flip(1)
