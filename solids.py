"""Embedded data set: procedural 3-D solids, a stand-in for 3DIEBench (seq-JEPA Sec. 2.3, A.1) that needs no download.

    recipe of a class + random proportions  ->  Solids: n objects of at most P boxes, ellipsoids and frusta
    seven latents of 3DIEBench per view      ->  latents (n, views, 7), in the order of LATENTS
    render(solids, object_index (B,), latents (B, 7), size)  ->  uint8 (B, 3, size, size)

The world is z-up, the camera looks towards +y from slightly above, and an object fits the unit ball around the
origin, about which it turns over a floor at z = -1. Nothing is approximated by meshes: rays meet primitives in closed
form, once from the camera (what is seen) and once from the light (what is lit), with 2x2 samples per pixel.
Object i of a (seed, split) is always the same, whatever the number of objects, the image size or the machine.

Differs from 3DIEBench: 16 classes of our own instead of 55 of ShapeNet, colours and stripes drawn per object and
independent of the class instead of textures, no reflections. Checked in tests/test_solids.py."""

import math
from typing import Iterator, NamedTuple

import numpy as np
import torch

LATENTS = ("rotation_x", "rotation_y", "rotation_z", "floor_hue", "light_theta", "light_phi", "light_hue")
LATENT_RANGES = ((-math.pi / 2, math.pi / 2),) * 3 + ((0.0, 1.0), (0.0, math.pi / 4), (0.0, 2 * math.pi), (0.0, 1.0))
SPLITS = ("train", "val")

CAMERA_DISTANCE, CAMERA_POLAR = 5.0, math.radians(62)           # polar angle: from the zenith
HALF_WIDTH = 1.03 / math.sqrt(CAMERA_DISTANCE**2 - 1)           # of the image at depth 1; the unit ball and 3 % margin
LIGHT_DISTANCE, SPOT_INNER, SPOT_OUTER = 5.0, math.radians(14), math.radians(30)
FLOOR_Z, FLOOR_SATURATION, FLOOR_VALUE = -1.0, 0.6, 0.9
AMBIENT, CAMERA_FILL, SPOT_STRENGTH, LIGHT_SATURATION = 0.25, 0.2, 0.55, 0.5   # the first two white; sum 1: no clipping
STRIPE_STRENGTH = 0.12
FAR = 1e9                                                       # t of a ray that hits nothing
CHUNK = 19
TILE, SAMPLES = 8, 2                                            # pixels per tile side, samples per pixel side
BOX, ELLIPSOID, FRUSTUM, NOTHING = 0, 1, 2, -1                  # kinds of primitive; NOTHING pads


# --- class recipes: z up, front towards -y; u(lo, hi) draws a proportion; the scale is normalised afterwards ---------

def box(centre, half, turn=(0, 0, 0), part=0):
    """One row: kind, centre (3), half extents (3), turn (extrinsic xyz radians), end radii (2), part (picks a colour)."""
    return (BOX, *centre, *half, *turn, 1, 1, part)


def ellipsoid(centre, radii, turn=(0, 0, 0), part=0):
    return (ELLIPSOID, *centre, *radii, *turn, 1, 1, part)


def frustum(base, top, r0, r1=None, part=0, flat=1):
    """Truncated cone (a cylinder if `r1` is None) from point `base`, radius `r0`, to `top`, `r1`; y is scaled by `flat`."""
    r1 = r0 if r1 is None else r1
    dx, dy, dz = (b - a for a, b in zip(base, top))
    length, radius = math.sqrt(dx * dx + dy * dy + dz * dz), max(r0, r1)
    turn = (0, math.acos(dz / length), math.atan2(dy, dx))      # takes the z axis to the direction base -> top
    middle = ((a + b) / 2 for a, b in zip(base, top))
    return (FRUSTUM, *middle, radius, flat * radius, length / 2, *turn, r0 / radius, r1 / radius, part)


def legs(x, y, top, bottom, r, part=1):
    return [frustum((i * x, j * y, top), (i * x, j * y, bottom), r, 0.8 * r, part) for i in (-1, 1) for j in (-1, 1)]


def wheels(xs, y, z, r, width, part=2):
    return [frustum((x, j * y, z), (x, j * (y + width), z), r, part=part) for x in xs for j in (-1, 1)]


