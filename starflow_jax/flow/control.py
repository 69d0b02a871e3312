"""Camera control: rays of cameras as tokens, and what they add to the deep block's hidden states.

A ray with origin o and unit direction d is the pair (o × d, d) of Plücker coordinates: the moment is the same for every
point o of the ray, so the six numbers identify the line of the world that a pixel sees, and nothing else. The rays
through a token's pixels are its control token. A small network maps it to `width` features by way of sines, which tell
near rays apart and can say of far ones that they see the same again; each layer of the frozen deep block is steered by
these (nn/transformer.py: Control), by nothing at first. Slot s, which predicts token s, gets that token's: the map
stays triangular, and frame n depends on the cameras of frames 0 .. n alone.
"""

import math
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Model, UserError
from starflow_jax.nn.patch import patchify
from starflow_jax.nn.transformer import Control

CHANNELS = 6  # of a ray
_FREQUENCY = 0.4  # radians by which a ray's number changes a feature, at first; the scene is about 1 from the camera
# Parameters of a control module, and ray tokens (B, T, S, K) of some frames of a window.
Steering = tuple[Any, jax.Array]


class LatentCameras(flax.struct.PyTreeNode):
    """Of each latent frame the cameras of the R pixel frames that it stands for; a video's first one, which stands for
    one, has that R times."""

    intrinsics_BNR4: Any  # fx, fy, cx, cy in units of the frame's width (fx, cx) and height (fy, cy)
    world_to_camera_BNR44: Any

    def cut(self, first: int, last: int) -> "LatentCameras":
        """Those of latent frames first to last; behind the video's end, its last one's."""
        frames = np.minimum(np.arange(first, last), self.intrinsics_BNR4.shape[1] - 1)
        return LatentCameras(self.intrinsics_BNR4[:, frames], self.world_to_camera_BNR44[:, frames])

    def before(self, first: int, last: int, start: int) -> Any:
        """(B, N, 4, 4) world to camera: the last camera in front of each of latent frames first to last, in a window
        that begins with frame `start`, which has its own last one."""
        frames = np.minimum(np.arange(first, last), self.intrinsics_BNR4.shape[1] - 1)
        return self.world_to_camera_BNR44[:, np.maximum(frames - 1, start), -1]


def cameras_of_latents(intrinsics_BT4: Any, world_to_camera_BT34: Any, time_stride: int) -> LatentCameras:
    """From the cameras of 1 + a multiple of time_stride pixel frames, whose matrices have 0 0 0 1 as last row; float32,
    of numpy if they are, so that a frame's are taken from them at no cost. Raises UserError for another number."""
    xp: Any = jnp if isinstance(intrinsics_BT4, jax.Array) else np
    frames = intrinsics_BT4.shape[1]
    if frames < 1 or (frames - 1) % time_stride:
        raise UserError(f"cameras: {frames} of them; a video has 1 + a multiple of {time_stride} frames")

    def grouped(of_frames_BTX: Any) -> Any:
        first = xp.repeat(of_frames_BTX[:, :1], time_stride, axis=1)
        whole = xp.concatenate([first, of_frames_BTX[:, 1:]], axis=1)
        return whole.reshape(len(whole), -1, time_stride, *whole.shape[2:])

    last_BT14 = xp.broadcast_to(xp.array([0.0, 0.0, 0.0, 1.0], xp.float32), (*world_to_camera_BT34.shape[:2], 1, 4))
    world_to_camera_BT44 = xp.concatenate([xp.asarray(world_to_camera_BT34, xp.float32), last_BT14], axis=2)
    return LatentCameras(grouped(xp.asarray(intrinsics_BT4, xp.float32)), grouped(world_to_camera_BT44))


def fresh_control(model: Model, width: int, time_stride: int, key: jax.Array) -> dict[str, Any]:
    """Parameters, float32, with which the model is its backbone: what is added to each layer is zero."""
    channels, layers, deep = ray_channels(model, time_stride), model.deep_layers, model.deep_width
    keys, draw = jax.random.split(key, 5), jax.nn.initializers.lecun_normal(batch_axis=0)
    return {"proj_in": {"kernel": _FREQUENCY * jax.random.normal(keys[0], (channels, width)),
                        "bias": jax.random.uniform(keys[1], (width,), maxval=2 * math.pi)},
            "proj_out": {"kernel": draw(keys[2], (1, width, width))[0], "bias": jnp.zeros(width)},
            "layers": {"tokens": {"kernel": draw(keys[3], (layers, width, width))},
                       "hidden": {"kernel": draw(keys[4], (layers, deep, width))},
                       "out": {"kernel": jnp.zeros((layers, width, deep))},
                       "qkv": {"kernel": jnp.zeros((layers, width, 3, deep))}}}


