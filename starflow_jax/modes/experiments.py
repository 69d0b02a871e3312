"""--mode=evaluate, experiments: denoisers side by side, guidance, the runs of configs/ablations.py, and smaller deep
blocks beside their teacher."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.evaluation import ablations, denoisers, guidance, students
from starflow_jax.evaluation.ablations import in_words
from starflow_jax.evaluation.causality import dependence
from starflow_jax.evaluation.memory import check_students
from starflow_jax.evaluation.split import prompts_to_read, real_clips
from starflow_jax.io.charts import draw_charts, draw_matrices
from starflow_jax.io.files import write_text
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.progress import table
from starflow_jax.model.own_settings import settings_of
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.store import backbone_weights, load_model, load_teacher
from starflow_jax.sampling.conditions import noised
from starflow_jax.sampling.mesh import sampling_mesh

SHEET_SEED, SHEET_SCALE = 0, 4
CAUSALITY_RUNS = ("base-0", "global_shallow-0")


def evaluate_denoisers(config: Config, workdir: Path) -> None:
    """Every way of denoising that the model has: WORKDIR/denoisers.json, and a sheet of consecutive frames."""
    began = time.perf_counter()
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    captions, labels = prompts_to_read(config)
    found = denoisers.measure(system, params, captions, labels, real_clips(system, len(captions))[1])
    shown = denoisers.side_by_side(system, params, captions[0], SHEET_SEED)
    names = list(next(iter(found.values())))
    titles = [f"{how}: " + ", ".join(f"{name.replace('_', ' ')} {in_words(found[how][name])}" for name in names
                                     if name.startswith(("psnr_to_the_clip", "temporal"))) for how in shown]
    contact_sheet(workdir / "denoisers.png", np.stack(list(shown.values())), titles, scale=SHEET_SCALE)
    _write(workdir, "denoisers", {"model": source, "prompts": len(captions), "sets": denoisers.SEEDS, "ways": found,
                                  "caption_of_the_sheet": captions[0]}, began)
    print(table([(how, *(in_words(row[name]) for name in names)) for how, row in found.items()],
                ("denoise", *(name.replace("_", " ") for name in names))))
    print(f"\nwritten to {workdir}: denoisers.json, denoisers.png")


def evaluate_guidance(config: Config, workdir: Path) -> None:
    """Adherence and diversity at the weights of evaluate.guidance: WORKDIR/guidance.json and a picture."""
    began = time.perf_counter()
    system, params, source, _ = load_model(config, workdir)
    print(f"model: {source}")
    captions, labels = prompts_to_read(config)
    rows = guidance.measure(system, params, captions, labels, config.evaluate.guidance)
    # Of data that nothing can be read of there may be no pixels.
    real = None if labels is None else float(real_clips(system, len(captions))[1].mean())
    draw_charts(workdir / "guidance.png", guidance.charts(rows, real),
                f"{len(captions)} test prompts, {guidance.SEEDS} videos of each")
    _write(workdir, "guidance", {"model": source, "prompts": len(captions), "videos_of_each": guidance.SEEDS,
                                 "weights": rows, "brightness_of_real_clips": real}, began)
    names = [name for name in rows[0] if name != "guidance"]
    print(table([(row["guidance"], *(in_words(row[name]) for name in names)) for row in rows], ("guidance", *names)))
    if real is not None:
        print(f"\nbrightness of real clips: {real:.3f}")
    print(f"\nwritten to {workdir}: guidance.json, guidance.png")


def evaluate_ablations(config: Config, workdir: Path, measure: Callable[[Config, Path], None]) -> None:
    """Table and picture of the runs VARIANT-SEED in this folder, WORKDIR/ablations.json and .png; those that were not
    measured since they were trained are measured first. Raises UserError where there is none."""
    began, runs = time.perf_counter(), ablations.trained(workdir)
    if not runs:
        raise UserError(f"{workdir} holds no run of configs/ablations.py; train some, such as "
                        f"--config=configs/ablations.py:base-0 --workdir={workdir / 'base-0'}, once "
                        "runs/ablations/start holds the model that they go on from (--mode=convert "
                        "--config.convert.source=pretrained)")
    parameters = {run: _measured(config, run, measure) for run in runs}
    found = ablations.collect(workdir, parameters)
    rows = ablations.summary(found)
    draw_charts(workdir / "ablations.png", ablations.charts(rows),
                "means over training seeds, with 95 % intervals where there are several")
    causality = _causality(workdir)
    _write(workdir, "ablations", {"variants": rows, "missing": found.missing, "causality": causality}, began)
    print(table([ablations.cells(name, row) for name, row in rows.items()], ablations.HEADERS))
    _print_far(rows)
    if found.missing:
        print(f"\nnot trained yet: {', '.join(found.missing)} (--config=configs/ablations.py:NAME "
              f"--workdir={workdir}/NAME)")
    also = ", ablations_causality.png" if causality else ""
    print(f"\nwritten to {workdir}: ablations.json, ablations.png{also}")


def evaluate_students(config: Config, workdir: Path) -> None:
    """The students in this folder beside their teacher: WORKDIR/students.json and a picture. Raises UserError where
    there are none, and for students of several teachers."""
    began = time.perf_counter()
    runs = {run.name: dataclasses.replace(settings_of(run), evaluate=config.evaluate, sample=config.sample)
            for run in students.runs_in(workdir)}
    runs = {name: own for name, own in runs.items() if own.train.target == "student"}
    if not runs:
        raise UserError(f"{workdir} holds no workdir of train.target=student; train some, such as "
                        f"--config.train.target=student --config.model.deep_layers=2 --workdir={workdir / 'half'}")
    check_students(list(runs.values()), sampling_mesh(config, config.sample.batch_size))
    checksums = {name: backbone_weights(own) for name, own in runs.items()}
    if len(set(checksums.values())) > 1:
        raise UserError(f"{workdir} holds students of several teachers ({checksums}); measure those of one in a folder "
                        "of their own")
    teacher = load_teacher(next(iter(runs.values())))
    models = {students.TEACHER: students.Measured(teacher.system, teacher.params, students.TEACHER)}
    for name, own in runs.items():
        loaded = load_model(own, workdir / name)
        models[name] = students.Measured(loaded.system, loaded.params, students.kind_of(own.student))
    rows = students.measure(models)
    draw_charts(workdir / "students.png", students.charts(rows), f"{teacher.source} and smaller deep blocks of it; "
                f"{config.evaluate.clips} test clips, {config.evaluate.prompts} test prompts")
    _write(workdir, "students", {"teacher": teacher.source, "models": rows,
                                 "sample_settings": dataclasses.asdict(config.sample)}, began)
    names = [name for name in rows[students.TEACHER] if name != "deep_parameters"]
    print(table([(one, *(_cell(row[name]) for name in names)) for one, row in rows.items()],
                ("", *(name.replace("_", " ") for name in names))))
    drafts = {one: row["as_draft"] for one, row in rows.items() if "as_draft" in row}
    columns = list(next(iter(drafts.values())))
    print("\n" + table([(one, *(_cell(row[name]) for name in columns)) for one, row in drafts.items()],
                       ("the teacher, drafted by", *(name.replace("_", " ") for name in columns))))
    print(f"\nwritten to {workdir}: students.json, students.png")


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return in_words(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _measured(config: Config, run: Path, measure: Callable[[Config, Path], None]) -> int:
    """A run's number of parameters, once its evaluate.json is of its newest checkpoint."""
    settings = dataclasses.replace(settings_of(run), evaluate=dataclasses.replace(config.evaluate, task="test_set"))
    _, params, source, _ = load_model(settings, run)
    if _step(ablations.measured_model(run)) != _step(source):
        measure(settings, run)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _step(source: str) -> str:
    """Of "WORKDIR, step STEP"; a folder of runs may be moved."""
    return source.rpartition(" ")[2]