def aeroplane(u):
    r, sweep, span, chord = u(.10, .14), u(.15, .5), u(.45, .55), u(.10, .16)
    wing = lambda x, z, s, c, j: box((x - s * math.sin(sweep), j * s * math.cos(sweep), z), (c, s, .025), (0, 0, j * sweep), 1)
    return [ellipsoid((0, 0, 0), (1, r, r)), wing(.2, 0, span, chord, 1), wing(.2, 0, span, chord, -1),
            wing(-.75, .05, .2, .08, 1), wing(-.75, .05, .2, .08, -1), box((-.85, 0, .2), (.1, .025, u(.16, .24)), (0, -.3, 0), 2),
            *(frustum((-.1, j * .42, -.08), (.22, j * .42, -.08), .06, part=2) for j in (-1, 1))]


def bookshelf(u):
    w, d, h, n, t = u(.40, .55), u(.13, .2), u(.85, 1), int(u(3, 6)), .035
    boards = [box((0, 0, h * (2 * i / n - 1)), (w, d, t), part=1) for i in range(n + 1)]
    return [box((-w, 0, 0), (t, d, h)), box((w, 0, 0), (t, d, h)), box((0, d, 0), (w, .02, h), part=2), *boards]


def bottle(u):
    r, body, neck = u(.22, .32), u(.9, 1.2), u(.07, .1)
    top = body + u(.2, .35)
    end = top + u(.2, .35)
    return [frustum((0, 0, 0), (0, 0, body), r), frustum((0, 0, body), (0, 0, top), r, neck),
            frustum((0, 0, top), (0, 0, end), neck), frustum((0, 0, end), (0, 0, end + .12), neck * 1.35, part=1),
            frustum((0, 0, .2 * body), (0, 0, .7 * body), r * 1.04, part=2)]


def car(u):
    w, h, nose, r = u(.38, .45), u(.14, .18), u(.35, .5), u(.17, .22)
    return [box((0, 0, 0), (1, w, h)), box((nose / 2 - .3, 0, h + .14), (.38, w * .85, .15), part=1),
            box((nose / 2 + .1, 0, h + .07), (.24, w * .84, .08), (0, .55, 0), 1), *wheels((-.6, .6), w - .1, -h, r, .14)]


def chair(u):
    w, back, leg, t = u(.38, .48), u(.75, 1.0), u(.65, .85), u(.05, .07)
    bars = [box((x * w, w, back / 2), (t, t, back / 2), part=1) for x in (-.9, 0, .9)]
    rest = [box((0, w, back / 2), (w, t, back / 2), part=1)] if u(0, 1) < .5 else [*bars, box((0, w, back), (w, t, .13))]
    return [box((0, 0, 0), (w, w, t)), *legs(w * .88, w * .88, 0, -leg, .065), *rest]


def guitar(u):
    low, high, d, neck = u(.40, .48), u(.28, .34), u(.09, .13), u(.8, 1.0)
    top = .75 + neck
    return [frustum((0, d, 0), (0, -d, 0), low), frustum((0, d, .48), (0, -d, .48), high), box((0, 0, .3), (high * .8, d, .2)),
            frustum((0, -d, .18), (0, -d - .02, .18), .14, part=2), box((0, -d, .45 + top / 2), (.055, .04, top / 2 - .1), part=1),
            box((0, -d, top + .45), (.11, .05, .15), part=2), box((0, -d - .02, -.2), (.17, .03, .04), part=1)]


def lamp(u):
    h, low, high, s = u(1.0, 1.3), u(.45, .6), u(.16, .28), u(.45, .6)
    return [frustum((0, 0, 0), (0, 0, .09), u(.32, .42), .25), frustum((0, 0, 0), (0, 0, h), .05, part=1),
            frustum((0, 0, h), (0, 0, h + s), low, high, 2), ellipsoid((0, 0, u(.2, .5)), (.13, .13, .16), part=1)]


