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
# Weights of samples at distances of 1.75, 0.75, 0.25 and 1.25, bicubic with A = -0.6: across in 2**-14, down in 2**-12.
# Of the first and third sample that comes out, ffmpeg leaves the farthest out.
_ACROSS = np.array([-461, 3943, 14284, -1382]), np.array([[17729, -1345, 0], [3835, 13894, -1345]])
_DOWN = np.array([-115, 985, 3572, -346]), np.array([[4432, -336, 0], [959, 3473, -336]])
_BRIGHTNESS = 9539  # 255 / 219 in 2**-13


def rgb_of_planes(planes: tuple[np.ndarray, ...], matrix: int) -> jax.Array:
    """uint8 (T, H, W, 3) of a clip's planes of 8 bits and a video's range: brightness, uint8 (T, H, W), and two of
    colour, of the same sides or of half of either."""
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
        across = jnp.minimum(_doubled(plane, *_ACROSS) >> 7, (1 << 15) - 1)
    down = _doubled(across.T, *_DOWN).T if plane.shape[0] < height else across << 12
    return (down + (1 << 9) - (128 << 19)) >> 10


def _doubled(rows: jax.Array, taps: np.ndarray, first: np.ndarray) -> jax.Array:
    """Twice the samples of each row, a quarter of their distance before and after each; those at the ends go on."""
    height, width = rows.shape
    padded = jnp.pad(rows, [(0, 0), (2, 2)], mode="edge")
    before, after = (sum((int(tap) * padded[:, begin + place:begin + place + width]
                          for place, tap in enumerate(ordered)), jnp.zeros_like(rows))
                     for begin, ordered in ((0, taps), (1, taps[::-1])))
    before = before.at[:, :2].set((rows[:, None, :3] * first).sum(-1))
    return jnp.stack([before, after], -1).reshape(height, 2 * width)
