"""What a training run trains (train.target), as the loop sees it; and the flow with all its parts, the usual target."""

import dataclasses
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.checkpoints.growth import Change
from starflow_jax.data.batch import Batch
from starflow_jax.model.initialise import initial_params
from starflow_jax.model.system import System
from starflow_jax.model.text import frozen_encoder_params
from starflow_jax.training.metrics import MetricWriter
from starflow_jax.training.state import TrainState, abstract_state, create_state
from starflow_jax.training.step import encoded, make_train_step
from starflow_jax.training.validation import validate

Scalars = dict[str, jax.Array]


class Target(Protocol):
    """What is trained: its state, a step of it and its validation. States have `step` and `skipped`."""

    shown: str  # which of a step's scalars stands beside the progress bar
    unit: str  # and in what

    def abstract_state(self) -> Any:
        """Shapes, dtypes and shardings of the state."""

    def initial_state(self) -> tuple[Any, list[Change]]:
        """The state at step 0, and what was changed in the model of train.init_from."""

    def step(self, state: Any, batch: Batch) -> tuple[Any, Scalars]:
        """One step; the state that is given is used up."""

    def validate(self, state: Any, writer: MetricWriter) -> dict[str, float]:
        """Measure the averaged parameters, and write what is found."""


class FlowTarget:
    """The flow, its denoiser and a trained text encoder."""

    shown, unit = "bits_per_dim", "bits/dim"

    def __init__(self, system: System, mesh: Mesh) -> None:
        self._mesh = mesh
        self._system = dataclasses.replace(system, codec=jax.device_put(system.codec, sharding.replicated(mesh)))
        self._encoder = sharding.spread(frozen_encoder_params(system.config), mesh)
        self._step = self._compile_step()

    def abstract_state(self) -> TrainState:
        return sharding.abstract(abstract_state(self._system.config), self._mesh)

    def initial_state(self) -> tuple[TrainState, list[Change]]:
        settings = self._system.config.train
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        params, changes = initial_params(self._system.config, jax.random.key(settings.seed), placed.params)
        return jax.jit(lambda params: create_state(params, settings), out_shardings=placed)(params), changes

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        return self._step(state, encoded(self._system, batch, self._encoder))

    def validate(self, state: TrainState, writer: MetricWriter) -> dict[str, float]:
        return validate(self._system, {**state.ema, **self._encoder}, int(state.step), writer)

    def _compile_step(self) -> Any:
        return make_train_step(self._system.config, self._mesh)
