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

from sources.shapes import BOX, ELLIPSOID, FRUSTUM, NOTHING, RECIPES

LATENTS = ("rotation_x", "rotation_y", "rotation_z", "floor_hue", "light_theta", "light_phi", "light_hue")
LATENT_RANGES = ((-math.pi / 2, math.pi / 2),) * 3 + ((0.0, 1.0), (0.0, math.pi / 4), (0.0, 2 * math.pi), (0.0, 1.0))
SPLITS = ("train", "val")

CAMERA_DISTANCE, CAMERA_POLAR = 5.0, math.radians(62)           # polar angle: from the zenith
HALF_WIDTH = 1.03 / math.sqrt(CAMERA_DISTANCE**2 - 1)           # of the image at depth 1; the unit ball and 3 % margin
LIGHT_DISTANCE, SPOT_INNER, SPOT_OUTER = 5.0, math.radians(14), math.radians(30)
FLOOR_Z, FLOOR_SATURATION, FLOOR_VALUE = -1.0, 0.6, 0.9
AMBIENT, CAMERA_FILL, SPOT_STRENGTH, LIGHT_SATURATION = 0.25, 0.2, 0.55, 0.5   # the first two white; sum 1: no clipping
STRIPE_STRENGTH = 0.12
PLAIN_FLOOR_HUE, PLAIN_LIGHT_HUE = 0.6, 0.12                     # what hues shrink to as hue_range goes to 0
FAR = 1e9                                                       # t of a ray that hits nothing
TILE, SAMPLES = 4, 2                                            # pixels per tile side, samples per pixel side


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


def sample_latents(n_objects: int, n_views: int, seed: int, split: str, rotation_range: float = math.pi / 2,
                   hue_range: float = 1.0) -> torch.Tensor:
    """float32 (n_objects, n_views, 7) in the order of LATENTS.

    rotation_range: the three angles lie within +-rotation_range, radians.  hue_range: from 1, 3DIEBench's hues of floor
    and light, down to 0, the same blue floor and warm light in every view. Hues are what short runs would learn first."""
    low, high = np.array(LATENT_RANGES).T
    low[:3], high[:3] = -rotation_range, rotation_range
    for column, plain in ((3, PLAIN_FLOOR_HUE), (6, PLAIN_LIGHT_HUE)):
        low[column], high[column] = plain * (1 - hue_range), plain * (1 - hue_range) + hue_range
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
    """Objects (B,) turned by rotations (B, 3, 3) about the origin."""
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
    a, b = dx * dx + dy * dy - growth * growth, ox * dx + oy * dy - radius * growth
    c = ox * ox + oy * oy - radius * radius
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
    """render() for a few views at once; camera: camera_rays(size, device)."""
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
    samples = 2**19 if latents.device.type == "cpu" else 2**24           # at a time; on a CPU temporaries stay in cache
    chunk, camera = max(1, samples // (size * SAMPLES) ** 2), camera_rays(size, latents.device)
    parts = zip(object_index.split(chunk), latents.split(chunk))
    return torch.cat([render_chunk(solids, index, part, size, camera) for index, part in parts])


def render_split(split: str, n_objects: int, n_views: int, size: int, seed: int, rotation_range: float = math.pi / 2,
                 hue_range: float = 1.0, device="cpu", batch: int = 16) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields (slice of objects, images uint8 (b, n_views, 3, size, size)); labels and latents: sample_objects/_latents."""
    solids = sample_objects(n_objects, seed, split)
    latents = sample_latents(n_objects, n_views, seed, split, rotation_range, hue_range)
    for start in range(0, n_objects, batch):
        objects = slice(start, min(start + batch, n_objects))
        index = torch.arange(objects.start, objects.stop).repeat_interleave(n_views)
        images = render(solids, index, latents[objects].flatten(0, 1).to(device), size)
        yield objects, images.view(-1, n_views, 3, size, size).cpu().numpy()
