"""seq-JEPA (Sec. 2.2): how encoder, aggregator and predictor are wired, and the loss of Eq. 4.

    views (B, M+1, 3, H, W),  actions (B, M, A), actions[:, i] leads from view i to view i+1

    z_i   = f_theta(x_i)                                i = 1..M        encoder.py
    a_i   = embedding of action i                                       ActionEmbedding
    z_agg = g_phi((z_1, a_1), ..., (z_{M-1}, a_{M-1}), z_M)             aggregator.py
    z_hat = h_psi(z_agg, a_M)                                           predictor.py
    loss  = 1 - cos(z_hat, sg(f_target(x_{M+1})))       averaged over the batch

f_target is an exponential moving average of f_theta and never receives a gradient. It stays in
train mode, as in the authors' code: its BatchNorms use the statistics of its own batch and keep
their own buffers; only parameters are averaged.

Differs from the paper: the action embedding is a linear map followed by BatchNorm without affine,
as in the authors' code; unlike there, no "no action" rows enter its statistics.
Checked in tests/test_jepa.py.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class Output(NamedTuple):
    """What a method returns for a batch."""
    loss: torch.Tensor      # scalar
    z: torch.Tensor         # (B, M, D) of the observed views
    z_agg: torch.Tensor     # (B, D+E), what z is gathered into; of baselines the projection of the
                            # first view; of region methods, whose z are the target encoder's patch
                            # tokens (B, P, D), their mean (B, D).  Both are watched for collapse
    logs: dict              # {name: scalar tensor}: averaged over an epoch, then in metrics.csv
    weight: torch.Tensor = None     # scalar, the share of samples that have a loss, whose mean
                                    # `loss` is; None: the losses of a batch's parts do not add up
                                    # to its own, so it cannot be split (--accumulate)


class ActionEmbedding(nn.Module):
    """actions (B, M, A) -> (B, M, E).  Only the columns that --condition names are read.

    kind: "linear", learned (A.3); "raw", the numbers themselves and zeros up to a multiple of 4,
        the number of the aggregator's heads; "noise", a learned map of fresh random numbers (the
        last two: ablations of Table 4)."""

    def __init__(self, columns, dim, kind="linear"):
        super().__init__()
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.long), persistent=False)
        self.kind = kind
        self.dim = 4 * math.ceil(len(columns) / 4) if kind == "raw" else dim
        self.blind = not columns
        if not self.blind and kind != "raw":
            self.linear = nn.Linear(len(columns), dim, bias=False)
            self.norm = nn.BatchNorm1d(dim, affine=False)

    def forward(self, actions):
        B, M, _ = actions.shape
        if self.blind:
            return actions.new_zeros(B, M, self.dim)
        actions = actions.index_select(2, self.columns).float()
        if self.kind == "raw":
            return F.pad(actions, (0, self.dim - actions.shape[2]))
        if self.kind == "noise":
            actions = torch.randn_like(actions)
        return self.norm(self.linear(actions).flatten(0, 1).float()).unflatten(0, (B, M))


class SeqJEPA(nn.Module):
    """The world model. Parts are injected; action_in: which of them see the actions (Table 4)."""

    def __init__(self, encoder, embed, aggregator, predictor, action_in="both"):
        super().__init__()
        self.encoder = encoder
        self.embed = embed
        self.aggregator = aggregator
        self.predictor = predictor
        self.in_aggregator = action_in in ("both", "aggregator")
        self.in_predictor = action_in in ("both", "predictor")
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)

    def encode(self, views):
        """(B, V, 3, H, W) -> z (B, V, D)."""
        return self.encoder(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    def aggregate(self, z, a):
        """z (B, M, D) and the embedded actions between them (B, M-1, E) -> z_agg (B, D+E)."""
        return self.aggregator(z, a * self.in_aggregator)

    def predict(self, z_agg, a_last):
        """z_agg (B, D+E), embedded a_M (B, E) -> z_hat (B, D)."""
        return self.predictor(z_agg, a_last * self.in_predictor)

    @property
    def representation(self):
        """What is evaluated and kept as encoder.pt."""
        return self.encoder

    def forward(self, batch):
        """images.Batch -> Output"""
        views, actions = batch.views, batch.actions
        B, V = views.shape[:2]
        assert actions.shape[:2] == (B, V - 1), \
            f"{V} views need {V - 1} actions, got {tuple(actions.shape[:2])}"
        z = self.encode(views[:, :-1])
        a = self.embed(actions)
        z_agg = self.aggregate(z, a[:, :-1])
        z_hat = self.predict(z_agg, a[:, -1])
        with torch.no_grad():                                        # sg(.) of Eq. 4
            z_next = self.target_encoder(views[:, -1])
        return Output(prediction_loss(z_hat, z_next), z, z_agg, {})

    @torch.no_grad()
    def update_target(self, tau):
        """theta_target <- tau * theta_target + (1 - tau) * theta, in place."""
        target = list(self.target_encoder.parameters())
        torch._foreach_lerp_(target, list(self.encoder.parameters()), 1 - tau)


def prediction_loss(z_hat, z_next):
    """Eq. 4, averaged over the batch: 1 - cosine similarity, in fp32.  (B, D), (B, D) -> scalar."""
    return 1 - F.cosine_similarity(z_hat.float(), z_next.float(), dim=1).mean()
