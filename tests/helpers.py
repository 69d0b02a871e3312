"""What several tests share: a tiny model and parameters in which nothing is zero."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Config, Model, Sample, Solver
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.parameters import init_params

HEAD_DIM = 20


def tiny_model(**changes: Any) -> Model:
    """Latents of 2 frames of 2x3 with 2 channels, two shallow blocks, text of 3 tokens, no denoiser."""
    settings: dict[str, Any] = dict(
        channels=2, frames=2, height=2, width=3, shallow_layers=(1, 1), shallow_width=40, deep_layers=2,
        deep_width=40, head_dim=HEAD_DIM, text_length=3, text_dim=4, denoiser="none")
    return Model(**{**settings, **changes})


def latents(model: Model, batch: int = 1, frames: int = 0, seed: int = 10) -> jax.Array:
    """(B, T, H, W, C) random latents of the model's size."""
    shape = (batch, frames or model.frames, model.height, model.width, model.channels)
    return as_jax(np.random.default_rng(seed).normal(size=shape))


def as_jax(random: np.ndarray) -> jax.Array:
    """In JAX's default precision. NumPy rounds and device_put copies: jnp.asarray would compile a program for each
    shape."""
    return jax.device_put(random.astype(jax.dtypes.canonicalize_dtype(float)))


def text(model: Model, batch: int = 1, seed: int = 20) -> jax.Array | None:
    """(B, text_length, text_dim) random features, None for a model without text."""
    shape = (batch, model.text_length, model.text_dim)
    return as_jax(np.random.default_rng(seed).normal(size=shape)) if model.text_length else None


def fresh(model: Model) -> tuple[STARFlow, Any]:
    """The flow and its parameters at the start of training."""
    flow = STARFlow(model)
    return flow, jax.jit(flow.init)(jax.random.key(0), latents(model), text(model))


def randomised(variables: Any, scale: float = 0.5, seed: int = 1) -> Any:
    """The variables with scale * normal / sqrt(fan in) added to each: fresh output projections are zero."""
    random = np.random.default_rng(seed)

    def add(path: Any, leaf: jax.Array) -> jax.Array:
        axis = -3 if "qkv" in jax.tree_util.keystr(path) else -2
        fan_in = leaf.shape[axis] if leaf.ndim > 1 else 1
        added = scale / np.sqrt(fan_in) * random.normal(size=leaf.shape)
        return jax.device_put(np.asarray(leaf) + np.asarray(added, leaf.dtype))

    return jax.tree_util.tree_map_with_path(add, variables)


def random_variables(shapes: Any, scale: float = 0.5, seed: int = 1) -> Any:
    """Variables of these shapes as `randomised` makes them of fresh ones, without compiling their drawing."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [key.key for key in path]
        if names[-1] == "scale" or names[-1] == "weight" and "text" in names:  # of a norm
            return np.ones(leaf.shape, leaf.dtype)
        if names[-1] not in ("kernel", "embedding", "sos", "position_bias") or names[-2] == "proj_out":
            return np.zeros(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[-3 if "qkv" in names else -2] if names[-1] == "kernel" else 1
        return np.asarray(random.normal(size=leaf.shape) / np.sqrt(fan_in), leaf.dtype)

    return randomised(jax.tree_util.tree_map_with_path(draw, shapes), scale, seed)


@functools.cache
def _shapes_of_flow(model: Model, x64: bool) -> Any:
    del x64  # another dtype of the parameters
    return jax.eval_shape(STARFlow(model).init, jax.random.key(0), latents(model), text(model))


@functools.cache
def _shapes_of_params(config: Config) -> Any:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def random_flow(model: Model, seed: int = 1) -> tuple[STARFlow, Any]:
    """The flow and random parameters."""
    return STARFlow(model), random_variables(_shapes_of_flow(model, jax.config.jax_enable_x64), seed=seed)


@functools.partial(jax.jit, static_argnums=0)
def forward(flow: STARFlow, variables: Any, x: jax.Array, features: jax.Array | None) -> Any:
    """The flow's FlowOutput."""
    return flow.apply(variables, x, features, method=STARFlow.forward)


def random_params(config: Config, scale: float = 0.5, seed: int = 1) -> Any:
    """Random parameters of flow, denoiser and trained text encoder."""
    return random_variables(_shapes_of_params(config), scale, seed)


def depends(jacobian: np.ndarray, out_axis: int, in_axis: int) -> np.ndarray:
    """(outputs, inputs) bool: whether any derivative along two chosen axes is not exactly zero."""
    axes = tuple(axis for axis in range(jacobian.ndim) if axis not in (out_axis, in_axis))
    return np.abs(np.asarray(jacobian)).max(axis=axes) > 0


def changed(settings: Sample, **changes: Any) -> Sample:
    """Sampling settings with some of them changed; those of the solver by their own names."""
    of_solver = {field.name for field in dataclasses.fields(Solver)}
    solver = dataclasses.replace(settings.solver, **{name: changes[name] for name in changes if name in of_solver})
    rest = {name: value for name, value in changes.items() if name not in of_solver}
    return dataclasses.replace(settings, solver=solver, **rest)


@contextlib.contextmanager
def flipped_bits(path: Path) -> Iterator[Path]:
    """A file with two flipped bits in its middle; then it is as it was."""
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for at in (len(whole) // 2, len(whole) // 2 + 1):
        damaged[at] ^= 1
    path.write_bytes(damaged)
    try:
        yield path
    finally:
        path.write_bytes(whole)
