"""Frames that leave as they are made: a pipeline of the deep block and of all that comes after it.

The deep block runs on the first device; the shallow stack, the denoiser and the codec on the second where
there is one. On a mesh each stage is sharded over all its devices. JAX dispatches without waiting, so the deep
block's next frame is dispatched before the one before it is fetched, and it never waits for the rest. The frames
equal those of the whole clip: each stage is causal, and the denoiser, which looks one frame ahead, is one frame
late. What is held does not grow with the video, and its frames are counted within windows: a stream may go on for ever.

With sample.offload nothing works beside the deep block: its weights, and the weights and caches of denoiser and
codec, are on the device in turns. The deep block's cache stays there.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.codec.interface import Decoded, decode_next
from starflow_jax.config import Config, Sample, UserError
from starflow_jax.flow import decode, generation
from starflow_jax.flow.control import Steering
from starflow_jax.flow.denoiser_stream import score_next
from starflow_jax.flow.inversion import Report
from starflow_jax.model.parameters import Params, shallow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions, make_conditions
from starflow_jax.sampling.denoise import AS_THEY_ARE, denoise_window
from starflow_jax.sampling.generate import Live, deep_steps
from starflow_jax.sampling.likelihood import window_nll_per_token
from starflow_jax.sampling.offload import takes_turns
from starflow_jax.sampling.solver import chosen_solver, shallow_solver
from starflow_jax.sampling.timeline import Timeline
from starflow_jax.sampling.windows import Window, denoising_windows, frames_taken
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


def for_streams(params: Params, devices: int) -> Params:
    """The parameters where the deep block of streams works, for all of them: streams of the same arrays are known to be
    of one model, and their steps can be made together. devices: as for `stream_devices`."""
    return _on(stream_devices(devices)[0], params)


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
    stride for each after it; the given ones come first. timeline: what is to watch it, and is told which are finite;
    its owner closes it. Raises UserError as `make_conditions` does, and where sample.denoise or sample.devices rules a
    stream out."""
    given = make_conditions(system, params, captions, seeds, settings, known_BTHWC)
    for step in generation.answered(stream_steps(system, params, given, settings, timeline=timeline)):
        for part in step.pixels:
            if timeline:
                timeline.finite.append(part.finite_B)
            yield fetch(part.frames_BTHWC)


class Surprise(NamedTuple):
    """-log p(x~_n | earlier frames of its window, text, camera) of a latent frame, exact: of each token, in bits per
    dimension, (B, S). Their mean is the frame's."""

    own_BS: jax.Array  # given the text that it was made from
    other_BS: jax.Array | None  # given the other one that it is compared with


class Step(NamedTuple):
    """What a step of the deep block has led to."""

    pixels: list[Decoded]  # of the latent frames that it completes, each one's
    begun: int  # latent frames that the deep block has begun by now, given ones included
    deep: Report
    shallow: tuple[Report, ...]
    surprises: list[Surprise]  # of each latent frame that was made, where they were asked for


def stream_steps(system: System, params: Params, given: Conditions, settings: Sample, *, live: Live | None = None,
                 timeline: Timeline | None = None, surprise: bool = False, ahead: bool = True
                 ) -> Iterator[generation.Ask | Step]:
    """Yield each step of the deep block to be made, as `generation.steps` does, and the stream's steps, until
    `given.total` frames are made. Of what was made no more is held than a window. surprise: tell each latent frame's.
    ahead: a step is handed out once the next one of the deep block has begun, so that no device waits; else as soon as
    it is made, so that what steers the stream holds a latent frame earlier."""
    deep, rest = stream_devices(settings.devices)
    finish = Finisher(system, params, given, settings, rest, surprise=surprise, live=live)
    needed = {"flow", "control", "draft", *(["denoiser"] if settings.renoise else [])}
    deep_params, given = _on(deep, ({part: params[part] for part in needed & set(params)}, given))
    frames, begun, done = deep_steps(system, deep_params, given, settings, live), given.given, None
    while begun < given.total:
        if live:
            live.begin(given, begun - given.given)
        made = next(frames)
        while isinstance(made, generation.Ask):
            yield made
            made = next(frames)
        u_BGSK, report = made
        if timeline:
            timeline.watch("deep", begun, u_BGSK)
            timeline.deep_reports.append(report)
        begun += u_BGSK.shape[1]
        # What was dispatched a step ago is fetched only now, with the deep block at work on the next.
        if done is not None:
            yield done._replace(begun=begun)
        pixels, shallow = finish(_on(rest, u_BGSK), given)
        if timeline:
            timeline.shallow_reports.append(shallow)
        if timeline and pixels:
            timeline.watch("rest", begun - u_BGSK.shape[1], pixels)
        done = Step(pixels, begun, report, shallow, finish.surprises())
        if not ahead:
            yield done
            done = None
    if done is not None:
        yield done


