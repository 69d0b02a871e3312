"""What tries came to, as files in runs/robustness and as tables.

    python -m tests.robustness.results

prints the tables of all that was tried in this checkout, and in the end one row for each kind of try, as
docs/pages/reliability.md has them.
"""

import collections
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starflow_jax.io.progress import table
from tests.robustness.commands import Result
from tests.robustness.report import write_report
from tests.robustness.trial import Outcome, slug
from tests.small_run import ROOT

FOLDER = ROOT / "runs" / "robustness"
HEADERS = {  # {folder of results: {field: header}}
    "readers": {"reader": "reader", "tries": "tries", "parsed": "came to a parser", "values": "read",
                "refused": "refused in one line", "faulty": "faults", "first": "from number", "seconds": "seconds",
                "date": "date"},
    "settings": {"what": "command lines", "tries": "tries", "work": "work", "done": "done", "refused": "one line",
                 "faulty": "faults", "seed": "seed", "seconds": "seconds", "date": "date"},
}


def today() -> int:
    """YYYYMMDD, a seed of what is another each day."""
    return int(time.strftime("%Y%m%d"))


def write_reader(name: str, outcome: Outcome, first: int, seconds: float) -> None:
    """The outcome of a reader's tries. first: the number that they, or those of the day, begin with."""
    _write("readers", name, seconds, {"reader": name, "tries": outcome.tries, "faulty": outcome.faulty, "first": first,
                                      **dataclasses.asdict(outcome)})


def write_settings(name: str, results: Sequence[tuple[list[str], Result]], seed: int, seconds: float) -> None:
    """How command lines ended. seed: Hypothesis's."""
    count = collections.Counter("faulty" if result.faulty else result.how for _, result in results)
    _write("settings", name, seconds, {
        "what": name, "tries": len(results), "work": count["work"], "done": count["done"], "seed": seed,
        "refused": count["one line"], "faulty": count["faulty"],
        "faults": [{"arguments": arguments, **dataclasses.asdict(result)} for arguments, result in results
                   if result.faulty]})


def _write(kind: str, name: str, seconds: float, facts: dict[str, Any]) -> None:
    write_report(FOLDER / kind / f"{slug(name)}.json", facts | {"seconds": round(seconds, 1)})


def shown(folder: Path = FOLDER) -> str:
    """The tables."""
    tables = []
    for kind, headers in HEADERS.items():
        found = _reports(folder / kind)
        if found:
            rows = [[facts.get(name, "?") for name in headers] for facts in found]
            tables.append(table(rows, tuple(headers.values())))
    return "\n\n".join([*tables, table(summary(folder), ("what", "tries", "lost or faulty", ""))])


def summary(folder: Path = FOLDER) -> list[list[object]]:
    """A row for each kind of try whose results are there: what, tries, how many were lost or ended otherwise than in
    one line, and what else there is to say."""
    rows: list[list[object]] = []
    for kind in HEADERS:
        found = _reports(folder / kind)
        if found:
            rows.append([kind, sum(facts["tries"] for facts in found), sum(facts["faulty"] for facts in found),
                         f"{len(found)} kinds"])
    for facts in _reports(folder):
        if "tried" in facts:
            by_part = collections.Counter[str]()
            for what, tries in facts["tried"].items():
                by_part[what.partition(": ")[0]] += tries
            rows += [[f"storage: {part}", tries, sum(said.startswith(f"{part}, ") for said in facts["lost"]), ""]
                     for part, tries in by_part.items()]
        elif "kills" in facts:
            rows.append(["kills", facts["kills"], facts["lost"] + len(facts["faults"]),
                         f"{facts['trainings']} trainings came to their end in spite of them"])
        elif "growth" in facts:
            rows.append(["videos and streams of one process", facts["videos"] + facts["streams"], "",
                         f"{facts['megabytes_after_the_first_fifty']} MB after 50, at most "
                         f"{facts['most_megabytes_later']} MB later ({facts['growth']:+.1%})"])
    return rows


def _reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


if __name__ == "__main__":
    print(shown())
