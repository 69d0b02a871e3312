"""--mode=convert: released weights and other workdirs -> checkpoints, and back to the release's names.

Array by array: no more than one of our parameters (all layers of a kind, stacked) is in memory. The only module
that sees torch, which is optional.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.checkpoints.parameters import save_params, stored_params
from starflow_jax.checkpoints.released import flow_shapes, stack_released, unstack_to_released
from starflow_jax.checkpoints.torch_files import open_weights
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.codec.wan_stream import channel_statistics, read_statistics, wan_config
from starflow_jax.codec.wan_weights import check_released
from starflow_jax.config import Config, UserError
from starflow_jax.io.files import atomic_path
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.io.tensor_files import StoredArray, check_shapes, write_safetensors
from starflow_jax.model.initialise import inherited_arrays, is_ours, whole_checkpoint
from starflow_jax.model.parameters import model_fingerprint


def convert(config: Config, workdir: Path) -> None:
    """config.convert.source -> a checkpoint in the workdir; the workdir's newest checkpoint -> config.convert.target;
    config.convert.codec -> config.codec.weights.

    Raises UserError for a source or target that can't be, and for tensors that are not this configuration's.
    """
    settings = config.convert
    if not (settings.source or settings.target or settings.codec):
        raise UserError("there is nothing to convert; name released weights with --config.convert.source=FILE_OR_DIR, "
                        "or a file to write them to with --config.convert.target=FILE.safetensors")
    if settings.target and not settings.target.endswith(".safetensors"):
        raise UserError(f"convert.target={settings.target!r}: has to end in .safetensors")
    if settings.codec:
        write_codec(config)
    if settings.source:
        write_checkpoint(config, workdir)
    if settings.target:
        write_released(config, workdir)


def write_checkpoint(config: Config, workdir: Path) -> None:
    """The source's parameters as the workdir's checkpoint of step 0, which sampling and evaluation read and
    training begins with (train.init_from)."""
    settings, source = config.convert, Path(config.convert.source)
    changes: list[tuple[str, str, str, str]] = []
    if is_ours(source):
        arrays, changes = inherited_arrays(config, source)
    else:
        found = stack_released(open_weights(source, settings.prefix), config.model, str(source))
        arrays = {name if name.startswith("denoiser/") else f"flow/{name}": array for name, array in found.items()}
        if config.text.encoder == "trained" and config.model.text_length:
            raise UserError(f"{source}: released weights hold no text encoder; set --config.text.encoder=frozen and "
                            "--config.text.weights=DIR")
    arrays = {name: _cast(array, settings.dtype) for name, array in arrays.items()}
    _check_room(workdir, sum(array.nbytes for array in arrays.values()))
    directory = workdir / "checkpoints"
    # Refuses a folder of another model, and marks a new one as this model's.
    Checkpoints(directory, keep=config.train.keep_checkpoints, model_fingerprint=model_fingerprint(config)).close()
    with ProgressBar("convert", len(arrays), unit="array") as progress:
        save_params(directory, {name: _counted(array, progress) for name, array in arrays.items()},
                    {"converted_from": str(source)})
    facts = {"source": str(source), "parameters": sum(array.size for array in arrays.values()),
             "bytes": sum(array.nbytes for array in arrays.values()),
             "changes": [dict(zip(("setting", "from", "to", "effect"), change)) for change in changes]}
    with atomic_path(workdir / "converted.json") as path:
        path.write_text(json.dumps(facts, indent=1))
    if changes:
        print(table(changes, ("setting", "source", "here", "what it does")))
    print(f"{source} -> {directory / '0'}: {facts['parameters']:,} parameters, {facts['bytes'] / 1e9:.2f} GB")


def write_released(config: Config, workdir: Path) -> None:
    """The workdir's newest averaged parameters as one safetensors file under the release's names."""
    target = Path(config.convert.target)
    arrays = stored_params(whole_checkpoint(workdir))
    flow = {name.removeprefix("flow/"): array for name, array in arrays.items() if not name.startswith("text/")}
    check_shapes(str(workdir), flow, flow_shapes(config.model))
    tensors = unstack_to_released({name: _cast(array, config.convert.dtype) for name, array in flow.items()},
                                  config.model)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _check_room(target.absolute().parent, size)
    with ProgressBar("convert", len(tensors), unit="tensor") as progress:
        write_safetensors(target, {name: _counted(tensor, progress) for name, tensor in tensors.items()})
    print(f"{workdir} -> {target}: {len(tensors)} tensors, {size / 1e9:.2f} GB")


def write_codec(config: Config) -> None:
    """The Wan VAE's weights as config.codec.weights, one safetensors file under the release's names, with the channel
    statistics of the settings beside them."""
    source, target = Path(config.convert.codec), Path(config.codec.weights)
    if config.codec.kind != "wan" or target.suffix != ".safetensors":
        raise UserError(f"convert.codec: needs codec.kind=wan (it is {config.codec.kind}) and the file to write, "
                        f"--config.codec.weights=FILE.safetensors (it is {config.codec.weights!r})")
    tensors: dict[str, Any] = dict(open_weights(source, config.convert.prefix))
    check_released(tensors, wan_config(config.codec, config.model.channels), str(source))
    tensors = {name: _cast(tensor, config.convert.dtype) for name, tensor in tensors.items()}
    given = read_statistics(Path(config.convert.statistics), config.model.channels) if config.convert.statistics else {}
    tensors |= channel_statistics(config.codec, config.model.channels, tensors | given)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _check_room(target.absolute().parent, size)
    with ProgressBar("convert", len(tensors), unit="tensor") as progress:
        write_safetensors(target, {name: _counted(tensor, progress) for name, tensor in tensors.items()})
    print(f"{source} -> {target}: {len(tensors)} tensors, {size / 1e9:.2f} GB")


def _cast(array: Any, dtype: str) -> StoredArray:
    kept = array.dtype if dtype == "stored" else jnp.dtype(dtype)
    return StoredArray(array.shape, kept, lambda: np.asarray(array, kept))


def _counted(array: StoredArray, progress: ProgressBar) -> StoredArray:
    def read() -> np.ndarray:
        progress.update()
        return np.asarray(array)

    return StoredArray(array.shape, array.dtype, read)


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB free; make room, or "
                        "write half as much with --config.convert.dtype=bfloat16")
