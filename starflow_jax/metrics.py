"""What a run reports: scalars and pictures on disk, progress and tables on the screen, small measures.

`metrics.jsonl` holds one JSON object per line, each with its `step`; the same numbers go to TensorBoard.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from starflow_jax.video_io import atomic_path

METRICS_FILE = "metrics.jsonl"


class MetricWriter:
    """Writes scalars to `workdir/metrics.jsonl` and scalars and pictures to `workdir/tensorboard`.

    `resume_step` is the step of the checkpoint that the run goes on from (0: a new run). Lines of later
    steps, left by a run that was killed, are dropped first, and so is a last line cut in the middle: the
    file ends up the one of a run that was never killed. TensorBoard hides the same steps by itself.
    `writes`: False on all but one of several processes, where nothing is written.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int = 0, writes: bool = True):
        self.writes = writes
        if not writes:
            return
        self.path = Path(workdir) / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(_json_line(line) for line in kept))
        self._file = open(self.path, "a")
        self._tensorboard = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line {"step": step, **values} and flushes it. Numbers that are not finite become null."""
        if not self.writes:
            return
        numbers = {name: _plain_number(value) for name, value in values.items()}
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

    def close(self) -> None:
        if self.writes:
            self._file.close()
            self._tensorboard.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `workdir/metrics.jsonl`, in order; a line that was cut or damaged is left out."""
    lines = []
    path = Path(workdir) / METRICS_FILE
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
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


class ProgressBar:
    """A tqdm bar: what is done, the loss in bits per dimension, rate and time left.

    Where the screen is no terminal (a log file) it prints a line at most every 30 seconds.
    """

    def __init__(self, description: str, total: int, initial: int = 0, unit: str = "step", shown: bool = True):
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            desc=description,
            total=total,
            disable=not shown,
            initial=initial,
            unit=unit,
            ascii=not terminal,
            dynamic_ncols=terminal,
            mininterval=0.1 if terminal else 30,
            maxinterval=10 if terminal else 60,
        )

    def update(self, count: int = 1, bits_per_dim: float | None = None) -> None:
        """Moves on by `count`; a new `bits_per_dim` is shown at the right."""
        if bits_per_dim is not None:
            self._bar.set_postfix_str(f"{bits_per_dim:.4f} bits/dim", refresh=False)
        self._bar.update(count)

    def write(self, message: str) -> None:
        """Prints a line above the bar."""
        self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """An aligned text table; columns of numbers go to the right, floats with four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    columns = []
    for index, header in enumerate(headers):
        texts = [header, *(row[index] for row in cells)]
        width = max(map(len, texts))
        is_number = all(isinstance(row[index], int | float) for row in rows)
        texts.insert(1, "-" * width)
        columns.append([text.rjust(width) if is_number else text.ljust(width) for text in texts])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def median_seconds(description: str, cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case. All run once a round, so that a busy machine slows all alike; one round more, the
    first, compiles and does not count. A case returns when its work is done."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    with ProgressBar(description, rounds + 1, unit="round") as progress:
        for round_ in range(rounds + 1):
            for name, run in cases.items():
                began = time.perf_counter()
                run()
                if round_:
                    times[name].append(time.perf_counter() - began)
            progress.update()
    return {name: float(np.median(values)) for name, values in times.items()}


def temporal_flickering(frames_THWC: np.ndarray) -> float:
    """VBench's temporal flickering of a clip (T, H, W, C), values 0 to 255, or of clips (B, T, H, W, C).

    (255 − m) / 255, m the mean absolute difference of consecutive frames, averaged over clips: 1 is a
    still picture. Raises ValueError for fewer than two frames.
    """
    if frames_THWC.ndim not in (4, 5) or frames_THWC.shape[-4] < 2:
        raise ValueError(f"temporal flickering needs (…, T ≥ 2, H, W, C), not {frames_THWC.shape}")
    frames = frames_THWC.astype(np.float32)
    difference = np.abs(frames[..., 1:, :, :, :] - frames[..., :-1, :, :, :])
    return float((255 - difference.mean(dtype=np.float64)) / 255)


def psnr(reference: np.ndarray, made: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames of one shape: 10 log10(255^2 / mean squared error)."""
    error = np.mean((reference.astype(np.float64) - made.astype(np.float64)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else math.inf
