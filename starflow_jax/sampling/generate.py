"""From prompts to frames."""

import dataclasses
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.codec.interface import Decoded, decode_next
from starflow_jax.config import Model, Sample, UserError
from starflow_jax.flow import generation
from starflow_jax.flow.control import LatentCameras, Steering, control_of
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, decoding_variables, flow_variables, shallow_variables
from starflow_jax.model.student import flow_of
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions, Draws, VideoText, make_conditions, steering
from starflow_jax.sampling.denoise import denoise, on_devices
from starflow_jax.sampling.finite import check_finite, names_of
from starflow_jax.sampling.likelihood import frame_nll
from starflow_jax.sampling.renoise import refresher
from starflow_jax.sampling.shallow import invert_videos
from starflow_jax.sampling.solved import Solved, solved
from starflow_jax.sampling.solver import chosen_solver, deep_solver, shallow_solver
from starflow_jax.sampling.windows import Latents, context_frames
from starflow_jax.sharding import fetch, to_devices


@dataclasses.dataclass(frozen=True)
class Clips:
    """Generated clips and how they were made; B clips, T pixel frames, N latent frames."""

    frames_BTHWC: np.ndarray  # uint8
    noisy_BNhwC: np.ndarray  # the flow's own sample, before denoising
    text: VideoText  # the prompts' features (B, S, D)
    solved: Solved
    finite_B: np.ndarray  # bool: whether all of a clip's pixels are
    certificate_B: np.ndarray | None = None  # with sample.certify: see `certificate`

    def check(self, index: int, what: str) -> None:
        """Raises UserError, which begins with `what`, where a clip or the solution behind it is not finite."""
        self.solved.check(index, what)
        check_finite(self.finite_B[index], what)

    def checked(self, captions: Sequence[str], seeds: Sequence[int]) -> "Clips":
        """Themselves. captions: of the first clips, those that were asked for; raises UserError where one of them is
        not finite."""
        for index, name in enumerate(names_of(captions, seeds)):
            self.check(index, name)
        return self


def generate_clips(
    system: System,
    params: Params,
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
    draws: Draws | None = None,
    cameras: LatentCameras | None = None,
) -> Clips:
    """One clip per caption and seed. params: as `inference_params` gives them. known: uint8 first frames (one: TI2V,
    more: extension), which are encoded, noised like training data and denoised with the rest. draws: random numbers
    instead of those of the seeds. cameras: each clip's own, in place of settings.camera.

    Raises UserError for a length that the codec or the window does not allow, and for a certificate that can't be.
    """
    given = make_conditions(system, params, captions, seeds, settings, known_BTHWC, draws, cameras=cameras)
    made, reports = zip(*deep_frames(system, params, given, settings))
    noisy, shallow = invert_videos(
        system.flow, shallow_variables(params), made,
        solver=shallow_solver(chosen_solver(system, settings)), token_grid=system.token_grid)
    if given.known_BThwC is not None:
        noisy = np.concatenate([fetch(given.known_BThwC), noisy], axis=1)
    clean = denoise(system, params, noisy, given.text, settings.denoise)
    decoded = pixels(system, clean, settings.denoise)
    clips = Clips(decoded.frames_BTHWC, noisy, given.text, solved(reports, shallow), decoded.finite_B)
    if not settings.certify:
        return clips
    return dataclasses.replace(clips, certificate_B=certificate(system, params, clips, given))


def pixels(system: System, latents: Latents, denoised: str) -> Decoded:
    """The frames, in the host's memory, of latents (B, N, h, w, C) that went through a way of denoising: one frame
    after the other, so that two programs serve any length. With tiles, all of whose caches that would keep, a codec
    decodes all at once.
    """
    codec, settings = to_devices(system.codec_behind(denoised), after=latents), system.config.codec
    if settings.tile:
        return Decoded(*map(fetch, system.decoded(on_devices(latents), denoised)))
    whole, cache, parts = fetch(latents), None, []
    for frame in range(whole.shape[1]):
        part, cache = decode_next(codec, on_devices(whole[:, frame:frame + 1]), cache, settings.later_frames_scale,
                                  system.as_released)
        parts.append(part)
    frames_BTHWC, finite_B = zip(*((fetch(part.frames_BTHWC), fetch(part.finite_B)) for part in parts))
    return Decoded(np.concatenate(frames_BTHWC, axis=1), np.all(finite_B, axis=0))