def laptop(u):
    w, d, t, tilt = u(.75, .95), u(.5, .62), .045, u(.1, .6)
    lid = lambda up, out, half, part: box(
        (0, d + up * math.sin(tilt) - out * math.cos(tilt), up * math.cos(tilt) + out * math.sin(tilt)), half, (-tilt, 0, 0), part)
    return [box((0, 0, 0), (w, d, t)), lid(d, 0, (w, t * .8, d), 0), lid(d, t, (w * .88, .02, d * .84), 1),
            box((0, .14, t), (w * .85, d * .45, .02), part=2), box((0, -d * .65, t), (w * .25, d * .2, .02), part=2)]


def mug(u):
    r, h, reach, t = u(.42, .55), u(.5, .65), u(.26, .36), .075
    low, high = -h * u(.4, .6), h * u(.4, .65)
    points = [(r - .05, low), (r + .7 * reach, low), (r + reach, low + .16), (r + reach, high - .16), (r + .7 * reach, high), (r - .05, high)]
    handle = [frustum((a, 0, b), (c, 0, d), t, part=1) for (a, b), (c, d) in zip(points, points[1:])]
    return [frustum((0, 0, -h), (0, 0, h), r * u(.8, 1), r), frustum((0, 0, h), (0, 0, h + .012), r * .86, part=2), *handle]


def rocket(u):
    r, h, nose, fin = u(.18, .25), u(1.0, 1.3), u(.4, .6), u(.2, .3)
    fins = [box((math.cos(a) * (r + fin / 2), math.sin(a) * (r + fin / 2), .12), (fin, .03, .25), (0, .35, a), 1)
            for a in (.5, .5 + math.pi / 2, .5 + math.pi, .5 + math.pi * 1.5)]
    return [frustum((0, 0, 0), (0, 0, h), r), frustum((0, 0, h), (0, 0, h + nose), r, 0, 1),
            frustum((0, 0, -.2), (0, 0, 0), r * .95, r * .55, 2), frustum((0, 0, .7 * h), (0, 0, .82 * h), r * 1.05, part=2), *fins]


def sailboat(u):
    w, h, mast, sail = u(.2, .28), u(.12, .16), u(1.2, 1.5), u(.5, .7)
    return [box((-.1, 0, 0), (.62, w, h)), ellipsoid((.45, 0, 0), (.55, w * .98, h * .98)),
            frustum((0, 0, 0), (0, 0, h + mast), .035, part=2),
            frustum((-.1, 0, h + .12), (0, 0, h + mast), sail, 0, 1, flat=.05)]


def skateboard(u):
    w, r, x, tilt = u(.24, .32), u(.1, .13), u(.5, .6), u(.3, .6)
    tail = lambda j: box((j * (.72 + .2 * math.cos(tilt)), 0, .2 * math.sin(tilt)), (.22, w * .92, .04), (0, -j * tilt, 0), 1)
    axles = [box((j * x, 0, -.1), (.05, w * .6, .09), part=1) for j in (-1, 1)]
    return [box((0, 0, 0), (.75, w, .04)), tail(1), tail(-1), *axles, *wheels((-x, x), w * .55, -.2, r, .14)]


def sofa(u):
    w, d, seat, back, arm = u(.75, .95), u(.36, .44), u(.16, .2), u(.5, .65), u(.12, .17)
    return [box((0, 0, 0), (w, d, seat)), box((0, d, back / 2), (w + arm, .13, back / 2 + seat), part=0),
            *(box((j * (w + arm * .5), 0, .12), (arm, d, seat + .13), part=1) for j in (-1, 1)),
            *(box((j * w * .47, -.06, seat + .05), (w * .44, d * .9, .07), part=2) for j in (-1, 1))]


def table(u):
    w, d, h, t = u(.75, 1), u(.5, .75), u(.6, .85), u(.045, .07)
    if u(0, 1) < .3:
        return [frustum((0, 0, -t), (0, 0, t), w * .9), *legs(w * .52, w * .52, 0, -h, .075)]
    return [box((0, 0, 0), (w, d, t)), *legs(w * .88, d * .86, 0, -h, .075)]


