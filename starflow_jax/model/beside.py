"""Parameters that are trained beside a model that stays as it is: where they are kept, and which model they belong to.
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import traverse_util

from starflow_jax.config import Config, UserError, changed
from starflow_jax.io.arrays import export_arrays, import_with_metadata
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import read_json
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.sharding import fetch

with epy.lazy_imports():
    from starflow_jax.checkpoints import checksums, parameters, training

SUFFIX = ".safetensors"  # of such parameters in one file, which is named where a workdir of them may be
# Small, there in every model, and changed by all of its training.
FINGERPRINTED = r"flow/deep/(sos|proj_in/kernel|proj_out/kernel|transformer/final_norm/weight)"


def fingerprint_of(arrays: Mapping[str, Any]) -> str:
    """Of the deep block among a model's parameters {"flow/deep/...": array}; equal for equal ones, whatever file and
    float dtype they are kept in."""
    checksum = 0
    for name in sorted(name for name in arrays if re.fullmatch(FINGERPRINTED, name)):
        value = fetch(arrays[name]).astype(np.float32).astype(jnp.bfloat16)
        checksum = zlib.crc32(value.tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


def checksum_of(arrays: Mapping[str, Any]) -> str:
    """Equal for equal arrays of equal names."""
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).tobytes(), found)
    return f"{found:08x}"


def shapes_of(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: np.shape(leaf) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


class Kind(NamedTuple):
    """What a train.target trains beside a model, and how its checkpoints are kept."""

    words: str
    was: str  # or were
    one: str  # or some
    settings: Callable[[Config], dict[str, Any]]  # that its parameters depend on, besides the model's
    best: str = "validation_bits_per_dim"  # of its validations, the smaller the better: as checkpoints.training.BEST


def _of_lora(config: Config) -> dict[str, Any]:
    settings = dataclasses.asdict(config.lora)
    del settings["weights"]  # the backbone's
    return settings


def _of_decoder(config: Config) -> dict[str, Any]:
    return {"width": config.decoder.width, "layers": config.decoder.layers} if config.codec.kind == "patch" else {}


KINDS = {
    "lora": Kind("LoRA factors", "were", "some", _of_lora),
    "control": Kind("control module", "was", "one", lambda config: dataclasses.asdict(config.control)),
    "student": Kind("smaller deep block", "was", "one", lambda _: {}),  # whose sizes are the model's
    "decoder": Kind("decoder", "was", "one", _of_decoder, best="validation_l1"),
}


def _fingerprint(config: Config, backbone: str) -> dict[str, Any]:
    """What the checkpoints of config.train.target depend on."""
    target = config.train.target
    return {**model_fingerprint(config), "target": target, target: KINDS[target].settings(config),
            "backbone": backbone}


def open_checkpoints(config: Config, workdir: Path, backbone: str) -> "training.Checkpoints":
    """The workdir's, of config.train.target. backbone: a checksum of what they are trained beside. Raises UserError
    where they are another model's, or were trained beside other weights."""
    _check_backbone(config, workdir, backbone)
    return training.Checkpoints(
        workdir / "checkpoints", keep=config.train.keep_checkpoints, best=KINDS[config.train.target].best,
        model_fingerprint=_fingerprint(config, backbone))


def whole_beside(config: Config, workdir: Path, backbone: str) -> Path:
    """The checkpoint of a workdir that what config.train.target trained there is read from.

    Raises UserError where there is none, where all are damaged, and where it was trained beside other weights.
    """
    _check_backbone(config, workdir, backbone)
    folder, _ = _whole(workdir, config.sample.checkpoint == "best", config.train.target)
    training.check_fingerprint(folder.parent / "model.json", _fingerprint(config, backbone))
    return folder


def stored_beside(workdir: Path, own: Config) -> tuple[Path, str]:
    """(such a checkpoint of a workdir with its own settings, a checksum of whatever it was trained beside)."""
    backbone = _backbone_of(workdir / "checkpoints" / "model.json")
    return whole_beside(own, workdir, backbone), backbone


def _check_backbone(config: Config, workdir: Path, backbone: str) -> None:
    """Raises UserError where a workdir's checkpoints were trained beside another model."""
    held, kind = _backbone_of(workdir / "checkpoints" / "model.json"), KINDS[config.train.target]
    if held not in ("", backbone):
        raise UserError(f"{workdir}: its {kind.words} {kind.was} trained beside other weights (checksum {held}) than "
                        f"those of {config.train.init_from or 'the model in the package'} ({backbone}); name them with "
                        "--config.train.init_from=WORKDIR, or WORKDIR/checkpoints/STEP")


