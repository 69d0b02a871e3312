"""Parameters that are trained beside a model that stays as it is: where they are kept, and which model they belong to.
"""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, UserError, changed
from starflow_jax.io.files import read_json
from starflow_jax.sharding import fetch

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


def settings_beside(config: Config) -> Config:
    """The settings that such a workdir keeps: it samples with what was trained there, and finds its model from
    anywhere."""
    source = config.train.init_from
    config = changed(config, "train", {"init_from": str(Path(source).absolute()) if source else ""})
    if config.train.target == "decoder":
        return changed(config, "sample", {"denoise": "decoder", "renoise": False})
    return changed(config, "sample", {"weights": config.lora.weights, "merge_lora": not config.lora.weights})
