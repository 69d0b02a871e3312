"""Videos that go on from the first frame of test clips, under the clips' captions."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation.measures import psnr, share_interval
from starflow_jax.evaluation.split import SHOWN, read
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.codec import frame_size
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import data_source
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled
from starflow_jax.sampling.generate import generate_clips

MOST_DECIBELS = 100.0  # of a frame that comes back as it was


class Clip(NamedTuple):
    """A real clip of the model's length and size."""

    caption: str
    frames_THWC: np.ndarray  # uint8
    labels_3: tuple[int, ...]  # of moving digits; () of others


class Shown(NamedTuple):
    """The first SHOWN videos, (B, 1 + T, H, W, 3) uint8: each behind the picture that it was given."""

    captions: list[str]
    frames_BTHWC: np.ndarray


def moving_clips(system: System, count: int) -> Iterator[Clip]:
    """The first test clips of the model's length and size."""
    source, shape = data_source(system.config, "test"), (system.pixel_frames, *frame_size(system.config))
    cut = (Clip(example["caption_long"].decode(), example["frames"][:shape[0]],
                tuple(int(example[name]) for name in ATTRIBUTES if name in example))
           for example in (source[index] for index in range(len(source))))
    return itertools.islice((clip for clip in cut if clip.frames_THWC.shape[:3] == shape), count)


def measure(system: System, params: Params, count: int) -> tuple[dict[str, Any], Shown]:
    """(figures of so many videos at most, the first of them). Of the frames after the given one: what `read` finds in
    those of samples and in the clips' own; of the first, the PSNR to what was given, the mean over videos.

    One batch after another, of which only the figures and the shown frames are kept. Raises UserError for a model of
    single pictures, where no test clip is of the model's length and size, and for a video that is not finite.
    """
    if system.pixel_frames == 1:
        raise UserError("evaluate.task=ti2v: this model makes single pictures; take one of videos")
    config, clips = system.config, moving_clips(system, count)
    size = config.sample.batch_size
    figures: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    sizes, decibels, captions, shown = list[int](), list[float](), list[str](), list[np.ndarray]()
    there = min(count, len(data_source(config, "test")))
    with ProgressBar("samples", there, unit="clip", compiles=True) as progress:
        while batch := list(itertools.islice(clips, size)):
            asked, begin = [clip.caption for clip in batch], sum(sizes)
            real_BTHWC = np.stack([clip.frames_THWC for clip in batch])
            made_BTHWC = _made(system, params, asked, begin, real_BTHWC[:, :1])
            labels_B3 = np.array([clip.labels_3 for clip in batch]) if batch[0].labels_3 else None
            figures["samples"].append(read(labels_B3, made_BTHWC[:, 1:]))
            figures["real_clips"].append(read(labels_B3, real_BTHWC[:, 1:]))
            decibels += [min(psnr(*pair), MOST_DECIBELS) for pair in zip(real_BTHWC[:, 0], made_BTHWC[:, 0])]
            sizes.append(len(batch))
            captions += asked[:max(0, SHOWN - begin)]
            shown.append(np.concatenate([real_BTHWC[:, :1], made_BTHWC], axis=1)[:max(0, SHOWN - begin)])
            progress.update(len(batch))
    if not sizes:
        raise UserError(f"evaluate.task=ti2v: no test clip has {system.pixel_frames} frames of the model's size, "
                        f"{frame_size(config)}")
    found: dict[str, Any] = {kind: _means(of_batches, sizes) for kind, of_batches in figures.items()}
    found["half_of_95_percent_interval"] = {
        name: share_interval(share, sum(sizes))[1] for name, share in found["samples"].items() if name in ATTRIBUTES}
    return {"clips": sum(sizes), **found, "psnr_of_the_first_frame": float(np.mean(decibels)),
            "worst_psnr": min(decibels)}, Shown(captions, np.concatenate(shown))


def _made(system: System, params: Params, captions: list[str], seed: int, given_B1HWC: np.ndarray) -> np.ndarray:
    """A video per caption and given first frame, of `seed` and the seeds after it, (B, T, H, W, 3) uint8."""
    settings = dataclasses.replace(system.config.sample, frames=0)
    size, seeds = settings.batch_size, range(seed, seed + settings.batch_size)
    clips = generate_clips(system, params, filled(captions, size), seeds, settings,
                           np.stack(filled(list(given_B1HWC), size)))
    return clips.checked(captions, seeds).frames_BTHWC[:len(captions)]


def _means(of_batches: list[dict[str, float]], sizes: list[int]) -> dict[str, float]:
    """Over clips, of each batch's means."""
    return {name: float(np.average([figures[name] for figures in of_batches], weights=sizes))
            for name in of_batches[0]}
