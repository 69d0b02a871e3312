"""Checksums of a folder's files, in a file beside them, so that damage is found when they are read.

Whoever writes files into a workdir or the package does so within `checksums_of`; whoever reads one calls `check_file`
first. A folder without checksums is from before there were any, and a file without one is read unchecked.
"""

import contextlib
import functools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from starflow_jax.config import UserError
from starflow_jax.io.files import write_text

CHECKSUMS = "checksums"
CHUNK = 1 << 24  # bytes that are read at a time


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def read_checksums(folder: Path) -> dict[str, int]:
    """{name: CRC-32} of a folder's files; {} where it has none. Raises UserError where they can't be read."""
    path = folder / CHECKSUMS
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: can't be read as checksums ({type(error).__name__}); restore that folder from a "
                        "copy, or delete this file if the others are whole") from error
    if not isinstance(found, dict) or not all(type(value) is int for value in found.values()):
        raise UserError(f"{path}: does not hold a checksum for each file; restore that folder from a copy, or delete "
                        "this file if the others are whole")
    return found


def is_damaged(path: Path) -> bool:
    """Whether a file is not the one that was written: its folder has another checksum of it."""
    expected = read_checksums(path.parent).get(path.name)
    if expected is None or not path.is_file():
        return False
    status = os.stat(path)
    return _checksum_of(path, status.st_mtime_ns, status.st_size) != expected


def check_file(path: Path) -> None:
    """Raises UserError where a file is damaged."""
    if is_damaged(path):
        raise UserError(f"{path}: is damaged, it has another checksum than when it was written; restore it from a copy "
                        f"or, if you changed it, delete {path.parent / CHECKSUMS}")


@functools.lru_cache
def _checksum_of(path: Path, modified: int, size: int) -> int:
    """Large files are read more than once, their names before their tensors."""
    return checksum(path)


@contextlib.contextmanager
def checksums_of(folder: Path, names: Iterable[str]) -> Iterator[None]:
    """Within it these files of a folder are written, or deleted; then their checksums are. A run that is killed leaves
    none of them, so that what it left is read."""
    names = set(names)
    others = {name: value for name, value in read_checksums(folder).items() if name not in names}
    if (folder / CHECKSUMS).exists():
        write_text(folder / CHECKSUMS, json.dumps(others))
    yield
    written = {name: checksum(folder / name) for name in sorted(names) if (folder / name).is_file()}
    if others or written:
        write_text(folder / CHECKSUMS, json.dumps(others | written, indent=1))
