"""Ways to remove the training noise, side by side: flicker of samples and adherence, PSNR on noised real clips, and
consecutive frames of one sample."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.evaluation.measures import interval, psnr_of
from starflow_jax.evaluation.split import denoise_choices, generate_and_read
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled, in_batches
from starflow_jax.sampling.conditions import noised
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.finite import finite_frames, names_of
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sharding import fetch

SEEDS = 3  # sets of samples, and draws of the noise of real clips; each figure is a mean over them, with its interval

Figures = dict[str, dict[str, tuple[float, float]]]  # of each way: (mean, half of its 95 % interval)


def of_samples(system: System, params: Params, captions: list[str], labels_B3: np.ndarray | None) -> Figures:
    """Temporal flickering and adherence of samples."""
    sets = [generate_and_read(system, params, captions, labels_B3, seed=seed * len(captions))[0]
            for seed in range(SEEDS)]
    return {how: {name: interval([one[how][name] for one in sets]) for name in sets[0][how]} for how in sets[0]}


def of_real_clips(system: System, params: Params, captions: list[str], frames_BTHWC: np.ndarray) -> Figures:
    """PSNR in dB of real clips (uint8) whose latents were noised and that were denoised: to the clips themselves, and
    to what the codec makes of them without noise."""
    size, ways = system.config.sample.batch_size, denoise_choices(system)
    errors: dict[tuple[str, str], list[list[np.ndarray]]] = {}
    with ProgressBar("real clips", SEEDS * len(captions), unit="clip", compiles=True) as progress:
        for seed, (begin, batch) in itertools.product(range(SEEDS), zip(
                itertools.count(step=size), list(in_batches(captions, size)))):
            clips = np.stack(filled(list(frames_BTHWC[begin:begin + size]), size))
            first = seed * len(captions) + begin
            noisy = noised(system, clips, range(first, first + size))
            text = system.caption_features(params, filled(batch, size), is_image=noisy.shape[1] == 1)
            targets = {"psnr_to_the_clip": clips, "psnr_to_the_codecs": fetch(system.decode(system.encode(clips)))}
            for how in ways:
                names = [f"{name}, real, denoise={how}" for name in names_of(batch, range(first, first + size))]
                made = finite_frames(system.decoded(denoise(system, params, noisy, text, how), how), names)
                for name, target in targets.items():
                    squares = (made.astype(np.float64) - target)[:len(batch)] ** 2
                    sets = errors.setdefault((how, name), [[] for _ in range(SEEDS)])
                    sets[seed].append(squares.mean(axis=(1, 2, 3, 4)))
            progress.update(len(batch))
    found: Figures = {how: {} for how in ways}
    for (how, name), sets in errors.items():
        found[how][name] = interval([psnr_of(float(np.concatenate(one).mean())) for one in sets])
    return found


def side_by_side(system: System, params: Params, caption: str, seed: int) -> dict[str, np.ndarray]:
    """{way: one sample's frames (T, H, W, 3) uint8}."""
    settings = dataclasses.replace(system.config.sample, denoise="none", frames=0, renoise=False)
    clips = generate_clips(system, params, [caption], [seed], settings).checked([caption], [seed])
    noisy = jnp.asarray(clips.noisy_BNhwC)
    return {how: finite_frames(system.decoded(denoise(system, params, noisy, clips.text, how), how),
                               [f"{caption!r}, seed {seed}, denoise={how}"])[0] for how in denoise_choices(system)}


def measure(system: System, params: Params, captions: list[str], labels_B3: np.ndarray | None,
            frames_BTHWC: np.ndarray) -> dict[str, dict[str, Any]]:
    """All figures of each way."""
    samples = of_samples(system, params, captions, labels_B3)
    real = of_real_clips(system, params, captions, frames_BTHWC)
    return {how: {**samples[how], **real[how]} for how in samples}
