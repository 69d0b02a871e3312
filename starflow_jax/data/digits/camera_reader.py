"""Reads a camera's path back from its frames (cameras.py), and the digit as the first frame would show it whole.

Which scan a clip shows is unknown, so a clip is matched with itself: its torus, a tile that begins as the first frame,
and the camera of each frame are fitted in turns, by least squares over all pixels of all frames, with the very model
that the frames of real clips are made by. What is found is where the camera is relative to the digit; the digit's own
speed, which is the same in all of these clips, is added. Clips whose digit changes in the middle can't be read.
"""

from typing import NamedTuple

import numpy as np
from etils import epy

from starflow_jax.data.digits import cameras
from starflow_jax.data.digits.cameras import Path
from starflow_jax.data.digits.captions import DIRECTIONS

with epy.lazy_imports():  # a second
    from scipy import ndimage

_COARSE = 1.5  # pixels: residuals are smoothed as much where a frame's camera isn't known to a pixel yet
_STEPS = (6, 4)  # of Gauss and Newton for each frame of the first pass: smoothed, and as it is
_STEPS_AGAIN = 2  # in the second pass
_TILE_STEPS = 8
_DAMPING = 1e-3  # of the mean curvature: where there is no ink, nothing moves
_MAX_LOG_SCALE, _MAX_ROLL = np.log(2.0), np.deg2rad(60.0)  # far beyond what any path has
_MAX_MOVE = np.array([0.12, 0.12, 0.25, 0.4], np.float32)  # the same, from frame to frame
_MAX_STEP = np.array([0.06, 0.06, 0.1, 0.1], np.float32)  # sides, sides, log of the scale, radians: in one step


class Read(NamedTuple):
    """What `read_cameras` finds in clips."""

    path: Path  # float32 (B, T), relative to the first frame
    tiles_BSSC: np.ndarray  # uint8: the torus as the first frame shows it, of all frames together


def read_cameras(frames_BTHWC: np.ndarray, directions_B: np.ndarray) -> Read:
    """The cameras of clips, uint8 (B, T, S, S, 3), whose digits move in these directions (indices of DIRECTIONS)."""
    ink_BTSS = frames_BTHWC.max(-1).astype(np.float32) / 255
    tiles_BSS, found_BT4 = _follow(ink_BTSS)
    # Once more, with what all frames show: where the first one is noisy or cuts the digit, the others know it better.
    tiles_BSS = _fitted_tiles(tiles_BSS, ink_BTSS, found_BT4)
    for frame in range(1, ink_BTSS.shape[1]):
        for _ in range(_STEPS_AGAIN):
            step_B4 = _step(tiles_BSS, ink_BTSS[:, frame], found_BT4[:, frame])
            found_BT4[:, frame] = _bounded(found_BT4[:, frame] + step_B4, found_BT4[:, frame - 1])
    colours_BTSSC = frames_BTHWC / np.float32(255)
    tiles_BSSC = np.stack([_fitted_tiles(colours_BTSSC[:, 0, ..., channel], colours_BTSSC[..., channel], found_BT4)
                           for channel in range(3)], axis=-1)
    x_BT, y_BT, log_scale_BT, roll_BT = np.moveaxis(found_BT4, 2, 0)
    speed_B2 = cameras.SPEED[0] * np.array(list(DIRECTIONS.values()))[directions_B]
    down_BT, right_BT = np.moveaxis(np.arange(ink_BTSS.shape[1])[:, None] * speed_B2[:, None], 2, 0)
    path = Path(x_BT + right_BT, y_BT + down_BT, log_scale_BT, roll_BT)
    return Read(path, (255 * tiles_BSSC.clip(0, 1) + 0.5).astype(np.uint8))


def camera_figures(read: Path, asked: Path) -> dict[str, float]:
    """How well a path was followed, over all frames but the first of all clips: the correlations of its places in x and
    y, the mean relative error of the scale and the mean error of the roll, in degrees."""
    read, asked = (path.part(np.s_[:, 1:]) for path in (read, asked))

    def correlation(left_BT: np.ndarray, right_BT: np.ndarray) -> float:
        return float(np.corrcoef(left_BT.ravel(), right_BT.ravel())[0, 1])

    return {"correlation_x": correlation(read.x_BT, asked.x_BT), "correlation_y": correlation(read.y_BT, asked.y_BT),
            "scale_error": float(np.abs(np.expm1(read.log_scale_BT - asked.log_scale_BT)).mean()),
            "roll_error_degrees": float(np.rad2deg(np.abs(read.roll_BT - asked.roll_BT)).mean())}


