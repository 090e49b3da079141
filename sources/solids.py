"""Embedded data set: procedural 3-D solids, a stand-in for 3DIEBench that needs no download.

    recipe of a class + random proportions  ->  Solids: n objects of at most P boxes, ellipsoids
                                                and frusta
    seven latents of 3DIEBench per view     ->  latents (n, views, 7), in the order of LATENTS
    render(solids, object_index (B,), latents (B, 7), size)  ->  uint8 (B, 3, size, size)

3DIEBench: seq-JEPA Sec. 2.3, A.1. The world is z-up, the camera looks towards +y from slightly
above, and an object fits the unit ball around the origin, about which it turns over a floor at
z = -1. Nothing is approximated by meshes: rays meet primitives in closed form, once from the
camera (what is seen) and once from the light (what is lit), with 2x2 samples per pixel. Object i
of a (seed, split) is always the same, whatever the number of objects, the image size or the
machine.

Differs from 3DIEBench: 16 classes of our own instead of 55 of ShapeNet, colours and stripes drawn
per object and independent of the class instead of textures, no reflections.
Checked in tests/test_solids.py.
"""
import math
from functools import partial
from typing import Iterator, NamedTuple

import numpy as np
import torch

from sources.shapes import BOX, ELLIPSOID, FRUSTUM, NOTHING, RECIPES

LATENTS = ("rotation_x", "rotation_y", "rotation_z",
           "floor_hue", "light_theta", "light_phi", "light_hue")
LATENT_RANGES = (*[(-math.pi / 2, math.pi / 2)] * 3,
                 (0.0, 1.0), (0.0, math.pi / 4), (0.0, 2 * math.pi), (0.0, 1.0))
SPLITS = ("train", "val")

CAMERA_DISTANCE = 5.0
CAMERA_POLAR = math.radians(62)     # angle from the zenith
HALF_WIDTH = 1.03 / math.sqrt(CAMERA_DISTANCE**2 - 1)   # of the image at depth 1: unit ball + 3 %
LIGHT_DISTANCE = 5.0
SPOT_INNER = math.radians(14)
SPOT_OUTER = math.radians(30)
FLOOR_Z = -1.0
FLOOR_SATURATION = 0.6
FLOOR_VALUE = 0.9
AMBIENT = 0.25                      # white, as the fill; with the spot they sum to 1: no clipping
CAMERA_FILL = 0.2
SPOT_STRENGTH = 0.55
LIGHT_SATURATION = 0.5
STRIPE_STRENGTH = 0.12
MATERIALS = ("free", "plain")       # three colours of its own for each object; the same for all
PLAIN_COLOURS = ((0.72, 0.52, 0.34), (0.52, 0.36, 0.24), (0.38, 0.27, 0.19))    # RGB, of each part
PLAIN_FLOOR_HUE = 0.6               # what hues shrink to as hue_range goes to 0
PLAIN_LIGHT_HUE = 0.12
FAR = 1e9                           # t of a ray that hits nothing
TILE = 4                            # pixels per tile side
SAMPLES = 2                         # per pixel side
PRIMITIVES = 15                     # P, room for the primitives of an object; at most 16


# ---------------------------------------------------------------- sampling

class Solids(NamedTuple):
    """n objects of P primitives each, in the object's frame; padded with kind NOTHING."""
    labels: torch.Tensor    # (n,) int64, index into CLASSES
    kind: torch.Tensor      # (n, P) int64
    centre: torch.Tensor    # (n, P, 3)
    half: torch.Tensor      # (n, P, 3) half extents along the primitive's own axes
    axes: torch.Tensor      # (n, P, 3, 3) those axes, as columns
    ends: torch.Tensor      # (n, P, 2) a frustum's radii at its own z = -1 and 1, parts of half
    colour: torch.Tensor    # (n, P, 3) RGB in [0, 1]
    stripes: torch.Tensor   # (n, 4) wave vector and phase of a faint pattern, by which symmetric
                            # shapes show their rotation too


