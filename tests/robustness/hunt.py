"""Readers tried in a process of their own, which may crash: its end by a signal is a fault, and it goes on behind it.

    python -m tests.robustness.hunt [READER ...] [--tries=10000] [--first=0]

prints a table, and keeps a damaged file of each fault in runs/robustness/faults/.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.robustness import results
from tests.robustness.readers import READERS
from tests.robustness.trial import LONGEST, Ended, Outcome, Specimen, limit_memory, slug, trials
from tests.small_run import ROOT, environment

CORPUS = Path(__file__).parent / "corpus"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where the files lie
SILENT = 30 * LONGEST  # seconds without a new try: a reader waits for something
MOST_CRASHES = 20  # of one reader, after which it is given up
OF_A_DAY = 10**6  # numbers


@dataclasses.dataclass(frozen=True)
class Task:
    """A reader's tries: damage of the numbers from `first` up to `end`, or the files of the corpus."""

    reader: str
    first: int = 0
    end: int = 0
    corpus: bool = False

    def numbers(self) -> range:
        return range(self.first, len(corpus_of(self.reader)) if self.corpus else self.end)

    def damage(self, specimen: Specimen) -> Callable[[int], tuple[str, bytes]]:
        """number -> (file, its bytes)."""
        if not self.corpus:
            return specimen.damage
        kept = corpus_of(self.reader)
        return lambda number: ("/".join(kept[number].relative_to(CORPUS / slug(self.reader)).parts[1:]),
                               kept[number].read_bytes())


def tasks_of_day(name: str, tries: int, day: int) -> list[Task]:
    """Half of them the same ones always, and half other ones each day. day: as YYYYMMDD."""
    half, first = tries // 2, day * OF_A_DAY
    return [Task(name, end=half), Task(name, first, first + tries - half)]


def corpus_of(name: str) -> list[Path]:
    """The files kept of a reader: corpus/READER/LABEL/PATH/OF/THE/FILE."""
    return sorted(path for path in (CORPUS / slug(name)).rglob("*") if path.is_file())


def hunt(tasks: Sequence[Task]) -> dict[str, Outcome]:
    """Each reader's outcome, found in another process."""
    outcomes = {task.reader: Outcome() for task in tasks}
    left, crashes = list(tasks), dict.fromkeys(outcomes, 0)
    with tempfile.TemporaryDirectory(prefix="robustness-", dir=MEMORY) as folder:
        while left:
            number, done, code, said = _work(left, Path(folder), outcomes)
            if code == 0:
                return outcomes
            if number is None and code > 0:
                raise RuntimeError(said)
            task = left.pop(done)
            number = task.first if number is None else number
            outcomes[task.reader].add(number, Ended(f"ended by {_signal(code)}", said))
            crashes[task.reader] += 1
            left = left[done:]
            if crashes[task.reader] < MOST_CRASHES and number + 1 < task.numbers().stop:
                left.insert(0, dataclasses.replace(task, first=number + 1))
    return outcomes


def _signal(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _work(tasks: Sequence[Task], folder: Path, outcomes: Mapping[str, Outcome]) -> tuple[int | None, int, int, str]:
    """Try them in a process, and add to the outcomes what it noted. (The number that it had begun when it ended, None
    where none; the index of its task; its exit code; the end of what it said)."""
    notes, said = folder / "notes", folder / "said"
    notes.write_text("")
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-m", "tests.robustness.hunt", "--notes",
               str(notes), "--work", json.dumps([dataclasses.asdict(task) for task in tasks])]
    with open(said, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
        _wait(process, notes)
    began, index = None, 0
    for index, number, *ended in map(json.loads, notes.read_text().splitlines()):
        began = None if ended else number
        if ended:
            outcomes[tasks[index].reader].add(number, Ended(*ended))
    return began, index, process.returncode, said.read_text(errors="replace")[-2_000:]


def _wait(process: subprocess.Popen, notes: Path) -> None:
    """Until it ends; it is killed where it begins nothing for SILENT seconds."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return
        if time.time() - notes.stat().st_mtime > SILENT:
            process.kill()


def work(tasks: Sequence[Task], notes: Path) -> None:
    """In the other process: try them, and note every try before and after it, a line each."""
    logging.disable()
    with open(notes, "a") as file, tempfile.TemporaryDirectory(prefix="robustness-", dir=MEMORY) as folder:
        def note(*values: object) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        specimen = None
        for index, task in enumerate(tasks):
            if specimen is None or specimen.name != task.reader:
                specimen = Specimen(task.reader, READERS[task.reader], Path(folder) / str(index))
                specimen.check()
                limit_memory()
            begins = functools.partial(note, index)
            for number, ended in trials(specimen, task.damage(specimen), task.numbers(), begins):
                note(index, number, ended.how, ended.said[-2_000:], ended.parsed)


def keep_faults(name: str, outcome: Outcome, folder: Path) -> None:
    """A damaged file of each fault, as the corpus would have it."""
    with tempfile.TemporaryDirectory(prefix="robustness-", dir=MEMORY) as made:
        specimen = Specimen(name, READERS[name], Path(made))
        for fault in outcome.faults.values():
            file, content = specimen.damage(fault["first"])
            path = folder / slug(name) / str(fault["first"]) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--tries", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work([Task(**task) for task in json.loads(arguments.work)], arguments.notes)
        return
    for name in arguments.readers or READERS:
        began = time.perf_counter()
        outcome = hunt([Task(name, arguments.first, arguments.first + arguments.tries)])[name]
        results.write_reader(name, outcome, arguments.first, time.perf_counter() - began)
        keep_faults(name, outcome, results.FOLDER / "faults")
        for how, fault in outcome.faults.items():
            print(f"{name}: {how}, {fault['times']} times, first number {fault['first']}\n{fault['said']}", flush=True)
    print(results.shown())


if __name__ == "__main__":
    main()
