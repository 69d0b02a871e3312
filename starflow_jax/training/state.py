"""The training state: all that a checkpoint holds besides the data position."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from starflow_jax.config import Config, Train
from starflow_jax.model.parameters import Params, init_params
from starflow_jax.training.optimizer import denoiser_optimizer, flow_optimizer, split


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes. Checkpoints store the arrays under these names."""

    step: jax.Array  # int32
    params: Params
    ema: Params  # the averaged parameters
    flow_optimizer: Any  # of flow and text encoder
    denoiser_optimizer: Any
    norm_mean: jax.Array  # running mean of accepted gradient norms
    skipped: jax.Array  # int32: steps whose update was left out
    key: jax.Array  # raw uint32 key data, the base of every step's noise


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
