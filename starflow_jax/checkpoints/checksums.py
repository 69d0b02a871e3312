"""Checksums of a checkpoint's files, so that damage is found before anything is restored."""

import json
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import logging

from starflow_jax.config import UserError
from starflow_jax.io.checksums import CHECKSUMS, checksum, read_checksums
from starflow_jax.io.files import first_line, naming

__all__ = ["CHECKSUMS", "damage_of", "first_line", "first_whole", "quick_checksum", "write_checksums"]
PARTS, PIECE = 64, 1 << 20  # pieces of a large file, and bytes of each


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, int | None]:
    """CRC-32 of each file, None for one that is missing."""
    def found(name: str) -> int | None:
        try:
            with naming(folder / name):
                return checksum(folder / name)
        except FileNotFoundError:
            return None

    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(found, names)))


def quick_checksum(path: Path) -> int:
    """CRC-32 of a file; of a large one, of its size and PARTS pieces that are spread over it. It tells files apart, but
    does not find every damage."""
    size = path.stat().st_size
    value = zlib.crc32(str(size).encode())
    step = PIECE if size <= PARTS * PIECE else size // PARTS
    with open(path, "rb") as file:
        for begin in range(0, size, step):
            file.seek(begin)
            value = zlib.crc32(file.read(PIECE), value)
    return value


def write_checksums(folder: Path) -> None:
    """Write the checksums of a checkpoint's files into its folder."""
    # The files directly in the folder hold no data, and change with the commit.
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/**/*") if path.is_file())
    (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder, names)))


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where nothing is."""
    try:
        expected = read_checksums(folder)
        if not expected:
            return f"{CHECKSUMS} is missing, or empty"
        found = _checksums(folder, expected)
    except (OSError, ValueError, UserError) as error:
        return first_line(error)
    for name, value in expected.items():
        if found[name] != value:
            return f"{name} is missing" if found[name] is None else f"{name} has changed"
    return None


def first_whole(directory: Path, steps: Iterable[int]) -> int | None:
    """The first of the steps whose files are undamaged; each damaged one before it is reported.

    Raises UserError where there are steps and all are damaged.
    """
    step = None
    for step in steps:
        damage = damage_of(directory / str(step))
        if damage is None:
            return step
        logging.error("checkpoint %s is damaged (%s); using the one before it", directory / str(step), damage)
    if step is not None:
        raise UserError(f"{directory}: all checkpoints are damaged; start in another --workdir")
    return None
