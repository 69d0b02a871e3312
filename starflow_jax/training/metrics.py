"""`metrics.jsonl`, one JSON object per line, each with its `step`; the same numbers go to TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter

from starflow_jax.config import UserError
from starflow_jax.io.files import naming, parse_json, write_text

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars to `workdir/metrics.jsonl` and scalars and pictures to `workdir/tensorboard`.

    `resume_step` is the step of the checkpoint that the run resumes from (0: it starts). Lines of later
    steps, left by a run that was killed, are dropped first, and so is a last line that was cut off: the
    file becomes that of a run that was never killed. TensorBoard hides the same steps by itself.
    `writes`: False on all but one of several processes; those write nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int = 0, writes: bool = True):
        self.writes = writes
        if not writes:
            return
        self.path = Path(workdir) / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        write_text(self.path, "".join(_json_line(line) for line in kept))
        self._file = open(self.path, "a")
        self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line {"step": step, **values} and flushes it. Numbers that are not finite become null."""
        if not self.writes:
            return
        numbers = {name: _plain_number(value) for name, value in values.items()}
        with naming(self.path):
            self._file.write(_json_line({"step": int(step), **numbers}))
            self._file.flush()
        for name, number in numbers.items():
            if number is not None:
                self._tensorboard.add_scalar(name, number, int(step))

    def image(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Shows a picture (H, W, 3) uint8 in TensorBoard."""
        if not self.writes:
            return
        self._tensorboard.add_image(name, image_HWC, int(step), dataformats="HWC")
        self._tensorboard.flush()

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        if self.writes:
            with naming(self.path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self.writes:
            with naming(self.path):
                self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl`, in order; a line that was cut or damaged is left out.

    Raises UserError where it is a folder.
    """
    lines = []
    path = Path(workdir) / METRICS_FILE
    if path.is_dir():
        raise UserError(f"{path} is a folder, where training writes a file; remove it, or name another --workdir")
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _json_line(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _plain_number(value: Any) -> int | float | None:
    """A Python number from a NumPy or JAX scalar; None stands for NaN and infinity, which JSON lacks."""
    number = np.asarray(value).item()
    if isinstance(number, bool):
        return int(number)
    return number if math.isfinite(number) else None
