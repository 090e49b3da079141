"""solids.py against SciPy's rotations, a slow ray marcher, colorsys and hand-worked projections."""

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from sources import solids
from sources.shapes import CLASSES
from sources.solids import (
    BOX,
    ELLIPSOID,
    FRUSTUM,
    NOTHING,
    Solids,
    object_masks,
    render,
    sample_latents,
    sample_objects,
)


def scene(kind, centre, half, colour=(.8, .1, .1), turn=(0, 0, 0), ends=(1, 1)):
    """One object that is one plain primitive."""
    row = lambda x: torch.tensor(x, dtype=torch.float32)[None, None]
    axes = row(Rotation.from_euler("xyz", turn).as_matrix().tolist())
    return Solids(
        torch.tensor([0]),
        torch.tensor([[kind]]),
        row(centre),
        row(half),
        axes,
        row(ends),
        row(colour),
        torch.zeros(1, 4),
    )


def latent(angles=(0, 0, 0), floor_hue=1 / 3, theta=0.0, phi=0.0, light_hue=0.0):
    return torch.tensor([[*angles, floor_hue, theta, phi, light_hue]], dtype=torch.float32)


def views(n, size=24, split="train", seed=0):
    objects, latents = sample_objects(n, seed, split), sample_latents(n, 1, seed, split)[:, 0]
    return objects, latents, render(objects, torch.arange(n), latents, size)


def project(point):
    """World point -> (column, row) in [-1, 1], from the documented camera alone: at y < 0, looking
    at the origin."""
    polar, distance = solids.CAMERA_POLAR, solids.CAMERA_DISTANCE
    camera = distance * np.array([0, -math.sin(polar), math.cos(polar)])
    forward = -camera / distance
    right = np.array([1, 0, 0])
    x, y, z = (np.dot(point - camera, axis) for axis in (right, np.cross(right, forward), forward))
    return np.array([x, -y]) / z / solids.HALF_WIDTH


def hue(pixels):
    """Mean RGB of uint8 pixels (3, n) -> hue in [0, 1]."""
    return colorsys.rgb_to_hsv(*(pixels.double().mean(1) / 255).tolist())[0]


def apart(a, b):
    return abs((a - b + .5) % 1 - .5)


# --- rotations
# ----------------------------------------------------------------------------------------

def test_rotation_matrix_is_scipys_extrinsic_xyz():
    angles = np.random.default_rng(0).uniform(-3, 3, (50, 3))
    ours = solids.rotation_matrix(torch.from_numpy(angles).view(5, 10, 3))
    np.testing.assert_allclose(
        ours.view(50, 3, 3), Rotation.from_euler("xyz", angles).as_matrix(), atol=1e-12
    )


@pytest.mark.parametrize("angles", [(1.2, 0, 0), (0, 1.2, 0), (0, 0, 1.2), (-.7, .9, -1.1)])
def test_a_marker_moves_on_screen_as_scipy_says(angles):
    marker, size = np.array([.5, -.3, .4]), 64
    image = render(
        scene(ELLIPSOID, marker.tolist(), (0.1, 0.1, 0.1), colour=(1, 0, 0)),
        torch.tensor([0]),
        latent(angles),
        size,
    )[0].int()
    # a red marker over a green floor
    rows, columns = torch.nonzero(image[0] > image[1], as_tuple=True)
    seen = np.array([columns.double().mean(), rows.double().mean()]) * 2 / size + 1 / size - 1
    np.testing.assert_allclose(
        seen, project(Rotation.from_euler("xyz", angles).apply(marker)), atol=0.02
    )
    assert np.abs(seen - project(marker)).max() > .1


@pytest.mark.parametrize("index", [0, 4, 8, 14])
def test_turning_by_latent_equals_turning_the_geometry(index):
    objects, angles = sample_objects(index + 1, 3, "train"), (.8, -1.1, .5)
    matrix = torch.from_numpy(Rotation.from_euler("xyz", angles).as_matrix()).float()
    turned = objects._replace(
        centre=objects.centre @ matrix.T,
        axes=matrix @ objects.axes,
        stripes=torch.cat([objects.stripes[:, :3] @ matrix.T, objects.stripes[:, 3:]], 1),
    )
    one, which = latent(angles, theta=.5, phi=1.0), torch.tensor([index])
    by_latent, by_geometry = (
        render(objects, which, one, 48),
        render(turned, which, latent(theta=0.5, phi=1.0), 48),
    )
    difference = (by_latent.int() - by_geometry.int()).abs()
    # rounding may move an edge sample
    assert (difference > 2).float().mean() < .005
    assert (
        (by_latent.int() - render(objects, which, latent(theta=0.5, phi=1.0), 48).int()).abs() > 2
    ).float().mean() > 0.1


