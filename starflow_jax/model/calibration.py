"""What --mode=calibrate finds for a trained model: the solver that decodes it fastest, and where that one starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Model, Solver, UserError
from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.io.checksums import check_file, checksums_of
from starflow_jax.io.files import write_text

FIRST_GUESS, NOISE_GUESS, SOLVER = "first_guess.safetensors", "noise_guess.safetensors", "decoding.json"
CALIBRATED = (FIRST_GUESS, NOISE_GUESS, SOLVER)
# The solver's settings that are calibrated.
MEASURED = ("kind", "block_size", "frames_per_step", "updates", "start", "tolerance")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """A solver, of which only MEASURED counts, and fitted guesses of its start; Calibration(): not calibrated."""

    solver: Solver = Solver()
    first_guess: FirstGuess | None = None  # of the first frame from its text
    noise_guess: NoiseGuess | None = None  # of each token from its noise and the one before
    platform: str = ""  # where the solver was measured: cpu, gpu or tpu; empty: not known, and it is used anywhere

    def solver_on(self, platform: str) -> Solver:
        """The solver where it was measured; on another platform, where other blocks are the fastest, the default one.
        The guesses, which save updates anywhere, hold on all."""
        return self.solver if self.platform in ("", platform) else Solver()


def save_calibration(calibration: Calibration, folder: Path) -> None:
    """Write the guesses, the solver's MEASURED settings and where they were measured."""
    assert calibration.first_guess is not None
    solver = {name: getattr(calibration.solver, name) for name in MEASURED}
    if calibration.platform:
        solver["platform"] = calibration.platform
    with checksums_of(folder, CALIBRATED):
        export_arrays(folder / FIRST_GUESS, dataclasses.asdict(calibration.first_guess), dtype=np.float16)
        if calibration.noise_guess is None:
            (folder / NOISE_GUESS).unlink(missing_ok=True)
        else:
            export_arrays(folder / NOISE_GUESS, dataclasses.asdict(calibration.noise_guess))
        write_text(folder / SOLVER, json.dumps(solver, indent=1))


def read_calibration(folder: Path, model: Model) -> Calibration:
    """What `save_calibration` wrote for a model; Calibration() where there is nothing. Raises UserError for a damaged
    file, and for one of another model."""
    if not (folder / SOLVER).exists():
        return Calibration()
    try:
        check_file(folder / SOLVER)
        found = json.loads((folder / SOLVER).read_text())
        if "kind" not in found:  # a file that names a wavefront by its updates alone
            found["kind"] = "wavefront" if found.get("updates") else "jacobi"
            found["updates"] = found.get("updates") or Solver.updates
        platform = found.pop("platform", "")
        if not isinstance(platform, str):
            raise ValueError(f"platform={platform!r} must be a string")
        solver, noise = Solver(**found), folder / NOISE_GUESS
        return Calibration(solver, FirstGuess(**_fitting(folder / FIRST_GUESS, model)),
                           _noise_guess(_fitting(noise, model)) if noise.exists() else None, platform)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError, UserError) as error:
        raise UserError(f"{folder / SOLVER}: can't be read as a calibration ({error}); make it anew with "
                        "--mode=calibrate, or delete it") from error


def _fitting(path: Path, model: Model) -> dict[str, Any]:
    """A guess's arrays. Raises ValueError where their shapes, by the letters of their names, are not the model's, and
    for values that are not finite."""
    arrays = import_arrays(path)
    sizes = {"D": model.text_dim, "S": model.tokens_per_frame, "K": model.token_channels}
    for name, array in arrays.items():
        letters = name.rpartition("_")[2]
        if not isinstance(array, np.ndarray) or array.ndim != len(letters) or any(
                size != sizes.setdefault(letter, size) for letter, size in zip(letters, array.shape)):
            raise ValueError(f"{path.name}: {name} is not of this model's shape")
        if not np.isfinite(array).all():
            raise ValueError(f"{path.name}: {name} holds values that are not finite")
    return arrays


def _noise_guess(arrays: dict[str, Any]) -> NoiseGuess:
    """From a file's arrays, which may be of each token's own noise alone."""
    return NoiseGuess(**{"before_KK": jnp.zeros_like(arrays["weights_KK"]), **arrays})


def remove_calibration(folder: Path) -> None:
    """Delete what `save_calibration` wrote, where it is there."""
    with checksums_of(folder, CALIBRATED):
        for name in CALIBRATED:
            (folder / name).unlink(missing_ok=True)
