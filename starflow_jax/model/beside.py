"""Parameters that are trained beside a model that stays as it is: where they are kept, and which model they belong to.
"""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epy

from starflow_jax.config import Config, UserError, changed
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import read_json
from starflow_jax.sharding import fetch

with epy.lazy_imports():
    from starflow_jax.checkpoints import checksums, parameters, training

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


def check_backbone(workdir: Path, what: str, config: Config, backbone: str) -> None:
    """Raises UserError where a workdir's checkpoints were trained beside another model. backbone: a checksum of the
    config's."""
    held = backbone_of(workdir / "checkpoints" / "model.json")
    if held not in ("", backbone):
        raise UserError(f"{workdir}: its {what} trained beside other weights (checksum {held}) than those of "
                        f"{config.train.init_from or 'the model in the package'} ({backbone}); name them with "
                        "--config.train.init_from=WORKDIR, or WORKDIR/checkpoints/STEP")


def backbone_of(path: Path) -> str:
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


WORDS = {"lora": "LoRA factors", "control": "control module"}  # of what such a train.target trains


def read_checkpoint(path: Path, best: bool, target: str) -> Stored:
    """The newest or best whole checkpoint of a workdir that train.target=`target` made, or one of its checkpoints.

    Raises UserError where there are none, and where all are damaged.
    """
    alone = (path / "state").is_dir()
    directory = path.absolute().parent if alone else path / "checkpoints"
    check_file(directory / "model.json")
    try:
        facts = read_json(directory / "model.json")
        backbone, settings = str(facts["backbone"]), facts[target]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no {WORDS[target]}; train some there with --config.train.target={target}"
                        ) from error
    step = checksums.first_whole(directory, [int(path.name)] if alone else _steps(directory, facts, best))
    if step is None:
        raise UserError(f"{path} holds no checkpoint of {WORDS[target]} yet; its training goes on with "
                        "the same command")
    arrays = {name: np.asarray(array) for name, array in parameters.stored_params(directory / str(step)).items()}
    return Stored(arrays, settings, backbone, str(path) if alone else f"{path}, step {step}")


def _steps(directory: Path, fingerprint: dict[str, Any], best: bool) -> list[int]:
    checkpoints = training.Checkpoints(directory, keep=1, model_fingerprint=fingerprint)
    steps = checkpoints.steps(best)
    checkpoints.close()
    return steps


def settings_beside(config: Config) -> Config:
    """The settings that such a workdir keeps: it samples with what was trained there, and finds its model from
    anywhere."""
    source = config.train.init_from
    config = changed(config, "train", {"init_from": str(Path(source).absolute()) if source else ""})
    if config.train.target == "decoder":
        return changed(config, "sample", {"denoise": "decoder", "renoise": False})
    if config.train.target == "control":
        return config
    return changed(config, "sample", {"weights": config.lora.weights, "merge_lora": not config.lora.weights})
