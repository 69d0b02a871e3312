"""The built-in data set: handwritten digits in colour, moving in straight lines over a black canvas.

Every clip shows one scan of `assets/digits.png` in one of seven colours, moving in one of eight
directions, with a short and a long caption. Train, validation and test use different scans. The clips
are written once, as a TFDS data set in ArrayRecord files, and read back by index:

    source = moving_digits.source(MovingDigitsConfig(), "train", data_dir)
    source[7]["frames"]  # uint8 (T, H, W, 3)
"""

import contextlib
import dataclasses
import fcntl
import functools
import io
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from PIL import Image

from starflow_jax.config import Data, UserError
from starflow_jax.data.digits.captions import COLOURS, DIRECTIONS, caption

SPLITS = ("train", "validation", "test")
# The split by scan never varies, also when `MovingDigitsConfig.seed` does: a model trained anywhere
# has not seen the test digits.
_SPLIT_SEED = 20240229
_SCANS_PER_DIGIT = {"train": slice(0, 400), "validation": slice(400, 430), "test": slice(430, 500)}
_DIGITS_PNG = pathlib.Path(__file__).parent / "assets" / "digits.png"
# TFDS gathers a split in memory, compressed to some 3 kB a clip, and above 1 GB asks for TensorFlow.
_MAX_CLIPS = 200_000
_RENDER_CHUNK = 500  # clips rendered at once: bounds the memory to some ten megabytes


@dataclasses.dataclass(frozen=True)
class MovingDigitsConfig:
    """What the clips look like and how many there are; raises UserError for values that can't be.

    size: height and width of the canvas in pixels. digit_size: of the digit's box in pixels.
    frames: recorded frames per clip. seed: of everything drawn at random but the split of the scans.
    """

    size: int = Data.size
    digit_size: int = Data.digit_size
    frames: int = 17
    train_clips: int = Data.train_clips
    validation_clips: int = Data.validation_clips
    test_clips: int = Data.test_clips
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
        return f"{self.size}px_digit{self.digit_size}_{self.frames}frames_{counts}_seed{self.seed}"


@functools.cache
def _all_scans() -> np.ndarray:
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


