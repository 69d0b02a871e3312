"""The deep block steered by cameras: its backbone at first, invertible, causal in frames, alike in any window."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.flow import generation
from starflow_jax.flow.control import (
    LatentCameras,
    Steering,
    cameras_of_latents,
    control_of,
    fresh_control,
    plucker_rays,
    ray_tokens,
    window_rays,
)
from starflow_jax.flow.inversion import SEQUENTIAL, Solver
from starflow_jax.flow.starflow import STARFlow
from tests.flow.test_control import random_cameras
from tests.helpers import depends, latents, random_flow, random_variables, text, tiny_model

STRIDE = 2
MODEL = tiny_model(frames=3)
FLOW, VARIABLES = random_flow(MODEL)
BACKBONE = fresh_control(MODEL, 8, STRIDE, jax.random.key(0))
CONTROL: Any = random_variables(jax.eval_shape(lambda: BACKBONE))


def cameras(latent_frames: int, seed: int = 0) -> LatentCameras:
    intrinsics, world_to_camera = random_cameras(1 + STRIDE * (latent_frames - 1), seed)
    return cameras_of_latents(intrinsics[None], world_to_camera[None, :, :3], STRIDE)


RAYS = window_rays(cameras(3), MODEL)  # (1, 3, 6, 24)


@jax.jit
def forward(params: Any, x: jax.Array, rays: jax.Array) -> Any:
    return FLOW.apply(VARIABLES, x, text(MODEL), control_of((params, rays)), method=STARFlow.forward)


def invert(params: Any, z: jax.Array, solver: Solver, steer: Any = None, **options: Any) -> np.ndarray:
    def steer_window(begin: int, first: int, frames: int) -> Steering:
        return params, RAYS[:, first:first + frames]

    made = generation.generate(FLOW, VARIABLES, z, text(MODEL)[None], token_grid=(2, 3), solver=solver,
                               steer=steer or steer_window, **options)
    return np.concatenate([np.asarray(u) for u, _ in made], axis=1)


def test_ray_tokens_are_the_rays_through_their_pixels() -> None:
    """In the space of the first frame's camera; that frame has its one camera twice."""
    intrinsics, world_to_camera = random_cameras(5)
    rays_THW6 = plucker_rays(intrinsics, world_to_camera, 2, 3, relative_to_first=True)
    expected = np.stack([np.concatenate([rays_THW6[a], rays_THW6[b]], axis=-1) for a, b in ((0, 0), (1, 2), (3, 4))])
    np.testing.assert_allclose(RAYS[0, ..., :12], expected.reshape(3, 6, 12), atol=1e-5)


def test_and_those_in_the_space_of_the_frame_before() -> None:
    """Whose last camera is the origin; a window's first frame has nothing before it but itself."""
    intrinsics, world_to_camera = random_cameras(5)
    for latent, before, seen in ((0, 0, (0, 0)), (1, 0, (1, 2)), (2, 2, (3, 4))):
        cameras = [before, *seen]
        rays_THW6 = plucker_rays(intrinsics[cameras], world_to_camera[cameras], 2, 3, relative_to_first=True)
        expected = np.concatenate([rays_THW6[1], rays_THW6[2]], axis=-1)
        np.testing.assert_allclose(RAYS[0, latent, :, 12:], expected.reshape(6, 12), atol=1e-4)


def test_a_later_window_has_the_rays_of_a_video_that_begins_there() -> None:
    whole = cameras(5)
    later = ray_tokens(whole.cut(2, 5), whole.world_to_camera_BNR44[:, 2, -1], whole.before(2, 5, start=2), MODEL)
    np.testing.assert_array_equal(window_rays(whole.cut(2, 5), MODEL), later)
    moved = whole.replace(world_to_camera_BNR44=whole.world_to_camera_BNR44 @ random_cameras(1, 7)[1][0])
    np.testing.assert_allclose(window_rays(moved.cut(2, 5), MODEL), later, atol=1e-4)


