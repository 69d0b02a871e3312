"""Camera control: the Plücker coordinates of the ray through every pixel of every frame.

A ray with origin o and unit direction d is the pair (o × d, d): the moment is the same for every point o
of the ray, so the six numbers identify the line of the world that a pixel sees, and nothing else.
"""

import numpy as np

from starflow_jax.config import UserError


def plucker_rays(
    intrinsics_T4: np.ndarray,
    world_to_camera_T44: np.ndarray,
    height: int,
    width: int,
    relative_to_first: bool,
) -> np.ndarray:
    """Rays (T, height, width, 6), float64: moment (3 channels), then unit direction (3), through pixel centres.

    intrinsics: fx, fy, cx, cy, each divided by the image width (fx, cx) or height (fy, cy).
    world_to_camera: camera = W · world, homogeneous; x right, y down, z forward.
    relative_to_first: the world's axes are those of the first camera, which looks from the origin.
    Raises UserError for other shapes and for cameras that can't be inverted.
    """
    intrinsics_T4 = np.asarray(intrinsics_T4, np.float64)
    world_to_camera_T44 = np.asarray(world_to_camera_T44, np.float64)
    frames = len(intrinsics_T4)
    if frames == 0 or intrinsics_T4.shape != (frames, 4) or world_to_camera_T44.shape != (frames, 4, 4):
        raise UserError(
            f"cameras: intrinsics {intrinsics_T4.shape} and world_to_camera {world_to_camera_T44.shape}; "
            "give (T, 4) and (T, 4, 4) of the same T"
        )
    try:
        camera_to_world_T44 = np.linalg.inv(world_to_camera_T44)
    except np.linalg.LinAlgError as error:
        raise UserError("cameras: a world_to_camera matrix is singular; give a rigid transform") from error
    if relative_to_first:
        camera_to_world_T44 = world_to_camera_T44[0] @ camera_to_world_T44

    fx, fy, cx, cy = intrinsics_T4.T[:, :, None, None]  # each (T, 1, 1)
    x = ((np.arange(width) + 0.5) / width - cx) / fx  # (T, 1, W)
    y = ((np.arange(height)[:, None] + 0.5) / height - cy) / fy  # (T, H, 1)
    camera_rays_THW3 = np.stack(np.broadcast_arrays(x, y, 1.0), axis=-1)

    direction_THW3 = np.einsum("tij,thwj->thwi", camera_to_world_T44[:, :3, :3], camera_rays_THW3)
    direction_THW3 /= np.linalg.norm(direction_THW3, axis=-1, keepdims=True)
    origin_T113 = camera_to_world_T44[:, None, None, :3, 3]
    return np.concatenate([np.cross(origin_T113, direction_THW3), direction_THW3], axis=-1)
