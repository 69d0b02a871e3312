"""One loop that times several cases in turn."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

from starflow_jax.io.progress import ProgressBar

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")


def median_seconds(description: str, cases: Mapping[Name, Callable[[], object]], rounds: int,
                   clock: Callable[[], float] = time.perf_counter) -> dict[Name, float]:
    """Median seconds of each case. All run once per round, so that a busy machine slows them alike; an extra first
    round compiles and does not count. A case must return only when its work is done."""
    return {name: seconds for name, (_, seconds) in timed(description, cases, rounds, clock).items()}


def timed(description: str, cases: Mapping[Name, Callable[[], Result]], rounds: int,
          clock: Callable[[], float] = time.perf_counter) -> dict[Name, tuple[Result, float]]:
    """{name: (what the case returned last, its median seconds)}; see `median_seconds`."""
    results: dict[Name, Result] = {}
    times: dict[Name, list[float]] = {name: [] for name in cases}
    with ProgressBar(description, (rounds + 1) * len(cases), unit="run") as progress:
        for round_ in range(rounds + 1):
            for name, run in cases.items():
                began = clock()
                results[name] = run()
                if round_:
                    times[name].append(clock() - began)
                progress.update()
    return {name: (results[name], float(np.median(values))) for name, values in times.items()}
