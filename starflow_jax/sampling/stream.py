"""Frames that leave as they are made: a pipeline of the deep block and of all that comes after it.

The deep block runs on the first device; the shallow stack, the denoiser and the codec on the second where
there is one. On a mesh each stage is sharded over all its devices. JAX dispatches without waiting, so the deep
block's next frame is dispatched before the one before it is fetched, and it never waits for the rest. The frames
equal those of the whole clip: each stage is causal, and the denoiser, which looks one frame ahead, is one frame
late.

With sample.offload nothing works beside the deep block: its weights, and the weights and caches of denoiser and
codec, are on the device in turns. The deep block's cache stays there.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.codec.interface import decode_next
from starflow_jax.config import Sample, UserError
from starflow_jax.flow import decode
from starflow_jax.flow.denoiser_stream import score_next
from starflow_jax.flow.inversion import Report
from starflow_jax.model.parameters import Params, shallow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions, make_conditions, text_at
from starflow_jax.sampling.denoise import AS_THEY_ARE, denoise_window, window_input
from starflow_jax.sampling.generate import deep_frames
from starflow_jax.sampling.offload import takes_turns
from starflow_jax.sampling.solver import chosen_solver, shallow_solver
from starflow_jax.sampling.timeline import Timeline
from starflow_jax.sampling.windows import denoising_windows
from starflow_jax.sharding import constrain, current_mesh, fetch, is_on_host, lay_out, to_devices, to_host


def stream_devices(count: int) -> tuple[jax.Device | None, jax.Device | None]:
    """(the deep block's device, everything else's); None where the mesh in force says where arrays lie.

    Raises UserError where there are fewer than `count`.
    """
    if current_mesh():
        return None, None
    devices = jax.local_devices()
    if count > len(devices):
        raise UserError(f"sample.devices={count}: this machine has {len(devices)}; on a CPU, set XLA_FLAGS="
                        f"--xla_force_host_platform_device_count={count}")
    return devices[0], devices[min(count, 2) - 1]


def stream_clips(
    system: System,
    params: Params,
    captions: list[str],
    seeds: list[int],
    settings: Sample,
    known_BTHWC: np.ndarray | None = None,
    timeline: Timeline | None = None,
) -> Iterator[np.ndarray]:
    """Yield the clips' next frames, uint8 (B, T, H, W, 3), T = 1 for the first latent frame and the codec's time
    stride for each after it; the given ones come first. timeline: what is to watch it; its owner closes it. Raises
    UserError as `make_conditions` does, and where sample.denoise or sample.devices rules a stream out."""
    deep, rest = stream_devices(settings.devices)
    given = make_conditions(system, params, captions, seeds, settings, known_BTHWC)
    finish = Finisher(system, params, given, settings, rest)
    index = given.given
    pending: list[jax.Array] = []
    needed = {"flow", "control", "denoiser"} if settings.renoise else {"flow", "control"}
    deep_params, deep_given = _on(deep, ({part: params[part] for part in needed & set(params)}, given))
    for u_BGSK, report in deep_frames(system, deep_params, deep_given, settings):
        if timeline:
            timeline.watch("deep", index, u_BGSK)
            timeline.deep_reports.append(report)
        # What was dispatched a step ago is fetched only now, with the deep block at work on the next.
        yield from map(fetch, pending)
        pending, reports = finish(_on(rest, u_BGSK))
        if timeline:
            timeline.shallow_reports.append(reports)
        if timeline and pending:
            timeline.watch("rest", index, pending)
        index += u_BGSK.shape[1]
    yield from map(fetch, pending)


class Finisher:
    """From u to pixels, frame after frame: what is known so far, and how many frames of it were emitted."""

    def __init__(self, system: System, params: Params, given: Conditions, settings: Sample,
                 device: jax.Device | None = None) -> None:
        model = system.config.model
        self._system, self._params, self._settings = system, _on(device, params), settings
        self._in_turns = takes_turns(settings)
        self._shallow_solver = shallow_solver(chosen_solver(system, settings))
        self._text = _on(device, given.text)
        self._codec, self._cache = _on(device, system.codec_behind(settings.denoise)), None
        batch, made = given.noise_BNSK.shape[:2]
        known = given.known_BThwC
        self._window, self._next, self._state = -1, 0, None  # of the denoiser
        self._ready = 0 if known is None else known.shape[1]
        self._emitted = 0
        shape = (batch, self._ready + made, model.height, model.width, model.channels)
        # Frames that are not made yet are 0: nothing that is taken depends on them.
        noisy = jnp.zeros(shape) if known is None else jnp.zeros(shape).at[:, :self._ready].set(known)
        self._noisy = _on(device, lay_out(noisy))
        self._clean = self._noisy[:, :0]
        self._windows = denoising_windows(system.config, shape[1])
        self._latency = latency(system, settings)

    @property
    def noisy_BNhwC(self) -> jax.Array:
        """The latents with their noise; of frames that are not made yet 0."""
        return self._noisy

    def __call__(self, u_BGSK: jax.Array) -> tuple[list[jax.Array], tuple[Report, ...]]:
        """Take the next frames of u; returns the pixels that they complete, and the shallow blocks' reports."""
        noisy, reports = decode.invert_shallow(
            self._system.flow, shallow_variables(self._params), u_BGSK, solver=self._shallow_solver,
            token_grid=self._system.token_grid)
        self._noisy = place(self._noisy, noisy, self._ready)
        self._ready += u_BGSK.shape[1]
        total = self._noisy.shape[1]
        done = total if self._ready == total else self._ready - self._latency
        out = []
        while self._emitted < done:
            out.append(self._pixels(self._emitted))
            self._emitted += 1
        return out, reports

    def _pixels(self, frame: int) -> jax.Array:
        start, stop, begin, _ = next(window for window in self._windows if window.begin <= frame < window.end)
        cached = self._system.config.model.denoiser == "first_layer" and not self._system.as_released
        if self._settings.denoise == "denoiser" and cached:
            latent = self._denoised(frame, start, stop, begin)
        else:
            window = window_input(self._system, self._noisy, self._clean, start, stop, begin)
            clean = denoise_window(self._system, self._params, window, begin, self._text, self._settings.denoise,
                                   start)
            latent = clean[:, frame - start:frame - start + 1]
        if self._system.as_released:
            self._clean = jnp.concatenate([self._clean, latent], axis=1)
        frames, cache = decode_next(
            to_devices(self._codec, after=latent), latent, to_devices(self._cache),
            self._system.config.codec.later_frames_scale, self._system.as_released)
        self._cache = self._kept(cache)
        return frames

    def _kept(self, state: Any) -> Any:
        """A stage's state until its next turn, and the stage done with this one."""
        return jax.block_until_ready(to_host(state)) if self._in_turns else state

    def _denoised(self, frame: int, start: int, stop: int, begin: int) -> jax.Array:
        """A frame of a window, denoised with the cache, which the window's context fills first."""
        model = self._system.config.model
        if self._window != start:
            self._window, self._next, self._state = start, start, None
        while self._next <= frame:
            score, state = score_next(
                self._system.flow, to_devices(self._params["denoiser"], after=self._noisy), to_devices(self._state),
                self._noisy, self._next, text_at(self._text, begin, start) if model.text_length else None,
                frames=min(1 + model.denoiser_lookahead, stop - self._next))
            self._state = self._kept(state)
            self._next += 1
        return self._noisy[:, frame:frame + 1] - model.denoising_step * score


def _on(device: jax.Device | None, tree: Any) -> Any:
    """Arrays on a device, but for those in the host's memory; None: where they are, which may be devices of other
    processes too."""
    if device is None:
        return tree
    return jax.tree.map(lambda leaf: leaf if is_on_host(leaf) else jax.device_put(leaf, device), tree)


def latency(system: System, settings: Sample) -> int:
    """Latent frames that must be known beyond the one emitted. Raises UserError for sample.denoise=score."""
    model = system.config.model
    if settings.denoise in AS_THEY_ARE or model.denoiser == "none":
        return 0
    if settings.denoise == "score":
        raise UserError("sample.denoise=score: the score of a frame depends on all frames after it; "
                        "stream with denoiser, decoder or none")
    return model.denoiser_lookahead * (model.denoiser_layers if model.denoiser == "every_layer" else 1)


@partial(jax.jit, donate_argnums=0)
def place(noisy: jax.Array, frames: jax.Array, at: int) -> jax.Array:
    """The latents with the next frames written in."""
    return constrain(jax.lax.dynamic_update_slice_in_dim(noisy, frames, at, axis=1), "batch", *[None] * 4)
