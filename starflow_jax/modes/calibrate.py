"""--mode=calibrate: first guesses are fitted, solvers measured, and the fastest is kept beside the model."""

import dataclasses
from pathlib import Path

from starflow_jax.config import Config, UserError
from starflow_jax.io.progress import table
from starflow_jax.model.store import PRETRAINED, load_model
from starflow_jax.model.system import Calibrated, save_decoding
from starflow_jax.sampling.calibration import ERROR, fit_guess, fit_noise_guess, measure


def calibrate(config: Config, workdir: Path) -> None:
    """Fit the guesses, measure the candidates and keep the fastest; written beside the model."""
    system, params, source = load_model(config, workdir)
    print(f"model: {source}")
    folder = workdir / "system" if (workdir / "system").exists() else PRETRAINED
    system = dataclasses.replace(system, guess=fit_guess(system, params), calibrated=Calibrated(), noise_guess=None)
    system = dataclasses.replace(system, noise_guess=fit_noise_guess(system, params))
    rows = measure(system, params)
    print(table([row[:-1] for row in rows],
                ("solver", "block", "frames a step", "start", "passes", "seconds", "error")))
    good = [row for row in rows if row[6] <= ERROR]
    if not good:
        raise UserError(f"nothing came within {ERROR} of sequential decoding; lower sample.tolerance")
    best = min(good, key=lambda row: row[5])
    save_decoding(dataclasses.replace(system, calibrated=best[-1]), folder)
    print(f"chosen: {best[0]}, blocks of {best[1]}, {best[2]} frames a step, started from the {best[3]}; "
          f"written to {folder}")
