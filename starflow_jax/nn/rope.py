"""Rotary positions over rows, columns and time (DESIGN: the flow block, RoPE).

The method rotates neighbouring channels (x_2i, x_2i+1). Here a head's channels lie as all even ones, then
all odd ones, so that a rotation acts on two contiguous halves: attention only sees q.k, which any common
permutation of q's and k's channels leaves unchanged. Loading released weights applies that permutation.
"""

import jax
import jax.numpy as jnp
import numpy as np

TIME_FREQUENCIES = 8
THETA = 10_000.0


def grid_positions(frames: int, height: int, width: int, extent: float) -> np.ndarray:
    """(frames*height*width, 3) row, column and time of each token in raster order.

    `extent` is the released models' pt_seq_len: an h x w grid spans extent/sqrt(h*w) per token, so that
    grids of every size and aspect ratio share one range.
    """
    scale = extent / np.sqrt(height * width)
    time, row, column = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([row.ravel() * scale, column.ravel() * scale, time.ravel()], axis=-1).astype(np.float64)


def text_positions(length: int, extent: float) -> np.ndarray:
    """(length, 3): text has row = column = 0 and is spread over the time axis."""
    positions = np.zeros((length, 3))
    positions[:, 2] = np.arange(length) * (extent / max(length, 1))
    return positions


def rope_table(positions_S3: np.ndarray, head_dim: int) -> jax.Array:
    """(2, S, head_dim/2) float32 cosines and sines of every slot's angles."""
    spatial = (head_dim // 2 - TIME_FREQUENCIES) // 2
    if spatial < 1 or head_dim % 4:
        raise ValueError(f"head_dim={head_dim}: RoPE needs a multiple of 4 of at least 20")
    space = THETA ** (-np.arange(spatial) / spatial)
    time = THETA ** (-np.arange(TIME_FREQUENCIES) / TIME_FREQUENCIES)
    angles = np.concatenate([positions_S3[:, i : i + 1] * f for i, f in enumerate((space, space, time))], axis=1)
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


def apply_rope(x_BSHD: jax.Array, table_2SE: jax.Array) -> jax.Array:
    """Rotate each slot's channel pairs (i, D/2 + i) by the slot's angles; keeps the dtype."""
    cos, sin = table_2SE[0][:, None, :], table_2SE[1][:, None, :]
    even, odd = jnp.split(x_BSHD.astype(jnp.promote_types(x_BSHD.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([even * cos - odd * sin, even * sin + odd * cos], axis=-1).astype(x_BSHD.dtype)


def pair_order(head_dim: int) -> np.ndarray:
    """Where each of our channels lies in a head of the released layout: evens first, then odds."""
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
