"""Any values of any settings: a run, or one line and exit code 2; never a traceback, a signal or a long silence."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.robustness import commands
from tests.robustness.commands import Result, result_in_process, result_of
from tests.robustness.results import today, write_settings

QUICK, SLOW, PROCESSES = 40, 5_000, 60  # command lines
HOW: dict[str, Any] = dict(database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    commands.make_folder(made)
    return made


@pytest.fixture(scope="module")
def without_work() -> Iterator[None]:
    with commands.without_work():
        yield


@settings(max_examples=QUICK, derandomize=True, **HOW)
@given(arguments=commands.commands())
def test_any_settings_end_in_work_or_one_line(folder: Path, without_work: None, arguments: list[str]) -> None:
    result = result_of(arguments, folder)
    assert not result.faulty, f"{arguments}: {result.how}\n{result.said}"


@pytest.mark.slow
def test_thousands_of_any_settings_end_in_work_or_one_line(folder: Path, without_work: None) -> None:
    """Other ones each day; the seed is in the results."""
    assert tried("settings", SLOW, lambda arguments: result_of(arguments, folder)) == []


@pytest.mark.slow
def test_any_settings_end_in_progress_or_one_line_as_processes(folder: Path) -> None:
    """With real work, in little memory: each says something within 20 s of CPU time, and none ends by a signal."""
    assert tried("settings, as processes", PROCESSES, lambda arguments: result_in_process(arguments, folder),
                 modes=("train", "sample", "evaluate", "prepare"), odd=("", "value")) == []


def tried(what: str, count: int, run: Callable[[list[str]], Result], **of: Any) -> list[tuple[list[str], Result]]:
    """Try command lines, write what they came to, and return the faults."""
    results: list[tuple[list[str], Result]] = []
    began, number = time.perf_counter(), today()

    @seed(number)
    @settings(max_examples=count, phases=[Phase.generate], **HOW)
    @given(arguments=commands.commands(**of))
    def collect(arguments: list[str]) -> None:
        results.append((arguments, run(arguments)))

    collect()
    write_settings(what, results, number, time.perf_counter() - began)
    return [(arguments, result) for arguments, result in results if result.faulty]


def test_a_fault_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback, another exit code than 2, and more lines than one."""
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("starflow_jax.modes.check", fails)
    assert result_of(["--config=configs/t2v.py"], folder).how == "ZeroDivisionError"
    assert commands.judged(1, "starflow_jax: x").faulty and commands.judged(2, "starflow_jax: x\ny").faulty
    assert not commands.judged(0, "progress").faulty and not commands.judged(2, "starflow_jax: x").faulty
