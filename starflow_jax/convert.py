"""--mode=convert: released weights and other workdirs -> checkpoints, and back to the release's names.

Array by array: no more than one of our parameters (all layers of a kind, stacked) is in memory. The only module
that sees torch, which is optional.
"""

import functools
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.checkpoint import Checkpoints
from starflow_jax.codec.wan_stream import channel_statistics, read_statistics, wan_config
from starflow_jax.codec.wan_weights import check_released
from starflow_jax.config import Config, UserError
from starflow_jax.initialise import inherited_arrays, is_ours, whole_checkpoint
from starflow_jax.metrics import ProgressBar, table
from starflow_jax.params_checkpoint import save_params, stored_params
from starflow_jax.released import flow_shapes, stack_released, unstack_to_released
from starflow_jax.system import model_fingerprint
from starflow_jax.tensor_files import (
    StoredArray,
    check_shapes,
    is_safetensors,
    open_safetensors,
    write_safetensors,
)
from starflow_jax.video_io import atomic_path


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


def open_weights(path: Path, prefix: str = "") -> dict[str, StoredArray]:
    """The tensors of a .pth, of torch's sharded checkpoint folder, or of safetensors, each read when asked for.

    Nested state dicts have dotted names; with a prefix, only the names that begin with it are taken, without it.
    Nothing is executed: PyTorch files are read by torch.load(weights_only=True). Raises UserError where there is
    nothing that can be read.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if is_safetensors(path):
        found = open_safetensors(path)
    elif path.is_dir():
        found = _open_sharded(path)
    else:
        found = _open_pth(path)
    taken = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    if not taken:
        raise UserError(f"{path}: no tensor's name begins with convert.prefix={prefix!r}; the first ones are "
                        f"{', '.join(list(found)[:5]) or 'none at all'}")
    return taken


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch files need torch: pip install 'starflow_jax[convert]'; or give safetensors") from error
    return torch


REOPEN_BYTES = 2 << 30  # read through one mapping of a .pth before it is mapped anew


def _open_pth(path: Path) -> dict[str, StoredArray]:
    torch = _torch()
    mapped: dict[str, Any] = {}
    done = 0

    def opened() -> dict[str, Any]:
        try:
            return dict(_tensors_in(torch, torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"{path}: torch can't read it as weights only ({reason}); save its state dict by "
                            "torch.save, or as safetensors") from error

    def read(name: str) -> np.ndarray:
        nonlocal done
        if not mapped or done > REOPEN_BYTES:  # what was read stays in memory as long as it is mapped
            mapped.clear()
            mapped.update(opened())
            done = 0
        value = _to_numpy(torch, mapped[name])
        done += value.nbytes
        return value

    return {name: StoredArray(tuple(tensor.shape), _numpy_dtype(path, name, tensor.dtype),
                              functools.partial(read, name)) for name, tensor in opened().items()}


def _tensors_in(torch: Any, tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, tensor) of nested dicts and lists; other values, such as step counts, are left out."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, value in items:
        yield from _tensors_in(torch, value, f"{path}.{name}" if path else str(name))


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def _numpy_dtype(path: Path, name: str, dtype: Any) -> np.dtype:
    try:
        return jnp.dtype(str(dtype).removeprefix("torch."))
    except TypeError as error:
        raise UserError(f"{path}: {name} is of type {dtype}, which can't be read") from error


def _open_sharded(folder: Path) -> dict[str, StoredArray]:
    """torch.distributed.checkpoint's format: tensors in slices over *.distcp files, listed in .metadata."""
    if not (folder / ".metadata").exists():
        raise UserError(f"{folder}: holds neither safetensors nor a sharded PyTorch checkpoint (.metadata)")
    torch = _torch()
    from torch.distributed import checkpoint as distributed

    class Reader(distributed.FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return metadata

    metadata = _sharded_metadata(torch, folder / ".metadata")

    def read(name: str, kind: Any) -> np.ndarray:
        tensor = torch.empty(kind.size, dtype=kind.properties.dtype)
        try:
            distributed.load({name: tensor}, storage_reader=Reader(folder), no_dist=True)
        except (OSError, RuntimeError, EOFError, ValueError, AssertionError,
                distributed.CheckpointException) as error:
            raise UserError(f"{folder}: {name} can't be read ({next(iter(str(error).splitlines()), error)})") from error
        return _to_numpy(torch, tensor)

    return {name: StoredArray(tuple(kind.size), _numpy_dtype(folder, name, kind.properties.dtype),
                              functools.partial(read, name, kind))
            for name, kind in metadata.state_dict_metadata.items() if hasattr(kind, "properties")}


def _sharded_metadata(torch: Any, path: Path) -> Any:
    """The list of slices. torch keeps it as a pickle, of a protocol that torch.load(weights_only=True) does not
    read; so it is unpickled with nothing allowed but the dozen record types that such a list is made of."""
    module = "torch.distributed.checkpoint.metadata"
    allowed = {(module, name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")}
    allowed |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"),
                ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module in ("pathlib", "pathlib._local") and name.endswith("Path"):  # where it was written
                return PurePosixPath
            if (module, name) not in allowed and not (
                    module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
                raise pickle.UnpicklingError(f"it asks for {module}.{name}")
            return super().find_class(module, name)

    try:
        with open(path, "rb") as file:
            metadata = Unpickler(file).load()
        assert metadata.state_dict_metadata and metadata.storage_data, "it is empty"
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, AssertionError, TypeError, ValueError,
            IndexError, KeyError) as error:
        raise UserError(f"{path}: is no list of a sharded checkpoint's tensors ({error})") from error
    return metadata
