"""One loop that times several cases in turns."""

import time
from collections.abc import Callable, Mapping

import numpy as np

from starflow_jax.io.progress import ProgressBar


def median_seconds(description: str, cases: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each case. All run once a round, so that a busy machine slows all alike; one round more, the
    first, compiles and does not count. A case returns when its work is done."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    with ProgressBar(description, rounds + 1, unit="round") as progress:
        for round_ in range(rounds + 1):
            for name, run in cases.items():
                began = time.perf_counter()
                run()
                if round_:
                    times[name].append(time.perf_counter() - began)
            progress.update()
    return {name: float(np.median(values)) for name, values in times.items()}
