"""Raw videos and pictures with captions, as people keep them: folders, lists, WebDataset tars.

`list_units` cuts an input into units of work, the same ones at every call; `read_unit` yields a unit's items one
by one. What can't be used comes out as `Rejected`, with its reason, and never as an exception.

    folder     cat.mp4 with cat.txt (a caption) and/or cat.json (captions in named fields) beside it, in any depth
    list       .csv, .jsonl or .parquet: a column "path" (relative to the list), captions in named columns, and,
               where only a stretch of the video is meant, "start" and "end" in seconds
    tars       a .tar or a glob of them, as video2dataset and img2dataset write: KEY.mp4, KEY.txt, KEY.json in a row

Paths may begin with gs:// or s3:// where fsspec's driver (gcsfs, s3fs) is installed.
"""

import csv
import dataclasses
import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from starflow_jax.config import Prepare, UserError

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
LISTS = (".csv", ".jsonl", ".parquet")
TXT = "txt"  # the field that a .txt file is


@dataclasses.dataclass(frozen=True)
class Unit:
    """A piece of the input; plain data, so that it can be written down and sent to other machines."""

    index: int
    kind: str  # "folder", "list" or "tar"
    where: str  # the folder, the list's folder, or the tar
    entries: tuple[Any, ...] = ()  # names of files, or [number, row] of a list


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


@dataclasses.dataclass(frozen=True)
class Rejected:
    """What is not in the result, and why; of a stretch of a video, from and to which second."""

    key: str
    reason: str
    start: float | None = None
    end: float | None = None


class Unusable(Exception):
    """Why an item is rejected."""


def list_units(source: str, items_per_unit: int) -> list[Unit]:
    """The units of an input, in order. Raises UserError where it is missing, empty or of no known kind."""
    if not source:
        raise UserError("prepare.input is empty; name a folder, a .csv, .jsonl or .parquet list, or tars")
    path = epath.Path(source)
    if source.endswith((".tar", ".tar.gz", ".tgz")):
        units = [Unit(index, "tar", str(tar)) for index, tar in enumerate(_glob(path))]
    elif path.is_dir():
        units = _grouped("folder", path, _media_below(path), items_per_unit)
        if not units:
            units = [Unit(index, "tar", str(tar)) for index, tar in enumerate(sorted(path.glob("*.tar"), key=str))]
    elif path.suffix in LISTS and path.exists():
        units = _grouped("list", path.parent, enumerate(_rows(path)), items_per_unit)
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
        return _read_tar(unit.where, settings)
    if unit.kind == "list":
        return (_from_row(epath.Path(unit.where), number, row, settings) for number, row in unit.entries)
    return (_from_folder(epath.Path(unit.where), name, settings) for name in unit.entries)


def _glob(path: epath.Path) -> list[epath.Path]:
    if any(letter in path.name for letter in "*?["):
        return sorted(path.parent.glob(path.name), key=str)
    return [path] if path.exists() else []


def _media_below(folder: epath.Path) -> list[str]:
    """Paths of all media files, relative to the folder, sorted."""

    def below(inner: epath.Path, prefix: str) -> Iterator[str]:
        # Not walk(): of an object store it gives paths without the store's name.
        for path in inner.iterdir():
            name = path.name.lower()
            if name.startswith("."):
                continue
            if name.endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
                yield prefix + path.name
            elif not name.endswith((".txt", ".json")) and path.is_dir():
                yield from below(path, f"{prefix}{path.name}/")

    return sorted(below(folder, ""))


def _grouped(kind: str, where: epath.Path, entries: Iterable[Any], size: int) -> list[Unit]:
    every = list(entries)
    return [Unit(index, kind, str(where), tuple(every[begin:begin + size]))
            for index, begin in enumerate(range(0, len(every), size))]


def _from_folder(folder: epath.Path, name: str, settings: Prepare) -> Item | Rejected:
    path = folder / name
    key = _printable(name[:-len(path.suffix)])
    beside = {suffix: path.with_suffix(f".{suffix}") for suffix in (TXT, "json")}
    try:
        fields = _fields({suffix: file.read_bytes() for suffix, file in beside.items() if file.exists()})
        long, short = _captions(fields, settings)
    except (Unusable, OSError) as error:
        return Rejected(key, _said(error))
    return Item(key, str(path), _is_image(name), long, short)


