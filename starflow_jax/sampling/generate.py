"""From prompts to frames, and from frames to exact likelihoods: what sampling, training and evaluation share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Sample, UserError
from starflow_jax.flow import decode
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, decoding_variables, flow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions, prepare, token_grid
from starflow_jax.sampling.denoise import denoise
from starflow_jax.sampling.likelihood import frame_nats
from starflow_jax.sampling.solver import deep_solver, shallow_solver
from starflow_jax.sampling.windows import context_frames
from starflow_jax.sharding import fetch


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


def _noise_of(system: System, params: Params, x: jax.Array, text: jax.Array) -> jax.Array:
    return apply_flow(system.flow, flow_variables(params), STARFlow.forward, x, text).z_BTSK


def _collect(frames, noisy, nats_BN, reports, shallow, batch: int) -> Clips:
    frames, noisy, nats_BN, reports, shallow = jax.tree.map(fetch, (frames, noisy, nats_BN, reports, shallow))
    steps = np.concatenate([r.steps for r in reports]).T
    residual = np.concatenate([r.residual for r in reports]).T
    converged = np.all(np.concatenate([r.converged for r in reports]), axis=0)
    per_frame = [r.steps.sum(axis=0).reshape(batch, -1).max(axis=1) for r in shallow]
    for report in shallow:
        converged &= np.all(report.converged, axis=0).reshape(batch, -1).all(axis=1)
    return Clips(frames, noisy, nats_BN.sum(axis=1), steps, residual, np.sum(per_frame, axis=0), converged)
