"""The built-in data set: handwritten digits in colour, moving over a black canvas.

Every clip shows one scan of `assets/digits.png` in one of seven colours, moving in one of eight
directions, with a short and a long caption. With `wraps` the canvas is a torus: what leaves on one side comes back
on the other, so that "moves right" stays true for ever; half of the clips are then twice as long, and half of these
change in the middle: the digit takes another direction or colour or becomes another digit, and a caption of its own
says so. With `camera` that torus is seen by a camera that moves (cameras.py), whose poses are with each clip. Without
either no digit reaches the border. Train, validation and test use different scans. The clips are written
once, as a TFDS data set in ArrayRecord files, and read back by index:

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
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from PIL import Image

from starflow_jax.config import Data, UserError
from starflow_jax.data.digits import cameras
from starflow_jax.data.digits.captions import COLOURS, DIGIT_WORDS, DIRECTIONS, caption
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import ARRIVING, atomic_path, make_folder
from starflow_jax.io.memory import check_fits, host_bytes

SPLITS = ("train", "validation", "test")
# The split by scan never varies, also when `MovingDigitsConfig.seed` does: a model trained anywhere
# has not seen the test digits.
_SPLIT_SEED = 20240229
_SCANS_PER_DIGIT = {"train": slice(0, 400), "validation": slice(400, 430), "test": slice(430, 500)}
_DIGITS_PNG = pathlib.Path(__file__).parent / "assets" / "digits.png"
# TFDS gathers a split in memory, compressed to some 3 kB a clip, and above 1 GB asks for TensorFlow.
_MAX_CLIPS = 200_000
_RENDER_CHUNK = 500  # clips rendered at once: bounds the memory to some ten megabytes
SPEED = (0.018, 0.0235)  # of a moving axis, in sides of the canvas per frame
_LONG_SHARE, _CHANGED_SHARE = 0.5, 0.5  # of all clips; of the long ones
_CHANGES = {"direction": 0.7, "colour": 0.4, "digit": 0.2}  # how often what has changed where something does


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
    """Anywhere on the torus, at a speed in SPEED, with a camera in cameras.SPEED, along each axis that moves; or within
    the borders for a short clip, over 0.78 to 1 times the room that they leave."""
    if config.is_torus:
        start_B2 = rng.uniform(0, config.size, (len(directions_B), 2))
        speed_B1 = config.size * rng.uniform(*(cameras.SPEED if config.camera else SPEED), (len(directions_B), 1))
        velocity_B2 = _velocities(directions_B, speed_B1)
        return Motion(start_B2.astype(np.float32), velocity_B2)
    room, steps = config.size - config.digit_size, config.frames - 1
    travel_B2 = steps * _velocities(directions_B, room / steps * rng.uniform(0.78, 1.0, (len(directions_B), 1)))
    start_B2 = rng.uniform(np.maximum(0, -travel_B2), room - np.maximum(0, travel_B2))
    return Motion(start_B2.astype(np.float32), travel_B2 / steps)


def _velocities(directions_B: np.ndarray, speed_B1: np.ndarray) -> np.ndarray:
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
    for begin in range(0, len(scans_BDD), _RENDER_CHUNK):
        chunk = slice(begin, begin + _RENDER_CHUNK)
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


def generate_clips(config: MovingDigitsConfig, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split, in order, the same for the same config; keys as `source` gives them."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split)])
    all_ids = split_scan_ids(split)
    all_scans = load_scans(all_ids, config.digit_size)
    for begin in range(0, config.clips(split), _RENDER_CHUNK):
        count = min(_RENDER_CHUNK, config.clips(split) - begin)
        which_B, labels_B3 = _random_labels(rng, all_ids, count)
        motion = random_motion(rng, labels_B3[:, 2], config)
        later_which_B, later_B3, long_B = which_B, labels_B3, np.zeros(count, bool)
        if config.is_torus:
            long_B = rng.random(count) < _LONG_SHARE
            changes_B = long_B & (rng.random(count) < _CHANGED_SHARE)
            later_which_B, later_B3 = _changed(rng, all_ids, which_B, labels_B3, changes_B)
        changed_B = (later_B3 != labels_B3).any(1)
        path = _random_path(config, split, begin, count, 2 * config.frames - 1)
        first = render_clips(all_scans[which_B], labels_B3[:, 1], motion.positions(config.frames), size=config.size,
                             path=path and path.part(np.s_[:, :config.frames]))
        later = _second_halves(all_scans[later_which_B], later_B3, motion, path, config) if config.is_torus else first
        for clip in range(count):
            frames = np.concatenate([first[clip], later[clip]]) if long_B[clip] else first[clip]
            described = _described(labels_B3[clip], rng)
            later_described = _described(later_B3[clip], rng) if changed_B[clip] else described
            yield {"frames": frames, **described, "scan": int(all_ids[which_B[clip]]),
                   "change": config.frames if changed_B[clip] else len(frames),
                   **{f"later_{name}": value for name, value in later_described.items()},
                   **_poses(path and path.part(np.s_[clip, :len(frames)]))}


def _random_path(config: MovingDigitsConfig, split: str, *seed_clips_and_frames: int) -> cameras.Path | None:
    """Of these clips, with a random generator of their own: the digits are those of the same data without a camera."""
    *seed, clips, frames = seed_clips_and_frames
    rng = np.random.default_rng([config.seed, SPLITS.index(split), *seed, frames, 1])
    return cameras.random_path(rng, clips, frames) if config.camera else None


def _poses(path: cameras.Path | None) -> dict[str, np.ndarray]:
    """What an example has of its camera's path, (T,) each."""
    if path is None:
        return {}
    return {"intrinsics": np.tile(cameras.INTRINSICS, (len(path.roll_BT), 1)),
            "world_to_camera": path.world_to_camera()}


