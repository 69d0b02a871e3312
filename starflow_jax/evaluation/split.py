"""Likelihood, adherence and denoising on a data set's test split, against two baselines."""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.data.digits import reader
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation.measures import temporal_flickering
from starflow_jax.evaluation.two_sample import clip_statistics
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import data_source, fixed_captions
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled, in_batches
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.finite import finite_frames, names_of
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.likelihood import bits_per_frame, likelihood_batches, noised_latents
from starflow_jax.sharding import fetch

BASELINE_CLIPS, BASELINE_BYTES = 2_000, 2**31  # training clips that the baselines are fitted to, at most
SHOWN = 12  # clips on the sheet


def denoise_choices(system: System) -> tuple[str, ...]:
    """Every way of denoising that the model has."""
    return ("denoiser", "score", "none", *(["decoder"] if system.decoder is not None else []))


def prompts_to_read(config: Config) -> tuple[list[str], np.ndarray | None]:
    """evaluate.prompts captions of the test split, and what samples of them should be read as, (B, 3); None where
    nothing can be read."""
    captions = fixed_captions(config, "test", config.evaluate.prompts)
    return captions, reader.labels_of(captions) if config.data.source == "digits" else None


def generate_and_read(
    system: System, params: Params, captions: list[str], labels_B3: np.ndarray | None, seed: int = 0
) -> tuple[dict[str, dict[str, float]], np.ndarray, np.ndarray]:
    """One clip per caption, of `seed` and the seeds after it, denoised in every way: {way: what `read` finds in its
    clips}; and of those that are denoised as the config says the first clips' frames (SHOWN, T, H, W, 3) uint8, and all
    clips' `clip_statistics`.

    One batch after another, of which only the figures and those first frames are kept. Raises UserError for a clip that
    is not finite.
    """
    settings = dataclasses.replace(system.config.sample, denoise="none", frames=0, renoise=False)
    size, shown, statistics, choices = settings.batch_size, [], [], denoise_choices(system)
    scores: dict[str, dict[str, float]] = {how: {} for how in choices}
    with ProgressBar("samples", len(captions), unit="clip", compiles=True) as progress:
        for begin, batch in zip(itertools.count(step=size), in_batches(captions, size)):
            first = seed + begin
            seeds = range(first, first + size)
            clips = generate_clips(system, params, filled(batch, size), seeds, settings).checked(batch, seeds)
            for how in choices:
                clean = denoise(system, params, jnp.asarray(clips.noisy_BNhwC), clips.text, how)
                names = [f"{name}, denoise={how}" for name in names_of(batch, seeds)]
                frames = finite_frames(system.decoded(clean, how), names)[:len(batch)]
                of_batch = read(None if labels_B3 is None else labels_B3[begin:begin + size], frames)
                for name, value in of_batch.items():  # each a mean over clips
                    scores[how][name] = scores[how].get(name, 0.0) + value * len(batch) / len(captions)
                if how == system.config.sample.denoise:
                    shown.append(frames[:max(0, SHOWN - begin)])
                    statistics.append(clip_statistics(frames))
            progress.update(len(batch))
    return scores, np.concatenate(shown), np.concatenate(statistics)


def read(labels_B3: np.ndarray | None, frames_BTHWC: np.ndarray) -> dict[str, float]:
    """Adherence to the labels of moving digits, and temporal flickering; of single pictures, only what one frame shows.
    """
    moves = frames_BTHWC.shape[1] > 1
    scores = {} if labels_B3 is None else reader.default_reader().adherence(labels_B3, frames_BTHWC)
    if moves:
        return {**scores, "temporal_flickering": temporal_flickering(frames_BTHWC)}
    return {name: share for name, share in scores.items() if name != "direction"}


def real_clips(system: System, count: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The first test clips: (labels (B, 3) int, None where they are no moving digits; frames (B, T, H, W, 3) uint8)."""
    source = data_source(system.config, "test")
    examples = [source[index] for index in range(min(count, len(source)))]
    labels = np.array([[e[name] for name in ATTRIBUTES] for e in examples]) if ATTRIBUTES[0] in examples[0] else None
    return labels, np.stack([e["frames"][:system.pixel_frames] for e in examples])


def split_likelihood(system: System, params: Params) -> dict[str, Any]:
    """Bits per dimension of the sigma-noised test latents, constants included, and those of two baselines. Raises
    UserError where they are not finite."""
    clips = system.config.evaluate.clips
    bits = bits_per_frame(system, params, likelihood_batches(system, "test", clips))
    if not np.isfinite(bits).all():
        raise UserError(f"the likelihood of {np.sum(~np.isfinite(bits).all(axis=1))} of {len(bits)} test clips is not "
                        "finite; the model's weights are damaged (use another checkpoint), or need model.dtype=float32")
    train = _noisy_latents(system, "train", BASELINE_CLIPS)
    same_size = [latents for latents in _noisy_latents(system, "test", clips) if latents.shape == train[0].shape]
    train = [latents for latents in train if latents.shape == train[0].shape]
    return {
        "bits_per_dim": float(bits.mean()),
        "bits_per_dim_standard_error": float(bits.mean(axis=1).std() / np.sqrt(len(bits))),
        "bits_per_dim_per_frame": [float(value) for value in bits.mean(axis=0)],
        "bits_per_dim_of": f"test latents with noise {system.config.model.noise_std}, given the caption",
        "baselines": baselines(np.stack(train), np.stack(same_size)) if same_size else {},
        "test_clips": len(bits),
    }


def _noisy_latents(system: System, split: str, limit: int) -> list[np.ndarray]:
    """The first clips' noised latents (N, h, w, C), fewer where they are large."""
    model = system.config.model
    clip_bytes = 4 * model.frames * model.height * model.width * model.channels
    batches = likelihood_batches(system, split, min(limit, max(2, BASELINE_BYTES // clip_bytes)))
    return [clip for index, batch in enumerate(batches)
            for clip in fetch(noised_latents(system, batch, index))[fetch(batch.valid_B)]]


def baselines(train_BNhwC: np.ndarray, test_BNhwC: np.ndarray) -> dict[str, float]:
    """Bits per dimension of two simple models of the same noised latents, fitted to training clips.

    gaussian: one Gaussian per dimension. last_frame: those Gaussians for the first frame, then the frame before with
    noise fitted per dimension.
    """
    mean, std = train_BNhwC.mean(axis=0), train_BNhwC.std(axis=0) + 1e-6
    gaussian = _gaussian_bits(test_BNhwC - mean, std)
    change = train_BNhwC[:, 1:] - train_BNhwC[:, :-1]
    spread = np.sqrt((change**2).mean(axis=0)) + 1e-6
    repeated = _gaussian_bits(test_BNhwC[:, 1:] - test_BNhwC[:, :-1], spread)
    last_frame = np.concatenate([gaussian[:, :1], repeated], axis=1)
    return {"gaussian": float(gaussian.mean()), "last_frame": float(last_frame.mean())}


def _gaussian_bits(error: np.ndarray, std: np.ndarray) -> np.ndarray:
    return (0.5 * (error / std) ** 2 + np.log(std) + 0.5 * np.log(2 * np.pi)) / np.log(2)