def teddy(u):
    belly, head, limb = u(.36, .44), u(.29, .35), u(.13, .17)
    z = belly * 1.1 + head * .75
    return [ellipsoid((0, 0, 0), (belly, belly * .85, belly * 1.15)), ellipsoid((0, -.02, z), (head, head * .9, head * .9)),
            ellipsoid((0, -head * .85, z - .06), (.13, .12, .1), part=1),
            *(ellipsoid((j * head * .75, 0, z + head * .75), (.13, .08, .13), part=1) for j in (-1, 1)),
            *(ellipsoid((j * (belly + .12), -.1, .18), (.28, limb, limb), (0, j * .6, 0), 2) for j in (-1, 1)),
            *(ellipsoid((j * belly * .65, -.32, -belly * .9), (limb * 1.1, .32, limb * 1.1), part=2) for j in (-1, 1))]


def train(u):
    r, z, cab, w = u(.22, .28), .28, u(.5, .65), .3
    return [frustum((-.4, 0, z), (.85, 0, z), r), box((0, 0, 0), (.95, w, .07), part=1), box((-.62, 0, cab / 2), (.28, w, cab / 2)),
            box((-.62, 0, cab), (.36, w + .08, .04), part=1), frustum((.6, 0, z), (.6, 0, z + r + u(.25, .4)), .07, .12, part=1),
            ellipsoid((.1, 0, z + r), (.12, .12, .14), part=2), *wheels((-.65, 0, .55), w - .1, -.1, .2, .12)]


RECIPES = (aeroplane, bookshelf, bottle, car, chair, guitar, lamp, laptop,
           mug, rocket, sailboat, skateboard, sofa, table, teddy, train)
CLASSES = tuple(recipe.__name__ for recipe in RECIPES)


# --- sampling --------------------------------------------------------------------------------------------------------

class Solids(NamedTuple):
    """n objects of P primitives each, in the object's frame; padded with kind NOTHING."""
    labels: torch.Tensor    # (n,) int64, index into CLASSES
    kind: torch.Tensor      # (n, P) int64
    centre: torch.Tensor    # (n, P, 3)
    half: torch.Tensor      # (n, P, 3) half extents along the primitive's own axes
    axes: torch.Tensor      # (n, P, 3, 3) those axes, as columns
    ends: torch.Tensor      # (n, P, 2) a frustum's radii at its own z = -1 and z = +1, as fractions of half
    colour: torch.Tensor    # (n, P, 3) RGB in [0, 1]
    stripes: torch.Tensor   # (n, 4) wave vector and phase of a faint pattern: symmetric shapes show their rotation too


def rotation_matrix(angles: torch.Tensor) -> torch.Tensor:
    """Extrinsic xyz angles (..., 3) in radians -> (..., 3, 3), SciPy's Rotation.from_euler("xyz", angles)."""
    (cx, cy, cz), (sx, sy, sz) = angles.cos().unbind(-1), angles.sin().unbind(-1)
    rows = (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx,
            sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx,
            -sy, cy * sx, cy * cx)
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def hsv_to_rgb(hue: torch.Tensor, saturation, value) -> torch.Tensor:
    """Hue (...,) in [0, 1] and the rest broadcastable to it -> RGB (..., 3)."""
    ramp = torch.stack([((hue * 6 + shift) % 6 - 3).abs() - 1 for shift in (0, 4, 2)], -1).clamp(0, 1)
    saturation, value = (torch.as_tensor(x, device=hue.device)[..., None] for x in (saturation, value))
    return value * (1 - saturation * (1 - ramp))


