"""The built-in data set: handwritten digits in colour, moving over a black canvas.

Every clip shows one scan of `assets/digits.png` in one of seven colours, moving in one of eight
directions, with a short and a long caption. The canvas is a torus (`wraps`): a clip begins with the whole digit on it,
and what leaves on one side comes back on the other, so that "moves right" stays true for ever; half of the clips are
twice as long as the others, and half of these change in the middle: the digit takes another direction or colour or
becomes another digit, and a caption of its own says so. With `camera` that torus is seen by a camera that moves
(cameras.py), whose poses are with each clip. Without either no digit reaches the border. Train, validation and test use
different scans. The clips are written once, as a TFDS data set in ArrayRecord files, and read back by index:

    source = moving_digits.source(MovingDigitsConfig(), "train", data_dir)
    source[7]["frames"]  # uint8 (T, H, W, 3)
"""

import contextlib
import dataclasses
import fcntl
import io
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from starflow_jax.config import UserError
from starflow_jax.data.digits import cameras
from starflow_jax.data.digits.captions import COLOURS, DIGIT_WORDS, DIRECTIONS, caption
from starflow_jax.data.digits.scene import (
    RENDERED_AT_ONCE,
    SPLITS,
    Motion,
    MovingDigitsConfig,
    load_scans,
    random_motion,
    render_clips,
    split_scan_ids,
    velocities,
)
from starflow_jax.io.files import ARRIVING, atomic_path, make_folder
from starflow_jax.io.memory import check_fits, host_bytes

_LONG_SHARE, _CHANGED_SHARE = 0.5, 0.5  # of all clips; of the long ones
_CHANGES = {"direction": 0.7, "colour": 0.4, "digit": 0.2}  # how often what has changed where something does


def generate_clips(config: MovingDigitsConfig, split: str) -> Iterator[dict[str, Any]]:
    """The examples of a split, in order, the same for the same config; keys as `source` gives them."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split)])
    all_ids = split_scan_ids(split)
    all_scans = load_scans(all_ids, config.digit_size)
    for begin in range(0, config.clips(split), RENDERED_AT_ONCE):
        count = min(RENDERED_AT_ONCE, config.clips(split) - begin)
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
    velocity_B2 = velocities(labels_B3[:, 2], np.abs(motion.velocity_B2).max(1, keepdims=True))
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

    VERSION = tfds.core.Version("3.0.0")
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
    most = min(RENDERED_AT_ONCE, max(config.clips(split) for split in SPLITS))
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
