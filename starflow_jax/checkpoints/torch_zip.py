"""PyTorch's .pth files (`torch.save` since version 1.6) read tensor by tensor, without torch and nothing executed.

Such a file is a zip archive: `data.pkl`, a pickle that says where each tensor lies, and the tensors' storages, not
compressed. The pickle may name nothing but what tensors are made of; anything else ends in an error.
"""

import functools
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io.tensor_files import StoredArray

STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16, "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16, "CharStorage": np.int8,
    "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}


class Storage(NamedTuple):
    """A run of values in the archive, which tensors are views of."""

    dtype: np.dtype
    key: str


class Tensor(NamedTuple):
    """What the pickle says of a tensor; sizes and strides are counted in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class UnknownType(NamedTuple):
    """A type of storage that numpy lacks, such as an 8-bit float; an error only where a tensor of it is read."""

    name: str


def open_pth(path: Path) -> dict[str, StoredArray]:
    """The tensors of a file by their names, dotted where they lie in nested dicts, each read on first use.

    Raises UserError for a file that is no such archive, or whose pickle asks for anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = next(name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl"))
            if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
                raise ValueError("its values are big-endian")
            with archive.open(f"{root}data.pkl") as pickled:
                tree = _Unpickler(pickled).load()
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, EOFError, ValueError, TypeError,
            KeyError, IndexError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: can't be read as weights only ({reason}); save its state dict by torch.save, or as "
                        "safetensors") from error
    found = dict(_tensors_in(tree))
    for name, tensor in found.items():
        if isinstance(tensor.storage.dtype, UnknownType):
            raise UserError(f"{path}: {name} is of type {tensor.storage.dtype.name}, which can't be read")
    return {name: StoredArray(tensor.shape, tensor.storage.dtype, functools.partial(_read, path, root, tensor))
            for name, tensor in found.items()}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: Tensor(storage, offset, tuple(shape), tuple(strides))
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            return np.dtype(STORAGES[name]) if name in STORAGES else UnknownType(name)
        if (module, name) == ("torch", "Size"):
            return tuple
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, reference: Any) -> Storage:
        kind, dtype, key, *_ = reference
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind}")
        return Storage(dtype, str(key))


def _tensors_in(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Nested dicts and lists flattened; other values, such as step counts, are left out."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, value in items:
        yield from _tensors_in(value, f"{path}.{name}" if path else str(name))


def _read(path: Path, root: str, tensor: Tensor) -> np.ndarray:
    """A copy of the tensor's values in memory as numpy lays them out."""
    dtype, begin = tensor.storage.dtype, tensor.offset * tensor.storage.dtype.itemsize
    spanned = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    count = spanned if math.prod(tensor.shape) else 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{root}data/{tensor.storage.key}") as file:
            file.seek(begin)
            values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    except (OSError, KeyError, zipfile.BadZipFile, ValueError) as error:
        raise UserError(f"{path}: a tensor's values can't be read ({error})") from error
    if len(values) < count:
        raise UserError(f"{path}: a tensor's values are cut off")
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(values, tensor.shape, strides)).reshape(tensor.shape)