def _fields(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of KEY.json, and KEY.txt as the field "txt"."""
    fields: dict[str, Any] = {}
    if "json" in files:
        try:
            values = json.loads(_decoded(files["json"], "JSON"))
        except ValueError as error:
            raise Unusable(f"unreadable JSON: {error}") from error
        if not isinstance(values, dict):
            raise Unusable("unreadable JSON: not an object of named fields")
        fields.update(values)
    if TXT in files:
        fields[TXT] = _decoded(files[TXT], "caption")
    return fields


def _decoded(text: bytes, what: str) -> str:
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"wrong encoding: the {what} is not UTF-8 (byte {error.start})") from error


def _captions(fields: Mapping[str, Any], settings: Prepare) -> tuple[str, str]:
    """(long, short), one for both where there is only one; raises Unusable where there is neither."""
    long, short = _first_text(fields, settings.long_names), _first_text(fields, settings.short_names)
    if not (long or short):
        raise Unusable("no caption")
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


def _printable(name: str) -> str:
    """A file's name as UTF-8, which it need not be: with question marks then."""
    return name.encode(errors="replace").decode()


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, Unusable) else f"unreadable: {getattr(error, 'strerror', '') or error}"


def _rows(path: epath.Path) -> Iterator[Any]:
    """The rows of a list as dicts; a line that can't be read as its reason (a str)."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    # Bytes that are no UTF-8 are kept as surrogates, so that one bad row costs one row.
    text = io.StringIO(path.read_bytes().decode("utf-8", errors="surrogateescape").removeprefix("\ufeff"), newline="")
    if path.suffix == ".csv":
        csv.field_size_limit(2**24)
        reader = csv.DictReader(text)
        if "path" not in (reader.fieldnames or ()):
            raise UserError(f'{path}: has no column "path"; its columns are {", ".join(reader.fieldnames or ())}')
        for row in reader:
            yield {name: value for name, value in row.items() if isinstance(name, str)}
        return
    for line in text:
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                yield f"unreadable JSON: {error}"


def _parquet_rows(path: epath.Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file)
            if "path" not in table.schema_arrow.names:
                raise UserError(f'{path}: has no column "path"; its columns are {", ".join(table.schema_arrow.names)}')
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({error})") from error


def _from_row(folder: epath.Path, number: int, row: Any, settings: Prepare) -> Item | Rejected:
    """The item of a row; its key is the path, and the row's number, since a video may be in several rows."""
    key = f"row {number}"
    try:
        if isinstance(row, str):
            raise Unusable(row)
        name = row.get("path") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name:
            raise Unusable("no path")
        key = f"{_printable(name)}#{number}"
        if name.startswith(("http://", "https://")):
            raise Unusable("not a file but an address: download it first, for example with video2dataset")
        if not name.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
            raise Unusable("not a video or picture by its name's ending")
        if not (folder / name).exists():
            raise Unusable("file not found")
        long, short = _captions(row, settings)
        start, end = _seconds(row, "start", 0.0), _seconds(row, "end", math.inf)
        if not 0 <= start < end:
            raise Unusable(f"start {start} and end {end} are no stretch of time")
        return Item(key, str(folder / name), _is_image(name), long, short, start, end)
    except (Unusable, OSError, ValueError) as error:
        return Rejected(key, _said(error))


def _seconds(row: Mapping[str, Any], name: str, default: float) -> float:
    value = row.get(name)
    if value is None or value == "":
        return default
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise Unusable(f"{name} is {value!r}, not a number of seconds") from error


def _read_tar(path: str, settings: Prepare) -> Iterator[Item | Rejected]:
    """Samples of a WebDataset tar, in its order, one in memory at a time."""
    tar_name = epath.Path(path).name
    files: dict[str, bytes] = {}
    key, read = "", 0
    try:
        with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if (sample := _printable(folder + slash + stem)) != key and files:
                    yield _from_sample(f"{tar_name}/{key}", files, settings)
                    files = {}
                key = sample
                content = tar.extractfile(member)
                files[suffix.lower()] = content.read() if content else b""
                read += 1
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        # The sample under way may lack what comes after the damage, so it is left out with the rest.
        yield Rejected(f"{tar_name}/{key}" if key else tar_name, f"tar damaged: after {read} files, {error}")
        return
    if files:
        yield _from_sample(f"{tar_name}/{key}", files, settings)


def _from_sample(key: str, files: Mapping[str, bytes], settings: Prepare) -> Item | Rejected:
    media = [suffix for suffix in files if f".{suffix}".endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES)]
    try:
        fields = _fields(files)
        if not media:
            said = fields.get("error_message")
            raise Unusable("no video or picture in the sample" + (f": {said}" if said else ""))
        long, short = _captions(fields, settings)
    except Unusable as error:
        return Rejected(key, str(error))
    return Item(key, files[media[0]], _is_image(f".{media[0]}"), long, short)
