"""Quaternions against SciPy, sequences against the latents they were drawn from."""
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from build import build_views
from config import Config
from images import normalise
from plumbing.errors import BadInput
from rotations import Rotations, inverse, multiply, quaternion, relative

CPU, CONFIG = torch.device("cpu"), Config()


def random_angles(*shape):
    """Uniform over 3DIEBench's range, float64, with its eight corners in front."""
    angles = (torch.rand(*shape, 3, dtype=torch.float64) - 0.5) * math.pi
    corners = torch.cartesian_prod(*[torch.tensor([-0.5, 0.5], dtype=torch.float64) * math.pi] * 3)
    angles.view(-1, 3)[:8] = corners
    return angles


def scipy_rotation(angles):
    return Rotation.from_euler("xyz", angles.numpy())           # lower case: extrinsic


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-12)


def test_quaternion_is_scipys_extrinsic_xyz_sign_included():
    angles = random_angles(500)
    assert_close(quaternion(angles), scipy_rotation(angles).as_quat())


def test_the_convention_is_extrinsic_xyz_and_no_other():
    """The check above can tell conventions apart."""
    angles = random_angles(500)
    for other in ("XYZ", "zyx", "ZYX"):
        assert (
            np.abs(
                quaternion(angles).numpy() - Rotation.from_euler(other, angles.numpy()).as_quat()
            ).max()
            > 0.1
        )


