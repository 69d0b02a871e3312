"""One scene of the built-in data set: which scan of a handwritten digit, how it moves, and its picture.

Where the canvas is a torus, what leaves on one side comes back on the other; it may be seen by a camera that moves
(cameras.py). Else no digit reaches the border.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from starflow_jax.config import Data, UserError
from starflow_jax.data.digits import cameras
from starflow_jax.data.digits.captions import COLOURS, DIRECTIONS
from starflow_jax.io.checksums import check_file

SPLITS = ("train", "validation", "test")
# The split by scan never varies, also when `MovingDigitsConfig.seed` does: a model trained anywhere
# has not seen the test digits.
_SPLIT_SEED = 20240229
_SCANS_PER_DIGIT = {"train": slice(0, 400), "validation": slice(400, 430), "test": slice(430, 500)}
_DIGITS_PNG = pathlib.Path(__file__).parent / "assets" / "digits.png"
# TFDS gathers a split in memory, compressed to some 3 kB a clip, and above 1 GB asks for TensorFlow.
_MAX_CLIPS = 200_000
RENDERED_AT_ONCE = 500  # clips: bounds the memory to some ten megabytes
SPEED = (0.018, 0.0235)  # of a moving axis, in sides of the canvas per frame


@dataclasses.dataclass(frozen=True)
class MovingDigitsConfig:
    """What the clips look like and how many there are; raises UserError for values that can't be.

    size: height and width of the canvas in pixels. digit_size: of the digit's box in pixels.
    frames: recorded frames of a short clip; long ones have one less than twice as many. wraps: the canvas is a torus.
    camera: a torus too, seen by a moving camera. seed: of everything drawn at random but the split of the scans.
    """

    size: int = Data.size
    digit_size: int = Data.digit_size
    frames: int = 17
    train_clips: int = Data.train_clips
    validation_clips: int = Data.validation_clips
    test_clips: int = Data.test_clips
    wraps: bool = Data.wraps
    camera: bool = Data.camera
    seed: int = 0

    def __post_init__(self) -> None:
        if self.digit_size < 8:
            raise UserError(f"data.digit_size is {self.digit_size}: a digit is unreadable below 8 pixels")
        if self.size < self.digit_size + 4:
            raise UserError(
                f"data.size is {self.size}: a digit of {self.digit_size} pixels needs 4 more to move in; "
                f"set data.size to {self.digit_size + 4} or more"
            )
        if self.frames < 2:
            raise UserError(f"data.frames is {self.frames}: movement needs 2 frames or more")
        for split in SPLITS:
            if self.clips(split) < 1:
                raise UserError(f"data.{split}_clips is {self.clips(split)}: must be 1 or more")
            if self.clips(split) > _MAX_CLIPS:
                raise UserError(f"data.{split}_clips is {self.clips(split)}: must be {_MAX_CLIPS} or less")
        if self.seed < 0:
            raise UserError(f"data.seed is {self.seed}: must be 0 or more")

    def clips(self, split: str) -> int:
        """The number of clips in a split."""
        return int(getattr(self, f"{split}_clips"))

    @property
    def name(self) -> str:
        """Names the folder of the data, so every field is in it."""
        counts = "_".join(str(self.clips(split)) for split in SPLITS)
        world = ("_wraps" if self.wraps else "") + ("_camera" if self.camera else "")
        return f"{self.size}px_digit{self.digit_size}_{self.frames}frames_{counts}{world}_seed{self.seed}"

    @property
    def is_torus(self) -> bool:
        """Whether the canvas has no borders."""
        return self.wraps or self.camera


@functools.cache
def _all_scans() -> np.ndarray:
    check_file(_DIGITS_PNG)
    grid = np.asarray(Image.open(_DIGITS_PNG))  # 50 rows, 100 columns of 20x20 scans
    scans = grid.reshape(50, 20, 100, 20).swapaxes(1, 2).reshape(5000, 20, 20)
    scans.flags.writeable = False
    return scans


def split_scan_ids(split: str) -> np.ndarray:
    """Indices (int64) of the split's scans among the 5,000; scan i shows the digit i // 500."""
    rng = np.random.default_rng(_SPLIT_SEED)
    per_digit = [500 * digit + rng.permutation(500)[_SCANS_PER_DIGIT[split]] for digit in range(10)]
    return np.concatenate(per_digit)


