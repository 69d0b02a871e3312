"""The programs of a training or sampling step, compiled from shapes alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.config import Config, Solver
from starflow_jax.data.batch import Batch
from starflow_jax.flow import decode, inversion
from starflow_jax.flow.decode import WindowState
from starflow_jax.flow.inversion import Known
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import flow_variables, init_params
from starflow_jax.model.quantize import quantize_params
from starflow_jax.nn.cache import KVCache
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning.program import Program
from starflow_jax.sampling.solver import complete, shallow_solver
from starflow_jax.training.state import abstract_state
from starflow_jax.training.step import make_train_step


def abstract_params_of(config: Config) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def compile_step(config: Config, mesh: Mesh) -> list[Program]:
    if config.plan.step == "train":
        return [Program("train", _compile_train(config, mesh))]
    if config.plan.step == "sample":
        return _compile_sample(config, mesh)
    return plan_codec.compile_codec(config, sharding.replicated(mesh))


def _compile_train(config: Config, mesh: Mesh) -> Any:
    """The training step on latents and text features that were prepared before."""
    model, clips = config.model, config.train.batch_size
    sharding.check_batch("train.batch_size / train.accumulate", clips // config.train.accumulate, mesh)
    by_clip = sharding.batch_sharding(mesh)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=by_clip)

    batch = Batch(latents_BNhwC=array(clips, model.frames, model.height, model.width, model.channels),
                  features_BSD=array(clips, model.text_length, model.text_dim))
    state = sharding.abstract(abstract_state(config), mesh)
    return make_train_step(config, mesh).lower(state, batch).compile()


def _compile_sample(config: Config, mesh: Mesh) -> list[Program]:
    """The programs that make a video: a frame of the deep block, its shallow blocks, the denoiser over the window."""
    model, videos = config.model, config.plan.videos
    flow, grid = STARFlow(model), (model.height // model.patch_size, model.width // model.patch_size)
    branches, tokens = 2 if config.sample.guidance else 1, model.tokens_per_frame
    solver = complete(config.sample.solver, Solver(), model)
    block = min(solver.block_size, tokens)
    dtype, whole = jnp.dtype(model.dtype), sharding.replicated(mesh)

    def array(shape: tuple[int, ...], dtype: Any = jnp.float32, placed: Any = whole) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    params = jax.tree.map(lambda leaf: array(leaf.shape, dtype), abstract_params_of(config))
    if config.sample.weights == "int8":
        params = jax.eval_shape(quantize_params, params)
    params = sharding.abstract(params, mesh)
    variables = flow_variables(params)
    slots = model.text_length + model.frames * tokens
    heads = model.deep_width // model.head_dim
    cache = jax.eval_shape(partial(KVCache.empty, model.deep_layers, branches * videos, slots, heads, model.head_dim,
                                   jnp.int8 if config.sample.cache == "int8" else dtype))
    cache = jax.tree.map(lambda leaf, placed: array(leaf.shape, leaf.dtype, placed), cache, cache.shardings(mesh))
    known = Known(cache, array((videos, 1, model.token_channels)))
    state = WindowState(known, array((videos, tokens, model.token_channels)), array((), jnp.int32))
    deep = decode.decode_frames.lower(
        flow, variables, state, array((videos, 1, tokens, model.token_channels)), array(()),
        solver=inversion.Solver(block, solver.tolerance), window=model.frames, token_grid=grid, branches=branches)
    shallow = decode.invert_shallow.lower(
        flow, variables, array((videos, 1, tokens, model.token_channels)),
        solver=shallow_solver(solver), token_grid=grid)
    updates = config.plan.updates
    programs = [Program("deep block, a frame", deep.compile(), model.frames, updates),
                Program("shallow blocks, a frame", shallow.compile(), model.frames, updates)]
    if model.denoiser != "none":
        x = array((videos, model.frames, model.height, model.width, model.channels))
        text = array((videos, model.text_length, model.text_dim), dtype)
        run = jax.jit(lambda v, x, text: apply_flow(flow, v, STARFlow.score, x, text))
        programs.append(Program("denoiser, a window", run.lower(variables, x, text).compile()))
    return programs