# --- rays
# ----------------------------------------------------------------------------------------

def inside(kind, p, ends):
    """Local points (3, k) -> is it in the primitive? The definition, without any intersection
    formula."""
    if kind == BOX:
        return (np.abs(p) <= 1).all(0)
    if kind == ELLIPSOID:
        return (p**2).sum(0) <= 1
    radius = ends[0] + (ends[1] - ends[0]) * (p[2] + 1) / 2
    return (np.abs(p[2]) <= 1) & (np.hypot(p[0], p[1]) <= radius)


@pytest.mark.parametrize(
    "kind, ends",
    [(BOX, (1, 1)), (ELLIPSOID, (1, 1)), (FRUSTUM, (1, 1)), (FRUSTUM, (1, 0.4)), (FRUSTUM, (0, 1))],
)
def test_hits_agree_with_a_ray_marcher(kind, ends):
    rng, hit = (
        np.random.default_rng(1),
        (solids.hit_box, solids.hit_ellipsoid, solids.hit_frustum)[kind],
    )
    origin = rng.normal(size=(200, 3))
    origin *= 4 / np.linalg.norm(origin, axis=1, keepdims=True)
    direction = (rng.uniform(-1, 1, (200, 3)) - origin) / 4
    direction[:40] = -origin[:40] * (.01, .01, 1) / 4                       # straight at the caps
    as_rays = lambda x: torch.from_numpy(x).float().unbind(1)
    t = hit(
        [x[:, None] for x in as_rays(origin)],
        [x[:, None] for x in as_rays(direction)],
        torch.tensor([ends]).float().expand(200, 2),
    )[:, 0]
    steps = np.arange(0, 10, .002)
    wrong = hits = 0
    for o, d, ours in zip(origin, direction, t.tolist()):
        within = inside(kind, o[:, None] + steps * d[:, None], ends)
        marched = steps[within.argmax()] if within.any() else solids.FAR
        wrong += abs(min(ours, 10) - min(marched, 10)) > .004
        hits += within.any()
    # the marcher steps over corners
    assert 40 < hits < 190 and wrong <= 2


@pytest.mark.parametrize("origin, direction, t", [
    ((0, 0, 3), (0, 0, -1), 2),             # top cap, radius 0.5
    # beside it: the side, whose radius 0.75 - 0.25 z is 0.7 at z = 0.2
    ((.7, 0, 3), (0, 0, -1), 2.8),
    ((0, 0, -3), (0, 0, 1), 2),             # bottom cap
    ((.99, 0, -3), (0, 0, 1), 2),           # its very edge: radius 1
    ((3, 0, 0), (-1, 0, 0), 2.25),          # half way up: radius 0.75
    ((1.01, 0, 3), (0, 0, -1), None), ((3, 0, 1.1), (-1, 0, 0), None)])
def test_frustum_by_hand(origin, direction, t):
    o, d = ([torch.tensor([[float(x)]]) for x in v] for v in (origin, direction))
    assert solids.hit_frustum(o, d, torch.tensor([[1, 0.5]])).item() == pytest.approx(
        solids.FAR if t is None else t, rel=1e-5
    )


