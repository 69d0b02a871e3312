"""How long a user waits for an answer: fresh processes, from `import` to a video, and a model that is loaded."""

import itertools
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax.io.command_line import PACKAGE
from starflow_jax.io.compiled import count_programs
from starflow_jax.io.timing import median_seconds
from starflow_jax.sampling.api import Video, load

ROUNDS = 3
CALLS = 20
PROMPT = "a blue three moves right"
PROMPTS = PROMPT, "a red seven moves left"
VIDEO = ("--mode=sample", f"--config.sample.prompt={PROMPT}", "--workdir=work")
COLD, WARM = "first video, nothing compiled", "first video, compiled before"
# How many videos, and how long in latent frames; each call has a prompt, guidance and seed of its own.
CALLS_THAT_COMPILE = (
    ("one video", 1, 4), ("another prompt, guidance and seed", 1, 4), ("a shorter one", 1, 3),
    ("a longer one, the first that moves its window on", 1, 6), ("one longer still", 1, 9),
    ("three videos", 3, 4), ("four", 4, 4), ("four longer ones, the first that move on", 4, 6),
    ("three of another length", 3, 9), ("two videos", 2, 4))
# Arguments of Python, and the exit code.
PROCESSES: dict[str, tuple[tuple[str, ...], int]] = {
    "import jax": (("-c", "import jax"), 0),
    "import of what sampling needs": (("-c", "import starflow_jax.modes.sample"), 0),
    "--help": (("-m", "starflow_jax.main", "--help"), 0),
    "an error of settings": (("-m", "starflow_jax.main", "--config=configs/t2v.py", "--config.sample.count=0"), 2),
    COLD: (("-m", "starflow_jax.main", "--config=configs/t2v.py", *VIDEO), 0),
    WARM: (("-m", "starflow_jax.main", "--config=configs/t2v.py", *VIDEO), 0),
}


def report(rounds: int = ROUNDS, calls: int = CALLS) -> dict[str, list[dict[str, Any]]]:
    """Median seconds of each process, by the clock and of all cores together, away from the checkout and with a cache
    of compiled programs of their own.

    Raises RuntimeError where one ends otherwise than it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        cpu_seconds: dict[str, list[float]] = {name: [] for name in PROCESSES}
        cases = {name: _case(name, Path(folder), cpu_seconds[name]) for name in PROCESSES}
        seconds = median_seconds("start", cases, rounds)
    return {"fresh processes": [
        {"what": name, "seconds": seconds[name], "CPU seconds": float(np.median(cpu_seconds[name][1:]))}
        for name in PROCESSES], "a loaded model": loaded_model(calls), "programs that calls compile": programs()}


def loaded_model(rounds: int) -> list[dict[str, Any]]:
    """Median seconds of calls of the pretrained model that were compiled before, each with a seed of its own."""
    model, seeds = load(), itertools.count()

    def generate() -> Video:
        return model.generate(PROMPT, seed=next(seeds))

    seconds = median_seconds("calls", {"generate": generate, "generate and its log_likelihood":
                                       lambda: generate().log_likelihood}, rounds)
    return [{"what": name, "seconds": seconds[name]} for name in seconds]


def programs() -> list[dict[str, Any]]:
    """How many programs each of some calls of the pretrained model compiles, or reads from the disk, one after the
    other in this process."""
    model = load()
    jax.clear_caches()  # of the calls before
    compiled = count_programs()
    rows: list[dict[str, Any]] = []
    for what, count, latent_frames in CALLS_THAT_COMPILE:
        before = compiled()
        seed, frames = len(rows), 1 + (latent_frames - 1) * model.config.codec.time_stride
        made = model.generate([PROMPTS[seed % 2]] * count, seed=seed, guidance=1.0 + seed, frames=frames)
        assert np.isfinite([video.log_likelihood for video in made]).all()
        rows.append({"call": what, "programs": compiled() - before})
    return rows


def _case(name: str, folder: Path, cpu_seconds: list[float]) -> Callable[[], None]:
    arguments, code = PROCESSES[name]
    compiled = folder / "compiled"

    def run() -> None:
        if name == COLD:
            shutil.rmtree(compiled, ignore_errors=True)
        shutil.rmtree(folder / "work", ignore_errors=True)  # a video that exists is not made again
        before = _cpu_seconds_of_children()
        run_process(arguments, code, folder, compiled)
        cpu_seconds.append(_cpu_seconds_of_children() - before)

    return run


def run_process(arguments: Sequence[str], code: int, folder: Path, compiled: Path) -> None:
    """Run Python in a folder, with this package and a cache of compiled programs."""
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": str(compiled)}
    ended = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    if ended.returncode != code:
        raise RuntimeError(f"{' '.join(arguments)}: exit code {ended.returncode}, not {code}\n{ended.stderr}")


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
