"""Rotations (seq-JEPA Secs. 2.3, A.1): one object in several poses, and the turns between them.

    angles (..., 3) extrinsic xyz, radians  ->  quaternion q (..., 4) = (x, y, z, w), unit length
    index (B,)  ->  M+1 distinct views (B, M+1, 3, S, S) of each object, actions (B, M, 6)

Action i: [q_i^-1 q_{i+1} (4), change of floor hue, change of light hue]. The products compose: the
actions of a sequence, multiplied from left to right, give the relative rotation from its first to
its last view. Signs are never flipped: with half-angles of at most pi/4 the formula is continuous
in the angles. Hues are in [0, 1] as published. Their differences are plain ones: the wrap from 1
to 0 is not undone.

Differs from the paper: nothing. Which columns the model is told is --condition; all are probed.
Checked in tests/test_rotations.py against SciPy.
"""
import torch

from images import Batch, Views, normalise
from plumbing.errors import BadInput

# Columns of the seven latents: rotation x, y, z; floor hue; light theta, phi, hue.
FLOOR_HUE = 3
LIGHT_HUE = 6


def quaternion(angles):
    """Rotation about the fixed x axis, then y, then z.

    angles (..., 3) in radians  ->  (..., 4) as (x, y, z, w)"""
    cx, cy, cz = (angles / 2).cos().unbind(-1)
    sx, sy, sz = (angles / 2).sin().unbind(-1)
    return torch.stack([sx * cy * cz - cx * sy * sz,
                        cx * sy * cz + sx * cy * sz,
                        cx * cy * sz - sx * sy * cz,
                        cx * cy * cz + sx * sy * sz], dim=-1)


def inverse(q):
    """Of unit quaternions (..., 4): the conjugate."""
    return torch.cat([-q[..., :3], q[..., 3:]], dim=-1)


def multiply(p, q):
    """Hamilton product (..., 4) x (..., 4) -> (..., 4): turn by q, then by p, as SciPy's p * q."""
    px, py, pz, pw = p.unbind(-1)
    qx, qy, qz, qw = q.unbind(-1)
    return torch.stack([pw * qx + px * qw + py * qz - pz * qy,
                        pw * qy - px * qz + py * qw + pz * qx,
                        pw * qz + px * qy - py * qx + pz * qw,
                        pw * qw - px * qx - py * qy - pz * qz], dim=-1)


def relative(q1, q2):
    """The turn (..., 4) that takes q1 to q2 in the frame of the object: q1^-1 q2.

    q1 times it is q2."""
    return multiply(inverse(q1), q2)


class Rotations(Views):
    """Mode `rotation`: object indices -> Batch of M+1 distinct renders of each, in random order.

    split: images.Split with images (N, V, 3, S, S) and latents (N, V, 7).
    actions (B, M, 6): relative quaternion, then differences of floor hue and light hue.
    params (B, M+1, 9): the view's own quaternion, floor hue, light hue, and last its three angles
    in radians."""

    conditions = ("rotation", "color", "rotation+color", "none")
    groups = {"rotation": slice(0, 4), "color": slice(4, 6)}
    param_groups = {"rotation": slice(0, 4), "color": slice(4, 6)}
    maps = {"angle x, rad": 6, "angle y, rad": 7, "angle z, rad": 8}

    def __init__(self, split, config, device):
        super().__init__(split, config, device)
        assert len(split.parts) == 1, "mode rotation needs a data set in one part"
        images = split.parts[0].images
        assert images.ndim == 5, f"mode rotation needs objects (N, V, 3, S, S), got {images.shape}"
        assert split.latents.shape == (*images.shape[:2], 7), \
            f"images {images.shape} need latents (N, V, 7), got {split.latents.shape}"
        self.view_count = images.shape[1]
        latents = torch.as_tensor(split.latents).to(device)
        angles = latents[..., :3]
        hues = latents[..., [FLOOR_HUE, LIGHT_HUE]]
        self.params = torch.cat([quaternion(angles), hues, angles], dim=-1)     # (N, V, 9)
        self.labels = torch.from_numpy(split.labels)                # of objects, not of renders

    def __call__(self, index, M):
        """index (B,) int64 on the CPU -> Batch of M observed views and the one after."""
        if M + 1 > self.view_count:
            raise BadInput(f"--views {M}: a sequence needs {M + 1} distinct views "
                           f"and an object has {self.view_count}; lower --views")
        views, params = self.look(index, self._choose(index, M))
        actions = self.relative(params[:, :-1], params[:, 1:])
        return Batch(views, actions, params, self.labels_of(index))

    def relative(self, first, last):
        """Action (..., 6) between views of a sequence with these params (..., 9)."""
        turn = relative(first[..., :4], last[..., :4])
        return torch.cat([turn, last[..., 4:6] - first[..., 4:6]], dim=-1)

    def look(self, index, chosen):
        """Chosen views (B, K) of objects (B,), both on the CPU.

        ->  views (B, K, 3, S, S), params (B, K, 9)"""
        rows = self._rows(index, chosen)
        views = self.images[rows].unflatten(0, chosen.shape)
        rows = rows.to(self.device, non_blocking=True)
        params = self.params.flatten(0, 1)[rows].unflatten(0, chosen.shape)
        return self.to_views(views), params

    def to_views(self, views):
        """uint8 (B, K, 3, S, S) -> float, normalised."""
        return normalise(views, self.mean, self.std, channel_dim=2)

    def prefetch(self, index, M):
        """Say that self(index, M) comes soon, under the same seed."""
        self.images.prefetch(self._rows(index, self._choose(index, M)))

    def _choose(self, index, M):
        """M+1 distinct views of each object, on the CPU: images may be fetched there."""
        return torch.rand(len(index), self.view_count).topk(M + 1).indices

    def _rows(self, index, chosen):
        return (index[:, None] * self.view_count + chosen).flatten()

    def all_views(self, index):
        """All V views of objects (B,), in stored order: views (B, V, 3, S, S), params (B, V, 9)."""
        return self.look(index, torch.arange(self.view_count).expand(len(index), -1))

    def clean(self, index):
        """None: a render has no cleaner original, so z is probed on the first view itself."""