@pytest.mark.parametrize("kind, ends", [(BOX, (1, 1)), (ELLIPSOID, (1, 1)), (FRUSTUM, (1, .3))])
def test_normals_are_the_gradient_of_the_surface(kind, ends):
    """At a hit point, a small step along the normal leaves the solid, one against it enters, and
    tangents do neither."""
    objects = scene(kind, (.1, .2, 0), (.5, .3, .4), turn=(.3, .5, -.2), ends=ends)
    placed = solids.place(objects, torch.tensor([0]), torch.eye(3)[None])
    eye, axes, rays = solids.camera_rays(24, "cpu")
    t, primitive = solids.trace(eye, axes, rays, placed)
    view, tile, sample = (t < 100).nonzero(as_tuple=True)
    points = eye + t[view, tile, sample, None] * rays[0, tile, :, sample]
    normal = solids.normals(placed, view, primitive[view, tile, sample], points)
    torch.testing.assert_close(normal.norm(dim=1), torch.ones(len(points)))
    local = lambda p: (placed.to_local[0, 0] @ (p - placed.centre[0, 0]).T).double().numpy()
    # they face the camera
    assert len(points) > 100 and (normal * rays[0, tile, :, sample]).sum(1).max() < 1e-2
    assert (
        not inside(kind, local(points + 1e-3 * normal), ends).any()
        and inside(kind, local(points - 1e-3 * normal), ends).mean() > 0.98
    )
    tangent = torch.linalg.cross(normal, normal.roll(1, 1) + .1)
    ahead = inside(kind, local(points + 1e-2 * tangent - 5e-4 * normal), ends)
    assert ahead.mean() > .9


def test_culling_changes_nothing(monkeypatch):
    objects, latents, image = views(16, 32)
    everything = lambda axes, v: (
        torch.full((*v.shape[:2], 2), -1e9),
        torch.full((*v.shape[:2], 2), 1e9),
    )
    monkeypatch.setattr(solids, "screen_bounds", everything)
    assert torch.equal(render(objects, torch.arange(16), latents, 32), image)


# --- light and colour
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("asked", [.02, .3, .55, .9])
def test_floor_hue(asked, monkeypatch):
    monkeypatch.setattr(solids, "LIGHT_SATURATION", 0.0)
    image = render(
        scene(ELLIPSOID, (0, 0, 0), (0.1, 0.1, 0.1)), torch.tensor([0]), latent(floor_hue=asked), 32
    )[0]
    assert apart(hue(image[:, 24:].flatten(1)), asked) < .01


@pytest.mark.parametrize("asked", [.02, .3, .55, .9])
def test_light_hue_tints_what_is_lit(asked):
    image = render(
        scene(ELLIPSOID, (0, 0, 0), (0.8, 0.8, 0.8), colour=(0.8, 0.8, 0.8)),
        torch.tensor([0]),
        latent(light_hue=asked),
        32,
    )[0]
    assert apart(hue(image[:, 6:10, 12:20].flatten(1)), asked) < .02


@pytest.mark.parametrize("phi", [0.0, math.pi / 2, math.pi, 3 * math.pi / 2])
def test_shadow_falls_away_from_the_light(phi):
    centre, size = np.array([0, .4, -.5]), 64
    light = (
        np.array([math.sin(0.7) * math.cos(phi), math.sin(0.7) * math.sin(phi), math.cos(0.7)])
        * solids.LIGHT_DISTANCE
    )
    # light -> centre, on to the floor
    shadow = light + (centre - light) * (light[2] + 1) / (light[2] - centre[2])
    lone, one = scene(ELLIPSOID, centre.tolist(), (.15, .15, .15)), latent(theta=.7, phi=phi)
    with_ball, without = (render(x, torch.tensor([0]), one, size)[0].float().mean(0)
                          for x in (lone, lone._replace(kind=torch.tensor([[NOTHING]]))))
    row, column = ((project(shadow)[::-1] + 1) * size / 2).astype(int)
    darker = with_ball / without < .8
    assert darker[row, column]
    row, column = ((project(centre * (2, 2, 0) - shadow * (1, 1, -1))[::-1] + 1) * size / 2).astype(
        int
    )
    assert not darker[row, column]
    assert darker.float().mean() < .05                                      # and nowhere else


def test_the_spot_leaves_the_far_floor_in_the_dark():
    image = render(scene(ELLIPSOID, (0, 0, 0), (0.1, 0.1, 0.1)), torch.tensor([0]), latent(), 32)[
        0
    ].float()
    assert image[:, :2].mean() < .6 * image[:, 20:26, 12:20].mean()


def test_without_the_spot_what_faces_the_camera_is_brightest(monkeypatch):
    monkeypatch.setattr(solids, "SPOT_STRENGTH", 0.0)
    image = (
        render(
            scene(ELLIPSOID, (0, 0, 0), (0.8, 0.8, 0.8), colour=(1, 1, 1)),
            torch.tensor([0]),
            latent(),
            65,
        )[0].double()
        / 255
    )
    assert image[0, 32, 32] == pytest.approx(solids.AMBIENT + solids.CAMERA_FILL, abs=.01)
    assert image[0, 32, 9] < image[0, 32, 32] - .05                         # towards the rim