def test_other_numbers_of_cameras_are_refused() -> None:
    intrinsics, world_to_camera = random_cameras(4)
    with pytest.raises(UserError, match="cameras: 4 of them; a video has 1 . a multiple of 2 frames"):
        cameras_of_latents(intrinsics[None], world_to_camera[None, :, :3], STRIDE)


def test_training_begins_at_the_backbone_exactly() -> None:
    plain = jax.jit(lambda x: FLOW.apply(VARIABLES, x, text(MODEL), method=STARFlow.forward))(latents(MODEL))
    steered = forward(BACKBONE, latents(MODEL), RAYS)
    np.testing.assert_array_equal(steered.z_BTSK, plain.z_BTSK)
    assert np.abs(forward(CONTROL, latents(MODEL), RAYS).z_BTSK - plain.z_BTSK).max() > 1e-2


@pytest.mark.parametrize("solver", [SEQUENTIAL, Solver(block_size=4, tolerance=1e-12),
                                    Solver(block_size=4, updates=4, tolerance=1e-12)],
                         ids=["one", "blocks", "wavefront"])
def test_inverse_of_the_steered_flow_is_its_input(solver: Solver) -> None:
    out = forward(CONTROL, latents(MODEL), RAYS)
    np.testing.assert_allclose(invert(CONTROL, out.z_BTSK, solver), out.block_outputs[-2], atol=1e-4)


def test_frames_that_are_known_are_steered_by_their_cameras() -> None:
    out = forward(CONTROL, latents(MODEL), RAYS)
    rest = invert(CONTROL, out.z_BTSK[:, 1:], SEQUENTIAL, known_BTSK=out.block_outputs[-2][:, :1])
    np.testing.assert_allclose(rest, out.block_outputs[-2][:, 1:], atol=1e-4)


def test_both_branches_of_guidance_are_steered() -> None:
    """With the same text in both, guidance changes nothing, whatever its weight."""
    out = forward(CONTROL, latents(MODEL), RAYS)
    made = generation.generate(FLOW, VARIABLES, out.z_BTSK, jnp.stack([text(MODEL)] * 2), token_grid=(2, 3),
                               guidance=3.0, steer=lambda begin, first, frames: (CONTROL, RAYS[:, first:first + frames])
                               )
    u = np.concatenate([np.asarray(u) for u, _ in made], axis=1)
    np.testing.assert_allclose(u, out.block_outputs[-2], atol=1e-4)


def test_a_frame_depends_on_its_own_and_earlier_cameras_alone() -> None:
    jacobian = jax.jit(jax.jacrev(lambda rays: forward(CONTROL, latents(MODEL), rays).z_BTSK[0].sum((1, 2))))(RAYS)
    seen = depends(np.asarray(jacobian), 0, 2)  # (T, 1, T, S, K)
    np.testing.assert_array_equal(seen, np.tril(np.ones((3, 3), bool)))


def test_the_log_determinant_is_that_of_the_dense_jacobian() -> None:
    small = latents(MODEL, frames=1)
    flat = lambda x: forward(CONTROL, x.reshape(small.shape), RAYS[:, :1]).z_BTSK.ravel()  # noqa: E731
    dense = np.linalg.slogdet(np.asarray(jax.jacfwd(flat)(small.ravel())))[1]
    total = sum(float(logdet.sum()) for logdet in forward(CONTROL, small, RAYS[:, :1]).logdets)
    assert total == pytest.approx(dense, rel=1e-4)


def test_a_window_that_moved_on_asks_for_rays_of_its_own() -> None:
    asked: list[tuple[int, int, int]] = []

    def steer(begin: int, first: int, frames: int) -> Steering:
        asked.append((begin, first, frames))
        return CONTROL, RAYS[:, first - begin:first - begin + frames]

    z = jnp.zeros((1, 3, 6, 2))
    made = invert(CONTROL, z, SEQUENTIAL, steer, window=2, context=1)
    assert asked == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 2, 1)]
    again = invert(CONTROL, z[:, 2:], SEQUENTIAL, known_BTSK=jnp.asarray(made[:, 1:2]))
    np.testing.assert_allclose(made[:, 2:], again, atol=1e-4)
