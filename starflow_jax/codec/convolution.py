"""The Wan VAE's convolutions, each in the form that is fastest on the platform that the program is lowered for.

TPUs and GPUs have good 3-D convolutions. On CPUs XLA's 2-D convolution does up to three times as much a second as its
3-D one, so there a convolution in time is a sum of 2-D ones: one for each tap or, for pairs of frames, four where the
taps are six. Each reads a copy of its weights, which costs more than is won where there are few pixels.

Both functions are called as `lax.conv_general_dilated` is, so that a flax.linen.Conv takes them for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MANY = 512  # pixels of all frames together, from which on copies of the weights are cheap beside the convolution
ROWS = ("NHWC", "HWIO", "NHWC")
Padding = str | Sequence[tuple[int, int]]


def convolution(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding, **options: Any) -> jax.Array:
    """In rows and columns, x (N, H, W, C), or also in time, x (N, T, H, W, C) without strides in rows and columns."""

    def at_once(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    if x.ndim == 4:
        return at_once(x, kernel)
    pairs = ((0, 0),) * 3 if isinstance(padding, str) else padding
    by_frames = partial(_by_frames, at_once, strides[0], pairs)
    return lax.platform_dependent(x, kernel, cpu=by_frames, default=at_once)


def _by_frames(at_once: Callable, stride: int, padding: Sequence[tuple[int, int]], x: jax.Array, kernel: jax.Array
               ) -> jax.Array:
    """Few pixels at once; pairs of frames where none is padding; else one 2-D convolution for each tap in time, over
    the frames that it sees: none of those that are padding."""
    frames, taps, (front, back) = x.shape[1], kernel.shape[0], padding[0]
    outputs = (frames + front + back - taps) // stride + 1
    seen = []  # (tap, its first output, the one after its last)
    for tap in range(taps):
        first = max(0, -((tap - front) // stride))
        last = min(outputs, (frames - 1 + front - tap) // stride + 1)
        if first < last:
            seen.append((tap, first, last))
    if len(seen) > 1 and x.shape[0] * outputs * x.shape[2] * x.shape[3] < MANY:
        return at_once(x, kernel)
    if outputs > 0 and (taps, stride, front, back, outputs % 2) == (3, 1, 0, 0, 0):
        return _pairs_of_frames(x, kernel, padding[1:])
    total: Any = 0
    for tap, first, last in seen:
        begin = first * stride + tap - front
        part = x[:, begin:begin + (last - first - 1) * stride + 1:stride]
        out = _in_space(part.reshape(-1, *x.shape[2:]), kernel[tap], padding[1:])
        out = out.reshape(x.shape[0], last - first, *out.shape[1:])
        total = total + jnp.pad(out, ((0, 0), (first, outputs - last), (0, 0), (0, 0), (0, 0)))
    return total.astype(x.dtype)


def _pairs_of_frames(x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Three taps in time over frames a, b, c, d give the next two of a - c, b + c, c - b and b - d, each convolved
    once: F(2, 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1."""
    frames, dtype = x.shape[1] - 2, _sums(x)
    first, middle, last = kernel.astype(dtype)
    a, b, c, d = (x[:, start:start + frames - 1:2].reshape(-1, *x.shape[2:]).astype(dtype) for start in range(4))
    outer, inner = (first + last) / 2, middle / 2
    alone = _in_space(a - c, first, padding)
    plus = _in_space(b + c, outer + inner, padding)
    minus = _in_space(c - b, outer - inner, padding)
    other = _in_space(b - d, last, padding)
    out = jnp.stack([alone + plus + minus, plus - minus - other], axis=1)
    return out.reshape(x.shape[0], frames, *out.shape[2:]).astype(x.dtype)


def doubled(x_NHWC: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Padding, **options: Any
            ) -> jax.Array:
    """The 3x3 convolution, with one pixel of padding, of x with each row and column repeated."""

    def repeated(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    few = x_NHWC.shape[0] * x_NHWC.shape[1] * x_NHWC.shape[2] < MANY
    return lax.platform_dependent(x_NHWC, kernel, cpu=repeated if few else _four_convolutions, default=repeated)


def _four_convolutions(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`doubled` with 4 products a pixel in place of 9. Two of three neighbours of a repeated pixel are the same one, so
    that their taps add up: an even row sees the row before and its own, an odd one its own and the one after."""
    number, height, width, _ = x.shape
    top, middle, bottom = kernel.astype(_sums(x))
    rows = []
    for row, of_row in enumerate(((top, middle + bottom), (top + middle, bottom))):
        left, centre, right = jnp.moveaxis(jnp.stack(of_row), 1, 0)
        columns = []
        for column, of_column in enumerate(((left, centre + right), (left + centre, right))):
            taps = jnp.stack(of_column, axis=1)
            columns.append(_in_space(x, taps, ((1 - row, row), (1 - column, column))))
        rows.append(jnp.stack(columns, axis=3))
    out = jnp.stack(rows, axis=2)  # (N, H, 2, W, 2, C)
    return out.reshape(number, 2 * height, 2 * width, -1).astype(x.dtype)


def _sums(x: jax.Array) -> jnp.dtype:
    """The dtype in which products are summed."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _in_space(x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    dtype = _sums(x)
    return lax.conv_general_dilated(x.astype(dtype), kernel.astype(dtype), (1, 1), padding, dimension_numbers=ROWS)
