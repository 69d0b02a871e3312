"""From prompts to frames, and from frames to exact likelihoods: what sampling, training and evaluation share."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Sample, UserError
from starflow_jax.data import adherence
from starflow_jax.data.pipeline import evaluation_batches
from starflow_jax.flow import decode
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.losses import REFERENCE_NOISE, nats
from starflow_jax.optimizer import Params
from starflow_jax.sharding import fetch, lay_out
from starflow_jax.system import (
    Calibrated,
    System,
    data_source,
    decoding_variables,
    flow_variables,
    pixel_frames,
    prompt_text,
    training_source,
)


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
    certificate_B: np.ndarray | None = None  # with sample.certify: see `certificate`


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


class Conditions(flax.struct.PyTreeNode):
    """All that a batch of videos depends on, on the device; frames are latent ones."""

    texts: dict[int, jax.Array]  # (branches, B, text_length, text_dim) by the frame from which on it holds
    noise_BNSK: jax.Array  # of the frames to make
    known_BTSK: jax.Array | None  # u of the given frames
    known_BThwC: jax.Array | None  # and their noised latents
    guess_BSK: jax.Array | None  # of the first frame
    start_BNSK: jax.Array | None  # where the solver starts; None: each frame from the one before

    @property
    def text(self) -> dict[int, jax.Array]:
        """The conditional features, by the frame of the whole video."""
        given = 0 if self.known_BTSK is None else self.known_BTSK.shape[1]
        return {at + given if at else 0: texts[0] for at, texts in self.texts.items()}


def prepare(
    system: System,
    params: Params,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
) -> Conditions:
    """Captions, seeds and given frames as the flow takes them. Raises UserError for what can't be."""
    model, total = system.config.model, latent_frames(system.config, settings)
    features, is_image = jax.jit(system.features), total == 1

    def encode(prompts: Sequence[str]) -> jax.Array:
        told = partial(prompt_text, system.config, is_image=is_image, fps=settings.fps,
                       aspect_ratio=settings.aspect_ratio)
        return features(params, jnp.asarray(system.text_ids([told(prompt) for prompt in prompts])))

    def branches(prompts: Sequence[str]) -> jax.Array:
        text = encode(prompts)
        if not settings.guidance:
            return text[None]
        return jnp.stack([text, jnp.broadcast_to(encode([settings.negative_prompt]), text.shape)])

    noise = noise_for(seeds, (total, model.tokens_per_frame, model.token_channels))
    known, known_latents, given = None, None, 0
    if known_BTHWC is not None:
        known_latents = _noised(system, known_BTHWC, seeds)
        given = known_latents.shape[1]
        if given >= total:
            raise UserError(f"sample.frames={settings.frames}: the {known_BTHWC.shape[1]} given frames fill it; "
                            f"ask for {known_BTHWC.shape[1] + system.config.codec.time_stride} or more")
        known = jax.jit(shallow_tokens, static_argnums=0)(system, params, known_latents)
    texts = {0: branches(captions)}
    for frame, prompt in prompt_changes(system.config, settings).items():
        texts[frame - given] = branches([prompt] * len(captions))
    if min(texts) < 0:
        raise UserError(f"sample.changes={settings.changes!r}: the prompt of given frames can't be changed")
    guess = None if system.guess is None or given else system.guess(texts[0][0])
    noise, start = noise[:, given:], None
    if deep_start(system, settings) == "noise":
        start = noise if system.noise_guess is None else system.noise_guess(noise)
    return Conditions(texts, noise, known, known_latents, guess, start)


