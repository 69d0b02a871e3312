"""A reader of foreign files, tried with damaged ones: each must end in a value or a UserError."""

import contextlib
import dataclasses
import random
import re
import resource
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from starflow_jax.config import UserError
from starflow_jax.io.checksums import CHECKSUMS
from tests.robustness.mutate import mutated

LONGEST = 20.0  # CPU seconds that a file of some kB may take
ROOM = 4 * 2**30  # bytes of address space beyond what the process has at first


@dataclasses.dataclass(frozen=True)
class Reader:
    """make: writes whole files into a folder. damaged: which of these are damaged, one at a time. read: of the folder
    and the damaged file, all that is in it. pack: of the damaged bytes the file's, where they are an inner part of it
    that an outer checksum would protect; inner: the inverse. seal: makes the damage pass for whole. writes: reading
    changes the folder. crashes: a native library reads, which may end the process."""

    make: Callable[[Path], None]
    read: Callable[[Path, Path], Any]
    damaged: tuple[str, ...] = ("**/*",)
    inner: Callable[[bytes], bytes] = bytes
    pack: Callable[[bytes], bytes] = bytes
    seal: Callable[[Path, Path], None] | None = None
    writes: bool = False
    crashes: bool = False


def slug(name: str) -> str:
    """A reader's name as a folder's."""
    return re.sub(r"\W+", "_", name)


VALUE, REFUSED = "value", "refused"
# In the line of what is refused before it is parsed: by our checksums, or by a format's own.
OF_CHECKSUMS = re.compile("checksum|checkpoints are damaged|is damaged;|hash mismatch")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a try ended: with a VALUE, REFUSED in one line, or with a fault, named by what it was and where. said: its
    traceback, or the line. parsed: whether the damage came as far as a parser, and did not end at a checksum."""

    how: str
    said: str = ""
    parsed: bool = True


@dataclasses.dataclass
class Outcome:
    """What a number of tries came to. parsed: of how many the damage came as far as a parser. faults: {how: {"times",
    "first": number of the first try, "said"}}."""

    values: int = 0
    refused: int = 0
    parsed: int = 0
    faults: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def tries(self) -> int:
        return self.values + self.refused + self.faulty

    @property
    def faulty(self) -> int:
        return sum(fault["times"] for fault in self.faults.values())

    def add(self, number: int, ended: Ended) -> None:
        self.parsed += ended.parsed
        if ended.how == VALUE:
            self.values += 1
        elif ended.how == REFUSED:
            self.refused += 1
        else:
            fault = self.faults.setdefault(ended.how, {"times": 0, "first": number, "said": ended.said[-2_000:]})
            fault["times"] += 1


class TooLong(BaseException):
    """It took more than LONGEST seconds of CPU time."""


class Specimen:
    """A folder of a reader's whole files, of which one is damaged at a time."""

    def __init__(self, name: str, reader: Reader, folder: Path):
        self.name, self.reader = name, reader
        self.whole, self.folder = folder / "whole", folder / "tried"
        self.whole.mkdir(parents=True)
        reader.make(self.whole)
        found = {path for pattern in reader.damaged for path in self.whole.glob(pattern) if path.is_file()}
        self.files = sorted(str(path.relative_to(self.whole)) for path in found)
        assert self.files, f"{name}: nothing to damage"
        self.contents = {file: reader.inner((self.whole / file).read_bytes()) for file in self.files}

    def check(self) -> None:
        """That the whole files are read."""
        for file in self.files:
            ended = attempt(self, file, (self.whole / file).read_bytes())
            assert ended.how == VALUE, f"{self.name}: {file} is whole: {ended.said}"

    def damage(self, number: int) -> tuple[str, bytes]:
        """(file, its bytes) of a try; the same ones for the same number."""
        chosen = random.Random(f"{self.name} {number}")
        file = chosen.choice(self.files)
        return file, self.reader.pack(mutated(self.contents[file], chosen))

    def put(self, file: str, content: bytes) -> Path:
        """The folder with these bytes as the file."""
        if self.reader.writes or not self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.copytree(self.whole, self.folder)
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        if self.reader.seal:
            self.reader.seal(self.folder, path)
        return path

    def mend(self, file: str) -> None:
        """The file as it was."""
        if not self.reader.writes and file in self.contents:
            shutil.copyfile(self.whole / file, self.folder / file)


def attempt(specimen: Specimen, file: str, content: bytes) -> Ended:
    """How reading ends with these bytes as the file."""
    path = specimen.put(file, content)
    of_checksums = path.name == CHECKSUMS
    try:
        with at_most(LONGEST):
            specimen.reader.read(specimen.folder, path)
    except UserError as error:
        line = str(error)
        early = of_checksums or OF_CHECKSUMS.search(line.replace(str(specimen.folder), ""))
        return Ended(REFUSED if len(line.splitlines()) == 1 else "UserError of several lines", line, not early)
    except (Exception, SystemExit, TooLong) as error:
        return Ended(_where(error), "".join(traceback.format_exception(error)))
    finally:
        specimen.mend(file)
    return Ended(VALUE, parsed=not of_checksums)


def _where(error: BaseException) -> str:
    """The kind of a fault: its exception, and the line of the package that let it through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "starflow_jax" in frame.filename and "site-packages" not in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {'/'.join(Path(last.filename).parts[-2:])}:{last.lineno} {last.name}"


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TooLong after so many seconds of this thread's CPU time, or ten times as many of the process's (other
    threads may have work of their own); in the main thread, once Python has its turn. Not by SIGPROF, which libtpu
    sends itself."""
    end, last, running = time.thread_time() + seconds, time.process_time() + 10 * seconds, True

    def stop(*_: Any) -> None:
        if not running:  # the signal was on its way
            return
        if time.thread_time() >= end or time.process_time() >= last:
            raise TooLong
        signal.setitimer(signal.ITIMER_VIRTUAL, max(end - time.thread_time(), 0.01))

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def without_checksums(_: Path, path: Path) -> None:
    """A `seal`: without the checksums beside a file, it is read as it is."""
    if path.name != CHECKSUMS:
        path.with_name(CHECKSUMS).unlink(missing_ok=True)


def limit_memory() -> None:
    """Of this process, to ROOM more than it has: what asks for more is a MemoryError, or the process's end."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def trials(specimen: Specimen, damage: Callable[[int], tuple[str, bytes]], numbers: Iterable[int],
           begins: Callable[[int], None] = lambda _: None) -> Iterator[tuple[int, Ended]]:
    """(number, how it ended) of the (file, its bytes) of each number. begins: called before each."""
    for number in numbers:
        begins(number)
        yield number, attempt(specimen, *damage(number))