def random_starts_and_travels(
    rng: np.random.Generator, directions_B: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws where clips start and how far they go, so that every position stays in [0, room].

    room: canvas size less digit size, in pixels. A moving axis travels 0.78 to 1 times the room.
    Returns start and travel, each float32 (B, 2) as (down, right) in pixels.
    """
    distance_B1 = room * rng.uniform(0.78, 1.0, (len(directions_B), 1))
    travel_B2 = distance_B1 * np.array(list(DIRECTIONS.values()))[directions_B]
    low_B2, high_B2 = np.maximum(0, -travel_B2), room - np.maximum(0, travel_B2)
    start_B2 = rng.uniform(low_B2, high_B2)
    return start_B2.astype(np.float32), travel_B2.astype(np.float32)


def render_clips(
    scans_BDD: np.ndarray,
    colours_B: np.ndarray,
    start_B2: np.ndarray,
    travel_B2: np.ndarray,
    *,
    frames: int,
    size: int,
) -> np.ndarray:
    """Moves scans over a black canvas at constant velocity; positions are exact to the subpixel.

    scans_BDD: uint8. colours_B: indices into COLOUR_NAMES. start_B2, travel_B2: the position (down,
    right) of the scan's corner in the first frame, and the way from the first to the last, in pixels.
    Returns uint8 (B, T, H, W, 3).
    """
    lit_C3 = np.array(list(COLOURS.values())) > 0
    clips = np.empty((len(scans_BDD), frames, size, size, 3), np.uint8)
    for begin in range(0, len(scans_BDD), _RENDER_CHUNK):
        chunk = slice(begin, begin + _RENDER_CHUNK)
        time_T1 = np.linspace(0, 1, frames, dtype=np.float32)[:, None]
        position_BT2 = start_B2[chunk, None] + time_T1 * travel_B2[chunk, None]
        rows_BTHD = _bilinear_weights(position_BT2[..., 0], scans_BDD.shape[1], size)
        columns_BTWD = _bilinear_weights(position_BT2[..., 1], scans_BDD.shape[2], size)
        grey_BTHW = rows_BTHD @ scans_BDD[chunk, None].astype(np.float32) @ columns_BTWD.swapaxes(2, 3)
        grey_BTHW = (grey_BTHW + 0.5).astype(np.uint8)
        for channel in range(3):
            lit_B111 = lit_C3[colours_B[chunk], channel, None, None, None]
            np.multiply(grey_BTHW, lit_B111, out=clips[chunk, ..., channel])
    return clips


def _bilinear_weights(position_BT: np.ndarray, scan_size: int, canvas_size: int) -> np.ndarray:
    """(B, T, canvas, scan): how much of the scan's line i lands on the canvas's line h."""
    offset_HD = np.arange(canvas_size, dtype=np.float32)[:, None] - np.arange(scan_size, dtype=np.float32)
    distance_BTHD = np.abs(offset_HD - position_BT[:, :, None, None])
    return np.maximum(0, 1 - distance_BTHD)


def generate_clips(config: MovingDigitsConfig, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split, in order, the same for the same config; keys as in MovingDigits."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split)])
    all_ids = split_scan_ids(split)
    all_scans = load_scans(all_ids, config.digit_size)
    for begin in range(0, config.clips(split), _RENDER_CHUNK):
        count = min(_RENDER_CHUNK, config.clips(split) - begin)
        which_B = rng.integers(len(all_ids), size=count)
        colours_B = rng.integers(len(COLOURS), size=count)
        directions_B = rng.integers(len(DIRECTIONS), size=count)
        start_B2, travel_B2 = random_starts_and_travels(rng, directions_B, config.size - config.digit_size)
        frames_BTHWC = render_clips(
            all_scans[which_B], colours_B, start_B2, travel_B2, frames=config.frames, size=config.size
        )
        scan_ids_B = all_ids[which_B]
        for frames, scan, colour, direction in zip(frames_BTHWC, scan_ids_B, colours_B, directions_B):
            label = (int(scan) // 500, int(colour), int(direction))
            yield {
                "frames": frames,
                "caption_long": caption(*label, rng, long=True),
                "caption_short": caption(*label, rng, long=False),
                "digit": label[0],
                "colour": label[1],
                "direction": label[2],
                "scan": int(scan),
            }


@dataclasses.dataclass(eq=False)
class _BuilderConfig(tfds.core.BuilderConfig):
    settings: MovingDigitsConfig = MovingDigitsConfig()


class MovingDigits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the data set; `prepare` and `source` are the doors to it."""

    VERSION = tfds.core.Version("1.0.0")
    # TFDS's own way to find this file needs importlib_resources, which it forgets to require.
    code_path = pathlib.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        settings = self.builder_config.settings
        clip_shape = (settings.frames, settings.size, settings.size, 3)
        features = {
            "frames": tfds.features.Tensor(shape=clip_shape, dtype=np.uint8, encoding="zlib"),
            "caption_long": tfds.features.Text(),
            "caption_short": tfds.features.Text(),
            "digit": np.int64,
            "colour": np.int64,
            "direction": np.int64,
            "scan": np.int64,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits in colour, moving in straight lines over a black canvas.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the examples are drawn at random already
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        settings = self.builder_config.settings
        examples = generate_clips(settings, split)
        progress = tqdm.tqdm(examples, f"making {split} clips", settings.clips(split), unit=" clips")
        yield from enumerate(progress)


def prepare(config: MovingDigitsConfig, data_dir: str) -> None:
    """Makes the data set below `data_dir` unless it is there already.

    It is made in a folder "incomplete.*" that is renamed when done, under a lock: a process that was
    killed leaves nothing that would be taken for data, and of several processes one does the work.
    """
    try:
        with _quiet_tfds():
            builder = _builder(config, data_dir)
            if builder.data_path.exists():
                return
            versions_dir = pathlib.Path(builder.data_path).parent
            versions_dir.mkdir(parents=True, exist_ok=True)
            with _locked(versions_dir / "lock"):
                for leftover in versions_dir.glob("incomplete.*"):
                    shutil.rmtree(leftover)
                _builder(config, data_dir).download_and_prepare(
                    download_config=tfds.download.DownloadConfig(try_download_gcs=False)
                )
    except OSError as error:
        raise UserError(f"cannot make the data set in {data_dir}: {error}; choose another folder") from error


def source(config: MovingDigitsConfig, split: str, data_dir: str) -> Sequence[dict[str, Any]]:
    """Random access to a split's examples, made on first use: `len(s)`, `s[i]` -> dict.

    frames: uint8 (T, H, W, 3). caption_long, caption_short: UTF-8 bytes. digit, colour, direction,
    scan: int64; colour and direction index COLOUR_NAMES and DIRECTION_NAMES.
    """
    if split not in SPLITS:
        raise UserError(f'there is no split "{split}" in the moving digits: use one of {", ".join(SPLITS)}')
    prepare(config, data_dir)
    with _quiet_tfds():
        return _builder(config, data_dir).as_data_source(split=split)


def _builder(config: MovingDigitsConfig, data_dir: str) -> MovingDigits:
    builder_config = _BuilderConfig(name=config.name, settings=config)
    return MovingDigits(config=builder_config, data_dir=data_dir, file_format="array_record")


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds an advisory lock that the kernel frees when the process dies."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Only errors, and only our progress bar: TFDS announces every step on stdout and in the log."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)
