"""Checkpoints by orbax: the whole state with the data position, asynchronous, atomic and verified."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from starflow_jax.checkpoints.checksums import CHECKSUMS, first_whole, write_checksums
from starflow_jax.config import UserError
from starflow_jax.io.checksums import checksums_of, is_damaged
from starflow_jax.io.files import first_line, make_folder, read_json, sync, sync_all, write_text

BEST = "validation_bits_per_dim"  # the smaller the better
MOST_WORDS = 300  # letters of an error's own words, which end with what happened


class Checkpoints:
    """The checkpoints of one model in one folder: the newest `keep`, and also the best by validation, with the least
    of the metric `best`.

    Raises UserError where the folder holds another model's, and where orbax can't open it.
    """

    def __init__(self, directory: Path, *, keep: int, model_fingerprint: dict[str, Any], best: str = BEST):
        self.directory = Path(directory).absolute()
        make_folder(self.directory)
        check_fingerprint(self.directory / "model.json", model_fingerprint)
        _drop_unreadable_metrics(self.directory, best)
        self._best = best
        self._damaged: list[int] = []
        latest = ocp.checkpoint_managers.LatestN(keep)
        smallest = ocp.checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: metrics[best], reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=lambda metrics: metrics[best], best_mode="min",  # without best_fn orbax drops the metrics
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([latest, smallest]),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_checksums))
        try:
            self._manager = ocp.CheckpointManager(epath.Path(self.directory), options=options)
        except ValueError as error:
            raise UserError(f"{self.directory}: a checkpoint's _CHECKPOINT_METADATA is damaged ({first_line(error)}); "
                            "delete that file, which only says when it was written") from error

    def save(self, step: int, state: Any, data_state: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Start writing a checkpoint; the folder gets its final name once all of it is on disk.

        metrics[best], where given and finite, ranks it. A damaged checkpoint that `restore` passed over is
        deleted now, since its step will come again.
        """
        self.wait()
        ranked = metrics is not None and math.isfinite(metrics[self._best])
        with _writing(self.directory):
            while self._damaged:
                self._manager.delete(self._damaged.pop())
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state)),
                metrics=metrics if ranked else None, force=True)

    def wait(self) -> None:
        """Wait until all that was started is on disk. Raises UserError where it could not be written."""
        with _writing(self.directory):
            self._manager.wait_until_finished()
            self._sync_newest()

    def _sync_newest(self) -> None:
        newest = self.directory / str(self.latest_step())
        for path in newest.glob("*"):  # what orbax adds when it renames the folder
            if path.is_file():
                sync(path)
        for folder in (newest, self.directory):
            if folder.exists():
                sync(folder)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            with _writing(self.directory):
                self._manager.close()

    def latest_step(self) -> int | None:
        """The newest checkpoint that was not found damaged; None where there is none."""
        return max(set(self._manager.all_steps()) - set(self._damaged), default=None)

    def restore(self, abstract_state: Any) -> tuple[Any, dict[str, Any], int] | None:
        """(state, data position, step) of the newest undamaged checkpoint, or None where there is none at all.

        abstract_state: a pytree of jax.ShapeDtypeStruct, restored to their shardings, or to this process's
        first device where they have none, whatever devices wrote it.
        A damaged checkpoint is reported and the one before it is used; raises UserError where all are
        damaged, and where an undamaged one holds other arrays than abstract_state.
        """
        steps = self.steps()
        step = first_whole(self.directory, steps)
        if step is None:
            return None
        self._damaged = [newer for newer in steps if newer > step]
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(_placed, abstract_state)), data=ocp.args.JsonRestore()))
        except Exception as error:  # whatever orbax and tensorstore raise
            raise UserError(f"{self.directory / str(step)} is whole but does not fit this config "
                            f"({first_line(error)}); use the one it was trained with, or another --workdir") from error
        return found["state"], found["data"], step

    def steps(self, best: bool = False) -> list[int]:
        """All steps, the newest first; best: the best by validation before all others."""
        first = self._manager.best_step() if best else None
        return sorted(self._manager.all_steps(), key=lambda step: (step == first, step), reverse=True)

    def _write_checksums(self) -> None:
        """Called by orbax when a checkpoint is complete under its temporary name, just before it is renamed. Orbax
        itself does not sync all files."""
        for folder in self.directory.glob("*.orbax-checkpoint-tmp"):
            if not (folder / CHECKSUMS).exists():
                write_checksums(folder)
                sync_all(folder)


OF_OTHERS = "Gloo|NCCL|[Cc]oordination|[Bb]arrier"  # in errors of what processes do together


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Whatever orbax and tensorstore raise becomes a UserError, but for the loss of another process."""
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if jax.process_count() > 1 and re.search(OF_OTHERS, str(error)):  # as which orbax may raise such a loss
            raise jax.errors.JaxRuntimeError(str(error)) from error
        words = first_line(error).partition(" [")[0]  # tensorstore adds where in its source it happened
        words = words if len(words) <= MOST_WORDS else f"... {words[-MOST_WORDS:]}"
        raise UserError(f"{directory}: a checkpoint can't be written ({words}); those that are there are kept: once "
                        "that is solved, the same command resumes") from error


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """With a sharding; without one orbax would look for the devices that wrote the checkpoint."""
    if leaf.sharding is not None:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


def _drop_unreadable_metrics(directory: Path, best: str) -> None:
    """Orbax reads every checkpoint's metrics when it opens a folder, and fails on damaged ones."""
    for path in directory.glob("*/metrics/metrics"):
        if not path.parts[-3].isdigit():  # a checkpoint that a run is writing now
            continue
        try:
            float(read_json(path)[best])
        except (ValueError, KeyError, TypeError, OverflowError):
            logging.error("%s is damaged; it is deleted", path)
            path.unlink()


def check_fingerprint(path: Path, fingerprint: dict[str, Any]) -> None:
    """That a model.json, which is written where there is none, is of this model; raises UserError where it isn't."""
    if not path.exists():
        with checksums_of(path.parent, [path.name]):
            write_text(path, json.dumps(fingerprint, indent=1))
        return
    if is_damaged(path):
        raise UserError(f"{path} is damaged; delete it if this workdir holds this model")
    try:
        held = traverse_util.flatten_dict(read_json(path), sep=".")
    except (IsADirectoryError, ValueError, AssertionError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it if this workdir holds this model") from error
    asked = traverse_util.flatten_dict(json.loads(json.dumps(fingerprint)), sep=".")
    for name in (*asked, *held):
        if held.get(name) != asked.get(name):
            raise UserError(f"{path.parent} holds another model: its {name} is {held.get(name)!r}, the "
                            f"config's is {asked.get(name)!r}; use its config or another --workdir")
