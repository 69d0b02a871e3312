"""Optimizers, schedule, the skipping of bad steps and the training state (DESIGN: training constants)."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from starflow_jax.config import Config, Train
from starflow_jax.model.parameters import Params, init_params

NORM_MEMORY = 0.98  # of the running mean of gradient norms
NORM_WARMUP = 50  # accepted steps before a norm can count as an outlier


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes."""

    step: jax.Array  # int32
    params: Params
    ema: Params
    flow_optimizer: Any  # of flow and text encoder
    denoiser_optimizer: Any
    norm_mean: jax.Array  # running mean of accepted gradient norms
    skipped: jax.Array  # int32: steps whose update was left out
    key: jax.Array  # raw uint32 key data, the base of every step's noise


def schedule(settings: Train) -> optax.Schedule:
    """Linear warm-up, then cosine to the final learning rate."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if settings.warmup_steps else settings.learning_rate, settings.learning_rate,
        settings.warmup_steps, max(settings.steps, settings.warmup_steps + 1), settings.final_learning_rate)


def flow_optimizer(settings: Train) -> optax.GradientTransformation:
    """AdamW (0.9, 0.95) behind a clip by global norm."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(schedule(settings), b1=0.9, b2=0.95, weight_decay=settings.weight_decay))


def denoiser_optimizer(settings: Train) -> optax.GradientTransformation:
    """The denoiser's own AdamW, warmed up and decayed with the flow's."""
    shape, peak = schedule(settings), settings.learning_rate
    rate = lambda count: shape(count) * (settings.denoiser_learning_rate / peak)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(settings.clip),
        optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=settings.weight_decay))


def split(params: Params) -> tuple[Params, Params]:
    """(what the flow's optimizer trains, what the denoiser's does)."""
    return ({name: value for name, value in params.items() if name != "denoiser"},
            {name: value for name, value in params.items() if name == "denoiser"})


def create_state(params: Params, settings: Train) -> TrainState:
    """The state at step 0."""
    flow, denoiser = split(params)
    return TrainState(
        step=jnp.int32(0), params=params, ema=jax.tree.map(jnp.copy, params),
        flow_optimizer=flow_optimizer(settings).init(flow),
        denoiser_optimizer=denoiser_optimizer(settings).init(denoiser),
        norm_mean=jnp.float32(0), skipped=jnp.int32(0),
        key=jax.random.key_data(jax.random.key(settings.seed)))


def abstract_state(config: Config) -> TrainState:
    """Shapes and dtypes of a training state."""
    return jax.eval_shape(lambda: create_state(init_params(config, jax.random.key(0)), config.train))


def apply_gradients(state: TrainState, grads: Params, settings: Train) -> tuple[TrainState, jax.Array, jax.Array]:
    """One update, left out where the gradient is not finite or its norm an outlier.

    Returns (state, norm of the flow's gradient, whether the step was skipped).
    """
    norm, denoiser_norm = (optax.tree.norm(part) for part in split(grads))
    accepted = state.step - state.skipped
    outlier = (accepted >= NORM_WARMUP) & (norm > settings.outlier_factor * state.norm_mean)
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
    decay = jnp.minimum(settings.ema, (1 + accepted) / (10 + accepted))
    ema = jax.tree.map(lambda old, now: old + (1 - decay) * (now - old), state.ema, params)
    memory = jnp.where(accepted == 0, 0.0, NORM_MEMORY)
    return state.replace(
        params=params, ema=ema, flow_optimizer=flow_state, denoiser_optimizer=denoiser_state,
        norm_mean=memory * state.norm_mean + (1 - memory) * norm)