class Finisher:
    """From u to pixels, frame after frame: holds the latents of one of the denoiser's windows, and how many frames of
    the video were emitted."""

    def __init__(self, system: System, params: Params, given: Conditions, settings: Sample,
                 device: jax.Device | None = None, *, surprise: bool = False, live: Live | None = None) -> None:
        """surprise: compute each latent frame's; live: what steers it."""
        self._surprising, self._live = surprise, live
        self._surprises: list[Surprise] = []
        self._system, self._params, self._settings = system, _on(device, params), settings
        self._device, self._in_turns = device, takes_turns(settings)
        self._shallow_solver = shallow_solver(chosen_solver(system, settings))
        self._codec, self._cache = _on(device, system.codec_behind(settings.denoise)), None
        self._given: jax.Array | None = _on(device, given.known_BThwC)  # until they are taken
        self._total, self._latency = given.total, latency(system, settings)
        self._ready = self._emitted = 0  # frames whose latents are known, and whose pixels were emitted
        self._windows = denoising_windows(system.config, given.total)
        self._window = next(self._windows)
        self._next, self._state = 0, None  # of the denoiser: its next frame, and what it knows of the window
        self._noisy: Any = None  # of the window; frames that are not made yet are 0: nothing that is taken sees them
        self._clean: list[jax.Array] = []  # as released: the last frames that were emitted, which the denoiser sees

    def __call__(self, u_BGSK: jax.Array, given: Conditions) -> tuple[list[Decoded], tuple[Report, ...]]:
        """Take the next frames of u; returns the pixels that they complete, and the shallow blocks' reports. given:
        what was given first, whose texts may have changed since."""
        noisy, reports = self.latents(u_BGSK)
        return self.pixels(noisy, given), reports

    def latents(self, u_BGSK: jax.Array) -> tuple[jax.Array, tuple[Report, ...]]:
        """(B, G, h, w, C): latents with their noise of frames of u, and the shallow blocks' reports."""
        return decode.invert_shallow(
            self._system.flow, shallow_variables(self._params), u_BGSK, solver=self._shallow_solver,
            token_grid=self._system.token_grid)

    def pixels(self, noisy_BGhwC: jax.Array, given: Conditions) -> list[Decoded]:
        """The pixels that the next frames' latents complete; those of the given frames come with the first ones."""
        out: list[Decoded] = []
        parts, self._given = [noisy_BGhwC] if self._given is None else [self._given, noisy_BGhwC], None
        for part in parts:
            for index in range(part.shape[1]):
                self._take(part if part.shape[1] == 1 else frame_of(part, index))
                if self._surprising:
                    self._surprises.append(self._surprise(given))
                while self._emitted < self._ready and self._ready > self._needed():
                    out.append(self._next_pixels(given))
        return out

    def surprises(self) -> list[Surprise]:
        """Of each frame taken since this was asked."""
        surprises, self._surprises = self._surprises, []
        return surprises

    def _surprise(self, given: Conditions) -> Surprise:
        """Of the frame that was taken last."""
        frame, start, live = self._ready - 1, self._window.start, self._live
        steering = live.steering(start, start, self._noisy.shape[1]) if live else None
        other = live.other_text(given, frame, start) if live else None
        return Surprise(self._bits(given.text_at(frame, start), steering),
                        None if other is None else self._bits(other, steering))

    def _bits(self, text: jax.Array, steering: Steering | None) -> jax.Array:
        """(B, S): what is behind the frame in the window does not matter: the flow is causal."""
        nll_BTS = window_nll_per_token(
            self._system.flow, to_devices(self._params, after=self._noisy), self._noisy, _on(self._device, text),
            _on(self._device, steering))
        at, dimensions = self._ready - 1 - self._window.start, self._system.config.model.token_channels
        return in_bits(nll_BTS, at, dimensions=dimensions)

    def _needed(self) -> int:
        """The last frame that the next one's pixels depend on."""
        return min(self._emitted + self._latency, self._window.stop - 1)

    def _take(self, latent: jax.Array) -> None:
        if self._noisy is None:
            batch, _, *shape = latent.shape
            self._noisy = _on(self._device, lay_out(jnp.zeros((batch, self._system.config.model.frames, *shape))))
        self._noisy = place(self._noisy, latent, self._ready - self._window.start)
        self._ready += 1

    def _next_pixels(self, given: Conditions) -> Decoded:
        frame = self._emitted
        latent = self._denoised(frame, given)
        self._emitted += 1
        if self._system.as_released:
            self._clean = [*self._clean, latent][-self._system.config.model.frames:]
        if self._emitted == self._window.end < self._total:
            before, self._window = self._window, next(self._windows)
            self._noisy = moved_on(self._noisy, self._window.start - before.start)
            self._next, self._state = self._window.start, None
        decoded, cache = decode_next(
            to_devices(self._codec, after=latent), latent, to_devices(self._cache),
            self._system.config.codec.later_frames_scale, self._system.as_released)
        self._cache = self._kept(cache)
        return decoded

    def _kept(self, state: Any) -> Any:
        """A stage's state until its next turn, and the stage done with this one."""
        return jax.block_until_ready(to_host(state)) if self._in_turns else state

    def _denoised(self, frame: int, given: Conditions) -> jax.Array:
        """(B, 1, h, w, C): a frame's latent."""
        model, window = self._system.config.model, self._window
        at = frame - window.start
        if self._settings.denoise in AS_THEY_ARE or model.denoiser == "none":
            return frame_of(self._noisy, at)
        text: jax.Array = _on(self._device, given.text_at(window.begin, window.start))
        if by_frames(self._system.config, window):
            return self._by_frames(frame, text)
        noisy = self._noisy
        if self._system.as_released and window.begin > window.start:
            seen = self._clean[window.start - frame:][:window.begin - window.start]
            noisy = jnp.concatenate([*seen, noisy[:, window.begin - window.start:]], axis=1)
        clean = denoise_window(self._system, self._params, noisy, window.begin, text, self._settings.denoise,
                               window.start, window.stop - window.start)
        return frame_of(clean, at)

    def _by_frames(self, frame: int, text: jax.Array) -> jax.Array:
        """The same with the denoiser's cache, which the window's context fills first."""
        model, window = self._system.config.model, self._window
        while self._next <= frame:
            score, state = score_next(
                self._system.flow, to_devices(self._params["denoiser"], after=self._noisy), to_devices(self._state),
                self._noisy, self._next - window.start, text if model.text_length else None,
                frames=min(1 + model.denoiser_lookahead, window.stop - self._next))
            self._state = self._kept(state)
            self._next += 1
        return frame_of(self._noisy, frame - window.start) - model.denoising_step * score


