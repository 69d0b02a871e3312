"""Decoding made fast for one trained model: a first guess is fitted, and block sizes are measured."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Sample, UserError
from starflow_jax.data.pipeline import evaluation_batches
from starflow_jax.flow import first_guess
from starflow_jax.generation import deep_frames, fixed_prompts, prepare, shallow_tokens
from starflow_jax.metrics import ProgressBar, table
from starflow_jax.model_store import BOX, load_model
from starflow_jax.optimizer import Params
from starflow_jax.system import Calibrated, System, data_source, decoding_variables, save_decoding

FITTED_CLIPS = 4_096
PROMPTS = 8
ERROR = 1e-3  # allowed squared distance to sequential decoding, as a share of the squared norm


def calibrate(config: Config, workdir: Path) -> None:
    """Fit the first guess, measure block sizes and keep the fastest; written beside the model."""
    system, params, source = load_model(config, workdir)
    print(f"model: {source}")
    folder = workdir / "system" if (workdir / "system").exists() else BOX
    system = dataclasses.replace(system, guess=fit_guess(system, params))
    rows = measure(system, params)
    good = [row for row in rows if row[4] <= ERROR]
    if not good:
        raise UserError(f"no block size came within {ERROR} of sequential decoding; lower sample.tolerance")
    best = min(good, key=lambda row: row[3])
    system = dataclasses.replace(system, calibrated=Calibrated(block_size=best[0], frames_per_step=best[1]))
    save_decoding(system, folder)
    print(table(rows, ("block", "frames a step", "passes", "seconds", "error")))
    print(f"chosen: blocks of {best[0]}, {best[1]} frames a step; written to {folder}")


def fit_guess(system: System, params: Params) -> first_guess.FirstGuess:
    """First frames of training clips, as the deep block sees them, from their captions."""
    features, tokens, texts, frames = jax.jit(system.features), jax.jit(shallow_tokens, static_argnums=0), [], []
    batches = evaluation_batches(data_source(system.config, "train"), batch_size=64, limit=FITTED_CLIPS,
                                 pixel_frames=1, encode_text=system.text_ids,
                                 format_caption=lambda caption, _, **told: system.prompt(caption, **told))
    with ProgressBar("first guess", FITTED_CLIPS // 64, unit="batch") as progress:
        for index, batch in enumerate(batches):
            latents = system.encode(jnp.asarray(batch["frames_BTHWC"]))
            if latents.shape[2:4] != (system.config.model.height, system.config.model.width):
                continue  # prepared data has other sizes, too
            noise = jax.random.normal(jax.random.key(index), latents.shape)
            noisy = latents + system.config.model.noise_std * noise
            frames.append(np.asarray(tokens(system, params, noisy))[:, 0])
            texts.append(np.asarray(features(params, jnp.asarray(batch["text_ids_BS"]))))
            progress.update()
    if not frames:
        raise UserError(f"calibration needs training clips of the size that is sampled, {system.config.model.height}x"
                        f"{system.config.model.width} latents; the prepared data holds none")
    return first_guess.fit(np.concatenate(texts), np.concatenate(frames))


def candidates(system: System) -> list[tuple[int, int]]:
    """(block size, frames per step): parts of a frame, a frame, several frames."""
    tokens, window = system.config.model.tokens_per_frame, system.config.model.frames
    parts = [(size, 1) for size in sorted({max(1, tokens // n) for n in (6, 3, 2)})]
    return parts + [(tokens * frames, frames) for frames in sorted({1, max(1, window // 2), window})]


def measure(system: System, params: Params) -> list[tuple[int, int, float, float, float]]:
    """(block size, frames per step, passes, seconds, error) of each candidate on a few validation prompts."""
    captions, _ = fixed_prompts(system, "validation", PROMPTS)
    settings = dataclasses.replace(system.config.sample, frames=0, stream=False)
    exact, _, _ = decode_deep(system, params, captions, dataclasses.replace(settings, solver="sequential"))
    rows = []
    for block, frames in candidates(system):
        tried = dataclasses.replace(settings, block_size=block, frames_per_step=frames)
        decode_deep(system, params, captions, tried)  # compiles
        u, passes, seconds = decode_deep(system, params, captions, tried)
        rows.append((block, frames, passes, seconds, relative_error(u, exact)))
    return rows


def decode_deep(
    system: System, params: Params, captions: list[str], settings: Sample
) -> tuple[np.ndarray, float, float]:
    """(u, deep-block passes per video, seconds) of the deep block alone."""
    given = prepare(system, params, captions, range(len(captions)), settings)
    variables = jax.block_until_ready(decoding_variables(system.config, params))
    began = time.perf_counter()
    made, reports = zip(*deep_frames(system, variables, given, settings))
    u = np.asarray(jnp.concatenate(made, axis=1))
    seconds = time.perf_counter() - began
    return u, float(sum(np.asarray(r.steps).sum(axis=0).mean() for r in reports)), seconds


def relative_error(u: np.ndarray, exact: np.ndarray) -> float:
    """Mean over videos of ||u - exact||^2 / ||exact||^2."""
    axes = tuple(range(1, u.ndim))
    return float((((u - exact) ** 2).sum(axes) / (exact**2).sum(axes)).mean())
