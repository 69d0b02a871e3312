"""train.target=lora, control, student: parameters that are trained beside a model, which stays as it is."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.checkpoints.growth import Change
from starflow_jax.config import Config
from starflow_jax.data.batch import Batch
from starflow_jax.model.control import fresh_module, with_module
from starflow_jax.model.lora import fresh_factors, with_factors
from starflow_jax.model.own_settings import backbone_config
from starflow_jax.model.parameters import Params
from starflow_jax.model.quantize import quantize_param
from starflow_jax.model.store import abstract_params, load_backbone
from starflow_jax.model.student import fresh_block, with_block
from starflow_jax.model.system import System
from starflow_jax.training.metrics import MetricWriter
from starflow_jax.training.state import TrainState, create_state
from starflow_jax.training.step import encoded, make_train_step
from starflow_jax.training.target import FlowTarget, Scalars
from starflow_jax.training.validation import validate


class Beside(NamedTuple):
    """What is trained."""

    fresh: Callable[[Config, jax.Array], Params]  # from a key
    whole: Callable[[Config, Params, Params], Params]  # (config, the frozen model's parameters, these) -> the model's


PARTS = {"lora": Beside(fresh_factors, with_factors), "control": Beside(fresh_module, with_module),
         "student": Beside(fresh_block, with_block)}


class BesideTarget(FlowTarget):
    """The part that train.target names. The backbone is an argument of each step and no part of its state, and so has
    neither gradients nor an optimizer's moments nor an average."""

    def __init__(self, system: System, mesh: Mesh) -> None:
        super().__init__(system, mesh)
        config = system.config
        weights = frozen_as(config)
        self._backbone = load_backbone(config, partial(quantize_param, weights=weights) if weights else None).params

    def abstract_state(self) -> TrainState:
        return sharding.abstract(jax.eval_shape(partial(_create, self._system.config)), self._mesh)

    def initial_state(self) -> tuple[TrainState, list[Change]]:
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(partial(_create, self._system.config), out_shardings=placed)(), []

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Scalars]:
        return self._step(state, encoded(self._system, batch, self._encoder), self._backbone)

    def validate(self, state: TrainState, writer: MetricWriter) -> dict[str, float]:
        config = self._system.config
        model = PARTS[config.train.target].whole(config, self._backbone, state.ema)
        return validate(self._system, {**model, **self._encoder}, int(state.step), writer)

    def _compile_step(self) -> Any:
        return beside_step(self._system.config, self._mesh)


def frozen_as(config: Config) -> str:
    """What the backbone's matrices are kept as, as sample.weights says it."""
    return config.lora.weights if config.train.target == "lora" else ""


def beside_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """`make_train_step` of the part that train.target names; the frozen parameters that it takes are the backbone's."""
    whole = with_teacher if config.train.target == "student" else PARTS[config.train.target].whole
    return make_train_step(config, mesh, partial(whole, config))


def with_teacher(config: Config, frozen: Params, trained: Params) -> Params:
    """The student's model, with the deep block that it is compared to as "teacher"."""
    return {**with_block(config, frozen, trained), "teacher": frozen["flow"]["deep"]}


def abstract_beside(config: Config, mesh: Mesh) -> tuple[TrainState, Any]:
    """(a training state of that part, the backbone) on a mesh, in shapes."""
    return (sharding.abstract(jax.eval_shape(partial(_create, config)), mesh),
            abstract_params(backbone_config(config), mesh, frozen_as(config)))


def _create(config: Config) -> TrainState:
    fresh = PARTS[config.train.target].fresh
    return create_state(fresh(config, jax.random.key(config.train.seed)), config.train)
