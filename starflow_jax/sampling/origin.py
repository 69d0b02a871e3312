"""Where a video comes from, as the JSON beside it says."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from starflow_jax import sharding
from starflow_jax.flow import decode
from starflow_jax.model.parameters import Params, decoding_variables
from starflow_jax.model.store import LoadedModel
from starflow_jax.model.system import System
from starflow_jax.sampling.identity import Recipe


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model, what was given, and what they take of each device."""

    model: str
    weights: str  # checksums, as in Recipe
    system: str
    given: str
    dtype: str
    device: str
    mesh: dict[str, int]  # sizes of its axes; {}: one device
    parameter_bytes_per_device: int
    cache_bytes_per_device: int


def origin_of(loaded: LoadedModel, system: System, recipe: Recipe, videos: int) -> Origin:
    """Of videos that `system` makes, so many together, on the mesh in force."""
    mesh = sharding.current_mesh()
    return Origin(
        model=loaded.source, weights=recipe.weights, system=recipe.system, given=recipe.given,
        dtype=system.config.model.dtype, device=jax.devices()[0].device_kind, mesh=dict(mesh.shape) if mesh else {},
        parameter_bytes_per_device=bytes_per_device((loaded.params, system.codec)),
        cache_bytes_per_device=cache_bytes_per_device(system, loaded.params, videos))


def bytes_per_device(arrays: Any) -> int:
    """The most bytes that a device of this process holds of a pytree's arrays."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(arrays):
        on_devices = isinstance(leaf, jax.Array) and not sharding.is_on_host(leaf)
        for shard in leaf.addressable_shards if on_devices else ():
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)


def cache_bytes_per_device(system: System, params: Params, videos: int) -> int:
    """Bytes of keys and values that the deep block keeps of so many videos."""
    model, settings, mesh = system.config.model, system.config.sample, sharding.current_mesh()
    branches = 2 if settings.guided else 1
    known = jax.ShapeDtypeStruct((videos, 0, model.tokens_per_frame, model.token_channels), np.float32)
    text = jax.ShapeDtypeStruct((branches, videos, model.text_length, model.text_dim), np.float32)
    cache = jax.eval_shape(
        lambda params, known, text: decode.start_window(
            system.flow, params, known, text, window=model.frames, token_grid=system.token_grid,
            cache=settings.cache).known.cache,
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), decoding_variables(params)),
        known, text if model.text_length else None)
    leaves = jax.tree.leaves(cache)
    shapes = [leaf.shape for leaf in leaves] if mesh is None else [
        placed.shard_shape(leaf.shape) for leaf, placed in zip(leaves, jax.tree.leaves(cache.shardings(mesh)))]
    return sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, leaves))

