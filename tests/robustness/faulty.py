"""The orders of faulty_storage.c, and what is left of a folder once the power has gone."""

import ctypes
import dataclasses
import enum
import mmap
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("faulty_storage.c")


class Kind(enum.IntEnum):
    """What goes wrong; numbered as in the C file."""

    NOTHING = 0
    FULL = 1
    READ_ONLY = 2
    WRITE_ERROR = 3
    READ_ERROR = 4
    SHORT_WRITE = 5
    VANISH = 6  # a file is gone just before it is opened for reading
    POWER = 7  # all processes end at once


WRITE, READ, CREATE, CHANGE, SYNC, OPEN = range(6)  # places in Orders.counts
CONCERNED = {Kind.FULL: (WRITE, CREATE), Kind.READ_ONLY: (WRITE, CREATE, CHANGE), Kind.WRITE_ERROR: (WRITE, SYNC),
             Kind.READ_ERROR: (READ,), Kind.SHORT_WRITE: (WRITE,), Kind.VANISH: (OPEN,),
             Kind.POWER: (WRITE, CREATE, CHANGE, SYNC)}


class _Orders(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "at", "span", "lies_from", "count", "failed")] + [
        ("counts", ctypes.c_int64 * 6)]


class Storage:
    """A folder whose storage fails on command, for programs that run with `environment`."""

    def __init__(self, folder: Path) -> None:
        self.root, self.shadow = folder / "root", folder / "shadow"
        self.library, self._file = folder / "faulty_storage.so", folder / "orders"
        for made in (self.root, self.shadow):
            made.mkdir(parents=True, exist_ok=True)
        if not self._file.exists():
            self._file.write_bytes(bytes(ctypes.sizeof(_Orders)))
        if not self.library.exists():
            _compile(self.library)
        with open(self._file, "r+b") as file:
            self.orders = _Orders.from_buffer(mmap.mmap(file.fileno(), ctypes.sizeof(_Orders)))
        self._key = ctypes.CDLL(os.fspath(self.library)).faulty_key

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": os.fspath(self.library), "FAULTY_ORDERS": os.fspath(self._file),
                "FAULTY_ROOT": os.fspath(self.root), "FAULTY_SHADOW": os.fspath(self.shadow)}

    def order(self, kind: Kind = Kind.NOTHING, at: int = 0, span: int = 0, lies_from: int = 0) -> None:
        """From now on: the operation `at`, counted from 1, and the span - 1 after it (0: all) go wrong."""
        self.orders.kind, self.orders.at, self.orders.span, self.orders.lies_from = kind, at, span, lies_from
        self.orders.count = self.orders.failed = 0
        self.orders.counts = (ctypes.c_int64 * 6)()

    def operations(self, kind: Kind) -> int:
        """How many operations that this kind concerns there were since the last order."""
        return sum(self.orders.counts[place] for place in CONCERNED[kind])

    def fill(self, source: Path) -> None:
        """The folder becomes a copy of another one, all of which is safe on the disk."""
        self.order()
        shutil.rmtree(self.root)
        shutil.copytree(source, self.root)
        self.settle()

    def settle(self) -> None:
        """All that is there is safe."""
        shutil.rmtree(self.shadow)
        self.shadow.mkdir()
        for folder, folders, files in os.walk(self.root):
            names = [(name, "d") for name in folders] + [(name, "f") for name in files]
            listing = "".join(f"{self.key(os.path.join(folder, name))} {kind} {name}\n" for name, kind in names)
            (self.shadow / self.key(folder)).write_text(listing)
            for name in files:
                shutil.copyfile(os.path.join(folder, name), self.shadow / self.key(os.path.join(folder, name)))

    def key(self, path: str | os.PathLike[str]) -> str:
        found = ctypes.create_string_buffer(128)
        if self._key(os.fsencode(path), found, len(found)):
            raise FileNotFoundError(path)
        return found.value.decode()

    def lose_power(self, chance: random.Random, names_survive: float, bytes_survive: float) -> None:
        """What fsync did not make safe is lost: of a file its bytes, of a folder the changes of its names; each file
        and each folder keeps them with that probability."""
        self.order()
        there = {self.key(os.path.join(folder, name)): Path(folder) / name for folder, folders, files
                 in os.walk(self.root) for name in (*folders, *files)} | {self.key(self.root): self.root}
        left = self.root.with_name("left")
        _Loss(self, there, chance, names_survive, bytes_survive).rebuild(self.key(self.root), left)
        shutil.rmtree(self.root)
        left.rename(self.root)
        self.settle()


@dataclasses.dataclass(frozen=True)
class _Loss:
    storage: Storage
    there: dict[str, Path]  # what is in the folder, by its key
    chance: random.Random
    names_survive: float
    bytes_survive: float

    def rebuild(self, key: str, target: Path) -> None:
        target.mkdir()
        for child, kind, name in self._listing(key):
            if kind == "d":
                self.rebuild(child, target / name)
            else:
                (target / name).write_bytes(self._bytes(child))

    def _listing(self, key: str) -> list[list[str]]:
        safe = self.storage.shadow / key
        if key in self.there and self.chance.random() < self.names_survive:
            children = self.there[key].iterdir()
            return sorted(([self.storage.key(path), "d" if path.is_dir() else "f", path.name] for path in children),
                          key=lambda entry: entry[2])
        return [line.split(" ", 2) for line in safe.read_text().splitlines()] if safe.exists() else []

    def _bytes(self, key: str) -> bytes:
        safe = self.storage.shadow / key
        if key in self.there and self.chance.random() < self.bytes_survive:
            return self.there[key].read_bytes()
        return safe.read_bytes() if safe.exists() else b""


def _compile(library: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
