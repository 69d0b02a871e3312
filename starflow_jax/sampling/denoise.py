"""Samples without the training noise: by the denoiser, by the flow's own score, or as they are, also for a decoder
that was trained on noised latents."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.flow.control import Steering
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Text, steering, text_at
from starflow_jax.sampling.likelihood import window_nll
from starflow_jax.sampling.sizes import frames_together
from starflow_jax.sampling.windows import Latents, denoising_windows, filled_up
from starflow_jax.sharding import fetch, lay_out, to_devices

AS_THEY_ARE = ("none", "decoder")  # ways that leave the latents' noise in them


def denoise(system: System, params: Params, noisy: Latents, text: Text, how: str) -> Latents:
    """Latents (B, N, h, w, C) of any length without the training noise. how: of sample.denoise; none and decoder leave
    them as they are."""
    if how in AS_THEY_ARE:
        return noisy
    model, total = system.config.model, noisy.shape[1]
    if total == frames_together(model, total):
        return denoise_window(system, params, on_devices(noisy), 0, text, how, count=total)
    # Windows are cut and joined in the host's memory: on the device each length would be a program.
    whole = fetch(noisy)
    clean = whole[:, :0]
    for start, stop, begin, end in denoising_windows(system.config, total):
        window = np.asarray(window_input(system, whole, clean, start, stop, begin))
        out = fetch(denoise_window(system, params, on_devices(filled_up(window, model)), begin, text, how, start,
                                   stop - start))
        clean = np.concatenate([clean, out[:, begin - start:end - start]], axis=1)
    return clean


def on_devices(latents: Latents) -> jax.Array:
    """Those of the host laid out over the mesh in force, others as they are."""
    return lay_out(latents) if isinstance(latents, np.ndarray) else latents


def window_input(
    system: System, noisy: Latents, clean: Latents, start: int, stop: int, begin: int
) -> Latents:
    """What the denoiser is given for a window: noisy frames, as in training; as released, those before `begin` are
    already denoised."""
    if not system.as_released:
        return noisy[:, start:stop]
    return jnp.concatenate([clean[:, start:begin], noisy[:, begin:stop]], axis=1)


def denoise_window(
    system: System, params: Params, noisy: jax.Array, frame: int, text: Text, how: str, start: int = 0,
    count: int | None = None,
) -> jax.Array:
    """The same for a window of at most the training length, which begins with frame `start`; `frame` is the first that
    is wanted from it. count: how many of its frames there are, the others being anything; None: all."""
    if how in AS_THEY_ARE or (how == "denoiser" and system.config.model.denoiser == "none"):
        return noisy
    features = text_at(text, frame, start)
    if how == "denoiser":
        return denoiser_step(system.flow, to_devices(denoiser_alone(params), after=noisy), noisy, features,
                             count)
    return score_step(system.flow, to_devices(params, after=noisy), noisy, features,
                      steering(params, system.config.model, text, start, start, noisy.shape[1]), count)


def denoiser_alone(params: Params) -> Params:
    """Of the flow's parameters and the denoiser's, what `denoiser_step` needs."""
    return {"flow": {}, "denoiser": params["denoiser"]}


@partial(jax.jit, static_argnums=0)
def denoiser_step(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array, count: jax.Array | None = None
                  ) -> jax.Array:
    """x~ - 0.3 s(x~), or another step where the loss was weighted differently. count: int32, of the frames that there
    are; None: all."""
    score = apply_flow(flow, flow_variables(params), STARFlow.score, noisy, text, count)
    return noisy - flow.config.denoising_step * score


@partial(jax.jit, static_argnums=0)
def score_step(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array, steering: Steering | None = None,
               count: jax.Array | None = None) -> jax.Array:
    """x~ + sigma^2 d log p / dx~, Tweedie's formula with the gradient taken through the flow. count: as above."""

    def total_nll(x: jax.Array) -> jax.Array:
        nll_BT = window_nll(flow, params, x, text, steering)
        return jnp.sum(nll_BT if count is None else jnp.where(jnp.arange(nll_BT.shape[1]) < count, nll_BT, 0))

    return noisy - flow.config.noise_std**2 * jax.grad(total_nll)(noisy)
