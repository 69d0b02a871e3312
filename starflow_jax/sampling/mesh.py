"""The mesh that a trained model is used on: config.mesh, or what suits the model and the number of videos.

Decoding a few tokens reads every weight, so weights stay on the devices that hold them, spread over as many as divide
the heads; further devices take further videos.
"""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import Config, UserError

SMALLEST_SHARD = 64 * 2**20  # bytes of layers that are worth a device: of fewer, moving activations costs more


def sampling_mesh(config: Config, videos: int, devices: list[jax.Device] | None = None) -> Mesh:
    """config.mesh over the devices (default: this process's, or all processes' where its product is their number), or
    over the first of them where it wants fewer; where it is not set, `suited`.

    Raises UserError where the mesh does not suit the devices or the model, and for a stream over two devices on one.
    """
    local = jax.local_devices() if devices is None else devices
    split = config.sample.stream and config.sample.devices > 1  # its stages lie on devices of their own
    settings = config.mesh
    if settings == settings_of.Mesh():
        settings = settings_of.Mesh(1) if split else suited(config, len(local), videos)
    wanted = math.prod(dataclasses.astuple(settings))
    if devices is None and wanted == jax.device_count():
        local = jax.devices()
    mesh = sharding.make_mesh(settings, local[:wanted or None])
    sharding.check_model(config.model, mesh)
    if split and mesh.size > 1:
        raise UserError(f"sample.devices={config.sample.devices}: splits a stream's stages over single devices, and "
                        "config.mesh shards them; leave one of them out")
    return mesh


def suited(config: Config, devices: int, videos: int) -> settings_of.Mesh:
    """A mesh of at most `devices`: weights over as many as divide the heads and get SMALLEST_SHARD each, the rest over
    videos."""
    model = config.model
    heads = math.gcd(model.deep_width, model.shallow_width) // model.head_dim
    layers = model.deep_layers * model.deep_width**2 + sum(model.shallow_layers) * model.shallow_width**2
    worth = max(1, 12 * layers * jnp.dtype(model.dtype).itemsize // SMALLEST_SHARD)
    tensor = max(size for size in range(1, devices + 1) if math.gcd(devices, heads) % size == 0 and size <= worth)
    return settings_of.Mesh(data=math.gcd(devices // tensor, videos), tensor=tensor)


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager:
    """The mesh in force, for loading a model and for using it; one of a single device changes nothing."""
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()