def _backbone_of(path: Path) -> str:
    """What the file of such checkpoints' fingerprint says; "" where there is none, or where it can't be read, which
    Checkpoints then reports."""
    try:
        return str(read_json(path).get("backbone", ""))
    except (OSError, ValueError, AttributeError):
        return ""


class Stored(NamedTuple):
    """What a checkpoint of such parameters holds."""

    arrays: dict[str, np.ndarray]  # their averages, by name
    settings: dict[str, Any]  # of what was trained
    backbone: str
    source: str

    def within(self, prefix: str) -> dict[str, Any]:
        """The tree of arrays whose names begin so."""
        return traverse_util.unflatten_dict({name.removeprefix(prefix): array for name, array in self.arrays.items()
                                             if name.startswith(prefix)}, sep="/")


def read_checkpoint(path: Path, best: bool, target: str) -> Stored:
    """The newest or best whole checkpoint of a workdir that train.target=`target` made, or one of its checkpoints,
    beside whatever model it was trained.

    Raises UserError where there are none, and where all are damaged.
    """
    folder, facts = _whole(path, best, target)
    arrays = {name: np.asarray(array) for name, array in parameters.stored_params(folder).items()}
    return Stored(arrays, facts[target], str(facts["backbone"]),
                  str(path) if _is_alone(path) else f"{path}, step {folder.name}")


def _whole(path: Path, best: bool, target: str) -> tuple[Path, dict[str, Any]]:
    """(the newest or best whole checkpoint of a workdir, or the checkpoint itself; its model.json)."""
    kind = KINDS[target]
    directory = path.absolute().parent if _is_alone(path) else path / "checkpoints"
    check_file(directory / "model.json")
    try:
        facts = read_json(directory / "model.json")
        _ = facts["backbone"], facts[target]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no {kind.words}; train {kind.one} there with --config.train.target={target}"
                        ) from error
    step = checksums.first_whole(directory, [int(path.name)] if _is_alone(path) else _steps(
        directory, facts, best, kind.best))
    if step is None:
        raise UserError(f"{path} holds no checkpoint of its {kind.words} yet; the training goes on with the same "
                        "command")
    return directory / str(step), facts


def _is_alone(path: Path) -> bool:
    """Whether it is a checkpoint, and not a workdir."""
    return (path / "state").is_dir()


def _steps(directory: Path, fingerprint: dict[str, Any], best: bool, metric: str) -> list[int]:
    checkpoints = training.Checkpoints(directory, keep=1, model_fingerprint=fingerprint, best=metric)
    steps = checkpoints.steps(best)
    checkpoints.close()
    return steps


def save_alone(config: Config, path: Path, params: Mapping[str, Any], backbone: str, dtype: Any = None) -> None:
    """Write what config.train.target trained as one safetensors file, with a checksum of what it was trained beside.
    dtype: of floats on disk; None: as they are."""
    export_arrays(path, params, dtype, {"target": config.train.target, "backbone": backbone})


def read_alone(path: Path, target: str) -> tuple[dict[str, Any], str]:
    """(what `save_alone` wrote of such a target, float32 arrays in host memory; that checksum). Raises UserError for
    another file."""
    params, metadata = import_with_metadata(path)
    if metadata.get("target") != target or not metadata.get("backbone"):
        raise UserError(f"{path}: holds no {KINDS[target].words}; write one with --mode=convert --workdir=WORKDIR of "
                        f"train.target={target} and --config.convert.target={path}")
    if any(array.dtype.kind != "f" for array in jax.tree.leaves(params)):
        raise UserError(f"{path}: holds other numbers than floats; write it again with --mode=convert")
    return jax.tree.map(np.float32, params), metadata["backbone"]


def settings_beside(config: Config) -> Config:
    """The settings that such a workdir keeps: it samples with what was trained there, and finds its model from
    anywhere."""
    source = config.train.init_from
    config = changed(config, "train", {"init_from": str(Path(source).absolute()) if source else ""})
    if config.train.target == "decoder":
        return changed(config, "sample", {"denoise": "decoder", "renoise": False})
    if config.train.target != "lora":
        return config
    return changed(config, "sample", {"weights": config.lora.weights, "merge_lora": not config.lora.weights})