def test_multiply_and_inverse_agree_with_scipy_and_batch_over_any_shape():
    p, q = (
        torch.nn.functional.normalize(torch.randn(4, 30, 4, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    P, Q = (Rotation.from_quat(x.flatten(0, 1).numpy()) for x in (p, q))
    assert_close(multiply(p, q).flatten(0, 1), (P * Q).as_quat())
    np.testing.assert_allclose(
        Rotation.from_quat(inverse(p).flatten(0, 1).numpy()).as_matrix(),
        P.inv().as_matrix(),
        atol=1e-12,
    )
    assert_close(multiply(inverse(p), p), np.broadcast_to([0, 0, 0, 1], p.shape))
    assert_close(multiply(p[:, :1], q), multiply(p[:, :1].expand_as(q), q).numpy())


def test_relative_rotation_agrees_with_scipy_and_keeps_its_sign():
    a, b = random_angles(2000), random_angles(2000)[torch.randperm(2000)]
    ours = relative(quaternion(a), quaternion(b))
    assert_close(ours, (scipy_rotation(a).inv() * scipy_rotation(b)).as_quat())
    assert (ours[:, 3] < 0).any()                              # not flipped to w >= 0
    assert_close(multiply(quaternion(a), ours), quaternion(b).numpy())


def test_relative_rotation_is_continuous_in_the_angles():
    """Nowhere in the range does a small step of one view's pose make the action jump, as a sign
    flip would."""
    a, b = random_angles(5000), random_angles(5000)[torch.randperm(5000)]
    step = 1e-3 * torch.randn(5000, 3, dtype=torch.float64)
    jump = relative(quaternion(a), quaternion(b + step)) - relative(quaternion(a), quaternion(b))
    assert (jump.norm(dim=-1) <= step.norm(dim=-1)).all()


# ---------------------------------------------------------------- sequences

def make_latents(n, views, seed=0):
    u = np.random.default_rng(seed).random((n, views, 7))
    low, high = np.array(
        [[-np.pi / 2] * 3 + [0] * 4, [np.pi / 2] * 3 + [1, np.pi / 4, 2 * np.pi, 1]]
    )
    return (low + u * (high - low)).astype(np.float32)


@pytest.fixture
def split(make_split):
    return make_split(n=10, size=8, views=6, latents=make_latents(10, 6))


@pytest.fixture
def rotations(split):
    return Rotations(split, CONFIG, CPU)


def which_views(rotations, split, batch, index):
    """Stored number (B, K) of each view of a batch, found by its pixels."""
    stored = normalise(
        torch.from_numpy(split.parts[0].images)[index], rotations.mean, rotations.std, channel_dim=2
    )
    same = (batch.views[:, :, None] == stored[:, None]).flatten(3).all(3)               # (B, K, V)
    assert (same.sum(2) == 1).all()
    return same.int().argmax(2)


def test_batch_holds_what_the_latents_say(rotations, split):
    index, M = torch.tensor([7, 2, 2, 9]), 3
    batch = rotations(index, M)
    assert [tuple(t.shape) for t in batch[:4]] == [(4, 4, 3, 8, 8), (4, 3, 6), (4, 4, 9), (4,)]
    assert batch.labels.tolist() == [1, 0, 0, 1]
    # (B, M+1, 7)
    latents = split.latents[index[:, None], which_views(rotations, split, batch, index)]
    for b in range(4):
        turns = Rotation.from_euler("xyz", latents[b, :, :3])
        np.testing.assert_allclose(
            batch.actions[b, :, :4], (turns[:-1].inv() * turns[1:]).as_quat(), atol=1e-6
        )
        np.testing.assert_allclose(batch.params[b, :, :4], turns.as_quat(), atol=1e-6)
    np.testing.assert_allclose(
        batch.actions[..., 4:], np.diff(latents[..., [3, 6]], axis=1), atol=1e-6
    )
    np.testing.assert_array_equal(batch.params[..., 4:6], latents[..., [3, 6]])
    np.testing.assert_array_equal(batch.params[..., 6:], latents[..., :3])


def test_views_of_a_sequence_are_distinct_and_all_orders_equally_likely(rotations, split):
    index = torch.arange(10).repeat(600)
    chosen = which_views(rotations, split, rotations(index, 2), index)
    assert (chosen.sort(dim=1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(chosen @ torch.tensor([36, 6, 1]), minlength=216)
    # every ordered triple, about 50 times each
    assert (counts > 0).sum() == 6 * 5 * 4
    assert counts.max() < 95 and counts[counts > 0].min() > 20
    all_six = which_views(rotations, split, rotations(index[:10], 5), index[:10])
    assert (all_six.sort(dim=1).values == torch.arange(6)).all()


def test_composed_actions_lead_from_the_first_view_to_the_last(rotations):
    batch = rotations(torch.arange(10), 5)
    total = batch.actions[:, 0, :4]
    for i in range(1, 5):
        total = multiply(total, batch.actions[:, i, :4])
    first, last = (Rotation.from_euler("xyz", batch.params[:, i, 6:].numpy()) for i in (0, -1))
    np.testing.assert_allclose(total, (first.inv() * last).as_quat(), atol=1e-6)
    whole = torch.cat([total, batch.actions[:, :, 4:].sum(1)], dim=1)
    np.testing.assert_allclose(
        rotations.relative(batch.params[:, 0], batch.params[:, -1]), whole, atol=1e-6
    )


def test_action_depends_on_its_own_two_views_alone(split):
    """Disturb the latents of the third view of a sequence: actions 1 and 2 change, 0 and 3 do not,
    nor does any pixel."""
    index = torch.tensor([4])
    torch.manual_seed(5)
    before = Rotations(split, CONFIG, CPU)(index, 4)
    disturbed = split.latents.copy()
    third = (torch.from_numpy(split.latents[4, :, :3]) == before.params[0, 2, 6:]).all(1)
    disturbed[4, third.numpy()] += 0.3
    torch.manual_seed(5)
    after = Rotations(split._replace(latents=disturbed), CONFIG, CPU)(index, 4)
    assert (before.actions != after.actions).all(2).tolist() == [[False, True, True, False]]
    assert torch.equal(before.actions[:, [0, 3]], after.actions[:, [0, 3]]) and torch.equal(
        before.views, after.views
    )


def test_same_seed_same_views_other_seed_others(rotations):
    def draw(seed):
        torch.manual_seed(seed)
        return rotations(torch.arange(10), 3)
    assert all(torch.equal(a, b) for a, b in zip(draw(1)[:4], draw(1)[:4]))
    assert not torch.equal(draw(1).actions, draw(2).actions)


def test_all_views_come_in_stored_order(rotations, split):
    index = torch.tensor([3, 0])
    views, params = rotations.all_views(index)
    images = torch.from_numpy(split.parts[0].images)[index]
    stored = normalise(images, rotations.mean, rotations.std, channel_dim=2)
    assert torch.equal(views, stored)
    np.testing.assert_array_equal(params[..., 6:], split.latents[[3, 0], :, :3])
    assert rotations.clean(index) is None and len(rotations) == 10


def test_more_views_than_an_object_has_are_refused_by_flag(rotations):
    with pytest.raises(
        BadInput, match="--views 6: a sequence needs 7 distinct views and an object has 6"
    ):
        rotations(torch.arange(2), 6)


def test_one_view_images_are_no_objects(make_split):
    with pytest.raises(AssertionError, match="mode rotation needs objects"):
        Rotations(make_split(n=4, size=8), CONFIG, CPU)


def test_solids_end_to_end(make_config):
    config = make_config(
        "solids", "rotation", limit=16, image_size=16, object_views=4, rotation_range=0.5
    )
    views = build_views(config, "pretrain", CPU)
    assert (len(views), views.view_count, len(views.classes)) == (16, 4, 16)
    batch = views(torch.arange(16), config.views)
    assert batch.views.shape == (16, 4, 3, 16, 16) and batch.views.std() > 0.3
    assert batch.params[..., 6:].abs().max() <= 0.5
    assert batch.labels.tolist() == list(range(16))
    assert (batch.views[:, 0] != batch.views[:, 1]).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(condition="crop"),
            "--condition crop: mode rotation offers rotation, color, rotation.color, none",
        ),
        (
            dict(views=4, object_views=4),
            "--views 4: a sequence needs 5 distinct renders and an object has 4",
        ),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(
    make_config, tmp_path, changes, message
):
    with pytest.raises(BadInput, match=message):
        make_config("solids", "rotation", **changes)
    assert not list(tmp_path.iterdir())
