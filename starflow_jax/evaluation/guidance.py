"""Guidance against adherence and diversity: the same prompts and seeds at several weights."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from starflow_jax.data.digits import reader
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation.measures import interval
from starflow_jax.io.charts import Chart, series
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled, in_batches
from starflow_jax.sampling.generate import generate_clips

SEEDS = 3  # videos of each prompt; what is said of a weight is a mean over them, with its interval


def sampled(system: System, params: Params, captions: list[str], guidance: float, seed: int) -> np.ndarray:
    """One video per caption, (B, T, H, W, 3) uint8, seeds from `seed` on."""
    settings = dataclasses.replace(system.config.sample, guidance=guidance, frames=0)
    size, frames = settings.batch_size, []
    for begin, batch in zip(itertools.count(step=size), in_batches(captions, size)):
        first = seed + begin
        seeds = range(first, first + size)
        clips = generate_clips(system, params, filled(batch, size), seeds, settings).checked(batch, seeds)
        frames.append(clips.frames_BTHWC[:len(batch)])
    return np.concatenate(frames)


def diversity(first_BTHWC: np.ndarray, second_BTHWC: np.ndarray) -> float:
    """Mean over clips of the root mean square difference of two videos of one prompt, in shades of 255."""
    squares = (first_BTHWC.astype(np.float32) - second_BTHWC) ** 2
    return float(np.sqrt(squares.mean(axis=(1, 2, 3, 4))).mean())


def measure(system: System, params: Params, captions: list[str], labels_B3: np.ndarray | None,
            weights: tuple[float, ...]) -> list[dict[str, Any]]:
    """A row for each weight: {measure: (mean, half of its 95 % interval)} over SEEDS videos of each prompt. Diversity
    is that of each pair of them, its interval that of the SEEDS pairs. labels: None where nothing can be read."""
    rows = []
    with ProgressBar("guidance", len(weights) * SEEDS, unit="set", compiles=True) as progress:
        for weight in weights:
            sets = []
            for seed in range(SEEDS):
                sets.append(sampled(system, params, captions, weight, seed * len(captions)))
                progress.update()
            found: dict[str, Any] = {"guidance": weight, "brightness": interval([one.mean() for one in sets])}
            if labels_B3 is not None:
                read = [reader.default_reader().adherence(labels_B3, one) for one in sets]
                found |= {name: interval([shares[name] for shares in read]) for name in ATTRIBUTES}
            found["diversity"] = interval([diversity(*pair) for pair in itertools.combinations(sets, 2)])
            rows.append(found)
    return rows


def charts(rows: list[dict[str, Any]], real_brightness: float | None = None) -> list[Chart]:
    """Adherence, diversity and brightness against the weight. real_brightness: real clips', a line to compare with."""
    weights = [row["guidance"] for row in rows]

    def chart(title: str, *names: str, level: float | None = None) -> Chart:
        return Chart(title, weights, {name: series([row[name] for row in rows]) for name in names},
                     "weight of guidance", level=level)

    read = [chart("read as asked", *ATTRIBUTES)] if ATTRIBUTES[0] in rows[0] else []
    return [*read, chart("difference of two videos of one prompt (RMS of 255)", "diversity"),
            chart("mean pixel", "brightness", level=real_brightness)]