def rotation_matrix(angles: torch.Tensor) -> torch.Tensor:
    """Extrinsic xyz angles (..., 3) in radians -> (..., 3, 3), SciPy's from_euler("xyz", ...)."""
    cx, cy, cz = angles.cos().unbind(-1)
    sx, sy, sz = angles.sin().unbind(-1)
    rows = (cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx,
            sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx,
            -sy, cy * sx, cy * cx)
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def hsv_to_rgb(hue: torch.Tensor, saturation, value) -> torch.Tensor:
    """Hue (...,) in [0, 1] and the rest broadcastable to it -> RGB (..., 3)."""
    ramps = [((hue * 6 + shift) % 6 - 3).abs() - 1 for shift in (0, 4, 2)]
    ramp = torch.stack(ramps, -1).clamp(0, 1)
    saturation = torch.as_tensor(saturation, device=hue.device)[..., None]
    value = torch.as_tensor(value, device=hue.device)[..., None]
    return value * (1 - saturation * (1 - ramp))


def generator(stream: int, seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of one object; `stream` keeps shapes (0) and latents (1) apart."""
    assert split in SPLITS, f"split is one of {SPLITS}, got {split!r}"
    entropy = (stream, seed, SPLITS.index(split), index)
    return np.random.default_rng(np.random.SeedSequence(entropy))


def sample_objects(n: int, seed: int, split: str, material: str = "free") -> Solids:
    """Objects 0..n-1 of a split. Classes take turns: label i % 16. No object depends on n.

    material: one of MATERIALS. With "plain" all objects have the same colours, so that shape is
    what there is to see."""
    P = PRIMITIVES
    rows = np.zeros((n, P, 13))                 # as shapes.box makes them
    rows[..., 0] = NOTHING
    palette = np.empty((n, 3, 3))               # hue, saturation, value of each part
    stripes = np.empty((n, 4))
    for i in range(n):
        rng = generator(0, seed, split, i)
        primitives = RECIPES[i % len(RECIPES)](rng.uniform)
        rows[i, :len(primitives)] = primitives
        palette[i] = rng.uniform((0, .1, .4), (1, .8, .85), (3, 3))
        wave = rng.normal(size=3)
        stripes[i, :3] = wave / np.linalg.norm(wave) * rng.uniform(5, 12)
        stripes[i, 3] = rng.uniform(0, 2 * math.pi)
    rows = torch.from_numpy(rows).float()
    kind = rows[..., 0].long()
    axes = rotation_matrix(rows[..., 7:10])
    ends = rows[..., 10:12]
    centre, half = fit_unit_ball(kind, rows[..., 1:4], rows[..., 4:7], axes, ends)
    part = rows[..., 12].long().clamp(min=0)
    colours = hsv_to_rgb(*torch.from_numpy(palette).float().unbind(-1))
    if material == "plain":
        colours = torch.tensor(PLAIN_COLOURS).expand_as(colours)
    colour = colours.gather(1, part[..., None].expand(n, P, 3))
    labels = torch.arange(n) % len(RECIPES)
    return Solids(labels, kind, centre, half, axes, ends, colour, torch.from_numpy(stripes).float())


def fit_unit_ball(kind, centre, half, axes, ends):
    """Centres and half extents of objects that were moved and scaled into the unit ball.

    The middle of the bounding box goes to the origin, the farthest point (or a bound) to 1."""
    reach = torch.einsum("npij,npj->npi", axes.abs(), half)
    real = (kind != NOTHING)[..., None]
    low = (centre - reach).masked_fill(~real, math.inf).amin(1, keepdim=True)
    high = (centre + reach).masked_fill(~real, -math.inf).amax(1, keepdim=True)
    centre = (centre - (low + high) / 2) * real
    local = torch.einsum("npji,npj->npi", axes, centre)     # the centre along the primitive's axes
    corner = (local.abs() + half).norm(dim=-1)
    aside = local[..., :2].norm(dim=-1)                     # of the centre from the z axis
    low_rim = torch.hypot(aside + half[..., 0] * ends[..., 0], local[..., 2] - half[..., 2])
    high_rim = torch.hypot(aside + half[..., 0] * ends[..., 1], local[..., 2] + half[..., 2])
    tip = torch.minimum(corner, local.norm(dim=-1) + half.amax(-1))
    farthest = torch.where(kind == FRUSTUM, torch.maximum(low_rim, high_rim), corner)
    farthest = torch.where(kind == ELLIPSOID, tip, farthest)
    scale = 1 / (farthest * real[..., 0]).amax(1)[:, None, None]
    return centre * scale, half * scale * real


def sample_latents(n_objects: int, n_views: int, seed: int, split: str,
                   rotation_range: float = math.pi / 2, hue_range: float = 1.0) -> torch.Tensor:
    """float32 (n_objects, n_views, 7) in the order of LATENTS.

    rotation_range: the three angles lie within +-rotation_range, radians.
    hue_range: from 1, 3DIEBench's hues of floor and light, down to 0, the same blue floor and warm
    light in every view. Hues are what short runs would learn first."""
    low, high = np.array(LATENT_RANGES).T
    low[:3] = -rotation_range
    high[:3] = rotation_range
    for column, plain in ((3, PLAIN_FLOOR_HUE), (6, PLAIN_LIGHT_HUE)):
        low[column] = plain * (1 - hue_range)
        high[column] = low[column] + hue_range
    uniform = np.empty((n_objects, n_views, len(LATENTS)))
    for i in range(n_objects):
        uniform[i] = generator(1, seed, split, i).random((n_views, len(LATENTS)))
    return torch.from_numpy(low + (high - low) * uniform).float()


# ---------------------------------------------------------------- rendering

class Placed(NamedTuple):
    """The primitives of B views, turned into the world."""
    kind: torch.Tensor      # (B, P)
    centre: torch.Tensor    # (B, P, 3)
    to_local: torch.Tensor  # (B, P, 3, 3) world vectors -> frame in which half extents are 1
    ends: torch.Tensor      # (B, P, 2)
    corners: torch.Tensor   # (B, P, 3, 8) of the bounding boxes


def place(solids: Solids, object_index: torch.Tensor, rotation: torch.Tensor) -> Placed:
    """Objects (B,) turned by rotations (B, 3, 3) about the origin."""
    kind = solids.kind[object_index]
    centre = solids.centre[object_index]
    half = solids.half[object_index]
    axes = solids.axes[object_index]
    ends = solids.ends[object_index]
    axes = rotation[:, None] @ axes
    centre = (rotation[:, None] @ centre[..., None])[..., 0]
    signs = [[x, y, z] for x in (-1.0, 1) for y in (-1, 1) for z in (-1, 1)]
    signs = torch.tensor(signs, device=centre.device).T                         # (3, 8)
    corners = centre[..., None] + axes @ (half[..., None] * signs)
    return Placed(kind, centre, axes.mT / half.clamp(min=1e-6)[..., None], ends, corners)


def look_at_origin(theta: torch.Tensor, phi: torch.Tensor, distance: float):
    """Camera or light in polar coordinates (B,), which looks at the origin.

    ->  position (B, 3), axes (B, 3, 3) with rows right, up, forward"""
    ct, st = theta.cos(), theta.sin()
    cp, sp = phi.cos(), phi.sin()
    outward = torch.stack([st * cp, st * sp, ct], -1)
    right = torch.stack([-sp, cp, torch.zeros_like(cp)], -1)
    up = torch.stack([-ct * cp, -ct * sp, st], -1)
    return distance * outward, torch.stack([right, up, -outward], -2)


def hit_box(o, d, _):
    """Rays o + t d from outside -> t (n, S) where they enter [-1, 1]^3, FAR if never.

    o, d: their components, three of (n, 1) and three of (n, S).
    A negative number under a root marks a miss in all three functions: on a CPU NaN is far faster
    than torch.where, and rsqrt than sqrt, which has a slow path for such numbers."""
    inverse = [1 / (axis + 1e-12) for axis in d]
    middle = [-a * b for a, b in zip(o, inverse)]       # t half way between an axis's two planes
    reach = [b.abs() for b in inverse]
    enter = [m - r for m, r in zip(middle, reach)]
    leave = [m + r for m, r in zip(middle, reach)]
    near = torch.maximum(torch.maximum(enter[0], enter[1]), enter[2])
    far = torch.minimum(torch.minimum(leave[0], leave[1]), leave[2])
    return (near + 0 * (far - near).rsqrt()).nan_to_num(FAR)


def hit_ellipsoid(o, d, _):
    """The same for the unit ball."""
    ox, oy, oz = o
    dx, dy, dz = d
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    c = ox * ox + oy * oy + oz * oz - 1
    discriminant = b * b - a * c
    return ((-b - discriminant * discriminant.rsqrt()) / a).nan_to_num(FAR)


def hit_frustum(o, d, ends):
    """The same for the solid |z| <= 1 whose radius runs from ends[:, 0] at -1 to ends[:, 1] at 1.

    A convex body is entered once: through the side, always at the root with -sqrt, or through the
    cap facing the ray."""
    ox, oy, oz = o
    dx, dy, dz = d
    slope = (ends[:, 1:] - ends[:, :1]) / 2
    radius = (ends[:, :1] + ends[:, 1:]) / 2 + slope * oz       # at the origin of the ray
    growth = slope * dz                                         # of the radius, along the ray
    a = dx * dx + dy * dy - growth * growth
    b = ox * dx + oy * dy - radius * growth
    c = ox * ox + oy * oy - radius * radius
    discriminant = b * b - a * c
    side = (-b - discriminant * discriminant.rsqrt()) / (a + 1e-12)
    z = oz + side * dz
    inverse = 1 / (dz + 1e-12)
    cap = -oz * inverse - inverse.abs()
    x = ox + cap * dx
    y = oy + cap * dy
    r = radius + growth * cap
    side = side + 0 * (1 - z * z).rsqrt()
    cap = cap + 0 * (r * r - x * x - y * y).rsqrt()
    return torch.minimum(side.nan_to_num(FAR), cap.nan_to_num(FAR))


def screen_bounds(axes: torch.Tensor, vectors: torch.Tensor):
    """K sets of S vectors from an eye, bounded on its screen.

    axes (B, 3, 3), vectors (B, K, 3, S)  ->  low and high, (B, K, 2) each"""
    seen = axes[:, None] @ vectors
    uv = seen[:, :, :2] / seen[:, :, 2:].clamp(min=0.05)    # behind a light is outside its spot
    return uv.amin(-1), uv.amax(-1)


def trace(eye: torch.Tensor, axes: torch.Tensor, rays: torch.Tensor, placed: Placed):
    """First hits of rays (B, T, 3, S), S for each of T tiles, from eyes (B, 3).

    ->  t (B, T, S), about FAR if none, and primitive (B, T, S)
    A dimension B of 1 is shared by all views. Only tiles whose screen bounds meet those of a
    primitive test it."""
    B, P = placed.kind.shape
    T = rays.shape[1]
    S = rays.shape[3]
    assert P <= 16, f"four bits of t hold the primitive, so an object has at most 16, got {P}"
    tile_low, tile_high = screen_bounds(axes, rays)
    low, high = screen_bounds(axes, placed.corners - eye[:, None, :, None])
    overlap = (tile_low[:, :, None] < high[:, None]) & (tile_high[:, :, None] > low[:, None])
    meets = overlap.all(-1)                                         # (B, T, P)
    origin = placed.to_local @ (eye[:, None] - placed.centre)[..., None]
    shared = len(rays) == 1
    rays = rays.reshape(-1, 3, S)
    # Positive floats sort like their bits. With the primitive in the lowest four bits of t, one
    # minimum keeps both.
    nearest = torch.full((B * T, S), FAR, device=rays.device).view(torch.int32)
    for p in range(P):
        for kind, hit in ((BOX, hit_box), (ELLIPSOID, hit_ellipsoid), (FRUSTUM, hit_frustum)):
            tested = meets[:, :, p] & (placed.kind[:, None, p] == kind)
            view, tile = tested.nonzero(as_tuple=True)
            if len(view) == 0:
                continue
            row = view * T + tile
            x, y, z = rays.index_select(0, tile if shared else row).unbind(1)
            d = [torch.addcmul(torch.addcmul(axis[:, 0] * x, axis[:, 1], y), axis[:, 2], z)
                 for axis in placed.to_local[view, p, :, :, None].unbind(1)]
            t = hit(origin[view, p].unbind(1), d, placed.ends[view, p])
            packed = t.view(torch.int32) & -16 | p
            nearest.index_copy_(0, row, torch.minimum(nearest.index_select(0, row), packed))
    nearest = nearest.view(B, T, S)
    return (nearest & -16).view(torch.float32), nearest & 15


def normals(placed: Placed, view: torch.Tensor, primitive: torch.Tensor,
            points: torch.Tensor) -> torch.Tensor:
    """Outward unit normals (H, 3) at points (H, 3) on primitive (H,) of view (H,)."""
    index = view * placed.kind.shape[1] + primitive
    to_local = placed.to_local.flatten(0, 1).index_select(0, index)
    kind = placed.kind.flatten(0, 1).index_select(0, index)
    ends = placed.ends.flatten(0, 1).index_select(0, index)
    centre = placed.centre.flatten(0, 1).index_select(0, index)
    x, y, z = (points - centre)[:, None].unbind(-1)
    local = to_local[:, :, 0] * x + to_local[:, :, 1] * y + to_local[:, :, 2] * z
    x, y, z = local.unbind(-1)
    around = torch.hypot(x, y)
    slope = (ends[:, 1] - ends[:, 0]) / 2
    on_cap = (z.abs() - 1 > around - (ends.mean(-1) + slope * z))[:, None]
    cap = local * local.new_tensor([0, 0, 1])
    side = torch.stack([x, y, -slope * around], -1)
    normal = torch.where((kind == FRUSTUM)[:, None], torch.where(on_cap, cap, side), local)
    face = local * (local.abs() == local.abs().amax(-1, keepdim=True))
    normal = torch.where((kind == BOX)[:, None], face, normal)
    x, y, z = normal[..., None].unbind(1)
    normal = x * to_local[:, 0] + y * to_local[:, 1] + z * to_local[:, 2]
    return torch.nn.functional.normalize(normal, dim=-1)


def camera_rays(size: int, device):
    """Position (1, 3), axes (1, 3, 3) and rays (1, T, 3, S) of the fixed camera.

    S runs over the pixels of a tile, then over the samples of a pixel."""
    n = tiles_per_side(size)
    eye, axes = look_at_origin(torch.tensor([CAMERA_POLAR]), torch.tensor([-math.pi / 2]),
                               CAMERA_DISTANCE)
    across = ((torch.arange(n * TILE * SAMPLES) + 0.5) / (size * SAMPLES) * 2 - 1) * HALF_WIDTH
    v, u = torch.meshgrid(-across, across, indexing="ij")
    rays = torch.stack([u, v, torch.ones_like(u)], -1) @ axes[0]
    rays = rays.view(n, TILE, SAMPLES, n, TILE, SAMPLES, 3)
    rays = rays.permute(0, 3, 6, 1, 4, 2, 5).reshape(1, n * n, 3, -1)
    return eye.to(device), axes.to(device), rays.to(device)


def tiles_per_side(size: int) -> int:
    """As many as cover `size` pixels; what exceeds them is cropped at the end."""
    return -(-size // TILE)


def surface(solids, object_index, latents, placed, points, on_object, primitive):
    """Colour and unit normal, both (B, T, 3, S), at `points` (B, T, 3, S).

    on_object (B, T, S): which of them lie on primitive (B, T, S); the others are floor."""
    view, tile, sample = on_object.nonzero(as_tuple=True)
    p = primitive[view, tile, sample]
    position = points[view, tile, :, sample]
    stripes = solids.stripes[object_index]
    colour = solids.colour[object_index]
    wave = (rotation_matrix(latents[:, :3]) * stripes[:, None, :3]).sum(-1)
    pattern = 1 + STRIPE_STRENGTH * torch.sin((position * wave[view]).sum(-1) + stripes[view, 3])
    floor = hsv_to_rgb(latents[:, 3], FLOOR_SATURATION, FLOOR_VALUE)
    albedo = floor[:, None, :, None].expand_as(points).clone()
    albedo[view, tile, :, sample] = colour[view, p] * pattern[:, None]
    normal = torch.zeros_like(points)
    normal[:, :, 2] = 1
    normal[view, tile, :, sample] = normals(placed, view, p, position)
    return albedo, normal


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Over the dimension of x, y, z in (B, T, 3, S)."""
    return a[:, :, :1] * b[:, :, :1] + a[:, :, 1:2] * b[:, :, 1:2] + a[:, :, 2:] * b[:, :, 2:]


@torch.no_grad()
def render_chunk(solids: Solids, object_index: torch.Tensor, latents: torch.Tensor, size: int,
                 camera, cut: bool = False) -> torch.Tensor:
    """render() or, with `cut`, cut_outs() for a few views; camera: camera_rays(size, device)."""
    eye, axes, rays = camera
    placed = place(solids, object_index, rotation_matrix(latents[:, :3]))
    t, primitive = trace(eye, axes, rays, placed)
    floor = (FLOOR_Z - eye[0, 2]) / rays[:, :, 2]           # all camera rays go below the horizon
    points = eye[:, None, :, None] + torch.minimum(t, floor)[:, :, None] * rays
    albedo, normal = surface(solids, object_index, latents, placed, points, t < floor, primitive)

    light, light_axes = look_at_origin(latents[:, 4], latents[:, 5], LIGHT_DISTANCE)
    beams = points - light[:, None, :, None]
    blocker, _ = trace(light, light_axes, beams, placed)
    lit = (blocker > 1 - 2e-3)[:, :, None]                  # nothing is nearer to the light
    inverse = dot(beams, beams).rsqrt()
    cosine = dot(beams, light_axes[:, None, 2, :, None]) * inverse
    inner = math.cos(SPOT_INNER)
    outer = math.cos(SPOT_OUTER)
    spot = ((cosine - outer) / (inner - outer)).clamp(0, 1)
    power = SPOT_STRENGTH * spot * (-dot(beams, normal) * inverse).clamp(min=0) * lit
    fill = AMBIENT - CAMERA_FILL * dot(normal, axes[:, None, 2, :, None]).clamp(max=0)
    tint = hsv_to_rgb(latents[:, 6], LIGHT_SATURATION, 1.0)[:, None, :, None]
    colours = albedo * (fill + tint * power)
    if cut:
        shown = (t < floor)[:, :, None]
        colours = torch.cat([colours * shown, shown], dim=2)

    return (_to_pixels(colours, size) * 255).round().clamp(0, 255).to(torch.uint8)


def _to_pixels(values, size):
    """Samples of tiles (B, T, C, S) -> their means over pixels, (B, C, size, size)."""
    B, _, C, _ = values.shape
    n = tiles_per_side(size)
    pixels = values.view(B, n, n, C, TILE, TILE, SAMPLES**2).mean(-1)
    pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(B, C, n * TILE, -1)
    return pixels[:, :, :size, :size]


def render(solids: Solids, object_index: torch.Tensor, latents: torch.Tensor,
           size: int) -> torch.Tensor:
    """Views of objects `object_index` (B,) under `latents` (B, 7), on latents' device.

    ->  uint8 (B, 3, size, size)"""
    return _in_chunks(render_chunk, solids, object_index, latents, size)


def cut_outs(solids: Solids, object_index: torch.Tensor, latents: torch.Tensor,
             size: int) -> torch.Tensor:
    """Objects of render(...) alone: uint8 (B, 4, size, size), the last channel is opacity.

    Colours are multiplied by it already, so that colours + (1 - opacity / 255) * background is the
    object on another background, edges included."""
    return _in_chunks(partial(render_chunk, cut=True), solids, object_index, latents, size)


def _in_chunks(draw, solids, object_index, latents, size):
    """draw(solids, object_index, latents, size, camera), a few views at once, on latents' device"""
    B = len(object_index)
    device = latents.device
    assert latents.shape == (B, 7), f"latents must be ({B}, 7), got {tuple(latents.shape)}"
    solids = Solids(*(x.to(device) for x in solids))
    samples = 2**19 if device.type == "cpu" else 2**24      # at a time: fits a CPU's cache
    chunk = max(1, samples // (size * SAMPLES) ** 2)
    camera = camera_rays(size, device)
    parts = zip(object_index.to(device).split(chunk), latents.split(chunk))
    return torch.cat([draw(solids, index, part, size, camera) for index, part in parts])


def object_masks(solids: Solids, object_index: torch.Tensor, latents: torch.Tensor,
                 size: int) -> torch.Tensor:
    """Where the object is in render(...) of the same arguments: which share of each pixel shows it.

    ->  float32 (B, size, size)"""
    return _in_chunks(_mask_chunk, solids, object_index, latents, size)


@torch.no_grad()
def _mask_chunk(solids, object_index, latents, size, camera):
    """object_masks() for a few views at once; camera: camera_rays(size, device)."""
    eye, axes, rays = camera
    placed = place(solids, object_index, rotation_matrix(latents[:, :3]))
    t, _ = trace(eye, axes, rays, placed)
    floor = (FLOOR_Z - eye[0, 2]) / rays[:, :, 2]
    return _to_pixels((t < floor).float()[:, :, None], size)[:, 0]


def render_split(split: str, n_objects: int, n_views: int, size: int, seed: int,
                 rotation_range: float = math.pi / 2, hue_range: float = 1.0,
                 material: str = "free", device="cpu",
                 batch: int = 16) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice of objects, images uint8 (b, n_views, 3, size, size)).

    Their labels and latents come from sample_objects and sample_latents."""
    solids = sample_objects(n_objects, seed, split, material)
    latents = sample_latents(n_objects, n_views, seed, split, rotation_range, hue_range)
    for start in range(0, n_objects, batch):
        objects = slice(start, min(start + batch, n_objects))
        index = torch.arange(objects.start, objects.stop).repeat_interleave(n_views)
        images = render(solids, index, latents[objects].flatten(0, 1).to(device), size)
        yield objects, images.view(-1, n_views, 3, size, size).cpu().numpy()
