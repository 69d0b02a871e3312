"""Parameters alone in orbax checkpoints: written array by array, read without the optimizer's state.

A converted model is a checkpoint of step 0 whose state is {"ema": parameters}; a training checkpoint has its
averaged parameters under the same name, so that both are read in the same way.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from starflow_jax.checkpoints.checksums import write_checksums
from starflow_jax.config import UserError
from starflow_jax.io.files import atomic_path, first_line, make_folder
from starflow_jax.io.tensor_files import StoredArray, check_shapes

MOST_WORDS = 300  # characters of what a library says of a fault
CHUNK_BYTES = 64 << 20  # of an array on disk: what reading and compressing hold in memory at a time


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Reads, writes and drops one array after the other; orbax's own way holds all of them."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([np.asarray(value)], [info], [arg]):
                written.result()
        return []


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Whatever orbax and tensorstore raise becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        words = first_line(error).partition(" [")[0]  # tensorstore adds where in its source it happened
        raise UserError(f"{directory}: a checkpoint can't be written ({words[-MOST_WORDS:]}); once that is solved, the "
                        "same command goes on") from error


def save_params(directory: Path, arrays: Mapping[str, Any], data: dict[str, Any]) -> None:
    """Write {"a/b": array} as the checkpoint of step 0 of a folder that has none; it appears once all is on disk.

    data: what goes with it, as JSON. Raises UserError where the folder has checkpoints.
    """
    directory = Path(directory).absolute()
    make_folder(directory)
    if newest_first(directory):
        raise UserError(f"{directory} holds checkpoints; convert into another --workdir, or delete them")
    tree = {"ema": traverse_util.unflatten_dict(dict(arrays), sep="/")}
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=ocp.type_handlers.create_type_handler_registry(
        (StoredArray, _OneByOne()), (np.ndarray, _OneByOne())))
    how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with atomic_path(directory / "0") as made, _writing(directory):
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(
                state=state, data=ocp.JsonCheckpointHandler())) as checkpointer:
            checkpointer.save(made, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree, save_args=how), data=ocp.args.JsonSave(data)))
        write_checksums(made)


def newest_first(directory: Path) -> list[int]:
    """The steps of a folder of checkpoints, the newest first. Reads only names: another process may be writing."""
    return sorted((int(path.name) for path in directory.glob("*") if path.name.isdigit()), reverse=True)


def stored_params(folder: Path) -> dict[str, StoredArray]:
    """{"a/b": array} of the averaged parameters in one checkpoint, read one at a time."""
    path = Path(folder).absolute() / "state"
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree["ema"]
        found = traverse_util.flatten_dict(tree, sep="/")
        return {name: StoredArray(kind.shape, kind.dtype, partial(_read_array, path, name))
                for name, kind in found.items()}
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    """Of whatever orbax and tensorstore raise."""
    return UserError(f"{path}: can't be read as parameters ({first_line(error)}); use another checkpoint, or copy it "
                     "again")


def _read_array(path: Path, name: str) -> np.ndarray:
    part = {"ema": traverse_util.unflatten_dict({name: 0}, sep="/")}
    how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore(path, args=ocp.args.PyTreeRestore(part, how, partial_restore=True))
    except Exception as error:
        raise _unreadable(path, error) from error
    return jax.tree.leaves(found)[0]


def restore_params(folder: Path, abstract_params: Any, convert: Callable[[str, jax.Array], Any] | None = None) -> Any:
    """The averaged parameters of one checkpoint, in the dtypes and shardings of a pytree of ShapeDtypeStruct.

    convert: (name, array) -> what is kept of it; arrays are then read one by one, and no two are held unconverted.
    Without a sharding they go to this process's first device. Parameters that are not asked for are not read. Raises
    UserError listing every one that is missing or of another shape.
    """
    wanted = traverse_util.flatten_dict(abstract_params, sep="/")
    found = {name: array for name, array in stored_params(folder).items() if name in wanted}
    check_shapes(str(folder), found, {name: leaf.shape for name, leaf in wanted.items()})
    here = SingleDeviceSharding(jax.local_devices()[0])
    placed = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)
              for name, leaf in wanted.items()}

    def read(part: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        tree = {"ema": traverse_util.unflatten_dict(part, sep="/")}
        path = Path(folder).absolute() / "state"
        try:
            restored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(
                tree, ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True))["ema"]
        except Exception as error:
            raise _unreadable(path, error) from error
        return traverse_util.flatten_dict(restored, sep="/")

    with ocp.PyTreeCheckpointer() as checkpointer:
        if convert is None:
            return traverse_util.unflatten_dict(read(placed), sep="/")
        # Each is waited for: an array is in memory until what was made of it is there.
        return traverse_util.unflatten_dict(
            {name: jax.block_until_ready(convert(name, read({name: leaf})[name])) for name, leaf in placed.items()},
            sep="/")
