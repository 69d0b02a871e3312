"""Do videos hold on, far beyond the training length? (--mode=evaluate --config.evaluate.task=horizon)

Prompts with fixed seeds are sampled frame by frame and measured stretch by stretch, beside the real clips whose
captions they are. Where prompts name a digit, a colour and a direction, they are sampled once more with prompts that
change.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Config, Sample, UserError
from starflow_jax.data.digits import reader
from starflow_jax.data.digits.captions import ATTRIBUTES, COLOUR_NAMES, DIRECTION_NAMES, caption
from starflow_jax.data.examples import decoded
from starflow_jax.evaluation.frechet import frechet_distance
from starflow_jax.evaluation.networks import I3D
from starflow_jax.evaluation.quality import if_installed
from starflow_jax.evaluation.stretches import Measures, Stretches, in_stretches
from starflow_jax.io.pictures import Diagram
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.codec import frame_size
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import long_clips
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled
from starflow_jax.sampling.conditions import Conditions, Text, caption_text, make_conditions, noised
from starflow_jax.sampling.finite import finite_frames, names_of
from starflow_jax.sampling.generate import deep_frames
from starflow_jax.sampling.likelihood import frame_nll
from starflow_jax.sampling.shallow import joined
from starflow_jax.sampling.stream import Finisher
from starflow_jax.sharding import fetch

STRETCHES_A_CHANGE = 2  # training lengths from one change of the prompt to the next
CHANGING = ("direction", "colour")  # what changes, in turn
SHOWN, SHOWN_STRETCHES, SHOWN_FRAMES = 5, 7, 3  # videos, stretches of each and frames of each stretch on the sheet
LEAST_FRAMES = 9  # that I3D takes
PANELS = {
    "read as asked": ATTRIBUTES, "Frechet video distance to real clips": ("frechet_distance",),
    "brightness: mean pixel": ("mean_pixel",), "variance of the pixels": ("pixel_variance",),
    "temporal flickering": ("flickering",), "likelihood: bits per dimension": ("bits_per_dim",)}

RealClips = tuple[Sequence[str], np.ndarray, np.ndarray | None]  # captions, uint8 frames (B, T, H, W, 3), labels (B, 3)
Changes = Mapping[int, Sequence[str]]  # captions of each video, by the latent frame from which on they hold


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """What is asked of videos: their captions, those that come later, and labels where these can be read."""

    captions: Sequence[str]
    changes: Changes = dataclasses.field(default_factory=dict)
    labels_NB3: np.ndarray | None = None  # digit, colour and direction of each stretch

    def batch(self, begin: int, size: int) -> "Prompts":
        """`size` of them from one on; the last is repeated where there are fewer."""
        part = slice(begin, begin + size)
        return Prompts(filled(self.captions[part], size),
                       {at: filled(captions[part], size) for at, captions in self.changes.items()},
                       None if self.labels_NB3 is None else self.labels_NB3[:, part])

    def labels_of(self, stretch: int) -> np.ndarray | None:
        """(B, 3) of a stretch."""
        return None if self.labels_NB3 is None else self.labels_NB3[stretch]


class Shown:
    """A few frames of a few stretches of the first videos: of the first, the last, and evenly spread between them."""

    def __init__(self, stretches: int) -> None:
        places = np.linspace(0, stretches - 1, min(SHOWN_STRETCHES, stretches)).round().astype(int)
        self._parts: dict[int, list[np.ndarray]] = {int(place): [] for place in places}

    def add(self, stretch: int, frames_BTHWC: np.ndarray) -> None:
        if stretch in self._parts:
            times = np.linspace(0, frames_BTHWC.shape[1] - 1, SHOWN_FRAMES).round().astype(int)
            there = sum(map(len, self._parts[stretch]))
            self._parts[stretch].append(frames_BTHWC[:SHOWN - there, times])

    @property
    def stretches(self) -> list[int]:
        """Which they are."""
        return list(self._parts)

    @property
    def frames(self) -> np.ndarray:
        """(stretches, videos, SHOWN_FRAMES, H, W, 3) uint8."""
        return np.stack([np.concatenate(parts) for parts in self._parts.values()])


def stretches_in(config: Config) -> int:
    """Whole training lengths in evaluate.latent_frames. Raises UserError for fewer than two."""
    asked, length = config.evaluate.latent_frames, config.model.frames
    if asked < 2 * length:
        raise UserError(f"evaluate.latent_frames={asked}: must be two training lengths or more, {2 * length} latent "
                        "frames")
    return asked // length


def plain_prompts(captions: Sequence[str], labels_B3: np.ndarray | None, stretches: int) -> Prompts:
    """Captions that never change."""
    labels = None if labels_B3 is None else np.broadcast_to(labels_B3, (stretches, *labels_B3.shape))
    return Prompts(captions, labels_NB3=labels)


def changing_prompts(captions: Sequence[str], labels_B3: np.ndarray, stretches: int, length: int) -> Prompts:
    """Captions of which every STRETCHES_A_CHANGE stretches of `length` latent frames the direction or the colour
    changes, in turn; the digit stays."""
    labels_NB3 = np.repeat(labels_B3[None], stretches, axis=0)
    changes: dict[int, list[str]] = {}
    for index, stretch in enumerate(range(STRETCHES_A_CHANGE, stretches, STRETCHES_A_CHANGE)):
        name = CHANGING[index % len(CHANGING)]
        attribute, choices = ATTRIBUTES.index(name), len(DIRECTION_NAMES if name == "direction" else COLOUR_NAMES)
        random = np.random.default_rng([STRETCHES_A_CHANGE, index])
        labels_NB3[stretch:, :, attribute] += random.integers(1, choices, len(captions))
        labels_NB3[stretch:, :, attribute] %= choices
        changes[stretch * length] = [caption(digit, colour, direction, random, long=True)
                                     for digit, colour, direction in labels_NB3[stretch].tolist()]
    return Prompts(captions, changes, labels_NB3)


def measure_samples(
    system: System, params: Params, prompts: Prompts, stretches: int, measures: Measures, name: str
) -> tuple[Stretches, Shown]:
    """The figures of a video per prompt, seeds 0, 1, 2, ..., and a few of their frames. Of a batch's frames no more
    than a stretch is held."""
    config, length = system.config, system.config.model.frames
    size, stride, count = config.sample.batch_size, config.codec.time_stride, len(prompts.captions)
    settings = dataclasses.replace(config.sample, frames=1 + (stretches * length - 1) * stride)
    found, shown = Stretches(measures), Shown(stretches)
    with ProgressBar(name, count * stretches * length, unit="latent frame", compiles=True) as progress:
        for begin in range(0, count, size):
            batch, kept = prompts.batch(begin, size), min(size, count - begin)
            given = make_conditions(system, params, batch.captions, range(begin, begin + size), settings,
                                    changes=batch.changes)
            noisy: list[jax.Array] = []
            names = names_of(prompts.captions[begin:begin + kept], range(begin, begin + kept))
            frames = _frames(system, params, given, settings, noisy, names)
            for stretch, frames_BTHWC in enumerate(in_stretches(frames, system.pixel_frames, length * stride)):
                found.add(stretch, frames_BTHWC[:kept], batch.labels_of(stretch))
                shown.add(stretch, frames_BTHWC[:kept])
                progress.update(kept * length)
            found.add_bits(bits_of(system, params, joined(*noisy), given.text)[:kept], length)
    return found, shown


def _frames(system: System, params: Params, given: Conditions, settings: Sample, noisy: list[jax.Array],
            names: Sequence[str]) -> Iterator[np.ndarray]:
    """The pixels of each latent frame as it is made; its latents with their noise are put into `noisy`. names: as for
    `finite_frames`."""
    finish = Finisher(system, params, given, settings)
    for u_BGSK, _ in deep_frames(system, params, given, settings):
        noisy.append(finish.latents(u_BGSK)[0])
        for part in finish.pixels(noisy[-1], given):
            yield finite_frames(part, names)


def measure_real(
    system: System, params: Params, clips: Iterator[RealClips], stretches: int, measures: Measures
) -> tuple[Stretches, list[str]]:
    """The same figures of real clips, of as many stretches as they have; and the clips' captions."""
    length, stride, found = system.config.model.frames, system.config.codec.time_stride, Stretches(measures)
    size, described = system.config.sample.batch_size, list[str]()
    for begin, (captions, frames_BTHWC, labels_B3) in zip(itertools.count(step=size), clips):
        described += captions
        parts = list(itertools.islice(in_stretches([frames_BTHWC], system.pixel_frames, length * stride), stretches))
        for stretch, frames in enumerate(parts):
            found.add(stretch, frames, labels_B3)
        whole = np.stack(filled(list(np.concatenate(parts, axis=1)), size))
        noisy = noised(system, whole, range(begin, begin + size))
        text = caption_text(system, params, filled(captions, size), noisy.shape[1])
        found.add_bits(bits_of(system, params, noisy, text)[:len(captions)], length)
    return found, described


