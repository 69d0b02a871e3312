"""Scalars, pictures, progress and tables: what a person sees of a run."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorboardX
import tqdm


class MetricWriter:
    """Writes metrics.jsonl, one JSON object a line, and TensorBoard files into a workdir.

    start_step: where a resumed run goes on; what a killed run wrote for later steps is taken out, so that
    the file is an uninterrupted run's.
    """

    def __init__(self, workdir: Path, start_step: int = 0):
        self.workdir = workdir
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(line + "\n" for line in kept))
        self._file = open(path, "a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """A uint8 picture for TensorBoard."""
        self._board.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines that a killed run finished writing."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]


class ProgressBar:
    """A bar with rate and time left; on something that is no terminal, a line every now and then."""

    def __init__(self, total: int, label: str, initial: int = 0, unit: str = "step"):
        interval = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm.tqdm(total=total, desc=label, initial=initial, unit=unit, mininterval=interval,
                              dynamic_ncols=True)

    def update(self, position: int, **shown: Any) -> None:
        """Move to `position` and show these values beside the bar."""
        self._bar.set_postfix({name: f"{value:.4f}" if isinstance(value, float) else value
                               for name, value in shown.items()}, refresh=False)
        self._bar.update(position - self._bar.n)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._bar.close()


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """An aligned text table."""
    cells = [[str(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def temporal_flickering(frames_THWC: np.ndarray) -> float:
    """VBench's temporal flickering, 0 to 1, higher is steadier: (255 - mean |frame - next frame|) / 255."""
    frames = frames_THWC.astype(np.float64)
    return float((255.0 - np.abs(frames[1:] - frames[:-1]).mean(axis=(1, 2, 3)).mean()) / 255.0)