def control_of(steering: Steering | None) -> Control | None:
    """What ray tokens add to the deep block, as its layers take it; None where nothing steers."""
    if steering is None:
        return None
    params, rays_BTSK = steering

    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ params[name]["kernel"] + params[name]["bias"]

    tokens_BTSC = dense("proj_out", jnp.sin(dense("proj_in", rays_BTSK)))
    return Control(tokens_BTSC.reshape(len(rays_BTSK), -1, tokens_BTSC.shape[-1]), params["layers"])


def ray_channels(model: Model, time_stride: int) -> int:
    """Numbers of a ray token."""
    return 2 * CHANNELS * time_stride * model.patch_size**2


@partial(jax.jit, static_argnums=3)
def ray_tokens(cameras: LatentCameras, reference_B44: jax.Array, before_BN44: jax.Array, model: Model) -> jax.Array:
    """(B, N, S, 12 R p^2) float32: the rays through the pixels of each token, for each of its R cameras, in the space
    of two cameras (world to camera): the reference, which is the last one of the window's first latent frame, and the
    last one before each frame. So a window depends on how its cameras move, not on where the world has its origin,
    however long the video is, and a frame is told by how much it differs from the one that the model saw."""
    with jax.default_matmul_precision("highest"):  # a camera moves by hundredths from frame to frame
        spaces = [_in_space(cameras, camera, model) for camera in (reference_B44[:, None], before_BN44)]
    return jnp.concatenate(spaces, axis=-1)


def _in_space(cameras: LatentCameras, reference_BN44: jax.Array, model: Model) -> jax.Array:
    """(B, N, S, 6 R p^2) float32: rays in the space of a camera for each frame."""
    batch, frames, poses = cameras.intrinsics_BNR4.shape[:3]
    to_reference = reference_BN44[:, :, None] @ jnp.linalg.inv(cameras.world_to_camera_BNR44)
    rays = _rays(jnp, cameras.intrinsics_BNR4.reshape(-1, 4), to_reference.reshape(-1, 4, 4), model.height,
                 model.width)
    rays_BNRhw6 = rays.reshape(batch, frames, poses, model.height, model.width, CHANNELS)
    rays_BNhwK = jnp.moveaxis(rays_BNRhw6, 2, 4).reshape(batch, frames, model.height, model.width, -1)
    tokens = patchify(rays_BNhwK.astype(jnp.float32), model.patch_size)
    return tokens.reshape(batch, frames, -1, tokens.shape[-1])


def window_rays(cameras: LatentCameras, model: Model) -> jax.Array:
    """`ray_tokens` of a window's cameras."""
    before_BN44 = cameras.before(0, cameras.intrinsics_BNR4.shape[1], 0)
    return ray_tokens(cameras, cameras.world_to_camera_BNR44[:, 0, -1], before_BN44, model)


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
    return _rays(np, intrinsics_T4, camera_to_world_T44, height, width)


def _rays(xp: Any, intrinsics_T4: Any, camera_to_world_T44: Any, height: int, width: int) -> Any:
    """(T, height, width, 6), by numpy or jax.numpy."""
    fx, fy, cx, cy = intrinsics_T4.T[:, :, None, None]  # each (T, 1, 1)
    x = ((xp.arange(width) + 0.5) / width - cx) / fx  # (T, 1, W)
    y = ((xp.arange(height)[:, None] + 0.5) / height - cy) / fy  # (T, H, 1)
    camera_rays_THW3 = xp.stack(xp.broadcast_arrays(x, y, xp.ones_like(x)), axis=-1)
    direction_THW3 = xp.einsum("tij,thwj->thwi", camera_to_world_T44[:, :3, :3], camera_rays_THW3)
    direction_THW3 = direction_THW3 / xp.linalg.norm(direction_THW3, axis=-1, keepdims=True)
    origin_T113 = camera_to_world_T44[:, None, None, :3, 3]
    moment_THW3 = xp.cross(xp.broadcast_to(origin_T113, direction_THW3.shape), direction_THW3)
    return xp.concatenate([moment_THW3, direction_THW3], axis=-1)
