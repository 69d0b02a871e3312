"""Lists of videos and pictures: .csv, .jsonl and .parquet, one row an item or a stretch of a video."""

import csv
import io
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from starflow_jax.config import Prepare, UserError
from starflow_jax.data.raw.items import (
    CAMERAS,
    MEDIA_SUFFIXES,
    Item,
    Rejected,
    Unusable,
    camera_of,
    captions_of,
    check_file,
    check_size,
    is_image,
    parse_json,
    printable,
    reason_of,
)
from starflow_jax.io.cameras import SUFFIXES, are_moves

LISTS = (".csv", ".jsonl", ".parquet")


def rows(path: epath.Path) -> Iterator[Any]:
    """The rows of a list as dicts of plain values; a row that can't be read as its reason (a str).

    Raises UserError for a list without a column "path".
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    # Bytes that are no UTF-8 are kept as surrogates, so that one bad row costs one row.
    text = io.StringIO(path.read_bytes().decode("utf-8", errors="surrogateescape").removeprefix("\ufeff"), newline="")
    yield from _csv_rows(path, text) if path.suffix == ".csv" else _json_rows(text)


def item_of_row(folder: epath.Path, number: int, row: Any, settings: Prepare) -> Item | Rejected:
    """The item of a row; its key is the path, and the row's number, since a video may be in several rows."""
    key = f"row {number}"
    try:
        if isinstance(row, str):
            raise Unusable(row)
        name = row.get("path") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise Unusable("no path")
        key = f"{printable(name)}#{number}"
        if name.startswith(("http://", "https://")):
            raise Unusable("not a file but an address: download it first, for example with video2dataset")
        if not name.lower().endswith(MEDIA_SUFFIXES):
            raise Unusable("not a video or picture by its name's ending")
        if not (folder / name).exists():
            raise Unusable("file not found")
        check_file(str(folder / name))
        long, short = captions_of(row, settings)
        start, end = _seconds(row, "start", 0.0), _seconds(row, "end", math.inf)
        if not 0 <= start < end:
            raise Unusable(f"start {start} and end {end} are no stretch of time")
        camera = camera_of(_camera_files(folder, row, settings), settings, name)
        return Item(key, str(folder / name), is_image(name), long, short, start, end, camera)
    except (Unusable, OSError, ValueError) as error:
        return Rejected(key, reason_of(error))


def _camera_files(folder: epath.Path, row: Mapping[str, Any], settings: Prepare) -> dict[str, bytes]:
    """The file or the moves that a row names, or the file beside its video, by the suffix that says how it is
    written."""
    named = row.get("camera") if settings.camera else None
    if isinstance(named, str) and not named.lower().endswith(SUFFIXES) and are_moves(named):
        check_size("camera", len(named), settings.max_text_mb, "max_text_mb")
        return {CAMERAS[0]: named.encode()}
    beside = {suffix: (folder / row["path"]).with_suffix(f".{suffix}") for suffix in CAMERAS}
    if isinstance(named, str) and named:
        beside = {CAMERAS[named.lower().endswith(".json")]: folder / named}
        if not (folder / named).exists():
            raise Unusable("camera neither a file that is there nor moves")
    files = {}
    for suffix, path in beside.items() if settings.camera else ():
        if path.exists():
            check_file(str(path))
            check_size("camera", path.stat().length, settings.max_text_mb, "max_text_mb")
            files[suffix] = path.read_bytes()
    return files


def _csv_rows(path: epath.Path, text: io.StringIO) -> Iterator[Any]:
    csv.field_size_limit(sys.maxsize)  # a field that is too large is its row's fault, not the list's
    reader = csv.DictReader(text)
    if "path" not in (reader.fieldnames or ()):
        raise UserError(f'{path}: has no column "path"; its columns are {", ".join(reader.fieldnames or ())[:200]}')
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"unreadable CSV: {error}"
            continue
        yield {name: value for name, value in row.items() if isinstance(name, str)}


def _json_rows(text: io.StringIO) -> Iterator[Any]:
    for line in text:
        if line.strip():
            try:
                yield _plain(parse_json(line))
            except Unusable as error:
                yield str(error)


def _parquet_rows(path: epath.Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            if "path" not in table.schema_arrow.names:
                raise UserError(f'{path}: has no column "path"; its columns are {", ".join(table.schema_arrow.names)}')
            for batch in table.iter_batches():
                yield from _rows_of(batch)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def _rows_of(batch: Any) -> list[Any]:
    """Of a pyarrow batch; where a value can't be read, such as a text that is no UTF-8, its row alone is lost."""
    try:
        return [_plain(row) for row in batch.to_pylist()]
    except ValueError as error:
        if batch.num_rows == 1:
            return [f"unreadable row: {error}"]
    return [row for index in range(batch.num_rows) for row in _rows_of(batch.slice(index, 1))]


def _plain(row: Any) -> Any:
    """What of a row may be used: it is written down as JSON, which what is nested deeply can't be."""
    return {name: _plain_value(value) for name, value in row.items()} if isinstance(row, dict) else None


def _plain_value(value: Any) -> Any:
    """A text or number as it is, a list's first entry in a list, nothing ([]) of what has named fields."""
    if isinstance(value, list | dict):
        first = value[:1] if isinstance(value, list) else []
        return [_plain_value(entry) for entry in first if not isinstance(entry, list | dict)]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _seconds(row: Mapping[str, Any], name: str, default: float) -> float:
    value = row.get(name)
    if value is None or value == "":
        return default
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Unusable(f"{name} is {str(value)[:100]!r}, not a number of seconds") from error