def _described(label_3: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    digit, colour, direction = map(int, label_3)
    return {"caption_long": caption(digit, colour, direction, rng, long=True),
            "caption_short": caption(digit, colour, direction, rng, long=False),
            "digit": digit, "colour": colour, "direction": direction}


def _random_labels(rng: np.random.Generator, all_ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of a split's scans clips show, and (digit, colour, direction) of each, (B, 3)."""
    which_B = rng.integers(len(all_ids), size=count)
    colours_B, directions_B = (rng.integers(len(kinds), size=count) for kinds in (COLOURS, DIRECTIONS))
    return which_B, np.stack([all_ids[which_B] // 500, colours_B, directions_B], axis=1)


def _changed(
    rng: np.random.Generator, all_ids: np.ndarray, which_B: np.ndarray, labels_B3: np.ndarray, changes_B: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What clips show in the end, as `_random_labels`: those that change, another direction, colour or digit, one of
    them or several."""
    shares_3 = np.array([_CHANGES[name] for name in ("digit", "colour", "direction")])
    turns_B3 = rng.random((len(which_B), 3)) < shares_3
    turns_B3[~turns_B3.any(1), 2] = True
    turns_B3 &= changes_B[:, None]
    kinds_3 = np.array([len(DIGIT_WORDS), len(COLOURS), len(DIRECTIONS)])
    step_B3 = rng.integers(1, kinds_3, (len(which_B), 3))
    later_B3 = np.where(turns_B3, (labels_B3 + step_B3) % kinds_3, labels_B3)
    per_digit = len(all_ids) // len(DIGIT_WORDS)  # a split has its scans digit by digit, as many of each
    another_B = later_B3[:, 0] * per_digit + rng.integers(per_digit, size=len(which_B))
    return np.where(turns_B3[:, 0], another_B, which_B), later_B3


def _second_halves(
    scans_BDD: np.ndarray, labels_B3: np.ndarray, motion: Motion, path: cameras.Path | None,
    config: MovingDigitsConfig,
) -> np.ndarray:
    """What long clips have after the frames of short ones: place and camera go on, the speed stays."""
    velocity_B2 = _velocities(labels_B3[:, 2], np.abs(motion.velocity_B2).max(1, keepdims=True))
    start_B2 = motion.positions(config.frames)[:, -1] + velocity_B2
    return render_clips(scans_BDD, labels_B3[:, 1], Motion(start_B2, velocity_B2).positions(config.frames - 1),
                        size=config.size, path=path and path.part(np.s_[:, config.frames:]))


def long_clips(config: MovingDigitsConfig, split: str, count: int, frames: int) -> Iterator[dict[str, Any]]:
    """Clips of any length that never change, of a canvas that wraps, made as they are asked for, with the keys of
    `source` but the later ones."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), frames])
    all_ids = split_scan_ids(split)
    for index in range(count):
        which_B, labels_B3 = _random_labels(rng, all_ids, 1)
        position_BT2 = random_motion(rng, labels_B3[:, 2], config).positions(frames)
        scans_BDD = load_scans(all_ids[which_B], config.digit_size)
        path = _random_path(config, split, index, 1, frames)
        clip = render_clips(scans_BDD, labels_B3[:, 1], position_BT2, size=config.size, path=path)[0]
        yield {"frames": clip, **_described(labels_B3[0], rng), "scan": int(all_ids[which_B[0]]),
               **_poses(path and path.part(0))}


@dataclasses.dataclass(eq=False)
class _BuilderConfig(tfds.core.BuilderConfig):
    settings: MovingDigitsConfig = MovingDigitsConfig()


class MovingDigits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of the data set; `prepare` and `source` are the doors to it."""

    VERSION = tfds.core.Version("2.0.0")
    # TFDS's own way to find this file needs importlib_resources, which it forgets to require.
    code_path = pathlib.Path(__file__)

    def _info(self) -> tfds.core.DatasetInfo:
        settings = self.builder_config.settings
        clip_shape = (None, settings.size, settings.size, 3)
        described = {
            "caption_long": tfds.features.Text(),
            "caption_short": tfds.features.Text(),
            "digit": np.int64,
            "colour": np.int64,
            "direction": np.int64,
        }
        features = {
            "frames": tfds.features.Tensor(shape=clip_shape, dtype=np.uint8, encoding="zlib"),
            **described,
            "scan": np.int64,
            "change": np.int64,
            **{f"later_{name}": feature for name, feature in described.items()},
        }
        if settings.camera:
            features["intrinsics"] = tfds.features.Tensor(shape=(None, 4), dtype=np.float32)
            features["world_to_camera"] = tfds.features.Tensor(shape=(None, 3, 4), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits in colour, moving over a black canvas.",
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

    It is made in another folder that is renamed when all of it is on the disk, under a lock: a process that was
    killed leaves nothing that would be taken for data, and of several processes one does the work.
    """
    try:
        with _quiet_tfds():
            builder = _builder(config, data_dir)
            if builder.data_path.exists():
                return
            final = pathlib.Path(builder.data_path)
            make_folder(final.parent)
            with _locked(final.parent / "lock"):
                for leftover in final.parent.glob(f"{ARRIVING}*"):
                    shutil.rmtree(leftover)
                if final.exists():
                    return
                _check_room(config)
                with atomic_path(final) as local:
                    made = _builder(config, str(local.parent / "made"))
                    made.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
                    pathlib.Path(made.data_path).rename(local)
    except OSError as error:
        raise UserError(f"cannot make the data set in {data_dir}: {error}; choose another folder") from error


def _check_room(config: MovingDigitsConfig) -> None:
    """Raises UserError where the clips that are rendered at once, in float32 and in uint8, do not fit into memory."""
    most = min(_RENDER_CHUNK, max(config.clips(split) for split in SPLITS))
    check_fits(f"data.size={config.size}, clips of {config.frames} frames", most * config.frames * config.size**2 * 7,
               host_bytes(), "machine", "make them smaller, shorter (model.frames) or fewer (data.train_clips)")


def source(config: MovingDigitsConfig, split: str, data_dir: str) -> Sequence[dict[str, Any]]:
    """Random access to a split's examples, made on first use: `len(s)`, `s[i]` -> dict.

    frames: uint8 (T, H, W, 3). caption_long, caption_short: UTF-8 bytes. digit, colour, direction,
    scan: int64; colour and direction index COLOUR_NAMES and DIRECTION_NAMES. change: the first frame of which
    later_caption_long, later_digit and so on are true; the number of frames where nothing changes. With a camera also
    intrinsics, float32 (T, 4), and world_to_camera, float32 (T, 3, 4), of each frame (cameras.py).
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
