"""train.target=student: a smaller deep block, which begins with parts of the one that it is to replace."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.checkpoints.growth import Change
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.own_settings import backbone_config
from starflow_jax.model.parameters import Params
from starflow_jax.model.student import Deep, Magnitudes, chosen_layers, cut, flow_of, kept_parts
from starflow_jax.model.system import System
from starflow_jax.nn.transformer import unstacked
from starflow_jax.sampling.conditions import shallow_tokens
from starflow_jax.sampling.likelihood import likelihood_batches, noised_latents
from starflow_jax.sharding import fetch
from starflow_jax.training.beside_target import BesideTarget
from starflow_jax.training.state import TrainState, create_state

# What is watched: the outputs of these modules of a layer, or the inputs of those.
NORMS, ATTENTION, HIDDEN = ("attention_norm", "mlp_norm"), "proj", "mlp_out"


class StudentTarget(BesideTarget):
    """The deep block, of the config's sizes; all of its teacher stays as it is."""

    def __init__(self, system: System, mesh: Mesh) -> None:
        sharding.check_model(backbone_config(system.config).model, mesh)
        super().__init__(system, mesh)

    def initial_state(self) -> tuple[TrainState, list[Change]]:
        config = self._system.config
        if config.student.start == "random":
            return super().initial_state()
        deep = self._backbone["flow"]["deep"]
        teacher = flow_of(config.model, deep).config
        layers_l = chosen_layers(config, teacher)
        narrower = config.model.deep_width < teacher.deep_width
        found = magnitudes(self._system, {**self._backbone, **self._encoder}) if narrower else None
        kept = kept_parts(layers_l, config.model, teacher, found)
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())

        def begin(deep: Deep) -> TrainState:
            return create_state({"flow": {"deep": cut(deep, kept, config.model.head_dim)}}, config.train)

        return jax.jit(begin, out_shardings=placed)(deep), []


def magnitudes(system: System, params: Params) -> Magnitudes:
    """Of the deep block in `params` on the first student.clips noised training clips, means over slots and
    batches."""
    flow, found = flow_of(system.config.model, params["flow"]["deep"]), list[Magnitudes]()
    for index, batch in enumerate(likelihood_batches(system, "train", system.config.student.clips)):
        u_BTSK = shallow_tokens(flow, params, noised_latents(system, batch, index))
        found.append(jax.tree.map(fetch, _magnitudes(
            flow, params["flow"]["deep"], u_BTSK, system.text_of(params, batch.text_B), token_grid=system.token_grid)))
    return jax.tree.map(lambda *of_batches: np.mean(of_batches, axis=0), *found)


@partial(jax.jit, static_argnames=("flow", "token_grid"))
def _magnitudes(flow: STARFlow, deep: Deep, u_BTSK: jax.Array, text_BTD: jax.Array, *, token_grid: tuple[int, int]
                ) -> Magnitudes:
    """Of one batch. The layers' modules are watched, one layer after the other: of a loop over a stack nothing would
    come out."""
    seen: dict[str, list[jax.Array]] = {name: [] for name in (*NORMS, ATTENTION, HIDDEN)}
    inside = False  # of a module that is watched: its method calls that of the class it is made from

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal inside
        name = context.module.name
        if inside or name not in seen:
            return call(*args, **kwargs)
        inside = True
        out = call(*args, **kwargs)
        inside = False
        values = jnp.abs(out if name in NORMS else args[0]).astype(jnp.float32)
        seen[name].append(values.mean(axis=tuple(range(values.ndim - 1))))
        return out

    with nn.intercept_methods(watch):
        apply_flow(flow, {"params": {"deep": unstacked(deep)}}, STARFlow.deep_forward, u_BTSK, token_grid, text_BTD)
    channels_LD = jnp.stack(seen[NORMS[0]]) + jnp.stack(seen[NORMS[1]])
    heads_LH = jnp.stack(seen[ATTENTION]).reshape(len(channels_LD), -1, flow.config.head_dim).mean(axis=-1)
    return Magnitudes(channels_LD, heads_LH, jnp.stack(seen[HIDDEN]))