def generator(stream: int, seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of one object; `stream` keeps shapes (0) and latents (1) apart."""
    assert split in SPLITS, f"split is one of {SPLITS}, got {split!r}"
    return np.random.default_rng(np.random.SeedSequence((stream, seed, SPLITS.index(split), index)))


def sample_objects(n: int, seed: int, split: str) -> Solids:
    """Objects 0..n-1 of a split. Classes take turns (label i % 16); object i does not depend on n."""
    P = 15
    rows, palette, stripes = np.zeros((n, P, 13)), np.empty((n, 3, 3)), np.empty((n, 4))
    rows[..., 0] = NOTHING
    for i in range(n):
        rng = generator(0, seed, split, i)
        primitives = RECIPES[i % len(RECIPES)](rng.uniform)
        rows[i, :len(primitives)] = primitives
        palette[i] = rng.uniform((0, .1, .4), (1, .8, .85), (3, 3))             # hue, saturation, value of each part
        wave = rng.normal(size=3)
        stripes[i] = *(wave / np.linalg.norm(wave) * rng.uniform(5, 12)), rng.uniform(0, 2 * math.pi)
    rows, palette, stripes = (torch.from_numpy(x).float() for x in (rows, palette, stripes))
    kind, part = rows[..., 0].long(), rows[..., 12].long().clamp(min=0)
    colour = hsv_to_rgb(*palette.unbind(-1)).gather(1, part[..., None].expand(n, P, 3))
    axes, half, ends = rotation_matrix(rows[..., 7:10]), rows[..., 4:7], rows[..., 10:12]
    centre, half = fit_unit_ball(kind, rows[..., 1:4], half, axes, ends)
    return Solids(torch.arange(n) % len(RECIPES), kind, centre, half, axes, ends, colour, stripes)


def fit_unit_ball(kind, centre, half, axes, ends):
    """Moves the middle of the bounding box to the origin and scales the farthest point (or a bound of it) to 1."""
    reach = torch.einsum("npij,npj->npi", axes.abs(), half)
    real = (kind != NOTHING)[..., None]
    low = (centre - reach).masked_fill(~real, math.inf).amin(1, keepdim=True)
    high = (centre + reach).masked_fill(~real, -math.inf).amax(1, keepdim=True)
    centre = (centre - (low + high) / 2) * real
    local = torch.einsum("npji,npj->npi", axes, centre)                        # the centre along the primitive's axes
    corner = (local.abs() + half).norm(dim=-1)
    rims = [torch.hypot(local[..., :2].norm(dim=-1) + half[..., 0] * ends[..., e], local[..., 2] + s * half[..., 2])
            for e, s in ((0, -1), (1, 1))]
    farthest = torch.where(kind == FRUSTUM, torch.maximum(*rims), corner)
    farthest = torch.where(kind == ELLIPSOID, torch.minimum(corner, local.norm(dim=-1) + half.amax(-1)), farthest)
    scale = 1 / (farthest * real[..., 0]).amax(1)[:, None, None]
    return centre * scale, half * scale * real


def sample_latents(n_objects: int, n_views: int, seed: int, split: str, rotation_range: float = math.pi / 2) -> torch.Tensor:
    """float32 (n_objects, n_views, 7) in the order of LATENTS; the three angles within +-rotation_range (radians)."""
    low, high = np.array(LATENT_RANGES).T
    low[:3], high[:3] = -rotation_range, rotation_range
    uniform = [generator(1, seed, split, i).random((n_views, len(LATENTS))) for i in range(n_objects)]
    return torch.from_numpy(low + (high - low) * np.array(uniform).reshape(n_objects, n_views, len(LATENTS))).float()


# --- rendering -------------------------------------------------------------------------------------------------------

class Placed(NamedTuple):
    """The primitives of B views, turned into the world."""
    kind: torch.Tensor      # (B, P)
    centre: torch.Tensor    # (B, P, 3)
    to_local: torch.Tensor  # (B, P, 3, 3) world vectors -> frame where the primitive's half extents are 1
    ends: torch.Tensor      # (B, P, 2)
    corners: torch.Tensor   # (B, P, 3, 8) of the bounding boxes


def place(solids: Solids, object_index: torch.Tensor, rotation: torch.Tensor) -> Placed:
    kind, centre, half, axes, ends = (x[object_index] for x in solids[1:6])
    axes, centre = rotation[:, None] @ axes, (rotation[:, None] @ centre[..., None])[..., 0]
    signs = torch.tensor([[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)], device=centre.device).T
    corners = centre[..., None] + axes @ (half[..., None] * signs)
    return Placed(kind, centre, axes.mT / half.clamp(min=1e-6)[..., None], ends, corners)


def look_at_origin(theta: torch.Tensor, phi: torch.Tensor, distance: float):
    """Camera or light in polar coordinates (B,) -> position (B, 3), axes (B, 3, 3) with rows right, up, forward."""
    (ct, cp), (st, sp) = (theta.cos(), phi.cos()), (theta.sin(), phi.sin())
    outward = torch.stack([st * cp, st * sp, ct], -1)
    right, up = torch.stack([-sp, cp, torch.zeros_like(cp)], -1), torch.stack([-ct * cp, -ct * sp, st], -1)
    return distance * outward, torch.stack([right, up, -outward], -2)


def hit_box(o, d, _):
    """Rays o + t d, components (n, 1) and (n, S), from outside -> t (n, S) where they enter [-1, 1]^3, FAR if never.

    A negative number under a root marks a miss in all three functions: on a CPU NaN is far faster than torch.where,
    and rsqrt than sqrt, which has a slow path for such numbers."""
    inverse = [1 / (axis + 1e-12) for axis in d]
    middle, reach = [-a * b for a, b in zip(o, inverse)], [b.abs() for b in inverse]
    near = torch.maximum(torch.maximum(middle[0] - reach[0], middle[1] - reach[1]), middle[2] - reach[2])
    far = torch.minimum(torch.minimum(middle[0] + reach[0], middle[1] + reach[1]), middle[2] + reach[2])
    return (near + 0 * (far - near).rsqrt()).nan_to_num(FAR)


def hit_ellipsoid(o, d, _):
    """The same for the unit ball."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    a, b, c = dx * dx + dy * dy + dz * dz, ox * dx + oy * dy + oz * dz, ox * ox + oy * oy + oz * oz - 1
    discriminant = b * b - a * c
    return ((-b - discriminant * discriminant.rsqrt()) / a).nan_to_num(FAR)


def hit_frustum(o, d, ends):
    """The same for the solid |z| <= 1 whose radius runs from ends[:, 0] at z = -1 to ends[:, 1] at z = 1.

    A convex body is entered once: through the side, always at the root with -sqrt, or through the cap facing the ray."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    slope = (ends[:, 1:] - ends[:, :1]) / 2
    radius, growth = (ends[:, :1] + ends[:, 1:]) / 2 + slope * oz, slope * dz      # at the origin, and along the ray
    a, b, c = dx * dx + dy * dy - growth * growth, ox * dx + oy * dy - radius * growth, ox * ox + oy * oy - radius * radius
    discriminant = b * b - a * c
    side = (-b - discriminant * discriminant.rsqrt()) / (a + 1e-12)
    z = oz + side * dz
    inverse = 1 / (dz + 1e-12)
    cap = -oz * inverse - inverse.abs()
    x, y, r = ox + cap * dx, oy + cap * dy, radius + growth * cap
    side, cap = side + 0 * (1 - z * z).rsqrt(), cap + 0 * (r * r - x * x - y * y).rsqrt()
    return torch.minimum(side.nan_to_num(FAR), cap.nan_to_num(FAR))


def screen_bounds(axes: torch.Tensor, vectors: torch.Tensor):
    """Vectors (B, K, 3, S) from an eye with axes (B, 3, 3) -> bounds (low, high) of each set on its screen, (B, K, 2)."""
    seen = axes[:, None] @ vectors
    uv = seen[:, :, :2] / seen[:, :, 2:].clamp(min=0.05)       # what lies behind a light is outside its spot anyway
    return uv.amin(-1), uv.amax(-1)


def trace(eye: torch.Tensor, axes: torch.Tensor, rays: torch.Tensor, placed: Placed):
    """First hits of rays (B, T, 3, S), S per tile, from eyes (B, 3) -> t (B, T, S), about FAR if none, and primitive (B, T, S).

    A dimension B of 1 is shared by all views. Only tiles whose screen bounds meet those of a primitive test it."""
    (B, P), (_, T, _, S) = placed.kind.shape, rays.shape
    assert P <= 16, f"four bits of t hold the primitive, so an object has at most 16, got {P}"
    tile_low, tile_high = screen_bounds(axes, rays)
    low, high = screen_bounds(axes, placed.corners - eye[:, None, :, None])
    meets = ((tile_low[:, :, None] < high[:, None]) & (tile_high[:, :, None] > low[:, None])).all(-1)   # (B, T, P)
    origin = (placed.to_local @ (eye[:, None] - placed.centre)[..., None])
    nearest = torch.full((B * T, S), FAR, device=rays.device).view(torch.int32)
    shared, rays = len(rays) == 1, rays.reshape(-1, 3, S)
    for p in range(P):
        for kind, hit in ((BOX, hit_box), (ELLIPSOID, hit_ellipsoid), (FRUSTUM, hit_frustum)):
            view, tile = (meets[:, :, p] & (placed.kind[:, None, p] == kind)).nonzero(as_tuple=True)
            if len(view):
                row, m = view * T + tile, placed.to_local[view, p, :, :, None].unbind(1)
                x, y, z = rays.index_select(0, tile if shared else row).unbind(1)
                d = [torch.addcmul(torch.addcmul(i[:, 0] * x, i[:, 1], y), i[:, 2], z) for i in m]
                t = hit(origin[view, p].unbind(1), d, placed.ends[view, p])
                # positive floats sort like their bits, so with p in the lowest four one minimum keeps both t and p
                packed = t.view(torch.int32) & -16 | p
                nearest.index_copy_(0, row, torch.minimum(nearest.index_select(0, row), packed))
    nearest = nearest.view(B, T, S)
    return (nearest & -16).view(torch.float32), nearest & 15


def normals(placed: Placed, view: torch.Tensor, primitive: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Outward unit normals (H, 3) at `points` (H, 3) on the surface of primitive (H,) of view (H,)."""
    index = view * placed.kind.shape[1] + primitive
    to_local, kind, ends, centre = (x.flatten(0, 1).index_select(0, index)
                                    for x in (placed.to_local, placed.kind, placed.ends, placed.centre))
    x, y, z = (points - centre).unbind(-1)
    local = to_local[:, :, 0] * x[:, None] + to_local[:, :, 1] * y[:, None] + to_local[:, :, 2] * z[:, None]
    x, y, z = local.unbind(-1)
    around, slope = torch.hypot(x, y), (ends[:, 1] - ends[:, 0]) / 2
    on_cap = (z.abs() - 1 > around - (ends.mean(-1) + slope * z))[:, None]
    cap, side = local * local.new_tensor([0, 0, 1]), torch.stack([x, y, -slope * around], -1)
    normal = torch.where((kind == FRUSTUM)[:, None], torch.where(on_cap, cap, side), local)
    face = local * (local.abs() == local.abs().amax(-1, keepdim=True))
    normal = torch.where((kind == BOX)[:, None], face, normal)
    normal = normal[:, :1] * to_local[:, 0] + normal[:, 1:2] * to_local[:, 1] + normal[:, 2:] * to_local[:, 2]
    return torch.nn.functional.normalize(normal, dim=-1)


def camera_rays(size: int, device):
    """Position (1, 3), axes (1, 3, 3) and rays (1, T, 3, S) of the fixed camera; S runs over pixels, then samples."""
    n = -(-size // TILE)                                       # tiles per side; what exceeds `size` is cropped later
    eye, axes = look_at_origin(torch.tensor([CAMERA_POLAR]), torch.tensor([-math.pi / 2]), CAMERA_DISTANCE)
    across = ((torch.arange(n * TILE * SAMPLES) + 0.5) / (size * SAMPLES) * 2 - 1) * HALF_WIDTH
    v, u = torch.meshgrid(-across, across, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], -1) @ axes[0]
    rays = rays.view(n, TILE, SAMPLES, n, TILE, SAMPLES, 3).permute(0, 3, 6, 1, 4, 2, 5).reshape(1, n * n, 3, -1)
    return eye.to(device), axes.to(device), rays.to(device)


def surface(solids, object_index, latents, placed, points, on_object, primitive):
    """Colour and unit normal, both (B, T, 3, S), at `points` (B, T, 3, S); of which `on_object` (B, T, S) are not floor."""
    view, tile, sample = on_object.nonzero(as_tuple=True)
    p, position = primitive[view, tile, sample], points[view, tile, :, sample]
    stripes, colour = solids.stripes[object_index], solids.colour[object_index]
    wave = (rotation_matrix(latents[:, :3]) * stripes[:, None, :3]).sum(-1)
    pattern = 1 + STRIPE_STRENGTH * torch.sin((position * wave[view]).sum(-1) + stripes[view, 3])
    albedo = hsv_to_rgb(latents[:, 3], FLOOR_SATURATION, FLOOR_VALUE)[:, None, :, None].expand_as(points).clone()
    albedo[view, tile, :, sample] = colour[view, p] * pattern[:, None]
    normal = torch.zeros_like(points)
    normal[:, :, 2] = 1
    normal[view, tile, :, sample] = normals(placed, view, p, position)
    return albedo, normal


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Over the dimension of x, y, z in (B, T, 3, S)."""
    return a[:, :, :1] * b[:, :, :1] + a[:, :, 1:2] * b[:, :, 1:2] + a[:, :, 2:] * b[:, :, 2:]


@torch.no_grad()
def render_chunk(solids: Solids, object_index: torch.Tensor, latents: torch.Tensor, size: int, camera) -> torch.Tensor:
    (eye, axes, rays), B, n = camera, len(latents), -(-size // TILE)
    placed = place(solids, object_index, rotation_matrix(latents[:, :3]))
    t, primitive = trace(eye, axes, rays, placed)
    floor = (FLOOR_Z - eye[0, 2]) / rays[:, :, 2]                        # every camera ray points below the horizon
    points = eye[:, None, :, None] + torch.minimum(t, floor)[:, :, None] * rays
    albedo, normal = surface(solids, object_index, latents, placed, points, t < floor, primitive)

    light, light_axes = look_at_origin(latents[:, 4], latents[:, 5], LIGHT_DISTANCE)
    beams = points - light[:, None, :, None]
    blocker, _ = trace(light, light_axes, beams, placed)
    lit = (blocker > 1 - 2e-3)[:, :, None]                     # nothing nearer to the light than the point itself
    inverse = dot(beams, beams).rsqrt()
    cosine = dot(beams, light_axes[:, None, 2, :, None]) * inverse
    spot = ((cosine - math.cos(SPOT_OUTER)) / (math.cos(SPOT_INNER) - math.cos(SPOT_OUTER))).clamp(0, 1)
    power = SPOT_STRENGTH * spot * (-dot(beams, normal) * inverse).clamp(min=0) * lit
    fill = AMBIENT - CAMERA_FILL * dot(normal, axes[:, None, 2, :, None]).clamp(max=0)
    tint = hsv_to_rgb(latents[:, 6], LIGHT_SATURATION, 1.0)[:, None, :, None]
    colours = albedo * (fill + tint * power)

    pixels = colours.view(B, n, n, 3, TILE, TILE, SAMPLES**2).mean(-1).permute(0, 3, 1, 4, 2, 5).reshape(B, 3, n * TILE, -1)
    return (pixels[:, :, :size, :size] * 255).round().clamp(0, 255).to(torch.uint8)


def render(solids: Solids, object_index: torch.Tensor, latents: torch.Tensor, size: int) -> torch.Tensor:
    """Views of objects `object_index` (B,) under `latents` (B, 7) -> uint8 (B, 3, size, size), on latents' device."""
    assert latents.shape == (len(object_index), 7), f"latents must be ({len(object_index)}, 7), got {tuple(latents.shape)}"
    solids, object_index = Solids(*(x.to(latents.device) for x in solids)), object_index.to(latents.device)
    samples = 2**CHUNK if latents.device.type == "cpu" else 2**24         # at a time; on a CPU temporaries stay in cache
    chunk, camera = max(1, samples // (size * SAMPLES) ** 2), camera_rays(size, latents.device)
    parts = zip(object_index.split(chunk), latents.split(chunk))
    return torch.cat([render_chunk(solids, index, part, size, camera) for index, part in parts])


def render_split(split: str, n_objects: int, n_views: int, size: int, seed: int, rotation_range: float = math.pi / 2,
                 device="cpu", batch: int = 16) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice of objects, images uint8 (b, n_views, 3, size, size)); labels and latents: sample_objects/_latents."""
    solids, latents = sample_objects(n_objects, seed, split), sample_latents(n_objects, n_views, seed, split, rotation_range)
    for start in range(0, n_objects, batch):
        objects = slice(start, min(start + batch, n_objects))
        index = torch.arange(objects.start, objects.stop).repeat_interleave(n_views)
        images = render(solids, index, latents[objects].flatten(0, 1).to(device), size)
        yield objects, images.view(-1, n_views, 3, size, size).cpu().numpy()
