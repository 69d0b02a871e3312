"""Plücker rays: projective geometry that they have to satisfy, whatever the code."""

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.flow.control import plucker_rays

HEIGHT, WIDTH = 5, 7


def random_cameras(frames: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Intrinsics (T, 4) and rigid world-to-camera transforms (T, 4, 4)."""
    rng = np.random.default_rng(seed)
    intrinsics_T4 = rng.uniform([0.7, 0.9, 0.45, 0.4], [1.1, 1.4, 0.55, 0.6], (frames, 4))
    rotation_T33, _ = np.linalg.qr(rng.normal(size=(frames, 3, 3)))
    rotation_T33 *= np.sign(np.linalg.det(rotation_T33))[:, None, None]
    world_to_camera_T44 = np.tile(np.eye(4), (frames, 1, 1))
    world_to_camera_T44[:, :3, :3] = rotation_T33
    world_to_camera_T44[:, :3, 3] = rng.normal(size=(frames, 3))
    return intrinsics_T4, world_to_camera_T44


def homogeneous(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points, np.ones((*points.shape[:-1], 1))], axis=-1)


def test_every_point_of_a_ray_projects_to_its_pixel_centre():
    intrinsics_T4, world_to_camera_T44 = random_cameras()
    rays_THW6 = plucker_rays(intrinsics_T4, world_to_camera_T44, HEIGHT, WIDTH, relative_to_first=False)
    moment, direction = rays_THW6[..., :3], rays_THW6[..., 3:]
    np.testing.assert_allclose(np.linalg.norm(direction, axis=-1), 1, atol=1e-12)
    # d × (o × d) is the point of the ray nearest to the origin; go far along d to be before the camera.
    points = np.cross(direction, moment) + 50 * direction
    camera = np.einsum("tij,thwj->thwi", world_to_camera_T44, homogeneous(points))
    assert (camera[..., 2] > 0).all()
    fx, fy, cx, cy = intrinsics_T4.T[:, :, None, None]
    column = (fx * camera[..., 0] / camera[..., 2] + cx) * WIDTH - 0.5
    row = (fy * camera[..., 1] / camera[..., 2] + cy) * HEIGHT - 0.5
    np.testing.assert_allclose(column, np.broadcast_to(np.arange(WIDTH), column.shape), atol=1e-9)
    np.testing.assert_allclose(row, np.broadcast_to(np.arange(HEIGHT)[:, None], row.shape), atol=1e-9)


def test_all_rays_of_a_frame_meet_in_the_camera():
    intrinsics_T4, world_to_camera_T44 = random_cameras()
    rays_THW6 = plucker_rays(intrinsics_T4, world_to_camera_T44, HEIGHT, WIDTH, relative_to_first=False)
    centre_T3 = np.linalg.inv(world_to_camera_T44)[:, :3, 3]
    expected = np.cross(centre_T3[:, None, None], rays_THW6[..., 3:])
    np.testing.assert_allclose(rays_THW6[..., :3], expected, atol=1e-12)


def test_relative_to_first_forgets_the_world_but_not_the_motion():
    intrinsics_T4, world_to_camera_T44 = random_cameras()
    rays = plucker_rays(intrinsics_T4, world_to_camera_T44, HEIGHT, WIDTH, relative_to_first=True)
    assert np.abs(rays[0, ..., :3]).max() < 1e-12  # the first camera is the origin
    assert np.abs(rays[1, ..., :3]).max() > 0.1
    other_world = random_cameras(frames=1, seed=9)[1][0]
    moved = plucker_rays(intrinsics_T4, world_to_camera_T44 @ other_world, HEIGHT, WIDTH, relative_to_first=True)
    np.testing.assert_allclose(moved, rays, atol=1e-12)


def test_bad_cameras_are_one_clear_line():
    intrinsics_T4, world_to_camera_T44 = random_cameras()
    with pytest.raises(UserError, match="same T"):
        plucker_rays(intrinsics_T4[:3], world_to_camera_T44, HEIGHT, WIDTH, relative_to_first=False)
    with pytest.raises(UserError, match="singular"):
        plucker_rays(intrinsics_T4, np.zeros((4, 4, 4)), HEIGHT, WIDTH, relative_to_first=False)
