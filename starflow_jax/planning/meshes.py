"""Which mesh suits a step on a number of devices, and which others are worth trying."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import jax

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import REMAT, Config, UserError
from starflow_jax.sampling import mesh

USES = ("sample", "likelihood")  # the steps of a trained model


def chosen(config: Config, devices: int) -> Config:
    """The config on its own mesh where that fits the devices, else on the one that suits its step; the use of
    a trained model leaves devices unused that its videos do not need."""
    sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
    explicit = config.mesh != settings_of.Mesh() and devices % math.prod(size for size in sizes if size) == 0
    return config if explicit else dataclasses.replace(config, mesh=suited(config, devices))


def suited(config: Config, devices: int) -> settings_of.Mesh:
    """Training: as many shards of the batch as divide it, the rest over tokens. Else as sampling and evaluation choose.
    """
    if config.plan.step == "sample":
        return mesh.suited(config, devices, config.plan.videos)
    if config.plan.step == "likelihood":
        return mesh.suited(config, devices, min(config.evaluate.draws, config.evaluate.batch_size))
    fsdp = math.gcd(devices, config.train.batch_size // config.train.accumulate)
    return settings_of.Mesh(data=1, fsdp=fsdp, sequence=devices // fsdp)


def candidates(config: Config, devices: int) -> Iterator[Config]:
    """Meshes over powers of two and rematerialisations that the model and batch divide over; of a codec its dtypes,
    with whole frames and with tiles."""
    if config.plan.step == "codec":
        for dtype, tile in itertools.product(("bfloat16", "float32"), (0, 2 * config.codec.tile_overlap)):
            yield dataclasses.replace(chosen(config, devices),
                                      codec=dataclasses.replace(config.codec, dtype=dtype, tile=tile))
        return
    remats = REMAT[1:] if config.plan.step == "train" else ("none",)
    for tensor, sequence in itertools.product((1, 2, 4, 8), repeat=2):
        for fsdp in {devices // (tensor * sequence), math.gcd(devices // (tensor * sequence), 64)} - {0}:
            data = devices // (tensor * sequence * fsdp)
            if data * fsdp * tensor * sequence != devices or (config.plan.step in USES and fsdp * sequence > 1):
                continue
            tried = settings_of.Mesh(data, fsdp, tensor, sequence)
            abstract = jax.sharding.AbstractMesh((data, fsdp, tensor, sequence), sharding.AXES)
            try:
                sharding.check_model(config.model, abstract)
                if config.plan.step == "train":
                    sharding.check_batch("", config.train.batch_size // config.train.accumulate, abstract)
            except UserError:
                continue
            for remat in remats:
                yield dataclasses.replace(config, mesh=tried, model=dataclasses.replace(config.model, remat=remat))
