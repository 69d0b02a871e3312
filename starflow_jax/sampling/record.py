"""The JSON beside a session's video: all that it was made from, so that it can be made again."""

import base64
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from starflow_jax.config import UserError
from starflow_jax.io.files import read_json, write_text
from starflow_jax.io.live_camera import as_json
from starflow_jax.io.pictures import NotAPicture, open_picture
from starflow_jax.sampling.steered import Change, check_prompt


@dataclasses.dataclass(frozen=True)
class Record:
    """A session's video."""

    model: str
    weights: str  # a checksum of the parameters, and as what they are kept
    settings: dict[str, Any]  # of `sample`, but for those that belong to loading and to the command line
    seed: int
    start: Change  # the first frame's prompt, guidance and camera
    changes: dict[int, Change]  # by the latent frame from which on they hold
    known_THWC: np.ndarray | None = None  # given frames, uint8
    frames: int | None = None  # how many were shown; None: no limit


def write_record(path: Path, record: Record, time_stride: int) -> None:
    """Write the JSON of `record_text`."""
    write_text(path, record_text(record, time_stride))


def record_text(record: Record, time_stride: int) -> str:
    """The JSON. Each change says the frame of the video, too, from which on it holds."""
    changes = [{"latent_frame": frame, "frame": 1 + (frame - 1) * time_stride, **change}
               for frame, change in sorted(record.changes.items())]
    known = [] if record.known_THWC is None else [_png(frame_HWC) for frame_HWC in record.known_THWC]
    return json.dumps({
        "model": record.model, "weights": record.weights, **record.start, "seed": record.seed, "frames": record.frames,
        "changes": changes, "settings": record.settings, "given": known}, indent=1)


def read_record(path: str | Path) -> Record:
    """What `write_record` wrote. Raises UserError where it can't be read, or is something else."""
    try:
        held = read_json(Path(path))
        known = [_pixels(png) for png in held["given"]]
        changes = {_count(change["latent_frame"]): _change(change)
                   for change in held["changes"]}
        if not isinstance(held["settings"], dict):
            raise ValueError("settings that are none")
        start = {"prompt": check_prompt(held["prompt"]), "guidance": None, "camera": None} | _change(held)
        return Record(str(held["model"]), str(held["weights"]), held["settings"], _count(held["seed"]), start,
                      changes, np.stack(known) if known else None, _count(held["frames"]))
    except OSError as error:
        raise UserError(f"{path}: the session can't be read ({error.strerror or error})") from error
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError, SyntaxError, NotAPicture, UserError
            ) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: no JSON of a session, or a damaged one ({why}); name one that Session.save wrote"
                        ) from error


def _change(held: dict[str, Any]) -> Change:
    """What is there of a change."""
    read: dict[str, Callable[[Any], Any]] = {"prompt": check_prompt, "guidance": float, "camera": as_json}
    return {name: of(held[name]) for name, of in read.items() if held.get(name) is not None}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no number of frames, and no seed")
    return value


def _png(frame_HWC: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(frame_HWC).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _pixels(png: str) -> np.ndarray:
    return np.asarray(open_picture(io.BytesIO(base64.b64decode(png, validate=True))))
