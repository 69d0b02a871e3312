"""What several tests share: a tiny model and parameters in which nothing is zero."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Model, Sample, Solver
from starflow_jax.flow.starflow import STARFlow

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
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.zeros(()).dtype)


def text(model: Model, batch: int = 1, seed: int = 20) -> jax.Array | None:
    """(B, text_length, text_dim) random features, None for a model without text."""
    shape = (batch, model.text_length, model.text_dim)
    random = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(random, jnp.zeros(()).dtype) if model.text_length else None


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
        return leaf + jnp.asarray(scale / np.sqrt(fan_in) * random.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, variables)


def random_flow(model: Model, seed: int = 1) -> tuple[STARFlow, Any]:
    """The flow and randomised parameters."""
    flow, variables = fresh(model)
    return flow, randomised(variables, seed=seed)


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
