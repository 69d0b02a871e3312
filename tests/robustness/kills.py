"""Training under SIGKILL: python -m tests.robustness.kills --kills=200

A tiny training is killed at random moments and started again by the same command until it ends; then its parameters
and metrics must be, bit for bit, those of a training that nothing interrupted, and the next one begins, until there
were as many kills as asked for. Moments are drawn from a seed, in seconds of the process's CPU time, so that a busy
machine kills where an idle one would. Processes are forked from this one, which has imported everything: a restart
then costs the tracing of its programs, whose compiled form JAX's cache holds. --jobs=2 has two trainings at once.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.robustness.forks import fork, import_everything, run_forked
from tests.robustness.report import write_report
from tests.small_run import command, run_here

STEPS, TIMES = 16, ("seconds", "tokens_per_second")
SETTINGS = [f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=2", "--config.train.evaluate_every=10",
            "--config.train.sheet_clips=0", "--config.train.validation_clips=4", "--config.model.denoiser=none",
            "--config.data.train_clips=64", "--config.data.image_probability=0"]
TICKS = os.sysconf("SC_CLK_TCK")
MOST_FAILURES = 3
Result = tuple[list[str], list[dict[str, Any]]]  # checksums of the last checkpoint's arrays, and the metrics


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill a tiny training again and again.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, default=Path("runs/robustness/kills.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_trainings(Path(folder), asked.kills, asked.seed, asked.jobs)
    write_report(asked.report, report)
    print(json.dumps(report, indent=1))
    sys.exit(1 if report["lost"] or report["faults"] else 0)


def kill_trainings(folder: Path, kills: int, seed: int, jobs: int = 1) -> dict[str, Any]:
    """The report: what was tried, where the kills fell, and what was lost."""
    import_everything()
    data, undisturbed = folder / "data", folder / "uninterrupted"
    complete(undisturbed, data, folder / "log")  # compiles, and makes the data
    shutil.rmtree(undisturbed)
    whole = complete(undisturbed, data, folder / "log")
    expected = arrays(undisturbed), metrics(undisturbed)
    print(f"an uninterrupted run takes {whole:.1f} s of CPU time", flush=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        parts = list(pool.map(partial(kill_one_by_one, folder, whole, expected, seed), range(jobs),
                              [kills // jobs + (job < kills % jobs) for job in range(jobs)]))
    killed: Counter[str] = sum((Counter(part["killed"]) for part in parts), Counter())
    return {"kills": killed.total(), "seed": seed, "jobs": jobs,
            **{name: sum(part[name] for part in parts) for name in ("starts", "trainings", "lost")},
            "faults": [fault for part in parts for fault in part["faults"]], "killed": dict(killed)}


def kill_one_by_one(folder: Path, whole: float, expected: Result, seed: int, job: int, kills: int) -> dict[str, Any]:
    """What one job found, whose trainings share data and compiled programs with those of the others."""
    data, workdir, log = folder / "data", folder / f"killed_{job}", folder / f"log_{job}"
    moments, phases, faults = random.Random(f"{seed} {job}"), Counter[str](), list[str]()
    starts, finished, lost = 0, 0, 0
    while phases.total() < kills and len(faults) < MOST_FAILURES:
        code = run_until(workdir, data, log, moments.uniform(0.05, 1) * whole, moments.uniform(0, 0.1))
        starts += 1
        if code == -signal.SIGKILL:
            phases[phase(workdir)] += 1
            print(f"job {job}: {phases.total()} kills, {finished} trainings", flush=True)
            continue
        finished += code == 0
        if code:
            faults.append(f"exit code {code}: {log.read_text()[-500:]}")
        elif (arrays(workdir), metrics(workdir)) != expected:
            lost += 1
        shutil.rmtree(workdir, ignore_errors=True)
    if workdir.exists() and not faults:  # the last one, to its end
        complete(workdir, data, log)
        finished, lost = finished + 1, lost + ((arrays(workdir), metrics(workdir)) != expected)
    return {"starts": starts, "trainings": finished, "lost": lost, "faults": faults, "killed": phases}


def start(workdir: Path, data: Path, log: Path) -> int:
    """The process of the training's command; what it says goes to the log."""
    def train() -> int:
        code, out, err = run_here(command(workdir, data, *SETTINGS)[3:])
        os.write(2, f"{out}\n{err}".encode())
        return code

    return fork(train, log)


def complete(workdir: Path, data: Path, log: Path) -> float:
    """Train to the end; returns the seconds of CPU time that it took."""
    process = start(workdir, data, log)
    _, status, used = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"a training that nothing interrupted failed ({status}): {log.read_text()[-2000:]}")
    return used.ru_utime + used.ru_stime


def run_until(workdir: Path, data: Path, log: Path, cpu_seconds: float, later: float) -> int:
    """Start, and kill once the process has used that much time, and some seconds later; the exit code, negative where
    a signal ended it."""
    process = start(workdir, data, log)
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if cpu_time(process) >= cpu_seconds:
            time.sleep(later)  # it may also be waiting for the disk
            os.kill(process, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        time.sleep(0.005)


def cpu_time(process: int) -> float:
    """Seconds that a process has used, all its threads together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def phase(workdir: Path) -> str:
    """What the training was doing when it was killed, as far as its folder shows."""
    steps = [path.name for path in workdir.glob("checkpoints/*") if path.name[0].isdigit()]
    if any(not name.isdigit() for name in steps):
        return "while a checkpoint was written"
    return "after a checkpoint" if steps else "before the first checkpoint"


def arrays(workdir: Path) -> list[str]:
    """A checksum of each array of the last checkpoint; in a process of its own, because reading starts threads."""
    def show() -> int:
        import jax
        import numpy as np
        import orbax.checkpoint as ocp

        state = workdir.absolute() / "checkpoints" / str(STEPS) / "state"
        for leaf in jax.tree.leaves(ocp.StandardCheckpointer().restore(state)):
            os.write(1, f"{hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()}\n".encode())
        return 0

    code, said = run_forked(show, workdir.with_name(f"arrays_of_{workdir.name}"))
    if code:
        raise RuntimeError(said[-2000:])
    return re.findall("^[0-9a-f]{64}$", said, re.MULTILINE)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """Every line without the numbers of the clock."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


if __name__ == "__main__":
    main()
