"""Files as torch.save writes them, without torch."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from starflow_jax.checkpoints.torch_zip import STORAGES


class Named:
    """Pickled as a name of a module that need not be there."""

    def __init__(self, module: str, name: str, *arguments: Any):
        self.module, self.name, self.arguments = module, name, arguments


class Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python, whose reducers can be set
    def persistent_id(self, value: Any) -> Any:
        return value.arguments if isinstance(value, Named) and value.name == "persistent" else None

    def save(self, value: Any, save_persistent_id: bool = True) -> None:
        if isinstance(value, Named) and value.name != "persistent":
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
            if value.arguments:
                self.save(value.arguments)
                self.write(pickle.REDUCE)
            return
        super().save(value, save_persistent_id)


def write(path: Path, tree: Any, storages: Mapping[str, Any]) -> None:
    """A file of a tree of `view`s and what they are views of, arrays of which one at a time is read and written."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("a/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(tree)
        for key, values in storages.items():
            with archive.open(f"a/data/{key}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(np.asarray(values)).reshape(-1).view(np.uint8).data)
        archive.writestr("a/version", "3\n")


def view(key: str, offset: int, shape: tuple, strides: tuple, storage: str = "FloatStorage", values: int = 6) -> Named:
    """A tensor, which is a view of the storage of that key, which has so many values."""
    held = Named("", "persistent", "storage", Named("torch", storage), key, "cpu", values)
    return Named("torch._utils", "_rebuild_tensor_v2", held, offset, shape, strides, False, OrderedDict())


def write_state_dict(path: Path, tensors: Mapping[str, Any]) -> None:
    """A file of {name: array}, each whole."""
    storages = {np.dtype(dtype): name for name, dtype in STORAGES.items()}

    def whole(key: str, array: Any) -> Named:
        strides = tuple(int(np.prod(array.shape[axis + 1:])) for axis in range(array.ndim))
        return view(key, 0, tuple(array.shape), strides, storages[np.dtype(array.dtype)], array.size)

    write(path, {name: whole(str(index), array) for index, (name, array) in enumerate(tensors.items())},
          {str(index): array for index, array in enumerate(tensors.values())})
