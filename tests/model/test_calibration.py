"""What is kept of a calibration is checked when it is read."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.config import Solver, UserError
from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess
from starflow_jax.io.arrays import export_arrays
from starflow_jax.io.checksums import CHECKSUMS
from starflow_jax.model.calibration import (
    FIRST_GUESS,
    NOISE_GUESS,
    SOLVER,
    Calibration,
    read_calibration,
    save_calibration,
)
from tests.helpers import tiny_model

MODEL = tiny_model()
TOKENS, CHANNELS = MODEL.tokens_per_frame, MODEL.token_channels
FIRST = FirstGuess(jnp.ones(MODEL.text_dim), jnp.ones((TOKENS, CHANNELS)), jnp.ones((MODEL.text_dim, 3)),
                   jnp.ones((3, TOKENS, CHANNELS)))
NOISE = NoiseGuess(jnp.ones(CHANNELS), jnp.ones((CHANNELS, CHANNELS)), jnp.ones((CHANNELS, CHANNELS)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Without checksums, by which any change is found."""
    save_calibration(Calibration(Solver("jacobi", block_size=4, start="noise"), FIRST, NOISE), tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    return tmp_path


def test_it_comes_back(folder: Path) -> None:
    read = read_calibration(folder, MODEL)
    assert (read.solver.kind, read.solver.block_size, read.solver.start) == ("jacobi", 4, "noise")
    np.testing.assert_array_equal(read.noise_guess.weights_KK, NOISE.weights_KK)


@pytest.mark.parametrize("found", [{"block_size": -5}, {"block_size": "4"}, {"kind": "newton"}, {"tolerance": None},
                                   {"steps": 3}, {"platform": 3}, [], None, 5])
def test_a_solver_is_checked_as_the_command_lines_is(folder: Path, found: Any) -> None:
    (folder / SOLVER).write_text(json.dumps(found))
    with pytest.raises(UserError, match=f"{SOLVER}: can't be read as a calibration .*--mode=calibrate"):
        read_calibration(folder, MODEL)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_what_is_no_json_is_said_in_one_line(folder: Path, text: str) -> None:
    (folder / SOLVER).write_text(text)
    with pytest.raises(UserError, match=f"{SOLVER}: can't be read as a calibration"):
        read_calibration(folder, MODEL)


@pytest.mark.parametrize("file, arrays", [
    (NOISE_GUESS, {"mean_K": np.ones(CHANNELS), "other_KK": np.ones((CHANNELS, CHANNELS))}),
    (NOISE_GUESS, {"mean_K": np.ones(CHANNELS + 1), "weights_KK": np.ones((CHANNELS + 1,) * 2)}),
    (NOISE_GUESS, {"mean_K": np.full(CHANNELS, np.nan), "weights_KK": np.ones((CHANNELS, CHANNELS))}),
    (FIRST_GUESS, {"mean_SK": np.ones((TOKENS, CHANNELS))})], ids=["names", "shapes", "not finite", "missing"])
def test_guesses_that_do_not_fit_the_model_are_refused(folder: Path, file: str, arrays: dict[str, np.ndarray]) -> None:
    export_arrays(folder / file, {name: array.astype(np.float32) for name, array in arrays.items()})
    with pytest.raises(UserError, match="can't be read as a calibration"):
        read_calibration(folder, MODEL)
