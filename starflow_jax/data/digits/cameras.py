"""The moving digits' world seen by a camera: random smooth paths, and the frames that they give.

The world is the plane z = 1, on which the torus of `data.wraps` lies side by side, like tiles, without end. The unit of
length is a side of the torus. A path begins at the origin and looks along z (x right, y down), at distance 1 from the
plane; with focal length 1 that frame shows one tile, as a clip without a camera does. From there the camera moves in x
and y without bounds, in z so that the digits' scale, 1 / (1 - z), is 0.8 to 1.25, and rolls about z by at most 20
degrees, positive clockwise as seen from behind it. It never tilts: a whole frame has one scale.

`world_to_camera` (3, 4) takes a point of the world to the camera's axes: camera = R · world + t, where R rotates about
z by minus the roll, and t = -R · (x, y, z). Intrinsics fx, fy, cx, cy are 1, 1, 0.5, 0.5, in sides of the frame.
"""

from typing import Any, NamedTuple

import numpy as np
from etils import epy

with epy.lazy_imports():  # a second
    from scipy import interpolate

SPEED = (0.02, 0.02)  # of a digit's moving axis, in sides per frame: one for all, or a steady pan would look the same
SCALE = (0.8, 1.25)
MAX_ROLL = np.deg2rad(20.0)
INTRINSICS = np.array([1.0, 1.0, 0.5, 0.5], np.float32)
_MAX_PAN = 0.04  # sides per frame, along each axis
_KNOT = 8  # frames between the points through which a random path goes
_MOVING, _STEADY = 0.8, 0.3  # how often a path moves in each of x, y, scale and roll; how often x and y do so steadily


class Path(NamedTuple):
    """Where cameras are in each frame; (B, T) each, or (T,) of one path."""

    x_BT: np.ndarray  # sides of the torus, to the right
    y_BT: np.ndarray  # down
    log_scale_BT: np.ndarray  # of the digits
    roll_BT: np.ndarray  # radians, clockwise

    def part(self, index: Any) -> "Path":
        """Of some clips, or some of their frames."""
        return Path(*(values_BT[index] for values_BT in self))

    def world_to_camera(self) -> np.ndarray:
        """float32 (B, T, 3, 4)."""
        cosine, sine = np.cos(self.roll_BT), np.sin(self.roll_BT)
        matrix_BT34 = np.zeros((*self.roll_BT.shape, 3, 4), np.float32)
        matrix_BT34[..., 0, :2] = np.stack([cosine, sine], axis=-1)
        matrix_BT34[..., 1, :2] = np.stack([-sine, cosine], axis=-1)
        matrix_BT34[..., 2, 2] = 1
        matrix_BT34[..., 0, 3] = -cosine * self.x_BT - sine * self.y_BT
        matrix_BT34[..., 1, 3] = sine * self.x_BT - cosine * self.y_BT
        matrix_BT34[..., 2, 3] = np.exp(-self.log_scale_BT) - 1
        return matrix_BT34

    @classmethod
    def of(cls, world_to_camera_BT34: np.ndarray) -> "Path":
        """The path of cameras that look straight at the plane."""
        matrix = world_to_camera_BT34.astype(np.float64)
        cosine, sine = matrix[..., 0, 0], matrix[..., 0, 1]
        right, down, forward = (matrix[..., axis, 3] for axis in range(3))
        return cls(sine * down - cosine * right, -sine * right - cosine * down, -np.log1p(forward),
                   np.arctan2(sine, cosine))


def random_path(rng: np.random.Generator, clips: int, frames: int) -> Path:
    """Smooth paths of any length, through random speeds in x and y, and random scales and rolls, at every eighth frame.
    Some move in some ways only, and some steadily."""
    knots = 3 + frames // _KNOT
    pan_2BK = rng.uniform(-_MAX_PAN, _MAX_PAN, (2, clips, knots))
    steady_2B = rng.random((2, clips)) < _STEADY
    pan_2BK[steady_2B] = pan_2BK[steady_2B][:, :1]
    look_2BK = rng.uniform(-1, 1, (2, clips, knots)) * np.array([np.log(SCALE[1]), MAX_ROLL])[:, None, None]
    look_2BK[:, :, 0] = 0  # where a path begins
    moving_4B1 = rng.random((4, clips, 1)) < _MOVING
    times_K = np.append(0, rng.uniform(_KNOT / 2, _KNOT) + _KNOT * np.arange(knots - 1))
    # Monotonic between two points, so never beyond the bounds.
    smooth = interpolate.PchipInterpolator(times_K, np.concatenate([pan_2BK, look_2BK]), axis=2)(np.arange(frames))
    place_2BT = np.cumsum(np.pad(smooth[:2, :, 1:], ((0, 0), (0, 0), (1, 0))), axis=2)
    return Path(*(np.concatenate([place_2BT, smooth[2:]]) * moving_4B1))


