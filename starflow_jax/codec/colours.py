"""RGB of the planes that video files keep, computed where a codec runs, and bit for bit what data/raw/planes.py makes.

The arithmetic is that of ffmpeg's scaler, in 32-bit integers: colours that are sampled half as often are interpolated
by bicubic filters of four taps, then brought to RGB by the matrix that the video states.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# By H.264's number of a matrix: red of V, blue of U, minus green of U and of V, in units of 2**-16.
_BT709, _BT601, _BT2020 = (117489, 138438, 13975, 34925), (104597, 132201, 25675, 53279), (110013, 140363, 12277, 42626)
MATRICES = {1: _BT709, 4: (104448, 132798, 24759, 53109), 5: _BT601, 6: _BT601, 7: (117579, 136230, 16907, 35559),
            9: _BT2020}
# Weights of four samples, bicubic with A = -0.6. Across, in 2**-14, every other pixel lies on a sample and the rest
# between two; down, in 2**-12, pixels are a quarter of the samples' distance before and after one. For the first and
# third row ffmpeg leaves the farthest sample out.
_ACROSS = np.array([-1229, 9421, 9421, -1229])
_DOWN, _DOWN_FIRST = np.array([-115, 985, 3572, -346]), np.array([[4432, -336, 0], [959, 3473, -336]])
_BRIGHTNESS = 9539  # 255 / 219 in 2**-13


def rgb_of_planes(planes: tuple[np.ndarray, ...], matrix: int) -> jax.Array:
    """uint8 (T, H, W, 3) of a clip's planes of 8 bits and a video's range: brightness, uint8 (T, H, W), and two of
    colour, of the same sides or of half of either, sampled at the left of the pixels that share them, as H.264 has it.
    Below 14 pixels a side ffmpeg has other filters.
    """
    red_v, blue_u, green_u, green_v = (_rounded(factor << 13, 16) for factor in MATRICES[matrix])
    return _rgb(planes, jnp.array([red_v, -green_v, -green_u, blue_u], jnp.int32))


def _rounded(value: int, bits: int) -> int:
    return (value + (1 << (bits - 1))) >> bits


@jax.jit
def _rgb(planes: tuple[jax.Array, ...], factors: jax.Array) -> jax.Array:
    return lax.map(partial(_frame_rgb, factors=factors), planes)


def _frame_rgb(planes: tuple[jax.Array, ...], factors: jax.Array) -> jax.Array:
    red_v, green_v, green_u, blue_u = factors
    grey = ((planes[0].astype(jnp.int32) << 9) - (16 << 9)) * _BRIGHTNESS + (1 << 21)
    u, v = (_full_size(plane.astype(jnp.int32), *planes[0].shape) for plane in planes[1:])
    rgb_HWC = jnp.stack([grey + v * red_v, grey + v * green_v + u * green_u, grey + u * blue_u], -1)
    return (jnp.clip(rgb_HWC, 0, (1 << 30) - 1) >> 22).astype(jnp.uint8)


def _full_size(plane: jax.Array, height: int, width: int) -> jax.Array:
    """A plane of colour less 128, in 2**-9, a sample for each pixel."""
    across = plane << 7
    if plane.shape[1] < width:
        between = jnp.minimum(_weighted(plane, _ACROSS, 1) >> 7, (1 << 15) - 1)
        across = jnp.stack([across, between], -1).reshape(-1, width)
    down = across << 12
    if plane.shape[0] < height:
        first = (across[None, :3] * _DOWN_FIRST[:, :, None]).sum(1)
        before = _weighted(across.T, _DOWN, 0).T.at[:2].set(first)
        down = jnp.stack([before, _weighted(across.T, _DOWN[::-1], 1).T], 1).reshape(height, -1)
    return (down + (1 << 9) - (128 << 19)) >> 10


def _weighted(rows: jax.Array, taps: np.ndarray, begin: int) -> jax.Array:
    """For each sample the weighted sum of four, from the second (begin=1: the first) before it on; those at the ends go
    on."""
    width = rows.shape[1]
    padded = jnp.pad(rows, [(0, 0), (2, 2)], mode="edge")
    return sum((int(tap) * padded[:, begin + place:begin + place + width] for place, tap in enumerate(taps)),
               jnp.zeros_like(rows))