class Live(Protocol):
    """What may change while a video is made: asked by each step of the deep block when it begins."""

    def begin(self, given: Conditions, frame: int) -> None:
        """Enter into `given` what changes from a frame on, the next one to make (counted from the first of these)."""

    def guidance(self, later: bool) -> float:
        """The weight; later: the window has moved on or the prompt has changed."""

    def steering(self, begin: int, first: int, frames: int) -> Steering | None:
        """Of so many frames from `first` on, in a window that begins with frame `begin`."""

    def other_text(self, given: Conditions, frame: int, start: int) -> jax.Array | None:
        """(B, S, D): as `Conditions.text_at`, of a prompt that the video is not made from but compared with; None:
        there is none."""


def deep_frames(system: System, params: Params, given: Conditions, settings: Sample) -> Iterator[generation.Made]:
    """Yield the u of the frames to make, one solver step's frames at a time, as `generation.generate` does."""
    return generation.answered(deep_steps(system, params, given, settings))


def deep_steps(
    system: System, params: Params, given: Conditions, settings: Sample, live: Live | None = None
) -> Iterator[generation.Ask | generation.Made]:
    """The same, with each step asked for first, as `generation.steps` does."""
    model, texts = system.config.model, given.texts
    later = generation.Later(texts.later[0], refresher(system, params, given, settings) if settings.renoise else None)
    steer: Callable[[int, int, int], Steering | None] | None = None
    if live:
        steer = live.steering
    elif given.cameras:
        steer = partial(steering, params, model, given.text)
    return generation.steps(
        system.flow, decoding_variables(params), given.noise, ChainMap({0: texts.first}, texts.later),
        guidance=live.guidance if live else settings.weight, solver=deep_solver(chosen_solver(system, settings)),
        token_grid=system.token_grid, known_BTSK=given.known_BTSK, window=model.frames,
        context=context_frames(model, settings), later=later, guess_BSK=given.guess_BSK,
        start_BTSK=given.start if given.starts_at_noise else None, cache=settings.cache, steer=steer,
        total=given.total - given.given,
        draft=drafting(model, params["draft"], settings) if "draft" in params else None)


def drafting(model: Model, params: Params, settings: Sample) -> generation.Draft:
    """How a smaller deep block, {"deep": parameters}, drafts for the model."""
    return generation.Draft(flow_of(model, params["deep"]), {"params": params}, settings.draft_tolerance)


def log_likelihood(system: System, params: Params, clips: Clips) -> np.ndarray:
    """(B,) exact log p of the clips' noised latents given their prompts, in nats."""
    return -fetch(frame_nll(system, params, clips.noisy_BNhwC, clips.text)).sum(axis=1)


def certificate(system: System, params: Params, clips: Clips, given: Conditions) -> np.ndarray:
    """(B,) ||z - f(x)||^2 / ||z||^2 of unguided samples: the forward flow's noise against the noise sampled from.

    Guidance changes the map that is inverted, so guided samples have no certificate: raises UserError. Of videos
    longer than the window, the first window is encoded.
    """
    if given.texts.first.shape[0] > 1 or len(given.texts.later) > 1:
        raise UserError("sample.certify: the forward flow knows neither guidance nor changes of the prompt; "
                        "set sample.guidance=0 and leave out sample.changes")
    window = system.config.model.frames
    noisy = jnp.asarray(clips.noisy_BNhwC[:, :window])
    z = encode_z(system.flow, params, noisy, given.texts.first[0],
                 steering(params, system.config.model, given.text, 0, 0, noisy.shape[1]))[:, given.given:]
    noise = given.noise(0, z.shape[1])
    return fetch(jnp.sum((z - noise)**2, axis=(1, 2, 3)) / jnp.sum(noise**2, axis=(1, 2, 3)))


@partial(jax.jit, static_argnums=0)
def encode_z(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array, steering: Steering | None = None
             ) -> jax.Array:
    """z = f(x~), (B, N, S, K), of at most a window."""
    return apply_flow(flow, flow_variables(params), STARFlow.forward, noisy, text, control_of(steering)).z_BTSK