# --- sampling
# ----------------------------------------------------------------------------------------

def test_same_seed_same_images_and_other_seeds_or_splits_other_ones():
    first, again = views(16)[2], views(16)[2]
    assert torch.equal(first, again)
    for other in (views(16, seed=1), views(16, split="val")):
        assert (first != other[2]).flatten(1).any(1).all()


def test_prefix_stability():
    for a, b in zip(sample_objects(4, 0, "val"), sample_objects(8, 0, "val")):
        assert torch.equal(a, b[:4])
    assert torch.equal(sample_latents(4, 3, 0, "val"), sample_latents(8, 5, 0, "val")[:4, :3])


def test_val_objects_are_never_train_objects_and_proportions_vary():
    both = [sample_objects(64, 0, split) for split in solids.SPLITS]
    shapes = torch.cat([torch.cat([x.half, x.centre], 2).flatten(1) for x in both])
    distance = (shapes[:, None] - shapes).norm(dim=-1)
    assert (distance + torch.eye(128) > 1e-2).all()
    with pytest.raises(AssertionError, match="split"):
        sample_objects(1, 0, "test")


def test_labels_are_balanced_and_name_the_recipe():
    labels = sample_objects(64, 0, "train").labels
    assert labels.dtype == torch.int64 and (labels.bincount() == 4).all()
    assert len(set(CLASSES)) == 16 and CLASSES[labels[7]] == "laptop"


def test_colour_does_not_depend_on_the_class():
    """The classes' mean colours differ no more than chance lets means of 50 objects differ."""
    colour = sample_objects(800, 0, "train").colour[:, 0].view(50, 16, 3)
    spread, expected = colour.mean(0).var(0), colour.flatten(0, 1).var(0) / 50
    assert (spread < 3 * expected).all() and (colour.var((0, 1)) > .01).all()


def test_latents_fill_their_ranges():
    latents = sample_latents(200, 10, 0, "train").flatten(0, 1)
    low, high = torch.tensor(solids.LATENT_RANGES).T
    assert latents.dtype == torch.float32 and (latents >= low).all() and (latents <= high).all()
    assert ((latents.amin(0) - low) / (high - low) < 0.01).all() and (
        (high - latents.amax(0)) / (high - low) < 0.01
    ).all()
    assert torch.corrcoef(latents.T).sub(torch.eye(7)).abs().max() < .1
    narrow = sample_latents(200, 10, 0, "train", rotation_range=.3).flatten(0, 1)
    assert .29 < narrow[:, :3].abs().max() <= .3 and torch.equal(narrow[:, 3:], latents[:, 3:])


def test_objects_stay_in_the_unit_ball_and_fill_it():
    objects = sample_objects(64, 0, "train")
    angle = torch.arange(0, 2 * math.pi, .1)
    rim = torch.stack([angle.cos(), angle.sin(), torch.zeros_like(angle)])
    sphere = torch.nn.functional.normalize(
        torch.randn(3, 500, generator=torch.Generator().manual_seed(0)), dim=0
    )
    cube = torch.tensor([[x, y, z] for x in (-1., 1) for y in (-1, 1) for z in (-1, 1)]).T
    for i in range(64):
        farthest = 0
        for kind, centre, half, axes, ends in zip(*(x[i] for x in objects[1:6])):
            if kind == NOTHING:
                continue
            caps = [
                rim * torch.tensor([[r], [r], [1]]) + torch.tensor([[0], [0], [z]])
                for r, z in zip(ends, (-1, 1))
            ]
            local = {BOX: cube, ELLIPSOID: sphere, FRUSTUM: torch.cat(caps, 1)}[kind.item()]
            farthest = max(
                farthest,
                (centre[:, None] + axes @ (half[:, None] * local)).norm(dim=0).max().item(),
            )
        assert .85 < farthest < 1 + 1e-4, CLASSES[i % 16]


# --- rendering
# ----------------------------------------------------------------------------------------