def _follow(ink_BTSS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tiles, cameras (B, T, 4) as x, y, log scale, roll): from frame to frame, each beginning where the last two lead.
    """
    tiles_BSS = ink_BTSS[:, 0].copy()
    found_BT4 = np.zeros((*ink_BTSS.shape[:2], 4), np.float32)
    for frame in range(1, ink_BTSS.shape[1]):
        before_B4 = found_BT4[:, frame - 1]
        guess_B4 = 2 * before_B4 - found_BT4[:, frame - 2] if frame > 1 else before_B4.copy()
        for coarse, steps in zip((_COARSE, 0.0), _STEPS):
            for _ in range(steps):
                guess_B4 = _bounded(guess_B4 + _step(tiles_BSS, ink_BTSS[:, frame], guess_B4, coarse), before_B4)
        found_BT4[:, frame] = guess_B4
    return tiles_BSS, found_BT4


def _bounded(found_B4: np.ndarray, before_B4: np.ndarray) -> np.ndarray:
    """Cameras within what a path can have, after those of the frame before: on frames that show no digit, or another
    one, the steps lead anywhere."""
    most_4 = np.array([np.inf, np.inf, _MAX_LOG_SCALE, _MAX_ROLL], np.float32)
    return np.clip(np.clip(found_B4, before_B4 - _MAX_MOVE, before_B4 + _MAX_MOVE), -most_4, most_4)


def _step(tiles_BSS: np.ndarray, ink_BSS: np.ndarray, found_B4: np.ndarray, coarse: float = 0.0) -> np.ndarray:
    """The step of Gauss and Newton (B, 4) that brings cameras nearer to a frame each."""
    side, path = ink_BSS.shape[-1], Path(*found_B4.T)
    rows, columns = cameras.plane_points(path, np.zeros((1, 2)), side)
    values, slope_down, slope_right = cameras.sample(cameras.smoothed(tiles_BSS, path.log_scale_BT), rows, columns)
    # From the point that the middle of the frame shows.
    down = rows - rows.mean((1, 2), keepdims=True)
    right = columns - columns.mean((1, 2), keepdims=True)
    images = np.stack([side * slope_right, side * slope_down, -slope_down * down - slope_right * right,
                       slope_down * right - slope_right * down, ink_BSS - values], axis=1)
    if coarse:
        for axis in (2, 3):
            images = ndimage.gaussian_filter1d(images, coarse, axis, mode="constant")
    jacobian_B4P, residual_BP = images[:, :4].reshape(len(images), 4, -1), images[:, 4].reshape(len(images), -1)
    normal_B44 = jacobian_B4P @ jacobian_B4P.swapaxes(1, 2)
    diagonal_B4 = np.diagonal(normal_B44, axis1=1, axis2=2)
    normal_B44 = normal_B44 + (_DAMPING * diagonal_B4 + 1e-3)[:, None] * np.eye(4, dtype=np.float32)
    step_B4 = np.linalg.solve(normal_B44, jacobian_B4P @ residual_BP[:, :, None])[..., 0]
    return np.clip(step_B4, -_MAX_STEP, _MAX_STEP)


def _fitted_tiles(tiles_BSS: np.ndarray, ink_BTSS: np.ndarray, found_BT4: np.ndarray) -> np.ndarray:
    """Tiles nearer to those from which all frames are seen: a few steps of simultaneous reconstruction."""
    (clips, frames, side, _), path = ink_BTSS.shape, Path(*found_BT4.reshape(-1, 4).T)
    rows, columns = cameras.plane_points(path, np.zeros((1, 2)), side)
    first_of_clip = np.repeat(np.arange(clips) * side**2, frames)[:, None, None]
    taps = [(first_of_clip + index, weight) for index, weight in cameras.taps(rows, columns, side)]

    def spread(values: np.ndarray | float) -> np.ndarray:
        """Values of frames' pixels summed up where on the tiles they are seen."""
        sums = [np.bincount(index.ravel(), (weight * values).ravel(), tiles_BSS.size) for index, weight in taps]
        return np.sum(sums, axis=0).reshape(tiles_BSS.shape)

    seen = np.maximum(spread(1.0), 1e-3)
    for _ in range(_TILE_STEPS):
        of_frames = cameras.smoothed(tiles_BSS.repeat(frames, axis=0), path.log_scale_BT)
        values = cameras.sample(of_frames, rows, columns)[0]
        tiles_BSS = tiles_BSS + (spread(ink_BTSS.reshape(values.shape) - values) / seen).astype(np.float32)
    return tiles_BSS