def turning_path(rng: np.random.Generator, clips: int, frames: int) -> Path:
    """Paths of a random steady speed in x and in y, which go back the way they came from the middle on."""
    pan_2B1 = rng.uniform(-_MAX_PAN, _MAX_PAN, (2, clips, 1))
    steps_T = np.arange(frames)
    place_2BT = pan_2B1 * np.minimum(steps_T, frames - 1 - steps_T)
    return Path(*place_2BT, *np.zeros((2, clips, frames)))


def see(tiles_BSS: np.ndarray, position_BT2: np.ndarray, path: Path) -> np.ndarray:
    """What cameras see of the plane: float32 (B, T, S, S).

    tiles_BSS: the torus of each clip. position_BT2: (down, right), in pixels, by which the tile is moved in each frame:
    the digit's own movement. Between pixels a tile is interpolated linearly. Where a frame shows it smaller, it is
    smoothed first, by as much as one of the frame's pixels then covers more of it.
    """
    seen_BTSS = np.empty((*position_BT2.shape[:2], *tiles_BSS.shape[1:]), np.float32)
    for clip, tile_SS in enumerate(tiles_BSS):  # one at a time stays in the processor's cache
        of_clip = path.part(clip)
        rows, columns = plane_points(of_clip, position_BT2[clip], len(tile_SS))
        tiles_TSS = smoothed(np.broadcast_to(tile_SS, (len(rows), *tile_SS.shape)), of_clip.log_scale_BT)
        seen_BTSS[clip] = sample(tiles_TSS, rows, columns)[0]
    return seen_BTSS


def plane_points(path: Path, position_N2: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns), float32 (N, S, S) each: where in a tile, in its pixels, each pixel of a frame looks.

    path: (N,) each. position_N2: by how much the tile is moved, (down, right) in pixels.
    """
    x_N, y_N, log_scale_N, roll_N = (np.asarray(values, np.float32) for values in path)
    from_middle_S = (np.arange(side, dtype=np.float32) + 0.5) - side / 2
    along_NS, across_NS = (factor_N[:, None] * np.exp(-log_scale_N)[:, None] * from_middle_S
                           for factor_N in (np.cos(roll_N), np.sin(roll_N)))
    middle_2N = np.stack([y_N, x_N]) * side - np.asarray(position_N2, np.float32).T + (side - 1) / 2
    down_N, right_N = np.mod(middle_2N, side)[:, :, None, None]
    rows = down_N + along_NS[:, :, None] + across_NS[:, None, :]
    columns = right_N - across_NS[:, :, None] + along_NS[:, None, :]
    return rows, columns


def smoothed(tiles_NSS: np.ndarray, log_scale_N: np.ndarray) -> np.ndarray:
    """float32 tiles as frames of these scales are sampled from.

    The triangle of linear interpolation is as wide as a pixel of the tile; one as wide as a pixel of a smaller picture
    has a larger variance, (1 / scale² - 1) / 6 more, which three taps in each direction add.
    """
    tap_N11 = (np.maximum(0, np.expm1(-2 * log_scale_N)) / 12).astype(np.float32)[:, None, None]
    for axis in (1, 2):
        beside = np.roll(tiles_NSS, 1, axis) + np.roll(tiles_NSS, -1, axis)
        tiles_NSS = tiles_NSS + tap_N11 * (beside - 2 * tiles_NSS)
    return tiles_NSS.astype(np.float32)


def sample(tiles_NSS: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles at places (N, S, S), around the torus: their values, and their slopes down and to the right."""
    side = tiles_NSS.shape[-1]
    flat, first = tiles_NSS.reshape(-1), (np.arange(len(tiles_NSS), dtype=np.int32) * side**2)[:, None, None]
    down, right, indices = _neighbours(rows, columns, side)
    a, b, c, d = (flat[index + first] for index in indices)
    upper, lower = a + right * (b - a), c + right * (d - c)
    return upper + down * (lower - upper), lower - upper, (b - a) * (1 - down) + (d - c) * down


def taps(rows: np.ndarray, columns: np.ndarray, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(index in the tile, weight) of each of the four pixels between which `sample` interpolates."""
    down, right, indices = _neighbours(rows, columns, side)
    return list(zip(indices, ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)))


def _neighbours(rows: np.ndarray, columns: np.ndarray, side: int
                ) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """How far places are below and to the right of a pixel of a tile; that pixel, and those right, below, and both."""
    top, left = np.floor(rows), np.floor(columns)
    row, column = top.astype(np.int32) % side, left.astype(np.int32) % side
    next_row, next_column = (row + 1) % side, (column + 1) % side
    row, next_row = row * side, next_row * side
    return rows - top, columns - left, (row + column, row + next_column, next_row + column, next_row + next_column)
