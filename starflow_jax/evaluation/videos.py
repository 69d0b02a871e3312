"""A folder of videos, whichever system made them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io.video import at_rate, read_video

SUFFIXES = (".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif")


@dataclasses.dataclass(frozen=True)
class Videos:
    """Videos by name, the file's without its extension; `read` gives (T, H, W, 3) uint8 or raises UserError."""

    name: str
    files: dict[str, Path]
    read: Callable[[str], np.ndarray]


def folder_of_videos(folder: Path, fps: int) -> Videos:
    """The video files of a folder, at their own frame rate or at `fps`. Raises UserError where there are none."""
    files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in SUFFIXES}
    if not files:
        raise UserError(f"{folder}: no videos there ({', '.join(SUFFIXES)}); check the path")

    def read(name: str) -> np.ndarray:
        frames_THWC, own = read_video(files[name])
        return at_rate(frames_THWC, own, fps) if fps else frames_THWC

    return Videos(str(folder), files, read)
