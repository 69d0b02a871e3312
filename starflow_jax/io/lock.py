"""One run at a time in a folder, held by FOLDER/in_use.json, which says who is there.

- A lock (flock) where the folder is on a disk of this machine: the system frees it when its holder ends, however that
  happens.
- A lease everywhere else (NFS, SMB, Lustre, FUSE and so mounted buckets, gs://): there flock is missing, or seen by
  one machine alone. Its holder writes the file anew every RENEWED seconds. Who finds one watches it, by its own clock:
  a file that changes has a holder, one that does not for EXPIRES seconds has none and is taken over. Of several that
  take it at once the last writer has it: each looks again SETTLED seconds after it wrote (Fischer's algorithm).
"""

import contextlib
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from etils import epath

from starflow_jax.config import UserError
from starflow_jax.io.files import parse_json, write_text

IN_USE = "in_use.json"
# File systems whose flock all processes see that can see the files.
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "tmpfs", "ramfs", "overlay"}
RENEWED, SETTLED, EXPIRES = 10.0, 3.0, 60.0  # seconds
POLLED = 0.5  # seconds between two looks at a lease of another


@contextlib.contextmanager
def held(folder: str | os.PathLike[str], named: str = "--workdir") -> Iterator[None]:
    """Have a folder, which is made where it is missing, for this run alone.

    named: the setting that names the folder. Raises UserError where another run has it. Waits up to EXPIRES seconds for
    a lease that a killed run left, and ends the process where its own was taken over, since this process was stopped
    for longer than that.
    """
    where = os.fspath(folder)
    if "://" not in where:
        Path(where).mkdir(parents=True, exist_ok=True)
    with (_lock if file_system(where) in LOCAL else _lease)(where, named):
        yield


def file_system(folder: str) -> str:
    """The type of the file system that a folder is on, as Linux names it; "" where that is not known."""
    mounts = Path("/proc/self/mounts")
    if "://" in folder or not mounts.exists():
        return ""
    path, found = Path(folder).resolve(), (-1, "")
    for line in mounts.read_text(errors="replace").splitlines():
        _, point, kind, *_ = line.split(" ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point)  # a space is \040
        if path.is_relative_to(point):
            found = max(found, (len(point), kind), key=lambda one: one[0])
    return found[1]


@contextlib.contextmanager
def _lock(folder: str, named: str) -> Iterator[None]:
    # Never deleted: whoever waits for a deleted file would get a lock that nobody else sees. Not inherited by programs
    # that this process starts, which would hold it beyond its end.
    with open(Path(folder) / IN_USE, "a+", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refused(folder, named, _parsed(file.read())) from None
        file.truncate(0)
        file.write(json.dumps(_myself()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # an empty file: nobody


@contextlib.contextmanager
def _lease(folder: str, named: str) -> Iterator[None]:
    path = f"{folder.rstrip('/')}/{IN_USE}"
    _wait_until_free(folder, named, path)
    mine = _myself()
    write_text(path, json.dumps(mine))
    time.sleep(SETTLED)
    there = _read(path)
    if _token(there) != mine["token"]:
        raise _refused(folder, named, there)
    released = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, mine, released, _end), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        released.set()
        renewal.join()
        if _token(_read(path)) == mine["token"]:
            epath.Path(path).unlink()


def _wait_until_free(folder: str, named: str, path: str) -> None:
    """Until there is no lease, or one that has expired. Raises UserError where one is renewed."""
    first, began = _read(path), time.monotonic()
    if first is None:
        return
    print(f"{folder}: {_who(first)} has it or was killed; waiting up to {EXPIRES:.0f} seconds for a sign of its life",
          file=sys.stderr, flush=True)
    while time.monotonic() - began < EXPIRES:
        time.sleep(POLLED)
        there = _read(path)
        if there is None:  # its run has ended
            return
        if there != first:
            raise _refused(folder, named, there)


def _renew(path: str, mine: dict[str, Any], released: threading.Event, end: Callable[[str], None]) -> None:
    """Write the lease anew until it is released; end(why) where it is this run's no more."""
    renewed, count = time.monotonic(), 0
    while not released.wait(RENEWED):
        late = time.monotonic() - renewed > EXPIRES  # another run may have taken it, and even be gone again
        try:
            there = _read(path)
            if _token(there) != mine["token"] and (there or late):
                end(f"{path}: this run did not write it for {EXPIRES:.0f} seconds, and {_who(there)} has the folder")
                return
            count += 1
            write_text(path, json.dumps({**mine, "renewals": count}))
            renewed = time.monotonic()
        except OSError as error:  # storage may be away for a moment
            if late:
                end(f"{path}: can't be written for {EXPIRES:.0f} seconds ({error}); another run may take the folder")
                return


def _end(why: str) -> None:
    print(f"starflow_jax: {why}; this run ends, and the same command goes on from what is saved", file=sys.stderr,
          flush=True)
    os._exit(2)  # at once: nothing more may be written


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": _now(), "token": uuid.uuid4().hex}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _read(path: str) -> dict[str, Any] | None:
    """What the file says, {} for something else; None where there is no file, or an empty one, which a lock left."""
    try:
        content = epath.Path(path).read_bytes()
    except FileNotFoundError:
        return None
    return _parsed(content) if content else None


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _token(there: dict[str, Any] | None) -> Any:
    return there and there.get("token")


def _who(there: dict[str, Any] | None) -> str:
    there = there or {}
    return (f"another run (host {there.get('host', 'unknown')}, process {there.get('pid', 'unknown')}, since "
            f"{there.get('since', 'unknown')})")


def _refused(folder: str, named: str, there: dict[str, Any] | None) -> UserError:
    return UserError(f"{folder}: {_who(there)} is using it; wait for its end, stop it, or name another {named}")
