"""One training step: noise, gradients, both optimizers, and the skipping of bad steps."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from starflow_jax.config import Config, Model, Train, UserError
from starflow_jax.data.batch import Batch
from starflow_jax.flow.control import window_rays
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sharding import parameter_shardings, replicated
from starflow_jax.training.losses import accumulated_gradients, all_trained, to_bits
from starflow_jax.training.optimizer import averaged, denoiser_optimizer, flow_optimizer, split
from starflow_jax.training.state import TrainState

NORM_MEMORY = 0.98  # of the running mean of gradient norms
NORM_WARMUP = 50  # accepted steps before a norm can count as an outlier


def make_train_step(config: Config, mesh: Mesh | None = None, whole: Callable[[Any, Params], Params] | None = None
                    ) -> jax.stages.Wrapped:
    """(state, batch as `encoded` makes it, frozen parameters) -> (state, scalars on the device); jitted, the state
    donated.

    On a mesh the state keeps its layout over it (sharding.parameter_shardings); the noise is the same on any. whole:
    (frozen, trained parameters) -> the model's; None: all are trained, and there are no frozen ones.
    """
    def step(state: TrainState, batch: Batch, frozen: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        clean = jnp.asarray(batch.latents_BNhwC, jnp.float32)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        noisy = clean + config.model.noise_std * jax.random.normal(key, clean.shape)
        grads, losses = accumulated_gradients(config, state.params, noisy, batch.text_B,
                                              partial(whole, frozen) if whole else all_trained,
                                              batch.rays_BNSK)
        state, norm, skip = apply_gradients(state, grads, config.train)
        return state, {**losses, "bits_per_dim": to_bits(losses["loss"]), "grad_norm": norm,
                       "skip": skip, "skipped": state.skipped}

    if mesh is None:
        return jax.jit(step, donate_argnums=0)

    def placed(state: TrainState, batch: Batch, frozen: Any = None) -> tuple[TrainState, dict[str, jax.Array]]:
        state, scalars = step(state, batch, frozen)
        return jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh)), scalars

    return jax.jit(placed, donate_argnums=0, out_shardings=(None, replicated(mesh)))


def apply_gradients(state: TrainState, grads: Params, settings: Train) -> tuple[TrainState, jax.Array, jax.Array]:
    """One update, left out where the gradient is not finite or its norm an outlier.

    Returns (state, norm of the flow's gradient, whether the step was skipped).
    """
    norm, denoiser_norm = (optax.tree.norm(part) for part in split(grads))
    accepted = state.step - state.skipped
    outlier = (accepted >= NORM_WARMUP) & (norm > settings.outlier_factor * state.norm_mean)
    outlier |= settings.skip_over_clip & (norm > settings.clip)
    skip = outlier | ~jnp.isfinite(norm) | ~jnp.isfinite(denoiser_norm)
    updated = lax.cond(skip, lambda: state.replace(skipped=state.skipped + 1),
                       lambda: _update(state, grads, norm, settings))
    return updated.replace(step=state.step + 1), norm, skip


def _update(state: TrainState, grads: Params, norm: jax.Array, settings: Train) -> TrainState:
    (flow, denoiser), (flow_grads, denoiser_grads) = split(state.params), split(grads)
    changes, flow_state = flow_optimizer(settings).update(flow_grads, state.flow_optimizer, flow)
    denoiser_changes, denoiser_state = denoiser_optimizer(settings).update(
        denoiser_grads, state.denoiser_optimizer, denoiser)
    params = optax.apply_updates(state.params, {**changes, **denoiser_changes})
    accepted = state.step - state.skipped
    memory = jnp.where(accepted == 0, 0.0, NORM_MEMORY)
    return state.replace(
        params=params, ema=averaged(state.ema, params, accepted, settings), flow_optimizer=flow_state,
        denoiser_optimizer=denoiser_state,
        norm_mean=memory * state.norm_mean + (1 - memory) * norm)


def encoded(system: System, batch: Batch, frozen: Params) -> Batch:
    """The batch as the step takes it: latents as trained on and, with a frozen text encoder, features; with
    train.target=control also rays. So the weights of a codec or a frozen encoder are no part of the step's program.
    frozen: {"text": its parameters}, or {}."""
    rays_BNSK = rays_of(batch, system.config) if system.config.train.target == "control" else None
    batch = batch.replace(latents_BNhwC=system.latents_of(batch), frames_BTHWC=None, drop_first_B=None,
                          rays_BNSK=rays_BNSK, intrinsics_BT4=None, world_to_camera_BT34=None)
    if frozen and batch.features_BSD is None:
        batch = batch.replace(features_BSD=system.features(frozen, batch.text_B), text_ids_BS=None)
    return batch


def rays_of(batch: Batch, config: Config) -> jax.Array:
    """(B, N, S, K): ray tokens of a batch's cameras, as trained on; of one camera for each image."""
    if batch.intrinsics_BT4 is None or batch.world_to_camera_BT34 is None:
        raise UserError("train.target=control: these data have no cameras; set data.camera=true for moving digits, or "
                        "prepare videos with a camera beside each of them")
    return _rays_of(batch, config.codec.time_stride, config.model)


@partial(jax.jit, static_argnums=(1, 2))
def _rays_of(batch: Batch, time_stride: int, model: Model) -> jax.Array:
    return window_rays(batch.cameras_of_latents(time_stride), model)


def tokens_of(batch: Batch, config: Config) -> int:
    """Latent tokens that a step on this batch trains on."""
    frames = 1 if batch.is_image else config.model.frames
    return batch.clips_B.shape[0] * frames * config.model.tokens_per_frame
