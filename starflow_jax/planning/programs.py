"""The programs of a training or sampling step, compiled from shapes alone."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.config import Config
from starflow_jax.data.batch import Batch
from starflow_jax.flow.control import ray_channels
from starflow_jax.model.parameters import init_params
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning.array_kinds import contents_of
from starflow_jax.planning.chain import Chain
from starflow_jax.planning.likelihood import likelihood_programs
from starflow_jax.planning.program import Program
from starflow_jax.planning.sampling import sampling_programs
from starflow_jax.training.beside_target import PARTS, abstract_beside, beside_step
from starflow_jax.training.state import abstract_state
from starflow_jax.training.step import make_train_step


def abstract_params_of(config: Config) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def compile_step(config: Config, mesh: Mesh) -> list[Program]:
    if config.plan.step == "train":
        return _train_programs(config, mesh)
    if config.plan.step == "sample":
        return sampling_programs(config, mesh)
    if config.plan.step == "likelihood":
        return likelihood_programs(config, mesh)
    return plan_codec.compile_codec(config, sharding.replicated(mesh))


def training_bytes(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(bytes of what is trained with its moments and averages, of the model beside it that stays as it is), whole."""
    if config.train.target in PARTS:
        trained, frozen = abstract_beside(config, mesh)
        return _size(trained), _size(frozen)
    return _size(abstract_state(config)), 0


def _size(tree: Any) -> int:
    """Bytes of arrays in shapes."""
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _train_programs(config: Config, mesh: Mesh) -> list[Program]:
    """The training step on latents and text features that were prepared before; of LoRA, a control module or a smaller
    deep block beside its whole backbone."""
    model, clips = config.model, config.train.batch_size
    by_clip = sharding.batch_sharding(mesh)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=by_clip)

    batch = Batch(latents_BNhwC=array(clips, model.frames, model.height, model.width, model.channels),
                  features_BSD=array(clips, model.text_length, model.text_dim))
    if config.train.target in PARTS:
        if config.train.target == "control":
            channels = ray_channels(model, config.codec.time_stride)
            batch = batch.replace(rays_BNSK=array(clips, model.frames, model.tokens_per_frame, channels))
        trained, backbone = abstract_beside(config, mesh)
        chain = Chain({}, (trained, backbone))
        chain.run("train", beside_step(config, mesh), trained, batch, backbone)
        return chain.programs
    state, step = sharding.abstract(abstract_state(config), mesh), make_train_step(config, mesh)
    lowered = step.lower(state, batch)
    return [Program("train", lowered.compile(), lowered=lowered,
                    contents=contents_of(step, (state, batch), {}, lowered.out_info, state))]
