"""The shallow blocks' inverse of whole videos, a few frames at a time.

Local shallow blocks see one frame, so that frames may be inverted in any company; what they need of memory for all
frames of a large video at once is more than the deep block's cache.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from starflow_jax.config import Model
from starflow_jax.flow import decode
from starflow_jax.flow.inversion import Report, Solver
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.sampling.sizes import frames_together
from starflow_jax.sharding import fetch

TOKENS = 6144  # of all videos together, at once; but at least a frame of each

Inverted = tuple[jax.Array, tuple[Report, ...]]  # as `decode.invert_shallow` returns it


def frames_at_once(model: Model, videos: int, frames: int) -> int:
    """How many of each video's frames are inverted at once: whatever their number, unless they are fewer."""
    if not model.local_shallow:
        return frames
    return min(frames, max(1, TOKENS // (videos * model.tokens_per_frame)))


def filled_at_once(model: Model, videos: int, frames: int) -> int:
    """The same of whole videos of so many frames, whose parts are filled up: at most a window."""
    return frames_at_once(model, videos, frames_together(model, frames) if model.local_shallow else frames)


def invert_videos(flow: STARFlow, variables: Any, made: Sequence[jax.Array], *, solver: Solver,
                  token_grid: tuple[int, int]) -> tuple[np.ndarray, list[tuple[Report, ...]]]:
    """The same of whole videos, of whose u the deep block has made some frames after the other, (B, G, S, K) each: the
    latents in the host's memory, and the reports of each part. One program serves any number of frames: the last part
    is filled up with its last frame."""
    frames = [part if part.shape[1] == 1 else part_of(part, index, 1)
              for part in made for index in range(part.shape[1])]
    at_once = filled_at_once(flow.config, len(made[0]), len(frames))
    parts = []
    for begin in range(0, len(frames), at_once):
        part = frames[begin:begin + at_once]
        u_BTSK = joined(*part, *part[-1:] * (at_once - len(part)))
        parts.append(decode.invert_shallow(flow, variables, u_BTSK, solver=solver, token_grid=token_grid))
    latents, reports = zip(*parts)
    return np.concatenate(list(map(fetch, latents)), axis=1)[:, :len(frames)], list(reports)


@jax.jit
def joined(*parts_BN: jax.Array) -> jax.Array:
    """Frames made one step after the other, together."""
    return jnp.concatenate(parts_BN, axis=1)


def invert_all(flow: STARFlow, variables: Any, u_BTSK: jax.Array, *, solver: Solver, token_grid: tuple[int, int]
               ) -> Inverted:
    """As `decode.invert_shallow`. All parts are equally long, so that one program does; the last one may begin with
    frames of the one before it, which are made again and dropped."""
    videos, frames = u_BTSK.shape[:2]
    at_once = frames_at_once(flow.config, videos, frames)
    invert = partial(decode.invert_shallow, flow, variables, solver=solver, token_grid=token_grid)
    if at_once == frames:
        return invert(u_BTSK)
    parts = [invert(part_of(u_BTSK, min(begin, frames - at_once), at_once)) for begin in range(0, frames, at_once)]
    return parts_together(parts, videos, frames)


@partial(jax.jit, static_argnums=2)
def part_of(u_BTSK: jax.Array, begin: int, frames: int) -> jax.Array:
    """So many frames from `begin` on."""
    return lax.dynamic_slice_in_dim(u_BTSK, begin, frames, axis=1)


@partial(jax.jit, static_argnums=(1, 2))
def parts_together(parts: list[Inverted], videos: int, frames: int) -> Inverted:
    """Parts of videos joined to so many frames; what is too many is the beginning of the last part."""
    def join(axis: int, *arrays: jax.Array) -> jax.Array:
        double = sum(array.shape[axis] for array in arrays) - frames
        return jnp.concatenate([*arrays[:-1], lax.slice_in_dim(arrays[-1], double, None, axis=axis)], axis)

    def by_frame(of_blocks: jax.Array) -> jax.Array:
        return of_blocks.reshape(of_blocks.shape[0], videos, -1)

    latents, reports = zip(*parts)
    joined = jax.tree.map(partial(join, 2), *jax.tree.map(by_frame, reports))
    return join(1, *latents), jax.tree.map(lambda array: array.reshape(array.shape[0], -1), joined)
