"""Does a model follow the camera? (--mode=evaluate --config.evaluate.task=camera)

Test prompts are sampled along random smooth paths, which no caption tells, and the paths are read back from the
frames, for videos of several lengths; and along paths that turn in the middle. The reader's own error is that on real
clips, whose poses are exact. Of real clips the model also says whether the right camera makes them likelier than
another clip's.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Sample
from starflow_jax.data.digits import camera_reader, cameras, reader
from starflow_jax.evaluation.measures import share_interval
from starflow_jax.flow.control import LatentCameras, cameras_of_latents
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import data_source
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled, in_batches
from starflow_jax.sampling.conditions import VideoText, noised_by_seeds
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.likelihood import frame_nll
from starflow_jax.sharding import fetch

LENGTHS = (1, 4)  # of videos, in training lengths
DRAWS = 500  # of clips anew, for an interval
PATHS_SEED = 0xCA3E7A  # of the paths that prompts are sampled along
SHOWN = ("pan_left", "tilt_down", "zoom_in", "roll_left")  # the moves of the picture
DIRECTION = 2  # of a label


def measure(system: System, params: Params, captions: list[str], labels_B3: np.ndarray) -> dict[str, Any]:
    """All figures, those of the training length at the top. params: with a control module."""
    with ProgressBar("camera", len(LENGTHS) + 3, unit="set", compiles=True) as progress:
        of_lengths = {}
        for length in LENGTHS:
            of_lengths[length] = _followed(system, params, captions, labels_B3, length)
            progress.update()
        turning = _followed(system, params, captions, labels_B3, 1, cameras.turning_path)
        progress.update()
        backbone = _backbone_alone(system, params, captions, labels_B3)
        progress.update()
        real, preferred_B = _real_clips(system, params, len(captions))
        progress.update()
    preferred, half = share_interval(float(preferred_B.mean()), len(preferred_B))
    return {**of_lengths[1], "right_camera_preferred": preferred,
            "intervals": {**of_lengths[1]["intervals"], "right_camera_preferred": half},
            "training_lengths": {str(length): figures for length, figures in of_lengths.items()},
            "turning_in_the_middle": turning, "real_clips": real, "backbone_alone": backbone}


def shown_moves(system: System, params: Params, caption: str) -> np.ndarray:
    """Videos of one caption and seed along SHOWN, (moves, T, H, W, 3) uint8."""
    settings = dataclasses.replace(system.config.sample, frames=0)
    return np.concatenate([generate_clips(
        system, params, [caption], [0], dataclasses.replace(settings, camera=move)).checked([caption], [0]).frames_BTHWC
        for move in SHOWN])


def _followed(system: System, params: Params, captions: list[str], labels_B3: np.ndarray, length: int,
              draw_path: Callable[..., cameras.Path] = cameras.random_path) -> dict[str, Any]:
    frames = _frames(system, length)
    asked = draw_path(np.random.default_rng([PATHS_SEED, length]), len(captions), frames)
    return _figures(_sampled(system, params, captions, asked, length), asked, labels_B3)


def _figures(frames_BTHWC: np.ndarray, asked: cameras.Path, labels_B3: np.ndarray) -> dict[str, Any]:
    """What is read from clips against what was asked for."""
    read = camera_reader.read_cameras(frames_BTHWC, labels_B3[:, DIRECTION])
    digits_B, colours_B, _ = reader.default_reader().read(read.tiles_BSSC[:, None])

    def of_clips(which: Any) -> dict[str, float]:
        return {**camera_reader.camera_figures(read.path.part(which), asked.part(which)),
                "digit": float((digits_B == labels_B3[:, 0])[which].mean()),
                "colour": float((colours_B == labels_B3[:, 1])[which].mean())}

    return _with_intervals(of_clips, len(frames_BTHWC))


def _with_intervals(of_clips: Callable[[Any], dict[str, float]], clips: int) -> dict[str, Any]:
    """The figures of all clips; "intervals": half of the 95 % ones over clips, by drawing as many clips from them again
    and again."""
    rng = np.random.default_rng(0)
    drawn = [of_clips(rng.integers(clips, size=clips)) for _ in range(DRAWS)]
    figures = of_clips(np.arange(clips))
    low_high = {name: np.percentile([one[name] for one in drawn], (2.5, 97.5)) for name in figures}
    return {**figures, "intervals": {name: float(high - low) / 2 for name, (low, high) in low_high.items()}}


def _backbone_alone(system: System, params: Params, captions: list[str], labels_B3: np.ndarray) -> dict[str, Any]:
    """Without a camera: what is asked for, and how steady scale and roll are, which should not change at all. With a
    camera they can hardly be steadier."""
    frames_BTHWC = _sampled(system, params, captions, None, 1)
    digits_B, colours_B, _ = reader.default_reader().read(frames_BTHWC)
    read = camera_reader.read_cameras(frames_BTHWC, labels_B3[:, DIRECTION]).path
    still = read._replace(log_scale_BT=np.zeros_like(read.roll_BT), roll_BT=np.zeros_like(read.roll_BT))

    def of_clips(which: Any) -> dict[str, float]:
        steady = camera_reader.camera_figures(read.part(which), still.part(which))
        return {"digit": float((digits_B == labels_B3[:, 0])[which].mean()),
                "colour": float((colours_B == labels_B3[:, 1])[which].mean()),
                **{name: steady[name] for name in ("scale_error", "roll_error_degrees")}}

    return _with_intervals(of_clips, len(captions))


def _frames(system: System, length: int) -> int:
    """Pixel frames of so many training lengths."""
    return 1 + (length * system.config.model.frames - 1) * system.config.codec.time_stride


def _sampled(system: System, params: Params, captions: list[str], path: cameras.Path | None, length: int) -> np.ndarray:
    """A video per caption with seeds 0, 1, ..., (B, T, H, W, 3) uint8, along these paths or without a camera."""
    settings: Sample = dataclasses.replace(system.config.sample, frames=_frames(system, length), camera="")
    size, made = settings.batch_size, []
    for begin, batch in zip(itertools.count(step=size), in_batches(captions, size)):
        seen = None if path is None else _latent_cameras(
            system, cameras.Path(*(_filled(part[begin:begin + len(batch)], size) for part in path)))
        seeds = range(begin, begin + size)
        clips = generate_clips(system, params, filled(batch, size), seeds, settings, cameras=seen).checked(batch, seeds)
        made.append(clips.frames_BTHWC[:len(batch)])
    return np.concatenate(made)


def _latent_cameras(system: System, path: cameras.Path) -> LatentCameras:
    intrinsics = np.broadcast_to(cameras.INTRINSICS, (*path.roll_BT.shape, 4))
    return cameras_of_latents(intrinsics, path.world_to_camera(), system.config.codec.time_stride)


def _real_clips(system: System, params: Params, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """(the reader's own error, whether the right camera is preferred (B,)), on test clips."""
    source, frames = data_source(system.config, "test"), _frames(system, 1)
    records = [source[index] for index in range(min(count, len(source)))]
    frames_BTHWC = np.stack([record["frames"][:frames] for record in records])
    path = cameras.Path.of(np.stack([record["world_to_camera"][:frames] for record in records]))
    labels_B3 = np.array([[record[name] for name in ("digit", "colour", "direction")] for record in records])
    captions = [record["caption_long"].decode() for record in records]
    return (_figures(frames_BTHWC, path, labels_B3),
            _preferred(system, params, captions, frames_BTHWC, _latent_cameras(system, path)))


def _preferred(system: System, params: Params, captions: list[str], frames_BTHWC: np.ndarray, seen: LatentCameras
               ) -> np.ndarray:
    """(B,) whether a clip is likelier with its own camera than with the next clip's."""
    wrong = jax.tree.map(lambda part: np.roll(part, -1, axis=0), seen)
    size, better = system.config.evaluate.batch_size, []
    for begin in range(0, len(captions), size):
        kept = min(size, len(captions) - begin)
        one = slice(begin, begin + kept)
        latents = system.encode(_filled(frames_BTHWC[one], size))
        noisy = noised_by_seeds(system, latents, range(begin, begin + size))
        features = system.caption_features(params, filled(captions[one], size))
        right_B, wrong_B = (_nll(system, params, noisy, features, jax.tree.map(np.asarray, of_clips), one)
                            for of_clips in (seen, wrong))
        better.append((right_B < wrong_B)[:kept])
    return np.concatenate(better)


def _nll(system: System, params: Params, noisy: jax.Array, features: jax.Array, seen: LatentCameras, part: slice
         ) -> np.ndarray:
    """(B,) -log p of noised latents seen by a part of these cameras, in nats."""
    batch = jax.tree.map(lambda of_clips: _filled(of_clips[part], len(noisy)), seen)
    return fetch(frame_nll(system, params, noisy, VideoText(features, {0: features}, batch))).sum(axis=1)


def _filled(array_B: np.ndarray, size: int) -> np.ndarray:
    """The array with its last entry repeated up to a batch's size."""
    return np.concatenate([array_B, np.repeat(array_B[-1:], size - len(array_B), axis=0)])
