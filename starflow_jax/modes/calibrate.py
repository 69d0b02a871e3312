"""--mode=calibrate: fit first guesses, measure solvers, and keep the fastest beside the model."""

import contextlib
import dataclasses
from pathlib import Path

import jax

from starflow_jax.config import Config, Solver, UserError
from starflow_jax.io.progress import table
from starflow_jax.model.calibration import Calibration, save_calibration
from starflow_jax.model.own_settings import PRETRAINED
from starflow_jax.model.store import load_model
from starflow_jax.modes.alone import alone_in
from starflow_jax.sampling.calibration import ERROR, PROMPTS, Measured, fit_guess, fit_noise_guess, measure
from starflow_jax.sampling.mesh import on_mesh, sampling_mesh
from starflow_jax.sampling.solver import complete


def calibrate(config: Config, workdir: Path) -> None:
    """Fit the guesses, measure the candidates and write the fastest beside the model.

    Raises UserError for a model whose values are not finite, and where another run has the workdir.
    """
    for name in ("draft", "lora", "decoder"):
        config.sample.require(name, not getattr(config.sample, name),
                              "a calibration is of the workdir's own model; leave it out")
    own = (workdir / "system").exists()
    with alone_in(workdir) if own else contextlib.nullcontext(), on_mesh(sampling_mesh(config, PROMPTS)):
        _calibrate(config, workdir, workdir / "system" if own else PRETRAINED)


def _calibrate(config: Config, workdir: Path, folder: Path) -> None:
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    system = dataclasses.replace(system, calibration=Calibration(first_guess=fit_guess(system, params)))
    found = dataclasses.replace(system.calibration, noise_guess=fit_noise_guess(system, params))
    rows = measure(dataclasses.replace(system, calibration=found), params)
    print(table([_cells(row) for row in rows],
                ("solver", "block", "frames per step", "start", "tolerance", "updates", "passes", "seconds", "error")))
    good = [row for row in rows if row.error <= ERROR]
    if not good:
        raise UserError("decoding one token after another gives values that are not finite; calibrate a model that "
                        "samples, such as an earlier checkpoint")
    best = min(good, key=lambda row: row.seconds).solver
    save_calibration(dataclasses.replace(found, solver=best, platform=jax.default_backend()), folder)
    how = "one token after another" if best.kind == "sequential" else (
        f"{best.kind}, blocks of {best.block_size}, {best.frames_per_step} frames per step, started from the "
        f"{best.start}, tolerance {best.tolerance}")
    print(f"chosen on {jax.default_backend()}: {how}; written to {folder}")
    asked = config.sample.solver
    if _what_runs(complete(asked, best, config.model)) != _what_runs(best):
        free = [f"--config.sample.solver.{field.name}={field.default}" for field in dataclasses.fields(Solver)
                if getattr(asked, field.name) != field.default]
        print(f"this config's settings choose another solver; to sample by what was chosen: {' '.join(free)}")


def _what_runs(solver: Solver) -> tuple:
    """What makes two solvers run the same updates."""
    if solver.kind == "sequential":
        return (solver.kind,)
    return (solver.kind, solver.block_size, solver.first_block_size, solver.frames_per_step, solver.start,
            solver.tolerance, solver.max_steps)


def _cells(row: Measured) -> tuple:
    solver = row.solver
    name = f"wavefront, {solver.updates} updates" if solver.kind == "wavefront" else solver.kind
    return (name, solver.block_size or 1, solver.frames_per_step or 1, solver.start,
            solver.tolerance if solver.kind == "jacobi" else "any", row.updates, row.passes, row.seconds, row.error)
