"""Released weights in any form, read tensor by tensor, nothing executed. The only module that sees torch, which its
sharded checkpoints need."""

import functools
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.checkpoints.torch_zip import open_pth
from starflow_jax.config import UserError
from starflow_jax.io.tensor_files import (
    StoredArray,
    is_safetensors,
    open_safetensors,
)


def open_weights(path: Path, prefix: str = "") -> dict[str, StoredArray]:
    """The tensors of a .pth, of torch's sharded checkpoint folder, or of safetensors, each read on first use.

    Nested state dicts have dotted names; with a prefix, only the names that begin with it are taken, without it.
    Nothing in a file is executed. Raises UserError where there is nothing that can be read.
    """
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if is_safetensors(path):
        found = open_safetensors(path)
    elif path.is_dir():
        found = _open_sharded(path)
    else:
        found = open_pth(path)
    taken = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    if not taken:
        raise UserError(f"{path}: no tensor's name begins with convert.prefix={prefix!r}; the first ones are "
                        f"{', '.join(list(found)[:5]) or 'none at all'}")
    return taken


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError("a sharded PyTorch checkpoint needs torch: pip install 'starflow_jax[convert]'; or give a .pth "
                        "or safetensors") from error
    return torch


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

    class Unpickler(pickle._Unpickler):  # the one in Python: see torch_zip.py
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
