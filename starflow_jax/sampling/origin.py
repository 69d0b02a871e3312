"""Where a video comes from, as the JSON beside it says; from which a later run knows that it need not be made again."""

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax import sharding
from starflow_jax.config import Sample
from starflow_jax.flow import decode
from starflow_jax.model.parameters import Params, decoding_variables
from starflow_jax.model.store import LoadedModel
from starflow_jax.model.system import System
from starflow_jax.sampling.requests import Request

# Settings of `sample` that say which videos are made, where and how many at a time, but not what is in them.
OF_THE_LIST = ("prompt", "prompts_file", "vbench", "image", "video", "count", "keep", "seed", "batch_size", "output",
               "checkpoint")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model, what was given, and what they take of each device."""

    model: str
    weights: str  # a checksum
    given: str  # checksum of the given frames; "": none
    dtype: str
    device: str
    mesh: dict[str, int]  # sizes of its axes; {}: one device
    parameter_bytes_per_device: int
    cache_bytes_per_device: int


def origin_of(loaded: LoadedModel, system: System, known_THWC: np.ndarray | None, videos: int) -> Origin:
    """Of videos that `system` makes, so many together, on the mesh in force."""
    mesh = sharding.current_mesh()
    given = "" if known_THWC is None else f"{zlib.crc32(known_THWC.tobytes()):08x}"
    return Origin(loaded.source, loaded.weights, given, system.config.model.dtype, jax.devices()[0].device_kind,
                  dict(mesh.shape) if mesh else {}, bytes_per_device((loaded.params, system.codec)),
                  cache_bytes_per_device(system, loaded.params, videos))


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


def made_before(path: Path, request: Request, settings: Sample, origin: Origin) -> dict[str, Any] | None:
    """What the JSON file of a video says, where the video is there and of the same prompt, seed, settings, weights and
    given frames; else None."""
    try:
        facts = json.loads(path.read_text())
        same = (facts["weights"], facts["given"], facts["dtype"], facts["prompt_given"], facts["seed"]) == (
            origin.weights, origin.given, origin.dtype, request.given or request.prompt, request.seed)
        same = same and "outcome" in facts
        # Which of a prompt's videos is kept depends on which were made.
        left_out = set(OF_THE_LIST) - ({"count", "keep", "seed"} if settings.keep else set())
        return facts if same and _without(facts["settings"], left_out) == _without(plain(settings), left_out) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def plain(settings: Sample) -> dict[str, Any]:
    """The settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}