def _print_far(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """What was measured past the training length."""
    far = {name: row["last_training_length"] for name, row in rows.items() if "last_training_length" in row}
    if not far:
        print("\nnothing measured past the training length yet: --mode=evaluate --config.evaluate.task=horizon "
              "in the runs base-SEED and no_drop-SEED")
        return
    names = list(next(iter(far.values())))
    print("\n" + table([(name, *(in_words(row.get(one)) for one in names)) for name, row in far.items()],
                       ("the last training length", *(name.replace("_", " ") for name in names))))


def _causality(folder: Path) -> dict[str, list[list[float]]]:
    """ablations_causality.png: which frames' noise each frame's latents move, with local shallow blocks and global
    ones; {} unless both runs are there."""
    runs = [folder / name for name in CAUSALITY_RUNS]
    if not all((run / "checkpoints").is_dir() for run in runs):
        return {}
    found = {}
    for run in runs:
        own = settings_of(run)
        system, params, *_ = load_model(own, run)
        frames, caption = real_clips(system, 1)[1], fixed_captions(own, "test", 1)
        matrix = dependence(system, params, noised(system, frames, [0]), system.caption_features(params, caption))
        found[run.name] = matrix
    draw_matrices(folder / "ablations_causality.png", found, ("noise of frame", "latents of frame"),
                  "how far noise moves with latents; white: not at all")
    return {name: matrix.tolist() for name, matrix in found.items()}


def _write(workdir: Path, name: str, results: dict[str, Any], began: float) -> None:
    results["seconds"] = round(time.perf_counter() - began, 1)
    write_text(workdir / f"{name}.json", json.dumps(results, indent=1))