def bits_of(system: System, params: Params, noisy_BNhwC: jax.Array, text: Text) -> np.ndarray:
    """(B, N) bits per dimension of each noised latent frame, given those before it in its window."""
    nll_BN = fetch(frame_nll(system, params, noisy_BNhwC, text))
    return nll_BN / np.prod(noisy_BNhwC.shape[2:]) / np.log(2)


def real_clips(system: System, count: int, frames: int) -> Iterator[RealClips]:
    """Test clips of the model's size, of `frames` pixel frames where the data has such, sample.batch_size at a time."""
    clips, size = long_clips(system.config, "test", count, frames), system.config.sample.batch_size
    while examples := list(itertools.islice(clips, size)):
        examples = [example for example in examples if example["frames"].shape[1:3] == frame_size(system.config)]
        if examples:
            captions = [decoded(example["caption_long"]) for example in examples]
            labels = [[example[name] for name in ATTRIBUTES] for example in examples if ATTRIBUTES[0] in example]
            together = min(len(example["frames"]) for example in examples)
            yield (captions, np.stack([example["frames"][:together] for example in examples]),
                   np.array(labels) if labels else None)


def change_figures(found: Stretches, every: int) -> dict[str, Any]:
    """How videos follow `changing_prompts`: shares of those in whose first training length after a change what changed
    is read as asked, and of the stretches up to the next change in which the digit, which stays, is."""
    changes: list[dict[str, Any]] = []
    for index, stretch in enumerate(range(STRETCHES_A_CHANGE, len(found), STRETCHES_A_CHANGE)):
        until = min(stretch + STRETCHES_A_CHANGE, len(found))
        changes.append({"stretch": stretch, "changed": CHANGING[index % len(CHANGING)],
                        "read": float(found.of(stretch, CHANGING[index % len(CHANGING)]).mean()),
                        "digit_kept": float(np.mean([found.of(at, "digit") for at in range(stretch, until)]))})
    if not changes:
        return {}
    read = {name: [change["read"] for change in changes if change["changed"] == name] for name in CHANGING}
    return {"every_latent_frames": every,
            **{f"{name}_read": float(np.mean(shares)) for name, shares in read.items() if shares},
            "read": float(np.mean([change["read"] for change in changes])),
            "digit_kept": float(np.mean([change["digit_kept"] for change in changes])),
            "changes": changes, "stretches": found.means()}


