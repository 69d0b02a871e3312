"""LoRA: low-rank factors of a model's matrices, which train.target=lora trains beside it; read, and added to it.

As trained they are a tree like the model's parameters, {"flow": {"deep": ... {"qkv": {"lora_a", "lora_b"}}}}; as read a
flat one, {name of the matrix: Factors}, with every scale in B.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import traverse_util

from starflow_jax import sharding
from starflow_jax.config import Config, Model, UserError
from starflow_jax.model.beside import checksum_of, read_checkpoint
from starflow_jax.model.parameters import Params
from starflow_jax.nn.lora import Adapted, merged

with epy.lazy_imports():
    from starflow_jax.checkpoints import peft, released

A, B = "lora_a", "lora_b"


class Factors(NamedTuple):
    """Of one matrix of stacked layers (L, in, *features)."""

    lora_a: Any  # (L, in, r)
    lora_b: Any  # (L, r, *features)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Factors as they were read, their scales in B."""

    factors: Mapping[str, Factors]
    backbone: str  # beside.fingerprint_of the model that they were trained beside; "": not known
    source: str

    @property
    def checksum(self) -> str:
        """Equal for equal factors."""
        return checksum_of({f"{name}/{part}": array for name, of_one in self.factors.items()
                            for part, array in of_one._asdict().items()})


def kernel_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """{"flow/deep/...": shape} of every matrix of the flow's and the denoiser's layers."""
    return {name if name.startswith("denoiser/") else f"flow/{name}": shape
            for name, shape in released.flow_shapes(model).items() if sharding.is_layer_matrix(name)}


def adapted_kernels(config: Config) -> dict[str, tuple[int, ...]]:
    """Those of them that config.lora trains factors of."""
    settings = config.lora
    blocks = [{"shallow": r"flow/shallow_\d+", "deep": "flow/deep", "denoiser": "denoiser"}[name]
              for name in settings.named_blocks]
    pattern = f"({'|'.join(blocks)})/.*/({'|'.join(settings.named_targets)})/kernel"
    return {name: shape for name, shape in kernel_shapes(config.model).items() if re.fullmatch(pattern, name)}


def fresh_factors(config: Config, key: jax.Array) -> Params:
    """What training begins with, float32: A uniform within 1 / sqrt(in), B zero, so that the model is its backbone."""
    rank, flat = config.lora.rank, {}
    draw = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=0)
    kernels = adapted_kernels(config)
    for one, (name, (layers, inputs, *features)) in zip(jax.random.split(key, len(kernels)), kernels.items()):
        path = name.removesuffix("/kernel")
        flat[f"{path}/{A}"] = draw(one, (layers, inputs, rank), jnp.float32)
        flat[f"{path}/{B}"] = jnp.zeros((layers, rank, *features))
    return traverse_util.unflatten_dict(flat, sep="/")


def with_factors(config: Config, frozen: Params, factors: Params) -> Params:
    """The model's parameters: those of the backbone, with factors as trained beside the matrices that have them."""
    params, trained = traverse_util.flatten_dict(frozen), traverse_util.flatten_dict(factors)
    scale = config.lora.alpha / config.lora.rank
    for *path, leaf in trained:
        if leaf == A:
            lora_a, lora_b = trained[(*path, A)], trained[(*path, B)]
            params[(*path, "kernel")] = Adapted(params[(*path, "kernel")], lora_a, scale * lora_b)
    return traverse_util.unflatten_dict(params)


def read_all(config: Config, workdir: Path) -> list[Lora]:
    """The factors of a workdir that train.target=lora made, then those of sample.lora.

    Raises UserError where one is missing or damaged, or its matrices are not this model's.
    """
    own = [read_workdir(workdir, config.sample.checkpoint == "best")] if config.train.target == "lora" else []
    return _fitting(config, own) + read_named(config)


def read_named(config: Config) -> list[Lora]:
    """Those of sample.lora. Raises UserError as `read_all` does."""
    found = []
    for name, scale in config.sample.adapters:
        one = read_lora(config, Path(name), config.sample.checkpoint == "best")
        found.append(dataclasses.replace(one, factors={
            kernel: Factors(a, scale * b) for kernel, (a, b) in one.factors.items()}))
    return _fitting(config, found)


def read_lora(config: Config, path: Path, best: bool) -> Lora:
    """The factors of a workdir, of one of its checkpoints, or of PEFT's files (checkpoints/peft.py)."""
    if (path / "checkpoints").is_dir() or (path / "state").is_dir():
        return read_workdir(path, best)
    factors, backbone = peft.read_peft(path, config.model)
    return Lora({name: Factors(*pair) for name, pair in factors.items()}, backbone, f"LoRA {path}")


def read_workdir(path: Path, best: bool) -> Lora:
    """The averaged factors of a workdir's newest or best checkpoint, or of one of its checkpoints.

    Raises UserError where there are none, and where all are damaged.
    """
    found = read_checkpoint(path, best, "lora")
    try:
        scale = found.settings["alpha"] / found.settings["rank"]
    except (KeyError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} holds no LoRA factors; train some there with --config.train.target=lora") from error
    factors = {name.replace(f"/{A}", "/kernel"): Factors(value, scale * found.arrays[name.replace(A, B)])
               for name, value in found.arrays.items() if name.endswith(A)}
    return Lora(factors, found.backbone, f"LoRA {found.source}")


def _fitting(config: Config, loras: list[Lora]) -> list[Lora]:
    """They as they are. Raises UserError for matrices that are not this model's."""
    shapes = kernel_shapes(config.model) if loras else {}
    for lora in loras:
        wrong = [name for name, (a, b) in lora.factors.items()
                 if name not in shapes or (*a.shape[:2], *b.shape[2:]) != shapes[name]
                 or (a.shape[0], a.shape[2]) != b.shape[:2]]
        if wrong:
            raise UserError(f"{lora.source}: belongs to another model: factors of {', '.join(wrong)} do not fit this "
                            "one's")
    return loras


def combined(loras: Sequence[Lora]) -> dict[str, Factors]:
    """Their sum: factors of the ranks' sum, on the mesh in force."""
    mesh, found = sharding.current_mesh(), dict[str, Factors]()
    for name in dict.fromkeys(name for lora in loras for name in lora.factors):
        parts = [lora.factors[name] for lora in loras if name in lora.factors]
        arrays = {name: Factors(np.concatenate([a for a, _ in parts], axis=2),
                                np.concatenate([b for _, b in parts], axis=1))}
        placed = sharding.parameter_shardings(arrays, mesh) if mesh else None
        found |= jax.device_put(arrays, placed)
    return found


_merged = jax.jit(merged)


def merge(param: jax.Array, factors: Factors) -> jax.Array:
    """The matrix that it is with its factors, in its dtype, where it lies."""
    return jax.device_put(_merged(param, *factors), param.sharding)
