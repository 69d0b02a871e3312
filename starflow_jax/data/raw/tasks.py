"""Runs a function on many tasks: on all cores of this machine, or, the same function, on Apache Beam.

Tasks don't depend on one another and each leaves a file when done, so any of them may run anywhere, at any
time, and again.
"""

import concurrent.futures
import multiprocessing
import os
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from starflow_jax.config import UserError
from starflow_jax.io.memory import cores
from starflow_jax.io.progress import ProgressBar

T = TypeVar("T")
PER_CORE = 8  # processes that are started at most


def check_processes(setting: str, count: int) -> None:
    """Raises UserError for more processes than a machine of so many cores can bear."""
    most = PER_CORE * cores()
    if count > most:
        raise UserError(f"{setting}={count}: must be at most {most} here, {PER_CORE} for each of {cores()} cores")


def run(function: Callable[[T], None], tasks: Sequence[T], *, what: str, processes: int = 0, beam: str | None = None,
        crashed: Callable[[T], None] | None = None) -> None:
    """function(task) for every task.

    processes: 0: one per core; 1: in this process. beam: the flags of a Beam pipeline, such as
    "--runner=FlinkRunner --flink_master=..."; None: no Beam. crashed(task) is called, in this process, for a
    task whose process ended (a decoder's fault, memory), and must leave in its place what the task would have.
    """
    if not tasks:
        return
    if beam is not None:
        _on_beam(function, tasks, beam)
    elif processes == 1 or (len(tasks) == 1 and crashed is None):
        with ProgressBar(what, len(tasks), unit="task") as progress:
            for task in tasks:
                function(task)
                progress.update()
    else:
        _on_cores(function, tasks, what, processes or cores(), crashed)


def attempt(function: Callable[[T], None], task: T) -> None:
    """Run one task in a process of its own, which it may end."""
    with ProgressBar("once more", 1, unit="task") as progress:
        _in_pool(function, [task], 1, progress)


def _on_cores(function: Callable[[T], None], tasks: Sequence[T], what: str, processes: int,
              crashed: Callable[[T], None] | None) -> None:
    with ProgressBar(what, len(tasks), unit="task") as progress:
        broken = _in_pool(function, tasks, processes, progress)
        # Which task it was is not said: each that was not done is tried by itself.
        for task in broken:
            if _in_pool(function, [task], 1, progress):
                if crashed is None:
                    raise UserError(f"{what}: a process ended at {task}; is there memory for {processes} processes?")
                crashed(task)
                progress.update()


def _in_pool(function: Callable[[T], None], tasks: Sequence[T], processes: int, progress: ProgressBar) -> list[T]:
    """Run tasks; returns those not done because a process ended. A task's own exception is raised."""
    # spawn: a forked copy of a process with threads (JAX has some) can hang.
    context = multiprocessing.get_context("spawn")
    undone = set()
    with concurrent.futures.ProcessPoolExecutor(min(processes, len(tasks)), context, _end_with_parent,
                                                (os.getpid(),)) as pool:
        futures = {pool.submit(function, task): task for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                try:
                    future.result()
                    progress.update()
                except BrokenProcessPool:
                    undone.add(future)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [task for future, task in futures.items() if future in undone]


def _end_with_parent(parent: int) -> None:
    """A worker whose parent was killed would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_beam(function: Callable[[T], None], tasks: Sequence[T], flags: str) -> None:
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("Apache Beam is not installed: pip install 'starflow_jax[beam]'") from error
    with apache_beam.Pipeline(options=PipelineOptions(shlex.split(flags))) as pipeline:
        # Reshuffle: without it a runner would keep all tasks where they were made.
        _ = pipeline | apache_beam.Create(tasks) | apache_beam.Reshuffle() | apache_beam.Map(function)
