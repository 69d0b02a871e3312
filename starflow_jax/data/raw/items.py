"""A video or picture to prepare, what is left out, and the captions and cameras that belong to it."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from starflow_jax.config import Prepare, UserError
from starflow_jax.io.cameras import Cameras, moves_in, moves_in_turn, parse_cameras

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES
TXT, JSON = "txt", "json"  # the files with captions; the first is a field of its own
CAMERAS = ("camera.txt", "camera.json")


@dataclasses.dataclass(frozen=True)
class Item:
    """A video or picture to prepare; `media` is its path or its bytes, the stretch is in seconds."""

    key: str
    media: str | bytes
    is_image: bool
    caption_long: str
    caption_short: str
    start: float = 0.0
    end: float = math.inf
    camera: Cameras | str | None = None  # a path, or moves by name


@dataclasses.dataclass(frozen=True)
class Rejected:
    """What is not in the result, and why; of a stretch of a video, from and to which second."""

    key: str
    reason: str
    start: float | None = None
    end: float | None = None


class Unusable(Exception):
    """Why an item is rejected."""


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def printable(name: str) -> str:
    """A file's name as UTF-8, which it need not be: with question marks then."""
    return name.encode(errors="replace").decode()


def reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, Unusable) else f"unreadable: {getattr(error, 'strerror', '') or error}"


def check_file(path: str) -> None:
    """Raises Unusable for a pipe or a device, from which bytes may come without end, or never."""
    if "://" not in path and os.path.exists(path) and not os.path.isfile(path):
        raise Unusable("unreadable: not a regular file")


def check_size(what: str, size: int, megabytes: int, setting: str) -> None:
    """Raises Unusable where something has more bytes than a setting allows."""
    if size > megabytes * 1_000_000:
        raise Unusable(f"too large: the {what} has {size / 1e6:.0f} MB, more than prepare.{setting}={megabytes}")


def fields_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of KEY.json, and KEY.txt as the field "txt"; raises Unusable."""
    fields: dict[str, Any] = {}
    if JSON in files:
        values = parse_json(_decoded(files[JSON], "JSON"))
        if not isinstance(values, dict):
            raise Unusable("unreadable JSON: not an object of named fields")
        fields.update(values)
    if TXT in files:
        fields[TXT] = _decoded(files[TXT], "caption")
    return fields


def parse_json(text: str) -> Any:
    """Raises Unusable for what is no JSON, or nested so deeply that it can't be meant."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise Unusable(f"unreadable JSON: {error}") from error
    except RecursionError as error:
        raise Unusable("unreadable JSON: nested too deeply") from error


def text_suffixes(settings: Prepare) -> tuple[str, ...]:
    """Of the files that may belong to a video or picture."""
    return (TXT, JSON, *CAMERAS) if settings.camera else (TXT, JSON)


def camera_of(files: Mapping[str, bytes], settings: Prepare, name: str) -> Cameras | str | None:
    """The camera among an item's files, None where none is asked for, or of a picture; raises Unusable."""
    if not settings.camera or is_image(name):
        return None
    for suffix in CAMERAS:
        if suffix in files:
            try:
                moves = moves_in(files[suffix], suffix)
                if moves:
                    moves_in_turn(moves)
                return moves or parse_cameras(files[suffix], suffix)
            except UserError as error:
                raise Unusable(f"unreadable camera: {error}") from error
    raise Unusable("no camera")


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"wrong encoding: the {what} is not UTF-8 (byte {error.start})") from error


def captions_of(fields: Mapping[str, Any], settings: Prepare) -> tuple[str, str]:
    """(long, short), one for both where there is only one; raises Unusable where there is neither."""
    long, short = _first_text(fields, settings.long_names), _first_text(fields, settings.short_names)
    if not (long or short):
        raise Unusable("no caption")
    check_size("caption", len(long) + len(short), settings.max_text_mb, "max_text_mb")
    return long or short, short or long


def _first_text(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        value = fields.get(name)
        if isinstance(value, list) and value:  # several captions: the first is the best one by custom
            value = value[0]
        if isinstance(value, str) and value.strip():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise Unusable(f'wrong encoding: the caption in "{name}" is not UTF-8') from error
            return " ".join(value.split())
    return ""