def test_one_object_under_two_latents():
    objects = sample_objects(3, 0, "train")
    images = render(
        objects,
        torch.tensor([2, 2, 2]),
        torch.cat([latent(), latent((0.5, 0, 0)), latent(floor_hue=0.8)]),
        24,
    )
    assert (images[0] != images[1]).any() and (images[0] != images[2]).any()
    green_floor = images[0].int() - images[2].int()
    # the object itself keeps its pixels
    assert (green_floor.abs().amax(0) <= 1).float().mean() > .05


@pytest.mark.parametrize("size", [7, 30, 33])
def test_odd_sizes_show_the_same_picture(size):
    objects, latents, image = views(4, size)
    assert image.shape == (4, 3, size, size) and image.dtype == torch.uint8
    large = render(objects, torch.arange(4), latents, 4 * size).float()
    assert (torch.nn.functional.avg_pool2d(large, 4) - image.float()).abs().mean() < 4


def test_batch_of_one_and_chunks():
    # 3 views per chunk at this size
    objects, latents, images = views(6, 200)
    for i in (0, 4):
        one = render(objects, torch.tensor([i]), latents[i:i + 1], 200)[0]
        assert ((one.int() - images[i].int()).abs() > 1).float().mean() < 1e-3
    with pytest.raises(AssertionError, match="latents"):
        render(objects, torch.tensor([0, 1]), latents[:1], 8)


def test_render_split_yields_every_view_once():
    objects, latents = sample_objects(5, 0, "val"), sample_latents(5, 3, 0, "val")
    slices, batches = zip(*solids.render_split("val", 5, 3, 16, 0, batch=2))
    assert [(s.start, s.stop) for s in slices] == [(0, 2), (2, 4), (4, 5)]
    images = np.concatenate(batches)
    assert images.shape == (5, 3, 3, 16, 16) and images.dtype == np.uint8
    expected = render(objects, torch.tensor([3]), latents[3, 2:], 16)[0].numpy()
    assert np.abs(images[3, 2].astype(int) - expected).mean() < .1


def test_hue_range_shrinks_hues_alone():
    full, half, none = (solids.sample_latents(40, 3, 0, "train", hue_range=r) for r in (1, .5, 0))
    others = [0, 1, 2, 4, 5]
    assert torch.equal(full[..., others], half[..., others]) and torch.equal(
        full[..., others], none[..., others]
    )
    for column, plain in ((3, solids.PLAIN_FLOOR_HUE), (6, solids.PLAIN_LIGHT_HUE)):
        assert full[..., column].min() < .1 and full[..., column].max() > .9
        torch.testing.assert_close(half[..., column], (full[..., column] + plain) / 2)
        torch.testing.assert_close(none[..., column], torch.full((40, 3), plain))


def test_plain_material_changes_colours_alone():
    """Same shapes and patterns; every object's part has the same colour, whatever its class."""
    free = sample_objects(20, 0, "train")
    plain = sample_objects(20, 0, "train", "plain")
    for field in set(free._fields) - {"colour"}:
        assert torch.equal(getattr(free, field), getattr(plain, field))
    colours = plain.colour[plain.kind != solids.NOTHING].unique(dim=0)
    torch.testing.assert_close(colours, torch.tensor(sorted(solids.PLAIN_COLOURS)))
    assert len(free.colour[free.kind != solids.NOTHING].unique(dim=0)) > 20


def test_object_masks_are_the_pixels_that_change_with_the_floor_s_absence():
    """Of a render with objects of another colour, exactly the pixels of the object change."""
    solids, latents = sample_objects(6, 0, "val"), sample_latents(6, 1, 0, "val")[:, 0]
    latents[:, 4] = 0                                                       # light from above
    masks = object_masks(solids, torch.arange(6), latents, 50)
    images = render(solids, torch.arange(6), latents, 50).float()
    painted = solids._replace(colour=1 - solids.colour)
    changed = (render(painted, torch.arange(6), latents, 50).float() - images).abs().amax(1) > 0
    assert masks.shape == (6, 50, 50) and masks.dtype == torch.float32
    assert set(masks.unique().tolist()) == {0, 0.25, 0.5, 0.75, 1}
    assert not (changed & (masks == 0)).any()
    assert ((masks > 0) & ~changed).float().mean() < 0.01                   # greys stay grey