def prompt_changes(config: Config, settings: Sample) -> dict[int, str]:
    """{latent frame: prompt} of sample.changes. Raises UserError where it can't be read."""
    changes = {}
    for part in filter(str.strip, settings.changes.split(";")):
        frame, colon, prompt = part.partition(":")
        if not colon or not frame.strip().isdigit() or int(frame) < 1:
            raise UserError(f'sample.changes={settings.changes!r}: write "25: a prompt; 49: another one", '
                            "frames from 1")
        changes[-(-int(frame) // config.codec.time_stride)] = prompt.strip()
    return changes


def generate_clips(
    system: System,
    params: Params,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
) -> Clips:
    """One clip per caption and seed. known: uint8 first frames (one: TI2V, more: extension), encoded, noised
    like training data and denoised with the rest.

    Raises UserError for a length that the codec or the window does not allow.
    """
    flow, variables = system.flow, decoding_variables(system.config, params)
    given = prepare(system, params, captions, seeds, settings, known_BTHWC)
    made, reports = [], []
    for frames, report in deep_frames(system, variables, given, settings):
        made.append(frames)
        reports.append(report)
    noisy, shallow = decode.invert_shallow(flow, variables, jnp.concatenate(made, axis=1),
                                           solver=shallow_solver(settings), token_grid=token_grid(system))
    if given.known_BThwC is not None:
        noisy = jnp.concatenate([given.known_BThwC, noisy], axis=1)
    clean = denoise(system, params, noisy, given.text, settings.denoise)
    frames = system.decode(clean)
    clips = _collect(frames, noisy, frame_nats(system, params, noisy, given.text), reports, shallow, len(captions))
    if not settings.certify:
        return clips
    return dataclasses.replace(clips, certificate_B=certificate(system, params, clips, given))


def deep_frames(system: System, variables: Any, given: Conditions, settings: Sample):
    """u of the frames to make, a step's at a time: decode.generate's pairs."""
    return decode.generate(
        system.flow, variables, given.noise_BNSK, given.texts, guidance=settings.guidance,
        solver=deep_solver(system, settings), token_grid=token_grid(system), known_BTSK=given.known_BTSK,
        window=system.config.model.frames, context=context_frames(system, settings), guess_BSK=given.guess_BSK,
        start_BTSK=given.start_BNSK)


def token_grid(system: System) -> tuple[int, int]:
    """Rows and columns of a frame's tokens."""
    model = system.config.model
    return model.height // model.patch_size, model.width // model.patch_size


def certificate(system: System, params: Params, clips: Clips, given: Conditions) -> np.ndarray:
    """(B,) ||z - f(x)||^2 / ||z||^2 of unguided samples: the forward flow's noise beside the one sampled from.

    Guidance changes the map that is inverted, so its samples have no such certificate: raises UserError. Of
    videos beyond the window the first window is encoded.
    """
    if given.texts[0].shape[0] > 1 or len(given.texts) > 1:
        raise UserError("sample.certify: the forward flow knows neither guidance nor changes of prompt; "
                        "set sample.guidance=0 and no sample.changes")
    window = system.config.model.frames
    known = 0 if given.known_BTSK is None else given.known_BTSK.shape[1]
    noise_of = jax.jit(_noise_of, static_argnums=0)
    z = noise_of(system, params, jnp.asarray(clips.noisy_BNhwC[:, :window]), given.texts[0][0])[:, known:]
    error, asked = z - given.noise_BNSK[:, :z.shape[1]], given.noise_BNSK[:, :z.shape[1]]
    return fetch(jnp.sum(error**2, axis=(1, 2, 3)) / jnp.sum(asked**2, axis=(1, 2, 3)))


def shallow_tokens(system: System, params: Params, x: jax.Array) -> jax.Array:
    """Noised latents -> u, the tokens that the deep block sees, (B, T, S, K)."""
    return apply_flow(system.flow, flow_variables(params), STARFlow.shallow_forward, x)[0][-1]


def _noise_of(system: System, params: Params, x: jax.Array, text: jax.Array) -> jax.Array:
    return apply_flow(system.flow, flow_variables(params), STARFlow.forward, x, text).z_BTSK


def fixed_prompts(system: System, split: str, count: int) -> tuple[list[str], np.ndarray]:
    """The first long captions of a split and what they ask for: (captions, labels (B, 3))."""
    captions = fixed_captions(system, split, count)
    return captions, adherence.labels_of(captions)


def fixed_captions(system: System, split: str, count: int) -> list[str]:
    """The first long captions of a split."""
    source = data_source(system.config, split)
    return [source[index]["caption_long"].decode() for index in range(min(count, len(source)))]


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


def deep_solver(system: System, settings: Sample) -> decode.Solver:
    """Block size and frames per step as asked for, as calibrated, or a frame at a time; a stream's steps are
    single frames, so that each leaves as soon as it can."""
    if settings.solver == "sequential":
        return decode.SEQUENTIAL
    frames = settings.frames_per_step or (0 if settings.stream else system.calibrated.frames_per_step) or 1
    block = settings.block_size or system.calibrated.block_size or frames * system.config.model.tokens_per_frame
    updates = settings.updates if settings.solver == "wavefront" else _calibrated(system, settings).updates
    return decode.Solver(block, settings.tolerance, settings.max_steps, frames, updates)


def deep_start(system: System, settings: Sample) -> str:
    """As asked for, or as calibrated: each frame from the "previous" one, or from its "noise"."""
    return settings.start or _calibrated(system, settings).start or "previous"


def _calibrated(system: System, settings: Sample) -> Calibrated:
    """What was found fastest for whole videos and within a tolerance, where no solver is named."""
    whole = not settings.solver and not settings.stream and settings.tolerance > 0
    return system.calibrated if whole else Calibrated()


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
    frames, noisy, nats_BN, reports, shallow = jax.tree.map(fetch, (frames, noisy, nats_BN, reports, shallow))
    steps = np.concatenate([r.steps for r in reports]).T
    residual = np.concatenate([r.residual for r in reports]).T
    converged = np.all(np.concatenate([r.converged for r in reports]), axis=0)
    per_frame = [r.steps.sum(axis=0).reshape(batch, -1).max(axis=1) for r in shallow]
    for report in shallow:
        converged &= np.all(report.converged, axis=0).reshape(batch, -1).all(axis=1)
    return Clips(frames, noisy, nats_BN.sum(axis=1), steps, residual, np.sum(per_frame, axis=0), converged)


def windows(total: int, size: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first frame of which it is the source) of the windows that cover `total` frames."""
    yield 0, min(size, total), 0
    done = min(size, total)
    while done < total:
        start = done - context
        stop = min(start + size, total)
        yield start, stop, done
        done = stop


Text = jax.Array | dict[int, jax.Array]  # features, or those that hold from a frame on


def text_at(text: Text, frame: int) -> jax.Array:
    return text[max(at for at in text if at <= frame)] if isinstance(text, dict) else text


def denoise(system: System, params: Params, noisy: jax.Array, text: Text, how: str) -> jax.Array:
    """Latents without the training noise: by the denoiser, by the flow's own score, or as they are."""
    return _windowed(system, noisy, lambda window, frame: denoise_window(system, params, window, frame, text, how))


def denoise_window(
    system: System, params: Params, noisy: jax.Array, frame: int, text: Text, how: str
) -> jax.Array:
    """The same for a window of at most the training length; `frame` is the first that is wanted from it."""
    if how == "none" or (how == "denoiser" and system.config.model.denoiser == "none"):
        return noisy
    step = jax.jit(_denoiser_step if how == "denoiser" else _score_step, static_argnums=0)
    return step(system, params, noisy, text_at(text, frame))


def _denoiser_step(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """x~ - 0.3 s(x~)."""
    score = apply_flow(system.flow, flow_variables(params), STARFlow.score, noisy, text)
    return noisy - REFERENCE_NOISE * score


def _score_step(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """x~ + sigma^2 d log p / dx~, Tweedie's formula with the gradient taken through the flow."""

    def total_nats(x: jax.Array) -> jax.Array:
        return jnp.sum(_nats_of_window(system, params, x, text))

    return noisy - system.config.model.noise_std**2 * jax.grad(total_nats)(noisy)


def frame_nats(system: System, params: Params, noisy: jax.Array, text: Text) -> jax.Array:
    """(B, N) exact -log p(x~_n | earlier frames of its window, text) in nats, constants included."""
    run = jax.jit(_nats_of_window, static_argnums=0)
    return _windowed(system, noisy, lambda window, frame: run(system, params, window, text_at(text, frame)), 0)


def _nats_of_window(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    return nats(apply_flow(system.flow, flow_variables(params), STARFlow.forward, noisy, text))


def _windowed(
    system: System, noisy: jax.Array, run: Callable[[jax.Array, int], jax.Array], lookahead: int | None = None
) -> jax.Array:
    """`run` (of a window, and of the first frame wanted from it) over a clip of any length."""
    ahead = system.config.model.denoiser_lookahead if lookahead is None else lookahead
    spans = output_windows(system.config, noisy.shape[1], ahead)
    return jnp.concatenate([run(noisy[:, start:stop], begin)[:, begin - start:end - start]
                            for start, stop, begin, end in spans], axis=1)


def output_windows(config: Config, total: int, ahead: int) -> list[tuple[int, int, int, int]]:
    """(start, stop, begin, end) of the windows of the training length that cover a clip: frames start to stop go
    in, noisy ones before `begin` for context, and frames begin to end are taken from what comes out."""
    size = config.model.frames
    if total <= size:
        return [(0, total, 0, total)]
    context = max(1, min(config.model.denoiser_window, size * 3 // 4) - ahead)
    # A window's last `ahead` frames lack their look-ahead, so the next window makes them again.
    return [(start, stop, max(first - ahead, 0), stop if stop == total else stop - ahead)
            for start, stop, first in windows(total, size, context + ahead)]


def likelihood_batches(system: System, split: str, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """The first clips of a split with their captions, as training reads them, laid out over the mesh."""
    batches = evaluation_batches(
        training_source(system, split), batch_size=system.config.evaluate.batch_size, limit=limit,
        pixel_frames=system.pixel_frames, latent_stride=system.config.codec.time_stride, encode_text=system.text_ids,
        format_caption=system.prompt, text_length=system.config.model.text_length)
    return ({**batch, **lay_out({name: batch[name] for name in batch if name not in ("captions_B", "valid_B")})}
            for batch in batches)


def noised_latents(system: System, batch: dict[str, Any], seed: int) -> jax.Array:
    """Noised latents of an evaluation batch; the noise depends on the clip's place in it and the seed."""
    latents = system.latents_of(batch)
    return latents + system.config.model.noise_std * jax.random.normal(jax.random.key(seed), latents.shape)


def bits_per_frame(system: System, params: Params, batches: Iterator[dict[str, Any]], seed: int = 0) -> np.ndarray:
    """(clips, N) bits per dimension of each noised latent frame, given its caption and the frames before it."""
    text_of, rows = jax.jit(system.text_of), []
    for index, batch in enumerate(batches):
        noisy = noised_latents(system, batch, seed + index)
        text = {name: batch[name] for name in ("text_ids_BS", "features_BSD") if name in batch}
        nats_BN = frame_nats(system, params, noisy, text_of(params, text))
        rows.append(fetch(nats_BN)[np.asarray(batch["valid_B"])] / np.prod(noisy.shape[2:]) / np.log(2))
    return np.concatenate(rows)
