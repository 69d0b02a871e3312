"""The solver's settings with what they leave unset filled in, for every program that inverts the flow."""

import dataclasses

import jax

from starflow_jax.config import Model, Sample, Solver
from starflow_jax.flow import inversion
from starflow_jax.model.system import System

TOLERANCE = 1e-3  # where none was calibrated for the blocks in use
SHALLOW_TOLERANCE = 0.1  # of the deep block's: shallow blocks are cheap and feed one another
WHOLE_FRAME = 1 << 30  # a block that no frame fills
LARGEST = 300  # tokens of a block that was neither asked for nor calibrated: larger ones take many updates


def chosen_solver(system: System, settings: Sample) -> Solver:
    """sample.solver, with what it leaves unset as calibrated. A stream's steps are single frames, so that each is
    emitted as soon as it can be; a draft is where an iteration starts, which sequential decoding has not."""
    calibrated = calibrated_solver(system)
    if settings.draft and calibrated.kind == "sequential":
        calibrated = Solver()
    return complete(settings.solver, calibrated, system.config.model, stream=settings.stream)


def calibrated_solver(system: System) -> Solver:
    """What calibration found on a platform such as the one in use, else Solver()."""
    return system.calibration.solver_on(jax.default_backend())


def complete(asked: Solver, calibrated: Solver, model: Model, stream: bool = False) -> Solver:
    """Every setting of a solver. The calibrated kind and its settings were measured on whole videos and within an
    error: they are used there alone, but for sequential decoding, which streams use too, and only where no kind is
    asked for; the tolerance only with the calibrated blocks and start. Calibrated sequential decoding gives way to any
    setting of blocks, and is the deep block's alone."""
    serves = not stream or calibrated.kind == "sequential"
    measured = calibrated if serves and not asked.kind and asked.tolerance != 0 else Solver()
    if measured.kind == "sequential" and _of_blocks(asked):
        measured = Solver()
    kind = asked.kind or measured.kind or "jacobi"
    frames = asked.frames_per_step or (0 if stream else calibrated.frames_per_step) or 1
    block = asked.block_size or calibrated.block_size or _equal_part(frames * model.tokens_per_frame)
    updates = asked.updates if asked.kind == "wavefront" else measured.updates
    start = asked.start or measured.start or "previous"
    as_measured = (block, frames, start) == (measured.block_size, measured.frames_per_step, measured.start)
    tolerance = measured.tolerance if asked.tolerance < 0 and as_measured else asked.tolerance
    if asked.kind == "sequential":
        tolerance = 0.0
    return dataclasses.replace(asked, kind=kind, block_size=block, frames_per_step=frames, updates=updates,
                               start=start, tolerance=TOLERANCE if tolerance < 0 else tolerance)


def _equal_part(tokens: int) -> int:
    """Of so many tokens in as few equal parts as are no larger than LARGEST."""
    return -(-tokens // -(-tokens // LARGEST))


def _of_blocks(asked: Solver) -> bool:
    """Whether a setting is asked for that sequential decoding makes no use of."""
    return bool(asked.block_size or asked.frames_per_step or asked.first_block_size or asked.max_steps or asked.start)


def deep_solver(solver: Solver) -> inversion.Solver:
    """The deep block's solver, from complete settings."""
    if solver.kind == "sequential":
        return inversion.SEQUENTIAL
    assert solver.tolerance >= 0, solver
    updates = solver.updates if solver.kind == "wavefront" else 0
    first_block = 0 if solver.kind == "wavefront" else solver.first_block_size
    return inversion.Solver(solver.block_size, solver.tolerance, solver.max_steps, solver.frames_per_step, updates,
                            first_block)


def shallow_solver(solver: Solver) -> inversion.Solver:
    """The shallow blocks' solver: a whole frame at once, to SHALLOW_TOLERANCE of the tolerance; of exact sequential
    decoding, sequential too."""
    if solver.kind == "sequential" and solver.tolerance == 0:
        return inversion.SEQUENTIAL
    return inversion.Solver(WHOLE_FRAME, solver.tolerance * SHALLOW_TOLERANCE)
