"""The training loop: data in, checkpoints, metrics and sample sheets out; killed and restarted at will."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from starflow_jax import sharding
from starflow_jax.config import UserError
from starflow_jax.io.files import first_line
from starflow_jax.io.progress import ProgressBar
from starflow_jax.training.metrics import MetricWriter
from starflow_jax.training.optimizer import schedule
from starflow_jax.training.run import Run
from starflow_jax.training.step import tokens_of


def train_to_end(run: Run, workdir: Path) -> int:
    """Train to train.steps, or until SIGTERM, and save; close the run; return the step reached.

    Raises UserError where another process of the run is lost.
    """
    writer = MetricWriter(workdir, resume_step=int(run.state.step), writes=jax.process_index() == 0)
    lost = False
    try:
        return _steps(run, writer)
    except jax.errors.JaxRuntimeError as error:
        lost = jax.process_count() > 1
        if not lost:
            raise
        raise UserError(f"another process of this run was lost ({first_line(error)[:200]}); start all of them "
                        "again with the same command: training resumes from the newest checkpoint") from error
    finally:
        run.batches.close()
        writer.close()
        if not lost:  # else it would wait for the lost one
            run.checkpoints.close()


def _steps(run: Run, writer: MetricWriter) -> int:
    target, config, settings = run.target, run.system.config, run.system.config.train
    rate = schedule(settings)
    since, tokens, step = time.perf_counter(), 0, int(run.state.step)
    with ProgressBar("train", settings.steps, initial=step, shown=writer.writes, compiles=True) as progress:
        while step < settings.steps and not run.stop.agreed():
            batch = sharding.put_batch(next(run.batches), run.mesh)
            tokens += tokens_of(batch, config)
            run.state, scalars = target.step(run.state, batch)
            step += 1
            if step % settings.log_every == 0 or step == settings.steps:
                learning_rate = float(rate(step - 1 - int(scalars["skipped"])))
                row = _row(scalars, learning_rate, time.perf_counter() - since, tokens)
                since, tokens = time.perf_counter(), 0
                writer.scalars(step, row)
                progress.update(0, f"{row[target.shown]:.4f} {target.unit}")
            progress.update()
            validated = step % settings.evaluate_every == 0 or step == settings.steps
            metrics = target.validate(run.state, writer) if validated else None
            if validated or step % settings.checkpoint_every == 0:
                _save(run, writer, step, metrics)
        if step < settings.steps and run.checkpoints.latest_step() != step:
            _save(run, writer, step, None)
        run.checkpoints.wait()
    return step


def _save(run: Run, writer: MetricWriter, step: int, metrics: dict[str, float] | None) -> None:
    writer.sync()  # a run that resumes from this step needs the lines up to it
    # A copy, which the asynchronous writer reads while the next step reuses the donated buffers.
    run.checkpoints.save(step, jax.tree.map(jnp.copy, run.state), run.batches.get_state(), metrics)


def _row(scalars: dict[str, jax.Array], rate: float, seconds: float, tokens: int) -> dict[str, float]:
    row = {name: float(value) for name, value in scalars.items() if name != "skip"}
    row["skipped"] = int(row["skipped"])
    return {**row, "learning_rate": rate, "seconds": seconds, "tokens_per_second": tokens / seconds}