def load_scans(scan_ids: np.ndarray, digit_size: int) -> np.ndarray:
    """The scans, uint8 (N, digit_size, digit_size), resized with antialiasing."""
    resized = [
        np.asarray(Image.fromarray(scan).resize((digit_size, digit_size), Image.Resampling.LANCZOS))
        for scan in _all_scans()[scan_ids]
    ]
    return np.stack(resized)


class Motion(NamedTuple):
    """How clips move: places on a torus whose side is the canvas's."""

    start_B2: np.ndarray  # float32 (down, right) of the digit's box in the first frame, in pixels
    velocity_B2: np.ndarray  # float32, pixels per frame

    def positions(self, frames: int) -> np.ndarray:
        """(B, T, 2) of each frame."""
        return self.start_B2[:, None] + np.arange(frames, dtype=np.float32)[:, None] * self.velocity_B2[:, None]


def random_motion(rng: np.random.Generator, directions_B: np.ndarray, config: MovingDigitsConfig) -> Motion:
    """On a torus: the whole box is on the canvas first, and moves at a speed in SPEED, with a camera in cameras.SPEED,
    along each axis that moves. Else within the borders for a short clip, over 0.78 to 1 times the room that they
    leave."""
    room = config.size - config.digit_size
    if config.is_torus:
        start_B2 = rng.uniform(0, room, (len(directions_B), 2))
        speed_B1 = config.size * rng.uniform(*(cameras.SPEED if config.camera else SPEED), (len(directions_B), 1))
        velocity_B2 = velocities(directions_B, speed_B1)
        return Motion(start_B2.astype(np.float32), velocity_B2)
    steps = config.frames - 1
    travel_B2 = steps * velocities(directions_B, room / steps * rng.uniform(0.78, 1.0, (len(directions_B), 1)))
    start_B2 = rng.uniform(np.maximum(0, -travel_B2), room - np.maximum(0, travel_B2))
    return Motion(start_B2.astype(np.float32), travel_B2 / steps)


def velocities(directions_B: np.ndarray, speed_B1: np.ndarray) -> np.ndarray:
    """(B, 2) float32 (down, right) per frame, in these directions, as fast along each axis that moves."""
    return (speed_B1 * np.array(list(DIRECTIONS.values()))[directions_B]).astype(np.float32)


def render_clips(scans_BDD: np.ndarray, colours_B: np.ndarray, position_BT2: np.ndarray, *, size: int,
                 path: cameras.Path | None = None) -> np.ndarray:
    """Scans on a black canvas without borders; positions are exact to the subpixel.

    scans_BDD: uint8. colours_B: indices into COLOUR_NAMES. position_BT2: (down, right) of the scan's corner in each
    frame, in pixels; any number, taken modulo the canvas. path: of a camera that looks at it; None: it is seen whole
    and upright. Returns uint8 (B, T, H, W, 3).
    """
    lit_C3 = np.array(list(COLOURS.values())) > 0
    clips = np.empty((*position_BT2.shape[:2], size, size, 3), np.uint8)
    for begin in range(0, len(scans_BDD), RENDERED_AT_ONCE):
        chunk = slice(begin, begin + RENDERED_AT_ONCE)
        scans, positions = scans_BDD[chunk].astype(np.float32), position_BT2[chunk]
        if path is None:
            rows_BTHD = _bilinear_weights(positions[..., 0], scans.shape[1], size)
            columns_BTWD = _bilinear_weights(positions[..., 1], scans.shape[2], size)
            grey_BTHW = rows_BTHD @ scans[:, None] @ columns_BTWD.swapaxes(2, 3)
        else:
            empty = size - scans.shape[1]
            tiles_BSS = np.pad(scans, ((0, 0), (0, empty), (0, empty)))
            grey_BTHW = cameras.see(tiles_BSS, positions, path.part(chunk))
        grey_BTHW = (grey_BTHW + 0.5).astype(np.uint8)
        for channel in range(3):
            lit_B111 = lit_C3[colours_B[chunk], channel, None, None, None]
            np.multiply(grey_BTHW, lit_B111, out=clips[chunk, ..., channel])
    return clips


def _bilinear_weights(position_BT: np.ndarray, scan_size: int, canvas_size: int) -> np.ndarray:
    """(B, T, canvas, scan): how much of the scan's line i lands on the canvas's line h, around the torus."""
    offset_HD = np.arange(canvas_size, dtype=np.float32)[:, None] - np.arange(scan_size, dtype=np.float32)
    around_BTHD = np.mod(offset_HD - position_BT[:, :, None, None], canvas_size)
    return np.maximum(0, 1 - np.minimum(around_BTHD, canvas_size - around_BTHD))
