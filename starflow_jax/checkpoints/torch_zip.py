"""PyTorch's .pth files (`torch.save` since version 1.6) read tensor by tensor, without torch and nothing executed.

Such a file is a zip archive: `data.pkl`, a pickle that says where each tensor lies, and the tensors' storages, not
compressed. The pickle may name nothing but what tensors are made of; anything else ends in an error.
"""

import functools
import itertools
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


MOST = 100_000  # values in a pickle; the largest models have some thousand tensors


class Storage(NamedTuple):
    """A run of values in the archive, which tensors are views of."""

    dtype: Any  # np.dtype, or an UnknownType
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
                found = dict(_tensors_in(_Unpickler(pickled).load(), "", itertools.count()))
    except Exception as error:  # a damaged pickle or archive can make its reader fail in any way
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: can't be read as weights only ({reason}); save its state dict by torch.save, or as "
                        "safetensors") from error
    for name, tensor in found.items():
        if isinstance(tensor.storage.dtype, UnknownType):
            raise UserError(f"{path}: {name} is of type {tensor.storage.dtype.name}, which can't be read")
    return {name: StoredArray(tensor.shape, tensor.storage.dtype, functools.partial(_read, path, root, tensor))
            for name, tensor in found.items()}


# The one in Python: the one in C makes room for as many objects as a pickle says that it will number, up to 64 GB.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name.endswith("Storage"):
            return np.dtype(STORAGES[name]) if name in STORAGES else UnknownType(name)
        if (module, name) == ("torch", "Size"):
            return tuple
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, reference: Any) -> Storage:
        kind, dtype, key, *_ = reference
        if kind != "storage" or not isinstance(dtype, np.dtype | UnknownType):
            raise pickle.UnpicklingError(f"it refers to a {kind} of {dtype}")
        return Storage(dtype, str(key))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """Raises UnpicklingError for one that would lie outside of its storage's beginning, or is of no shape."""
    tensor = Tensor(storage, offset, tuple(shape), tuple(strides))
    numbers = (offset, *tensor.shape, *tensor.strides)
    if not isinstance(storage, Storage) or len(tensor.shape) != len(tensor.strides) or not all(
            type(number) is int and 0 <= number < 2**62 for number in numbers):
        raise pickle.UnpicklingError(f"it has a tensor of shape {tensor.shape} and strides {tensor.strides}")
    return tensor


def _tensors_in(tree: Any, path: str, visited: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Nested dicts and lists flattened; other values, such as step counts, are left out. visited: counts them, for a
    pickle may hold a list that has a list twice, which has another twice, and so on. Raises ValueError beyond MOST."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    if next(visited) > MOST:
        raise ValueError(f"it holds more than {MOST:,} values")
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for name, value in items:
        yield from _tensors_in(value, f"{path}.{name}" if path else str(name), visited)


def _read(path: Path, root: str, tensor: Tensor) -> np.ndarray:
    """A copy of the tensor's values in memory as numpy lays them out."""
    dtype, begin = tensor.storage.dtype, tensor.offset * tensor.storage.dtype.itemsize
    spanned = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    count = spanned if math.prod(tensor.shape) else 0
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{root}data/{tensor.storage.key}") as file:
            file.seek(begin)
            values = np.frombuffer(file.read(count * dtype.itemsize), dtype)
        if len(values) < count:
            raise UserError(f"{path}: a tensor's values are cut off")
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        view = np.lib.stride_tricks.as_strided(values, tensor.shape, strides)
        return np.ascontiguousarray(view).reshape(tensor.shape)
    except UserError:
        raise
    except Exception as error:  # of a damaged archive, as above
        raise UserError(f"{path}: a tensor's values can't be read ({error})") from error
