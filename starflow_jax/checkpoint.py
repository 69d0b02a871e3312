"""Checkpoints by orbax: the whole state with the data position, asynchronous, atomic and verified."""

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from starflow_jax.config import UserError
from starflow_jax.video_io import atomic_path

BEST = "validation_bits_per_dim"  # the smaller the better
CHECKSUMS = "checksums"


class Checkpoints:
    """The checkpoints of one model in one folder: the newest `keep`, and the best by validation.

    Raises UserError where the folder holds another model's.
    """

    def __init__(self, directory: Path, *, keep: int, model_fingerprint: dict[str, Any]):
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        _check_fingerprint(self.directory / "model.json", model_fingerprint)
        policies = [ocp.checkpoint_managers.LatestN(keep),
                    ocp.checkpoint_managers.BestN(get_metric_fn=lambda metrics: -metrics[BEST], n=1,
                                                  keep_checkpoints_without_metrics=False)]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True, create=True)
        self._manager = ocp.CheckpointManager(epath.Path(self.directory), options=options)

    def save(self, step: int, state: Any, data_state: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Begin to write a checkpoint; the folder gets its final name when all of it is on disk."""
        self._write_checksums()
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)), metrics=metrics, force=True)

    def wait(self) -> None:
        """Until all that was begun is on disk."""
        self._manager.wait_until_finished()
        self._write_checksums()

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best validation likelihood so far."""
        scored = [(info.metrics[BEST], info.step) for info in self._manager._checkpoints  # noqa: SLF001
                  if info.metrics and BEST in info.metrics]
        return min(scored)[1] if scored else None

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """(state, data position, step) of the newest whole checkpoint, or None where there is none at all.

        abstract_state: a pytree of jax.ShapeDtypeStruct. A damaged checkpoint is reported and the one before
        it is taken; raises UserError where all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            folder = self.directory / str(step)
            damage = _damage(folder)
            if damage is None:
                try:
                    found = self._manager.restore(step, args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract_state), data=ocp.args.JsonRestore()))
                    return found["state"], found["data"], step
                except Exception as error:  # whatever orbax or tensorstore raise for what they can't read
                    damage = str(error).splitlines()[0] if str(error) else type(error).__name__
            logging.error("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
            self._manager.delete(step)
        if steps:
            raise UserError(f"{self.directory}: all checkpoints are damaged; start in another --workdir")
        return None

    def _write_checksums(self) -> None:
        """For every finished checkpoint that has none yet: what its files' contents should be."""
        for step in self._manager.all_steps(read=True):
            folder = self.directory / str(step)
            if (folder / "_CHECKPOINT_METADATA").exists() and not (folder / CHECKSUMS).exists():
                with atomic_path(folder / CHECKSUMS) as path:
                    path.write_text(json.dumps(_checksums(folder)))


def _checksums(folder: Path) -> dict[str, int]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != CHECKSUMS and p.name[0] != ".")
    with ThreadPoolExecutor() as pool:
        sums = pool.map(lambda path: zlib.crc32(path.read_bytes()), paths)
    return {str(path.relative_to(folder)): value for path, value in zip(paths, sums)}


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. One without checksums was killed before they were
    written; orbax's own commit then says that it is whole."""
    path = folder / CHECKSUMS
    if not path.exists():
        return None
    try:
        expected = json.loads(path.read_text())
    except ValueError:
        return f"{CHECKSUMS} is unreadable"
    found = _checksums(folder)
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != value:
            return f"{name} has changed"
    return None


def _check_fingerprint(path: Path, fingerprint: dict[str, Any]) -> None:
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(fingerprint, indent=1))
        return
    held = traverse_util.flatten_dict(json.loads(path.read_text()), sep=".")
    asked = traverse_util.flatten_dict(json.loads(json.dumps(fingerprint)), sep=".")
    for name in (*asked, *held):
        if held.get(name) != asked.get(name):
            raise UserError(f"{path.parent} holds another model: its {name} is {held.get(name)!r}, the "
                            f"configuration's is {asked.get(name)!r}; use its configuration or another --workdir")


def export_arrays(path: Path, params: Mapping[str, Any], dtype: Any = None,
                  metadata: dict[str, str] | None = None) -> None:
    """Write a pytree of dicts of arrays as one safetensors file with names a/b/c; dtype: of floats on disk."""
    flat = {name: np.ascontiguousarray(value) for name, value in traverse_util.flatten_dict(params, sep="/").items()}
    if dtype is not None:
        flat = {name: v.astype(dtype) if np.issubdtype(v.dtype, np.floating) else v for name, v in flat.items()}
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
    small = (np.float16, jax.numpy.bfloat16)
    return traverse_util.unflatten_dict(
        {name: v.astype(np.float32) if v.dtype in small else v for name, v in flat.items()}, sep="/")
