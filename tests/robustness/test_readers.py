"""Files from elsewhere, damaged in many ways: each reader ends with a value or one line, and nothing in them is run."""

import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from starflow_jax.checkpoints.checksums import damage_of
from starflow_jax.checkpoints.torch_files import open_weights
from starflow_jax.config import UserError
from starflow_jax.evaluation.networks import read_arrays
from starflow_jax.io.checksums import CHECKSUMS, is_damaged
from starflow_jax.model.release import released_config
from tests.robustness import results
from tests.robustness.hunt import Task, corpus_of, hunt, keep_faults, tasks_of_day
from tests.robustness.readers import READERS
from tests.robustness.trial import Outcome, Specimen, trials

QUICK, SLOW = 12, 10_000  # damaged files of each reader
NO_CHECKSUMS = f"{CHECKSUMS} is missing, or empty"
SAFE = [name for name, reader in READERS.items() if not reader.crashes]


@pytest.mark.parametrize("name", SAFE)
def test_damaged_files_end_in_one_line(name: str, tmp_path: Path) -> None:
    specimen, outcome = Specimen(name, READERS[name], tmp_path), Outcome()
    specimen.check()
    kept = Task(name, corpus=True)
    assert {kept.damage(specimen)(number)[0] for number in kept.numbers()} <= set(specimen.files)
    for task in (kept, Task(name, end=QUICK)):
        for number, ended in trials(specimen, task.damage(specimen), task.numbers()):
            outcome.add(number, ended)
    assert not outcome.faults and outcome.tries == QUICK + len(corpus_of(name)), outcome.faults
    assert outcome.parsed, "all of its damage ends at a checksum"


def test_damaged_files_end_in_one_line_where_a_native_library_reads() -> None:
    """All in one process: a crash of it is a fault, too."""
    names = [name for name in READERS if name not in SAFE]
    found = hunt([task for name in names for task in (Task(name, corpus=True), Task(name, end=QUICK))])
    assert {name: outcome.faults for name, outcome in found.items() if outcome.faults} == {}
    assert all(found[name].tries == QUICK + len(corpus_of(name)) and found[name].parsed for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_damaged_files_end_in_one_line(name: str) -> None:
    """Results go to runs/robustness, with the number that those of the day begin with (hunt.py's --first), and with a
    damaged file for each fault."""
    began, tasks = time.perf_counter(), tasks_of_day(name, SLOW, results.today())
    outcome = hunt(tasks)[name]
    results.write_reader(name, outcome, tasks[-1].first, time.perf_counter() - began)
    keep_faults(name, outcome, results.FOLDER / "faults")
    assert not outcome.faults and outcome.tries == SLOW and outcome.parsed, outcome.faults


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.seal])
def test_sealed_damage_passes_its_checksum(name: str, tmp_path: Path) -> None:
    """Of each file but the checksums themselves."""
    specimen = Specimen(name, READERS[name], tmp_path)
    for file in specimen.files:
        path = specimen.put(file, specimen.contents[file] + b" ")
        if path.name != CHECKSUMS:
            assert not is_damaged(path), file
            assert damage_of(specimen.folder / "checkpoints" / "7") in (None, NO_CHECKSUMS), file
        specimen.mend(file)


def test_half_of_the_thousands_are_other_ones_each_day(tmp_path: Path) -> None:
    specimen = Specimen("settings", READERS["settings"], tmp_path)
    days = [[specimen.damage(number) for task in tasks_of_day("settings", 10, day) for number in task.numbers()]
            for day in (20261129, 20261130, 20261130)]
    assert len(days[0]) == 10 and days[1] == days[2]
    assert days[0][:5] == days[1][:5] == [specimen.damage(number) for number in range(5)]
    assert not set(days[0][5:]) & set(days[1][5:])


def test_a_report_says_where_its_day_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    results.write_reader("settings", Outcome(refused=10, parsed=9), 20261130 * 10**6, 1.0)
    assert "20261130000000" in results.shown(tmp_path)


def test_a_fault_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is neither a value nor one line is counted, and so is the end of the process that reads."""
    specimen = Specimen("metrics", READERS["metrics"], tmp_path)
    for raised, how in ((ValueError("x"), "ValueError at"), (UserError("x"), "refused"), (SystemExit(3), "SystemExit")):
        def read(*_: Any, raised: BaseException = raised) -> None:
            raise raised

        monkeypatch.setattr(specimen, "reader", READERS["metrics"].__class__(READERS["metrics"].make, read))
        (_, ended), = trials(specimen, specimen.damage, [0])
        assert ended.how.startswith(how)


class Payload:
    """Pickled as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_malicious_pickle_runs_nothing(protocol: int, tmp_path: Path) -> None:
    made = tmp_path / "made"
    pickled = pickle.dumps({"weight": Payload(made)}, protocol)
    pickle.loads(pickled)
    assert made.exists(), "the payload works"
    made.unlink()
    bare, archive = tmp_path / "bare.pth", tmp_path / "archive.pth"
    bare.write_bytes(pickled)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    for read in (lambda: open_weights(bare), lambda: open_weights(archive), lambda: read_arrays(bare)):
        with pytest.raises(UserError):
            read()
    assert not made.exists()


def test_a_malicious_list_of_torchs_shards_runs_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = tmp_path / "made"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(made)))
    with pytest.raises(UserError, match="it asks for builtins.eval"):
        open_weights(tmp_path)
    assert not made.exists()


def test_a_malicious_yaml_runs_nothing(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "a.yaml").write_text(f"arguments: !!python/object/apply:os.system ['touch {made}']\n")
    with pytest.raises(UserError, match="can't be read as a YAML of the release"):
        released_config(tmp_path / "a.yaml")
    assert not made.exists()
