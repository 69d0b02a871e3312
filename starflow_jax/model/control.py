"""The control module that train.target=control trains beside a model: with it the model follows a camera."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from starflow_jax import sharding
from starflow_jax.config import Config, UserError
from starflow_jax.flow.control import fresh_control, ray_channels
from starflow_jax.io.arrays import import_with_metadata
from starflow_jax.io.checksums import checksums_of
from starflow_jax.model.beside import SUFFIX, checksum_of, read_checkpoint, save_alone, shapes_of
from starflow_jax.model.parameters import Params

PACKAGED, OF_PACKAGE = f"control{SUFFIX}", "the package's control module"


@dataclasses.dataclass(frozen=True)
class ControlModule:
    """As it was read."""

    params: Params
    backbone: str  # beside.fingerprint_of the model that it was trained beside
    source: str
    checksum: str  # equal for equal parameters


def fresh_module(config: Config, key: jax.Array) -> Params:
    """What training begins with, {"control": parameters}, float32: the model is its backbone."""
    return {"control": fresh_control(config.model, config.control.width, config.codec.time_stride, key)}


def with_module(config: Config, frozen: Params, trained: Params) -> Params:
    """The model's parameters: those of the backbone and the control module's."""
    return {**frozen, **trained}


def read_module(config: Config, workdir: Path, place: bool = True) -> ControlModule | None:
    """What sample.control names, or the averaged parameters of a workdir of train.target=control; None where there is
    neither. place: over the mesh in force; else in host memory.

    Raises UserError where there are none there, where a file or all checkpoints are damaged, and where they do not fit
    the model.
    """
    own = config.train.target == "control"
    if not (own or config.sample.control):
        return None
    path = Path(config.sample.control) if config.sample.control else workdir
    if path.suffix == SUFFIX:
        return _module_in(config, path, f"control module {path}", place)
    found = read_checkpoint(path, config.sample.checkpoint == "best", "control")
    params = found.within("control/")
    _check_shapes(config, params, found.source)
    return _module(params, found.backbone, f"control module {found.source}", place)


def packaged_module(config: Config, package: Path, place: bool = True) -> ControlModule | None:
    """What lies in the package beside its model; None where nothing does. place: over the mesh in force; else in host
    memory. Raises UserError where it is damaged, and where it does not fit the model."""
    path = package / PACKAGED
    return _module_in(config, path, OF_PACKAGE, place) if path.exists() else None


def save_packaged(config: Config, workdir: Path, package: Path) -> str:
    """Write a workdir's control module into the package, in float16; returns what it was."""
    with checksums_of(package, [PACKAGED]):
        return save_module(config, workdir, package / PACKAGED, np.float16)


def save_module(config: Config, workdir: Path, path: Path, dtype: Any = None) -> str:
    """Write a workdir's control module, and what it was trained beside, as one safetensors file; returns what it was.
    dtype: None: as it is kept."""
    found = read_module(config, workdir, place=False)
    assert found is not None, config.train.target
    save_alone(config, path, found.params, found.backbone, dtype)
    return found.source


def _module_in(config: Config, path: Path, source: str, place: bool) -> ControlModule:
    """What `save_module` wrote."""
    params, metadata = import_with_metadata(path)
    _check_shapes(config, params, str(path))
    return _module(params, metadata.get("backbone", ""), source, place)


def _module(params: Params, backbone: str, source: str, place: bool) -> ControlModule:
    """Of parameters in host memory."""
    checksum = checksum_of(traverse_util.flatten_dict(params, sep="/"))
    return ControlModule(_on_mesh(params) if place else params, backbone, source, checksum)


def _on_mesh(params: Params) -> Params:
    named, mesh = {"control": params}, sharding.current_mesh()
    return jax.device_put(named, sharding.parameter_shardings(named, mesh) if mesh else None)["control"]


def _check_shapes(config: Config, params: Params, source: str) -> None:
    if set(params.get("layers", {})) == {"kernel"}:
        raise UserError(f"{source}: its control module has the form of another version of this program; train it again")
    try:
        width, rows = len(params["proj_out"]["bias"]), len(params["proj_in"]["kernel"])
        expected = ray_channels(config.model, config.codec.time_stride)
        if rows != expected:
            raise UserError(f"{source}: its control module takes {rows} numbers of a token's rays where this model's "
                            f"have {expected}: it is of another model, another codec or another version of this "
                            "program")
        fits = shapes_of(params) == shapes_of(jax.eval_shape(lambda: fresh_control(
            config.model, width, config.codec.time_stride, jax.random.key(0))))
    except (KeyError, TypeError):
        fits = False
    if not fits:
        raise UserError(f"{source}: its control module belongs to another model")