def _on(device: jax.Device | None, tree: Any) -> Any:
    """Arrays on a device, but for those in the host's memory; None: where they are, which may be devices of other
    processes too. Those that were put there are returned themselves."""
    if device is None:
        return tree

    def placed(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and (is_on_host(leaf) or leaf.committed and leaf.devices() == {device})
        return leaf if there else jax.device_put(leaf, device)

    return jax.tree.map(placed, tree)


def latency(system: System, settings: Sample) -> int:
    """Latent frames that must be known beyond the one emitted. Raises UserError for sample.denoise=score."""
    model = system.config.model
    if settings.denoise in AS_THEY_ARE or model.denoiser == "none":
        return 0
    if settings.denoise == "score":
        raise UserError("sample.denoise=score: the score of a frame depends on all frames after it; "
                        "stream with denoiser, decoder or none")
    return model.denoiser_lookahead * (model.denoiser_layers if model.denoiser == "every_layer" else 1)


def by_frames(config: Config, window: Window) -> bool:
    """Whether the denoiser works on a window frame by frame, with what its layers know of the frames before: not where
    windows move on by a single frame, since all of their context would have to be worked on for that one."""
    model = config.model
    single = window.begin > window.start and window.end - window.begin == 1 == frames_taken(
        config, model.denoiser_lookahead)
    return model.denoiser == "first_layer" and not config.sample.as_released and not single


@jax.jit
def frame_of(latents: jax.Array, at: int | jax.Array) -> jax.Array:
    """(B, 1, h, w, C): one of the frames."""
    return jax.lax.dynamic_slice_in_dim(latents, at, 1, axis=1)


@partial(jax.jit, static_argnames="dimensions")
def in_bits(nll_BTS: jax.Array, at: int | jax.Array, *, dimensions: int) -> jax.Array:
    """(B, S) of one frame's tokens, of so many dimensions each, in bits per dimension."""
    return jax.lax.dynamic_index_in_dim(nll_BTS, at, axis=1, keepdims=False) / (dimensions * jnp.log(2))


@partial(jax.jit, donate_argnums=0)
def moved_on(noisy: jax.Array, by: int | jax.Array) -> jax.Array:
    """The latents of a window that begins so many frames later, as far as they are known; behind them 0."""
    frames = noisy.shape[1]
    known = jnp.arange(frames) + by < frames
    return constrain(jnp.where(known[:, None, None, None], jnp.roll(noisy, -by, axis=1), 0), "batch", *[None] * 4)


@partial(jax.jit, donate_argnums=0)
def place(noisy: jax.Array, frames: jax.Array, at: int) -> jax.Array:
    """The latents with the next frames written in."""
    return constrain(jax.lax.dynamic_update_slice_in_dim(noisy, frames, at, axis=1), "batch", *[None] * 4)
