"""Settings of the solver, as asked for or as calibrated."""

from starflow_jax.config import Sample
from starflow_jax.flow import decode
from starflow_jax.model.system import Calibrated, System


def deep_solver(system: System, settings: Sample) -> decode.Solver:
    """Block size and frames per step as asked for, as calibrated, or a frame at a time; a stream's steps are
    single frames, so that each leaves as soon as it can."""
    if settings.solver == "sequential":
        return decode.SEQUENTIAL
    frames = settings.frames_per_step or (0 if settings.stream else system.calibrated.frames_per_step) or 1
    block = settings.block_size or system.calibrated.block_size or frames * system.config.model.tokens_per_frame
    updates = settings.updates if settings.solver == "wavefront" else _calibrated(system, settings).updates
    return decode.Solver(block, settings.tolerance, settings.max_steps, frames, updates)


def deep_start(system: System, settings: Sample) -> str:
    """As asked for, or as calibrated: each frame from the "previous" one, or from its "noise"."""
    return settings.start or _calibrated(system, settings).start or "previous"


def _calibrated(system: System, settings: Sample) -> Calibrated:
    """What was found fastest for whole videos and within a tolerance, where no solver is named."""
    whole = not settings.solver and not settings.stream and settings.tolerance > 0
    return system.calibrated if whole else Calibrated()


def shallow_solver(settings: Sample) -> decode.Solver:
    """Shallow blocks are cheap and feed one another: whole frames at once, to a tenth of the tolerance."""
    if settings.solver == "sequential":
        return decode.SEQUENTIAL
    return decode.Solver(block_size=1 << 30, tolerance=settings.tolerance / 10)
