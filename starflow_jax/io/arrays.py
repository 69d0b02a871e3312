"""A pytree of arrays as one safetensors file."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from starflow_jax.config import UserError
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import atomic_path


def export_arrays(path: Path, params: Mapping[str, Any], dtype: Any = None,
                  metadata: dict[str, str] | None = None) -> None:
    """Write a pytree of dicts of arrays as one safetensors file with names a/b/c; dtype: of floats on disk."""
    flat = {name: np.array(value, order="C") for name, value in traverse_util.flatten_dict(params, sep="/").items()}
    if dtype is not None:
        flat = {name: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for name, v in flat.items()}
    with atomic_path(Path(path)) as temporary:
        temporary.touch()
        as_others = temporary.stat().st_mode
        save_file(flat, str(temporary), metadata)  # which only its owner may read
        temporary.chmod(as_others)


def import_arrays(path: Path) -> dict[str, Any]:
    """Read what `export_arrays` wrote; floats of less than 32 bits come back as float32.

    Raises UserError for a missing or damaged file, and where an array has the name of a group of others.
    """
    return import_with_metadata(path)[0]


def import_with_metadata(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """`import_arrays`, and the metadata of the file."""
    check_file(Path(path))
    try:
        with safe_open(str(path), framework="numpy") as file:
            flat, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError, AttributeError, TypeError) as error:  # the last two of dtypes that numpy lacks
        raise UserError(f"{path}: can't be read as safetensors ({error})") from error
    groups = {parent for name in flat for parent in itertools.accumulate(name.split("/")[:-1], "{}/{}".format)}
    if both := sorted(groups & set(flat)):
        raise UserError(f"{path}: can't be read as a tree of arrays: of these names others are a part: "
                        f"{', '.join(both)}")
    small = (np.float16, jnp.bfloat16)
    wide = {name: v.astype(np.float32) if v.dtype in small else v for name, v in flat.items()}
    return traverse_util.unflatten_dict(wide, sep="/"), metadata
