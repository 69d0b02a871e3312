"""Frames that are encoded again with noise of their own, so that what a window goes on from looks like training data
however often it has moved on (sample.renoise)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from starflow_jax.config import Sample, UserError
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, shallow_variables
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions
from starflow_jax.sampling.denoise import denoise_window
from starflow_jax.sampling.shallow import invert_all
from starflow_jax.sampling.solver import chosen_solver, shallow_solver


def refresher(
    system: System, params: Params, given: Conditions, settings: Sample
) -> Callable[[jax.Array, int, int], jax.Array]:
    """generation.Later.refresh: the last frames are denoised, with what is known of the window before them, and given
    the training noise again, drawn from the video's seed for each frame. What was sampled is denoised, not what an
    earlier window was encoded from: a frame is denoised and noised once, however many windows it is in.

    Raises UserError for a model that can't.
    """
    model = system.config.model
    if model.denoiser == "none" and settings.denoise == "denoiser":
        raise UserError("sample.renoise=true: this model has no denoiser; set sample.denoise=score")
    if not model.local_shallow:
        raise UserError("sample.renoise=true: needs model.local_shallow, or a frame can't be denoised before all are "
                        "made")
    solver = shallow_solver(chosen_solver(system, settings))

    def refresh(u_BTSK: jax.Array, frames: int, made: int) -> jax.Array:
        noisy, _ = invert_all(system.flow, shallow_variables(params), u_BTSK, solver=solver,
                              token_grid=system.token_grid)
        done = given.given + made
        clean = denoise_window(system, params, noisy, done - 1, given.text, settings.denoise, done - noisy.shape[1])
        assert given.fresh_BNhwC is not None
        return encode_again(system.flow, shallow_variables(params), clean,
                            given.fresh_BNhwC.frames(done - frames, frames))

    return refresh


@partial(jax.jit, static_argnums=0)
def encode_again(flow: STARFlow, shallow: Any, clean_BThwC: jax.Array, fresh_BNhwC: jax.Array) -> jax.Array:
    """u of the last of the latents with noise, as many as there is noise, (B, N, S, K). shallow: as `shallow_variables`
    gives them."""
    noisy = clean_BThwC[:, clean_BThwC.shape[1] - fresh_BNhwC.shape[1]:] + flow.config.noise_std * fresh_BNhwC
    return apply_flow(flow, shallow, STARFlow.shallow_forward, noisy)[0][-1]
