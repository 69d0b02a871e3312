"""Files and folders that are whole or not there at all."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from starflow_jax.config import UserError

ARRIVING = ".arriving-"  # prefix of the names of what is not whole yet; a killed process leaves such files behind

UNITS = {1: "bytes", 10**3: "kB", 10**6: "MB", 10**9: "GB", 10**12: "TB"}

DRIVERS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}  # what fsspec reads the stores by


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str], keep: bool = False) -> Iterator[Path]:
    """Yields a local path of the same name, where a file or folder is written; it becomes `path`, at once, if the
    block ends without an exception.

    Makes the parent folder where it is missing. All of it is synced to the disk before it is renamed, and its name
    afterwards, so that a loss of power takes nothing back and leaves no file without its bytes. keep: what is at `path`
    by then stays, because another process made the same; else a file is replaced.
    """
    if "://" in os.fspath(path):
        with tempfile.TemporaryDirectory(prefix=ARRIVING) as folder:
            local = Path(folder) / os.fspath(path).rpartition("/")[2]
            yield local
            _send(local, os.fspath(path))
        return
    final = Path(path)
    make_folder(final.parent)
    with tempfile.TemporaryDirectory(prefix=ARRIVING, dir=final.parent) as folder:
        local = Path(folder) / final.name
        yield local
        sync_all(local)
        if not (keep and final.exists()):
            try:
                os.replace(local, final)
            except OSError:
                if not (keep and final.exists()):
                    raise
    sync(final.parent)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds the file's name to an OSError without one, as reads and writes raise it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Make a folder and those above it, where they are missing; their names are synced to the disk."""
    path = Path(folder).absolute()
    missing = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:  # names can be added to a folder whose names can't be read
        return
    try:
        with naming(path):
            os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(opened)


def sync_all(path: Path) -> None:
    """The same of a file; or of a folder with all that is in it, the names last."""
    for folder, _, files in os.walk(path, topdown=False):
        for file in (os.path.join(folder, name) for name in files):
            if os.path.isfile(file):
                sync(file)
        sync(folder)
    if path.is_file():
        sync(path)


def check_writable(folder: str | os.PathLike[str], setting: str, files: Sequence[str] = ()) -> None:
    """Raises UserError, which names the setting, where a folder can't be written to, or can't be made; makes nothing.

    files: names that are to be written in it; a folder of such a name, and a name too long, are refused too.
    """
    if "://" in os.fspath(folder):
        return
    path = Path(folder).absolute()
    try:
        there = next(part for part in (path, *path.parents) if part.exists())
        longest = os.pathconf(there, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in (*path.parts, *files)):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if any((path / file).is_dir() for file in files):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, ValueError) as error:
        words = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
        whole = os.fspath(Path(folder, files[0]) if files else folder)
        shown = whole[:200] + ("..." if len(whole) > 200 else "")
        raise UserError(f"{setting}={shown}: can't be written to ({words}); name another "
                        f"{'file' if files else 'folder'}") from error


def check_reachable(path: str, setting: str) -> None:
    """Raises UserError, which names the setting, for an address (gs://...) that can't be read from here."""
    scheme, separator, _ = path.partition("://")
    if not separator:
        return
    if scheme not in DRIVERS:
        raise UserError(f"{setting}={path[:200]}: addresses of {scheme[:20]}:// are not taken; name a local path "
                        f"or one of {', '.join(f'{known}://' for known in DRIVERS)}")
    from etils import epath

    try:
        epath.Path(path).exists()
    except ImportError as error:
        raise UserError(f"{setting}={path[:200]}: needs its driver; pip install {DRIVERS[scheme]}") from error
    except Exception as error:  # each store has faults of its own
        words = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{setting}={path[:200]}: can't be reached ({words}); check name and access") from error


def first_line(error: BaseException) -> str:
    """Of its message, or its type where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path: Any) -> Any:
    """What a JSON file holds; the path may be one of etils, in a bucket. Raises OSError where it can't be read,
    ValueError for what is no JSON."""
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError for what is none, also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def size_in_words(count: int) -> str:
    """A number of bytes with the unit that suits it: 1.0 kB, 3.2 GB."""
    unit = next((unit for unit in (10**12, 10**9, 10**6, 10**3) if count >= unit), 1)
    return f"{count / unit:,.1f} {UNITS[unit]}" if unit > 1 else f"{count:,} {UNITS[unit]}"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file, replacing one that is there."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _send(local: Path, path: str) -> None:
    # An object store can't rename, and need not: it shows a file once all of it has arrived. The last file of a folder,
    # by name, is the one that says that the folder is whole.
    from etils import epath

    target = epath.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for file in _files(local):
        epath.Path(file).copy(target / file.relative_to(local) if local.is_dir() else target, overwrite=True)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
