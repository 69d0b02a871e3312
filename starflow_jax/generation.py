"""From prompts to frames, and from frames to exact likelihoods: what sampling, training and evaluation share."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Sample, UserError
from starflow_jax.data import adherence
from starflow_jax.flow import decode
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.losses import REFERENCE_NOISE, nats
from starflow_jax.optimizer import Params
from starflow_jax.system import System, data_source, flow_variables, pixel_frames


@dataclasses.dataclass(frozen=True)
class Clips:
    """Generated clips and how they came about; B clips, T pixel frames, N latent frames."""

    frames_BTHWC: np.ndarray  # uint8
    noisy_BNhwC: np.ndarray  # the flow's own sample, before denoising
    nats_B: np.ndarray  # -log p of that sample, given the prompt
    deep_steps_BK: np.ndarray  # Jacobi steps of each block of tokens of the deep block
    deep_residual_BK: np.ndarray
    shallow_steps_B: np.ndarray  # summed over the shallow blocks' blocks of tokens; the frames' largest
    converged_B: np.ndarray  # every block of tokens ended below the tolerance, or exact


def latent_frames(config: Config, settings: Sample) -> int:
    """Latent frames of a video of settings.frames pixel frames. Raises UserError for a length that can't be."""
    stride = config.codec.time_stride
    frames = settings.frames or pixel_frames(config)
    if (frames - 1) % stride:
        near = (frames - 1) // stride * stride + 1
        raise UserError(
            f"sample.frames={frames}: has to be 1 + a multiple of {stride}, such as {near} or {near + stride}")
    total = 1 + (frames - 1) // stride
    if total > config.model.frames < 3:
        raise UserError(f"sample.frames={frames}: a window of {config.model.frames} latent frames is too short to move "
                        f"on; up to {pixel_frames(config)} frames are possible")
    return total


def noise_for(seeds: Sequence[int], shape_NSK: tuple[int, int, int]) -> jax.Array:
    """(B, N, S, K): each clip's noise comes of its own seed, frame by frame, so that a seed gives the same
    video alone, in a batch, and at any length."""

    def of_clip(seed: jax.Array) -> jax.Array:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(shape_NSK[0]))
        return jax.vmap(lambda key: jax.random.normal(key, shape_NSK[1:]))(keys)

    return jax.vmap(of_clip)(jnp.asarray(seeds, jnp.uint32))


def generate_clips(
    system: System,
    params: Params,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
) -> Clips:
    """One clip per caption and seed. known: uint8 first frames (one: TI2V, more: extension), kept as given.

    Raises UserError for a length that the codec or the window does not allow.
    """
    model, total = system.config.model, latent_frames(system.config, settings)
    flow, variables = system.flow, flow_variables(params)
    grid = flow.grid((1, 1, model.height, model.width, model.channels))[1:]
    prompts = [system.prompt(caption, is_image=total == 1) for caption in captions]
    features = jax.jit(system.features)
    text = features(params, jnp.asarray(system.text_ids(prompts)))
    texts = text[None]
    if settings.guidance:
        null = features(params, jnp.asarray(system.text_ids([system.prompt("", is_image=total == 1)])))
        texts = jnp.stack([text, jnp.broadcast_to(null, text.shape)])
    noise = noise_for(seeds, (total, model.tokens_per_frame, model.token_channels))
    known, known_latents = None, None
    if known_BTHWC is not None:
        known_latents = _noised(system, known_BTHWC, seeds)
        known = apply_flow(flow, variables, STARFlow.shallow_forward, known_latents)[0][-1]
        noise = noise[:, known.shape[1]:]
    solver = deep_solver(settings)
    made, reports = [], []
    for frame, report in decode.generate(
            flow, variables, noise, texts, guidance=settings.guidance, solver=solver, token_grid=grid,
            known_BTSK=known, window=model.frames, context=context_frames(system, settings)):
        made.append(frame)
        reports.append(report)
    u = jnp.stack(made, axis=1)
    noisy, shallow = decode.invert_shallow(flow, variables, u, solver=shallow_solver(settings), token_grid=grid)
    if known_latents is not None:
        noisy = jnp.concatenate([known_latents, noisy], axis=1)
    clean = denoise(system, params, noisy, text, settings.denoise)
    frames = jax.jit(system.decode)(clean)
    return _collect(frames, noisy, frame_nats(system, params, noisy, text), reports, shallow, len(captions))


def fixed_prompts(system: System, split: str, count: int) -> tuple[list[str], np.ndarray]:
    """The first long captions of a split and what they ask for: (captions, labels (B, 3))."""
    source = data_source(system.config, split)
    captions = [source[index]["caption_long"].decode() for index in range(min(count, len(source)))]
    return captions, adherence.labels_of(captions)


def adherence_of_samples(system: System, params: Params, split: str, count: int) -> dict[str, float]:
    """Shares of clips, generated from a split's first captions with seeds 0, 1, ..., that do as asked."""
    captions, labels_B3 = fixed_prompts(system, split, count)
    settings = dataclasses.replace(system.config.sample, frames=0)
    frames = []
    for begin in range(0, len(captions), settings.batch_size):
        batch = captions[begin:begin + settings.batch_size]
        filled = batch + [batch[-1]] * (settings.batch_size - len(batch))  # one shape, one compilation
        clips = generate_clips(system, params, filled, range(begin, begin + len(filled)), settings)
        frames.append(clips.frames_BTHWC[:len(batch)])
    return adherence.default_reader().adherence(labels_B3, np.concatenate(frames))


def deep_solver(settings: Sample) -> decode.Solver:
    if settings.solver == "sequential":
        return decode.SEQUENTIAL
    return decode.Solver(settings.block_size, settings.tolerance, settings.max_steps)


