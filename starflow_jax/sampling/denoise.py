"""Samples without the training noise: by the denoiser, by the flow's own score, or as they are, also for a decoder
that was trained on noised latents."""

from functools import partial

import jax
import jax.numpy as jnp

from starflow_jax.flow.control import Steering
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Text, steering, text_at
from starflow_jax.sampling.likelihood import window_nll
from starflow_jax.sampling.windows import denoising_windows
from starflow_jax.sharding import to_devices

AS_THEY_ARE = ("none", "decoder")  # ways that leave the latents' noise in them


def denoise(system: System, params: Params, noisy: jax.Array, text: Text, how: str) -> jax.Array:
    """Latents (B, N, h, w, C) of any length without the training noise. how: of sample.denoise; none and decoder leave
    them as they are."""
    if how in AS_THEY_ARE:
        return noisy
    clean = noisy[:, :0]
    for start, stop, begin, end in denoising_windows(system.config, noisy.shape[1]):
        window = window_input(system, noisy, clean, start, stop, begin)
        out = denoise_window(system, params, window, begin, text, how, start)
        clean = jnp.concatenate([clean, out[:, begin - start:end - start]], axis=1)
    return clean


def window_input(
    system: System, noisy: jax.Array, clean: jax.Array, start: int, stop: int, begin: int
) -> jax.Array:
    """What the denoiser is given for a window: noisy frames, as in training; as released, those before `begin` are
    already denoised."""
    if not system.as_released:
        return noisy[:, start:stop]
    return jnp.concatenate([clean[:, start:begin], noisy[:, begin:stop]], axis=1)


def denoise_window(
    system: System, params: Params, noisy: jax.Array, frame: int, text: Text, how: str, start: int = 0
) -> jax.Array:
    """The same for a window of at most the training length, which begins with frame `start`; `frame` is the first that
    is wanted from it."""
    if how in AS_THEY_ARE or (how == "denoiser" and system.config.model.denoiser == "none"):
        return noisy
    features = text_at(text, frame, start)
    if how == "denoiser":
        return denoiser_step(system.flow, to_devices(denoiser_alone(params), after=noisy), noisy, features)
    return score_step(system.flow, to_devices(params, after=noisy), noisy, features,
                      steering(params, system.config.model, text, start, start, noisy.shape[1]))


def denoiser_alone(params: Params) -> Params:
    """Of the flow's parameters and the denoiser's, what `denoiser_step` needs."""
    return {"flow": {}, "denoiser": params["denoiser"]}


@partial(jax.jit, static_argnums=0)
def denoiser_step(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    """x~ - 0.3 s(x~), or another step where the loss was weighted differently."""
    score = apply_flow(flow, flow_variables(params), STARFlow.score, noisy, text)
    return noisy - flow.config.denoising_step * score


@partial(jax.jit, static_argnums=0)
def score_step(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array, steering: Steering | None = None
               ) -> jax.Array:
    """x~ + sigma^2 d log p / dx~, Tweedie's formula with the gradient taken through the flow."""

    def total_nll(x: jax.Array) -> jax.Array:
        return jnp.sum(window_nll(flow, params, x, text, steering))

    return noisy - flow.config.noise_std**2 * jax.grad(total_nll)(noisy)
