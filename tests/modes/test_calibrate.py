"""--mode=calibrate: what it prints and keeps of what was measured."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from starflow_jax.config import Solver, UserError, changed
from starflow_jax.flow.first_guess import FirstGuess
from starflow_jax.modes import calibrate as mode
from starflow_jax.sampling.calibration import Measured
from tests.small_model import small_system

SEQUENTIAL, BLOCKS = Solver("sequential"), Solver("jacobi", 4, 1, start="previous", tolerance=1e-3)
ROWS = [Measured(SEQUENTIAL, 12.0, 1.0, 2.0, 0.0), Measured(BLOCKS, 7.5, 2.5, 3.0, 5e-4),
        Measured(dataclasses.replace(BLOCKS, block_size=2), 3.0, 0.5, 1.0, 5e-3)]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Measured]:
    """What calibration measures, to be changed; no model is decoded."""
    rows, system = list(ROWS), small_system()
    monkeypatch.setattr(mode, "load_model", lambda config, workdir: (system, {}, "here", 0))
    monkeypatch.setattr(mode, "fit_guess", lambda system, params: FirstGuess(*(jnp.zeros(2),) * 4))
    monkeypatch.setattr(mode, "fit_noise_guess", lambda system, params: None)
    monkeypatch.setattr(mode, "measure", lambda system, params: rows)
    return rows


def test_the_fastest_within_the_error_is_kept_with_its_platform(
    measured: list[Measured], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The fastest of all is not near enough; one token after another is a candidate as any other."""
    mode._calibrate(small_system().config, tmp_path, tmp_path)
    kept = json.loads((tmp_path / "decoding.json").read_text())
    assert kept["kind"] == "sequential" and kept["platform"] == jax.default_backend()
    header, _, *table = capsys.readouterr().out.splitlines()[1:6]
    assert header.split() == ["solver", "block", "frames", "per", "step", "start", "tolerance", "updates", "passes",
                              "seconds", "error"]
    assert [line.split()[0] for line in table] == ["sequential", "jacobi", "jacobi"]
    assert table[0].split()[1] == "1" and table[1].split()[-4:] == ["2.5", "7.5", "3", "0.0005"]
    measured[1] = dataclasses.replace(ROWS[1], seconds=1.5)
    mode._calibrate(small_system().config, tmp_path, tmp_path)
    assert json.loads((tmp_path / "decoding.json").read_text())["kind"] == "jacobi"


def test_settings_that_choose_another_solver_are_named(
    measured: list[Measured], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = small_system().config
    for asked, expected in ((Solver(), ""), (Solver(block_size=2, max_steps=32),
                                             "--config.sample.solver.block_size=0 --config.sample.solver.max_steps=0")):
        mode._calibrate(changed(config, "sample", {"solver": dataclasses.asdict(asked)}), tmp_path, tmp_path)
        *_, last = capsys.readouterr().out.splitlines()
        assert last.endswith(expected) and ("choose another solver" in last) == bool(expected)


def test_a_model_that_is_not_finite_has_no_calibration(measured: list[Measured], tmp_path: Path) -> None:
    measured[:] = [dataclasses.replace(row, error=float("nan")) for row in ROWS]
    with pytest.raises(UserError, match="not finite"):
        mode._calibrate(small_system().config, tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())