def add_frechet(rows: list[dict[str, float]], found: Stretches, real: Stretches) -> None:
    """Into each row the Frechet video distance of that stretch to the first stretch of real clips."""
    for stretch, row in enumerate(rows):
        sets = real.of(0, "features"), found.of(stretch, "features")
        if min(map(len, sets)) > 1:
            row["frechet_distance"] = frechet_distance(*sets)


def measure(system: System, params: Params, captions: Sequence[str], labels_B3: np.ndarray | None
            ) -> tuple[dict[str, Any], Shown]:
    """(what horizon.json holds, the frames of the sheet). captions: what is sampled where there are fewer real clips;
    else those clips' own, so that both show the same. labels: of moving digits; None: nothing is read of the clips.
    Raises UserError where videos of evaluate.latent_frames can't be made one after the other."""
    config, stretches = system.config, stretches_in(system.config)
    length, shortest = config.model.frames, min(system.pixel_frames, config.evaluate.frames)
    missing: list[str] = []
    i3d = if_installed(I3D, missing) if labels_B3 is None and shortest >= LEAST_FRAMES else None
    measures = Measures(labels_B3 is not None, i3d, shortest)
    real_frames = 1 + (stretches * length - 1) * config.codec.time_stride
    real, described = measure_real(system, params, real_clips(system, len(captions), real_frames), stretches, measures)
    if len(described) == len(captions):
        captions, labels_B3 = described, None if labels_B3 is None else reader.labels_of(described)
    made, shown = measure_samples(system, params, plain_prompts(captions, labels_B3, stretches), stretches, measures,
                                  "samples")
    rows = made.means()
    if i3d is not None and len(real):
        add_frechet(rows, made, real)
    results: dict[str, Any] = {
        "videos": len(captions), "captions": list(captions), "latent_frames": stretches * length,
        "latent_frames_of_a_stretch": length,
        "stretches": rows, "standard_errors": made.standard_errors(),
        "real_stretches": real.means(), "real_standard_errors": real.standard_errors(), "missing": missing}
    if labels_B3 is not None:
        prompts = changing_prompts(captions, labels_B3, stretches, length)
        turning, _ = measure_samples(system, params, prompts, stretches, measures, "changing prompts")
        results["change"] = change_figures(turning, STRETCHES_A_CHANGE * length)
    return results, shown


def diagrams(results: dict[str, Any]) -> list[Diagram]:
    """What horizon.png shows of horizon.json, each against the number of the training length."""
    rows, real, change = results["stretches"], results["real_stretches"], results.get("change", {})
    found = []
    for title, names in PANELS.items():
        shown = [name for name in names if name in rows[0]]
        if shown:
            found.append(Diagram(title, {name.replace("_", " "): [row[name] for row in rows] for name in shown},
                                 {name: [row[name] for row in real if name in row] for name in shown}))
    if change:
        places = [one["stretch"] for one in change["changes"]]
        found.append(Diagram("after a change of the prompt", {
            "read as asked": [one["read"] for one in change["changes"]],
            "digit kept": [one["digit_kept"] for one in change["changes"]]}, {}, places))
    return found
