"""Smaller deep blocks beside their teacher: bits, adherence and sampling time of each as a model of its own, and the
teacher's passes that each saves where it drafts for it. Times and passes are at equal error: with the loosest tolerance
that keeps what is decoded within calibration's error of decoding one token after another."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from starflow_jax.config import Config, Sample, Solver
from starflow_jax.config import Student as Settings
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation.adherence import adherence_of_samples
from starflow_jax.evaluation.measures import interval, share_interval
from starflow_jax.io.charts import Chart, series
from starflow_jax.io.timing import timed
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.system import System
from starflow_jax.sampling.calibration import deep_decoder, loosest, relative_error
from starflow_jax.sampling.generate import Clips, generate_clips
from starflow_jax.sampling.likelihood import bits_per_frame, likelihood_batches

PROMPTS, ROUNDS = 8, 3  # of timings: videos made together, and how often
TEACHER = "teacher"
NONE = (math.nan, math.nan)


class Measured(NamedTuple):
    """A model to measure."""

    system: System
    params: Params
    kind: str  # how it was trained


class _Case(NamedTuple):
    """How videos are made at equal error."""

    make: Callable[[], Clips]
    tolerance: float
    error: float


def runs_in(folder: Path) -> list[Path]:
    """The workdirs in a folder that hold checkpoints."""
    return sorted(path.parent for path in folder.glob("*/checkpoints") if (path.parent / "system").is_dir())


def kind_of(settings: Settings) -> str:
    """How a student is trained, in words."""
    how = "distilled" if settings.mean + settings.scale else "likelihood alone"
    return how + (", from random parameters" if settings.start == "random" else "")


def measure(models: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """A row for each model, TEACHER the first of them: {measure: value, or (mean, half of its 95 % interval)}."""
    teacher, rows = models[TEACHER], dict[str, dict[str, Any]]()
    bits = {name: _bits(model) for name, model in models.items()}
    for name, model in models.items():
        deep = model.params["flow"]["deep"]
        rows[name] = {
            "kind": model.kind, "layers": model.system.config.model.deep_layers,
            "width": model.system.config.model.deep_width,
            "deep_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(deep)),
            "bits_per_dim": float(bits[name].mean()),
            "bits_above_teacher": interval(bits[name] - bits[TEACHER]), **_adherence(model)}
    cases = {(name, False): _case(model.system, model.params) for name, model in models.items()}
    cases |= {(name, True): _case(teacher.system, {**teacher.params, "draft": {"deep": model.params["flow"]["deep"]}})
              for name, model in models.items() if name != TEACHER}
    found = timed("sampling", {key: case.make for key, case in cases.items()}, ROUNDS)
    for (name, drafts), case in cases.items():
        clips, seconds = found[name, drafts]
        figures = {**_passes(clips), "tolerance": case.tolerance, "error": case.error,
                   "seconds_per_video": seconds / PROMPTS}
        if drafts:
            figures["passes_saved"] = 1 - figures["passes"] / rows[TEACHER]["passes"]
            rows[name]["as_draft"] = figures
        else:
            rows[name] |= figures
    return rows


def _bits(model: Measured) -> np.ndarray:
    """Bits per dimension of each test clip, under the same noise for all models."""
    system = model.system
    batches = likelihood_batches(system, "test", system.config.evaluate.clips)
    return bits_per_frame(system, model.params, batches).mean(axis=1)


def _adherence(model: Measured) -> dict[str, tuple[float, float]]:
    """Shares of samples that are read as asked; {} where nothing can be read."""
    config: Config = model.system.config
    if config.data.source != "digits":
        return {}
    found = adherence_of_samples(model.system, model.params, "test", config.evaluate.prompts)
    return {name: share_interval(share, config.evaluate.prompts) for name, share in found.items()}


def _case(system: System, params: Params) -> _Case:
    """Frame by frame, each from the one before or from its draft."""
    captions = fixed_captions(system.config, "test", PROMPTS)

    def settings(solver: Solver) -> Sample:
        return dataclasses.replace(system.config.sample, frames=0, stream=False, draft="", solver=solver,
                                   batch_size=PROMPTS)

    exact, _ = deep_decoder(system, params, captions, settings(Solver("sequential", 1, 1)))()
    solver = Solver("jacobi", system.config.model.tokens_per_frame, 1, start="previous")
    solver = loosest(lambda solver: deep_decoder(system, params, captions, settings(solver)), solver, exact)
    u, _ = deep_decoder(system, params, captions, settings(solver))()
    make = partial(generate_clips, system, params, captions, range(len(captions)), settings(solver))
    return _Case(make, solver.tolerance, relative_error(u, exact))


def _passes(clips: Clips) -> dict[str, float]:
    """Runs of the deep block, mean over videos; and of the block that drafts, which has one more between two frames, by
    which it learns what became of the first."""
    drafts, found = clips.solved.draft_steps_BK, {"passes": float(clips.solved.deep_steps_BK.sum(axis=1).mean())}
    if drafts is not None:
        found["draft_passes"] = float(drafts.sum(axis=1).mean()) + drafts.shape[1] - 1
    return found


def charts(rows: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Bits and adherence over sampling time, in a colour for each way of training; and what drafts save."""
    ordered = sorted(rows, key=lambda name: rows[name]["seconds_per_video"])
    seconds = [rows[name]["seconds_per_video"] for name in ordered]

    def over_time(title: str, measure: str, level: float | None = None) -> Chart:
        kinds = dict.fromkeys(rows[name]["kind"] for name in rows)
        return Chart(title, seconds, {kind: series([rows[name][measure] if rows[name]["kind"] == kind else NONE
                                                    for name in ordered]) for kind in kinds},
                     "seconds a video", level=level, joined=False)

    found = [over_time("bits per dimension above the teacher", "bits_above_teacher", level=0.0)]
    found += [over_time(f"{name} read as asked", name) for name in ATTRIBUTES if name in rows[TEACHER]]
    drafts = [name for name in rows if "as_draft" in rows[name]]
    saved = [(rows[name]["as_draft"]["passes_saved"], math.nan) for name in drafts]
    return [*found, Chart("share of the teacher's passes that a draft saves", drafts, {"": series(saved)}, level=0.0)]