def shallow_solver(settings: Sample) -> decode.Solver:
    """Shallow blocks are cheap and feed one another: whole frames at once, to a tenth of the tolerance."""
    if settings.solver == "sequential":
        return decode.SEQUENTIAL
    return decode.Solver(block_size=1 << 30, tolerance=settings.tolerance / 10)


def context_frames(system: System, settings: Sample) -> int:
    """Latent frames that are encoded again when the window moves on."""
    window = system.config.model.frames
    context = settings.context_frames or max(1, window * 3 // 4)
    if context >= window > 1:
        raise UserError(f"sample.context_frames={context}: has to be less than the window of {window} latent frames")
    return context


def _noised(system: System, frames_BTHWC: np.ndarray, seeds: Sequence[int]) -> jax.Array:
    """Given frames as the flow knows them: encoded, with the training noise added."""
    latents = system.encode(jnp.asarray(frames_BTHWC))
    shape = latents.shape[1:]
    noise = noise_for([seed ^ 0x5EED for seed in seeds], (shape[0], shape[1] * shape[2], shape[3]))
    return latents + system.config.model.noise_std * noise.reshape(latents.shape)


def _collect(frames, noisy, nats_BN, reports, shallow, batch: int) -> Clips:
    steps = np.concatenate([np.asarray(r.steps) for r in reports]).T
    residual = np.concatenate([np.asarray(r.residual) for r in reports]).T
    converged = np.all(np.concatenate([np.asarray(r.converged) for r in reports]), axis=0)
    per_frame = [np.asarray(r.steps).sum(axis=0).reshape(batch, -1).max(axis=1) for r in shallow]
    for report in shallow:
        converged &= np.all(np.asarray(report.converged), axis=0).reshape(batch, -1).all(axis=1)
    return Clips(np.asarray(frames), np.asarray(noisy), np.asarray(nats_BN).sum(axis=1), steps, residual,
                 np.sum(per_frame, axis=0), converged)


def windows(total: int, size: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first frame of which it is the source) of the windows that cover `total` frames."""
    yield 0, min(size, total), 0
    done = min(size, total)
    while done < total:
        start = done - context
        stop = min(start + size, total)
        yield start, stop, done
        done = stop


def denoise(system: System, params: Params, noisy: jax.Array, text: jax.Array, how: str) -> jax.Array:
    """Latents without the training noise: by the denoiser, by the flow's own score, or as they are."""
    if how == "none" or (how == "denoiser" and system.config.model.denoiser == "none"):
        return noisy
    step = jax.jit(_denoiser_step if how == "denoiser" else _score_step, static_argnums=0)
    return _windowed(system, noisy, lambda window: step(system, params, window, text))


def _denoiser_step(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """x~ - 0.3 s(x~)."""
    score = apply_flow(system.flow, flow_variables(params), STARFlow.score, noisy, text)
    return noisy - REFERENCE_NOISE * score


def _score_step(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """x~ + sigma^2 d log p / dx~, Tweedie's formula with the gradient taken through the flow."""

    def total_nats(x: jax.Array) -> jax.Array:
        return jnp.sum(_nats_of_window(system, params, x, text))

    return noisy - system.config.model.noise_std**2 * jax.grad(total_nats)(noisy)


def frame_nats(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """(B, N) exact -log p(x~_n | earlier frames of its window, text) in nats, constants included."""
    run = jax.jit(_nats_of_window, static_argnums=0)
    return _windowed(system, noisy, lambda window: run(system, params, window, text), lookahead=0)


def _nats_of_window(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    return nats(apply_flow(system.flow, flow_variables(params), STARFlow.forward, noisy, text))


def _windowed(
    system: System, noisy: jax.Array, run: Callable[[jax.Array], jax.Array], lookahead: int | None = None
) -> jax.Array:
    """`run` over a clip of any length, in windows of the training length with noisy frames as context."""
    model = system.config.model
    ahead = model.denoiser_lookahead if lookahead is None else lookahead
    total, size = noisy.shape[1], model.frames
    if total <= size:
        return run(noisy)
    context = max(1, min(model.denoiser_window, size * 3 // 4) - ahead)
    parts: list[Any] = []
    # A window's last `ahead` frames lack their look-ahead, so the next window makes them again.
    for start, stop, first in windows(total, size, context + ahead):
        parts.append(run(noisy[:, start:stop])[:, max(first - ahead, 0) - start:])
        if stop < total and ahead:
            parts[-1] = parts[-1][:, :-ahead]
    return jnp.concatenate(parts, axis=1)


def noised_latents(system: System, batch: dict[str, Any], seed: int) -> jax.Array:
    """Noised latents of an evaluation batch; the noise depends on the clip's place in it and the seed."""
    latents = system.encode(jnp.asarray(batch["frames_BTHWC"]))
    return latents + system.config.model.noise_std * jax.random.normal(jax.random.key(seed), latents.shape)


def bits_per_frame(system: System, params: Params, batches: Iterator[dict[str, Any]], seed: int = 0) -> np.ndarray:
    """(clips, N) bits per dimension of each noised latent frame, given its caption and the frames before it."""
    features = jax.jit(system.features)
    rows = []
    for index, batch in enumerate(batches):
        noisy = noised_latents(system, batch, seed + index)
        nats_BN = frame_nats(system, params, noisy, features(params, jnp.asarray(batch["text_ids_BS"])))
        rows.append(np.asarray(nats_BN)[np.asarray(batch["valid_B"])] / np.prod(noisy.shape[2:]) / np.log(2))
    return np.concatenate(rows)
