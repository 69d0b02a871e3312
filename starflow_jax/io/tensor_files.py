"""Safetensors files, single or in shards, read and written one tensor at a time."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from starflow_jax.config import UserError
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import atomic_path, read_json

DTYPES = {  # safetensors' names
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}


class StoredArray:
    """An array that np.asarray reads, each time anew; its shape and dtype are known without reading it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype, copy=False)


Array = np.ndarray | StoredArray


def is_safetensors(path: Path) -> bool:
    """Whether a path is a safetensors file or a folder that holds one."""
    return path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))


def open_safetensors(path: Path) -> dict[str, StoredArray]:
    """The tensors of a file, of a folder of shards with its index, or of a folder with one file, by name.

    Raises UserError where there is none, where one can't be read, and where the index and its shards disagree.
    """
    path = Path(path)
    if not path.is_dir():
        return _open_file(path)
    indices = sorted(path.glob("*.safetensors.index.json"))
    files = sorted(path.glob("*.safetensors"))
    if not indices and len(files) == 1:
        return _open_file(files[0])
    if len(indices) != 1:
        raise UserError(f"{path}: holds {len(files)} safetensors files and {len(indices)} index files; it must be "
                        "one file, or shards with one *.safetensors.index.json")
    check_file(indices[0])
    try:
        shard_of = read_json(indices[0])["weight_map"]
        shards = {shard: _open_file(path / Path(shard).name) for shard in sorted(set(shard_of.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{indices[0]}: can't be read as an index of shards ({error})") from error
    lost = sorted(name for name, shard in shard_of.items() if name not in shards[shard])
    if lost:
        raise UserError(f"{indices[0]}: these tensors are not in their shards: {', '.join(lost)}")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def _open_file(path: Path) -> dict[str, StoredArray]:
    check_file(path)
    try:
        with safe_open(str(path), framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read as safetensors ({error})") from error
    unknown = sorted({kind for _, kind in kinds.values()} - set(DTYPES))
    if unknown:
        raise UserError(f"{path}: holds tensors of type {', '.join(unknown)}; there are {', '.join(DTYPES)}")
    return {name: StoredArray(shape, DTYPES[kind], partial(_read_tensor, path, name))
            for name, (shape, kind) in kinds.items()}


def _read_tensor(path: Path, name: str) -> np.ndarray:
    # Opened anew each time: an open file would keep all that was read of it mapped into memory.
    with safe_open(str(path), framework="numpy") as file:
        return file.get_tensor(name)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write arrays as one safetensors file, read one after the other, so that only one is in memory at a time.

    safetensors' own writer takes them all at once. Raises UserError for a dtype that the format lacks.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    # The widest first, so that every tensor begins at a multiple of its item size.
    ordered = sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize)
    end = 0
    for name in ordered:
        array = tensors[name]
        dtype = np.dtype(array.dtype)
        if dtype not in names:
            raise UserError(f"{path}: {name} is of type {dtype}, which safetensors lacks")
        begin, end = end, end + math.prod(array.shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(np.asarray(tensors[name])).reshape(-1).view(np.uint8).data)


def check_finite(source: str, arrays: Mapping[str, Any]) -> None:
    """Raises UserError naming the first array whose values are not all finite."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{source}: {name} holds values that are not finite; it is damaged: make or copy it again")


def only_finite(source: str, tensors: Mapping[str, StoredArray]) -> dict[str, StoredArray]:
    """The tensors; reading one raises UserError as `check_finite` does."""
    def read(name: str) -> np.ndarray:
        value = np.asarray(tensors[name])
        check_finite(source, {name: value})
        return value

    return {name: StoredArray(tensor.shape, tensor.dtype, partial(read, name)) for name, tensor in tensors.items()}


def check_shapes(source: str, found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError listing every array that is missing, unexpected or of another shape."""
    report_misfits(source, missing=sorted(set(wanted) - set(found)), unexpected=sorted(set(found) - set(wanted)),
                   misshapen=[f"{name} {tuple(found[name].shape)} instead of {tuple(shape)}"
                              for name, shape in wanted.items()
                              if name in found and tuple(found[name].shape) != tuple(shape)])


def report_misfits(source: str, *, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    """Raises UserError listing them all, where there are any."""
    lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(lists.values()):
        listed = "; ".join(f"{what} {len(names)}: {', '.join(names)}" for what, names in lists.items() if names)
        raise UserError(f"{source} is not of this config's model: {listed}")
