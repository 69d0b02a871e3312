"""Checkpoints by orbax: the whole state with the data position, asynchronous, atomic and verified."""

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from starflow_jax.config import UserError
from starflow_jax.video_io import atomic_path

BEST = "validation_bits_per_dim"  # the smaller the better
CHECKSUMS = "checksums"


class Checkpoints:
    """The checkpoints of one model in one folder: the newest `keep`, and the best by validation besides.

    Raises UserError where the folder holds another model's.
    """

    def __init__(self, directory: Path, *, keep: int, model_fingerprint: dict[str, Any]):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        _check_fingerprint(self.directory / "model.json", model_fingerprint)
        _drop_unreadable_metrics(self.directory)
        self._damaged: list[int] = []
        latest = ocp.checkpoint_managers.LatestN(keep)
        best = ocp.checkpoint_managers.BestN(
            get_metric_fn=_bits, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(epath.Path(self.directory), options=ocp.CheckpointManagerOptions(
            best_fn=_bits, best_mode="min",  # without best_fn orbax drops the metrics
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([latest, best]),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums)))

    def save(self, step: int, state: Any, data_state: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Begin to write a checkpoint; the folder gets its final name when all of it is on disk.

        metrics[BEST], where given and finite, ranks it. A damaged checkpoint that `restore` passed over is
        deleted now: its step comes again.
        """
        self.wait()
        while self._damaged:
            self._manager.delete(self._damaged.pop())
        ranked = metrics is not None and math.isfinite(metrics[BEST])
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)),
            metrics=metrics if ranked else None, force=True)

    def wait(self) -> None:
        """Until all that was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest checkpoint not found damaged."""
        return max(set(self._manager.all_steps()) - set(self._damaged), default=None)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """(state, data position, step) of the newest whole checkpoint, or None where there is none at all.

        abstract_state: a pytree of jax.ShapeDtypeStruct, restored to their shardings, or to this process's
        first device where they have none: whatever devices wrote it.
        A damaged checkpoint is reported and the one before it is taken; raises UserError where all are
        damaged, and where a whole one holds other arrays than abstract_state.
        """
        return self._restore_first(self.steps(), abstract_state)

    def restore_best(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """As `restore`, but the best by validation, or the newest where none has been validated."""
        return self._restore_first(self.steps(best=True), abstract_state)

    def steps(self, best: bool = False) -> list[int]:
        """All steps, the newest first; before them, where asked for, the best by validation."""
        first = self._manager.best_step() if best else None
        return sorted(self._manager.all_steps(), key=lambda step: (step == first, step), reverse=True)

    def _restore_first(self, steps: list[int], abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        damaged: list[int] = []
        abstract_state = jax.tree.map(_placed, abstract_state)
        for step in steps:
            folder = self.directory / str(step)
            damage = damage_of(folder)
            if damage is None:
                try:
                    found = self._manager.restore(step, args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()))
                except Exception as error:  # whatever orbax and tensorstore raise
                    raise UserError(f"{folder} is whole but does not fit this configuration ({_first_line(error)}); "
                                    "use the one it was trained with, or another --workdir") from error
                self._damaged = damaged
                return found["state"], found["data"], step
            logging.error("checkpoint %s is damaged (%s); using the one before it", folder, damage)
            damaged.append(step)
        if steps:
            raise UserError(f"{self.directory}: all checkpoints are damaged; start in another --workdir")
        return None

    def _write_checksums(self) -> None:
        """Called by orbax when a checkpoint is complete under its temporary name, just before its commit."""
        for folder in self.directory.glob("*.orbax-checkpoint-tmp"):
            if not (folder / CHECKSUMS).exists():
                write_checksums(folder)


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """With a sharding; without one orbax would look for the devices that wrote the checkpoint."""
    if leaf.sharding is not None:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


def _bits(metrics: Any) -> float:
    return metrics[BEST]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, int | None]:
    """CRC-32 of each file, None for one that is missing."""
    def checksum(name: str) -> int | None:
        value = 0
        try:
            with open(folder / name, "rb") as file:
                while chunk := file.read(1 << 24):
                    value = zlib.crc32(chunk, value)
        except FileNotFoundError:
            return None
        return value

    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(checksum, names)))


def write_checksums(folder: Path) -> None:
    """Into a checkpoint's folder, of all its files."""
    # The files directly in the folder hold no data, and change with the commit.
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file())
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder, names)))


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        found = _checksums(folder, expected)
    except (OSError, ValueError) as error:
        return _first_line(error)
    for name, value in expected.items():
        if found[name] != value:
            return f"{name} is missing" if found[name] is None else f"{name} has changed"
    return None


def _drop_unreadable_metrics(directory: Path) -> None:
    """Orbax reads every checkpoint's metrics when it opens a folder, and fails on damaged ones."""
    for path in directory.glob("*/metrics/metrics"):
        try:
            float(json.loads(path.read_text())[BEST])
        except (ValueError, KeyError, TypeError):
            logging.error("%s is damaged; it is deleted", path)
            path.unlink()


def _check_fingerprint(path: Path, fingerprint: dict[str, Any]) -> None:
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(fingerprint, indent=1))
        return
    try:
        held = traverse_util.flatten_dict(json.loads(path.read_text()), sep=".")
    except (ValueError, AssertionError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it if this workdir holds this model") from error
    asked = traverse_util.flatten_dict(json.loads(json.dumps(fingerprint)), sep=".")
    for name in (*asked, *held):
        if held.get(name) != asked.get(name):
            raise UserError(f"{path.parent} holds another model: its {name} is {held.get(name)!r}, the "
                            f"configuration's is {asked.get(name)!r}; use its configuration or another --workdir")


def export_arrays(path: Path, params: Mapping[str, Any], dtype: Any = None,
                  metadata: dict[str, str] | None = None) -> None:
    """Write a pytree of dicts of arrays as one safetensors file with names a/b/c; dtype: of floats on disk."""
    flat = {name: np.array(value, order="C") for name, value in traverse_util.flatten_dict(params, sep="/").items()}
    if dtype is not None:
        flat = {name: v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for name, v in flat.items()}
    with atomic_path(Path(path)) as temporary:
        save_file(flat, str(temporary), metadata)


def import_arrays(path: Path) -> dict[str, Any]:
    """Read what `export_arrays` wrote; floats of less than 32 bits come back as float32.

    Raises UserError for a missing or damaged file.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read as safetensors ({error})") from error
    small = (np.float16, jnp.bfloat16)
    return traverse_util.unflatten_dict(
        {name: v.astype(np.float32) if v.dtype in small else v for name, v in flat.items()}, sep="/")
