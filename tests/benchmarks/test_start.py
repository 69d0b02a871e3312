"""The start is timed in processes that do what they should."""

from pathlib import Path

import pytest

from starflow_jax.benchmarks import start


def test_each_process_is_run_in_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ran, found_compiled, used = [], [], [0.0]

    def run_process(arguments, code: int, folder: Path, compiled: Path) -> None:
        ran.append((arguments, code))
        found_compiled.append(compiled.exists())
        compiled.mkdir(exist_ok=True)
        used[0] += 100 if len(ran) <= len(start.PROCESSES) else len(arguments)

    monkeypatch.setattr(start, "run_process", run_process)
    monkeypatch.setattr(start, "_cpu_seconds_of_children", lambda: used[0])
    monkeypatch.setattr(start, "programs", lambda: [])
    found = start.report(rounds=2, calls=1)
    rows = found["fresh processes"]
    assert [row["what"] for row in rows] == list(start.PROCESSES)
    assert ran == list(start.PROCESSES.values()) * 3
    assert found_compiled[4:6] == found_compiled[10:12] == [False, True]
    assert [row["CPU seconds"] for row in rows] == [len(arguments) for arguments, _ in start.PROCESSES.values()]
    plain, with_likelihood = (row["seconds"] for row in found["a loaded model"])
    assert 0 < plain and 0 < with_likelihood


@pytest.mark.slow
def test_only_the_first_call_of_each_size_compiles_programs() -> None:
    """And the first video that moves its window on."""
    rows = start.programs()
    assert [row["programs"] > 0 for row in rows] == [call[0] in (
        "one video", "three videos", "two videos") or "the first" in call[0] for call in start.CALLS_THAT_COMPILE]
    assert rows[3]["programs"] < rows[0]["programs"] / 4


def test_a_process_that_ends_otherwise_is_no_figure(tmp_path: Path) -> None:
    start.run_process(["-c", "import os; assert os.environ['JAX_COMPILATION_CACHE_DIR'].endswith('compiled')"], 0,
                      tmp_path, tmp_path / "compiled")
    start.run_process(["-c", "raise SystemExit(2)"], 2, tmp_path, tmp_path)
    with pytest.raises(RuntimeError, match="exit code 3, not 0"):
        start.run_process(["-c", "raise SystemExit(3)"], 0, tmp_path, tmp_path)
