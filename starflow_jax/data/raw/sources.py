"""Raw videos and pictures with captions, as people keep them: folders, lists, WebDataset tars.

`list_units` cuts an input into units of work, the same ones at every call; `read_unit` yields a unit's items one
by one. What can't be used comes out as `Rejected`, with its reason, and never as an exception.

    folder     cat.mp4 with cat.txt (a caption) and/or cat.json (captions in named fields) beside it, in any depth;
               with prepare.camera also cat.camera.txt or cat.camera.json (io/cameras.py)
    list       .csv, .jsonl or .parquet: a column "path" (relative to the list), captions in named columns, and,
               where only a stretch of the video is meant, "start" and "end" in seconds; a camera in "camera"
    tars       a .tar or a glob of them, as video2dataset and img2dataset write: KEY.mp4, KEY.txt, KEY.json in a row

Paths may begin with gs:// or s3:// where fsspec's driver (gcsfs, s3fs) is installed.
"""

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from starflow_jax.config import Prepare, UserError
from starflow_jax.data.raw.items import (
    JSON,
    MEDIA_SUFFIXES,
    TXT,
    Item,
    Rejected,
    Unusable,
    camera_of,
    captions_of,
    check_file,
    check_size,
    fields_of,
    is_image,
    printable,
    reason_of,
    text_suffixes,
)
from starflow_jax.data.raw.lists import LISTS, item_of_row, rows
from starflow_jax.data.raw.tars import TARS, read_tar
from starflow_jax.io.files import check_reachable


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of the input; plain data, so that it can be written down and sent to other machines."""

    index: int
    kind: str  # "folder", "list" or "tar"
    where: str  # the folder, the list's folder, or the tar
    entries: tuple[Any, ...] = ()  # names of files, or [number, row] of a list


def list_units(source: str, items_per_unit: int) -> list[Unit]:
    """The units of an input, in order. Raises UserError where it is missing, empty or of no known kind."""
    if not source:
        raise UserError("prepare.input is empty; name a folder, a .csv, .jsonl or .parquet list, or tars")
    check_reachable(source, "prepare.input")
    path = epath.Path(source)
    if source.endswith(TARS):
        units = [Unit(index, "tar", str(tar)) for index, tar in enumerate(_glob(path))]
    elif path.is_dir():
        units = _grouped("folder", path, _media_below(path), items_per_unit)
        if not units:
            units = [Unit(index, "tar", str(tar)) for index, tar in enumerate(sorted(path.glob("*.tar"), key=str))]
    elif path.suffix in LISTS and path.exists():
        units = _grouped("list", path.parent, enumerate(rows(path)), items_per_unit)
    elif path.exists():
        raise UserError(f"prepare.input={source!r}: neither a folder nor one of {', '.join(LISTS)}, .tar")
    else:
        raise UserError(f"prepare.input={source!r}: not found; check the path")
    if not units:
        raise UserError(f"prepare.input={source!r}: holds no videos, pictures or tars")
    return units


def read_unit(unit: Unit, settings: Prepare) -> Iterator[Item | Rejected]:
    """The unit's items in order; whatever can't be used as `Rejected`."""
    if unit.kind == "tar":
        return read_tar(unit.where, settings)
    if unit.kind == "list":
        return (item_of_row(epath.Path(unit.where), number, row, settings) for number, row in unit.entries)
    return (_from_folder(epath.Path(unit.where), name, settings) for name in unit.entries)


def _glob(path: epath.Path) -> list[epath.Path]:
    if any(letter in path.name for letter in "*?["):
        return sorted(path.parent.glob(path.name), key=str)
    return [path] if path.exists() else []


def _media_below(root: epath.Path) -> list[str]:
    """Paths of all media files, relative to the folder, sorted.

    A folder is entered once, however many symbolic links lead to it, and by its own name where it has one in here.
    """
    found: list[str] = []
    entered: set[str] = set()
    folders, links = collections.deque([("", root)]), collections.deque[tuple[str, epath.Path]]()
    while folders or links:
        prefix, folder = (folders or links).popleft()
        real = str(folder) if "://" in str(folder) else os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        # Not walk(): of an object store it gives paths without the store's name.
        for path in sorted(folder.iterdir(), key=lambda path: path.name):
            name = path.name.lower()
            if name.startswith("."):
                continue
            if name.endswith(MEDIA_SUFFIXES):
                found.append(prefix + path.name)
            elif not name.endswith((f".{TXT}", f".{JSON}")) and path.is_dir():
                (links if os.path.islink(path) else folders).append((f"{prefix}{path.name}/", path))
    return sorted(found)


def _grouped(kind: str, where: epath.Path, entries: Iterable[Any], size: int) -> list[Unit]:
    every = list(entries)
    return [Unit(index, kind, str(where), tuple(every[begin:begin + size]))
            for index, begin in enumerate(range(0, len(every), size))]


def _from_folder(folder: epath.Path, name: str, settings: Prepare) -> Item | Rejected:
    path = folder / name
    key = printable(name[:-len(path.suffix)])
    beside = {suffix: path.with_suffix(f".{suffix}") for suffix in text_suffixes(settings)}
    try:
        check_file(str(path))
        files = {}
        for suffix, file in beside.items():
            if file.exists():
                check_file(str(file))
                check_size(f".{suffix}", file.stat().length, settings.max_text_mb, "max_text_mb")
                files[suffix] = file.read_bytes()
        long, short = captions_of(fields_of(files), settings)
        camera = camera_of(files, settings, name)
    except (Unusable, OSError) as error:
        return Rejected(key, reason_of(error))
    return Item(key, str(path), is_image(name), long, short, camera=camera)
