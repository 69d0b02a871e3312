"""Several processes of one run: what one process gives, and what happens when one of them is killed or told to stop."""

import math
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from starflow_jax.io.lock import held
from starflow_jax.training.metrics import read_metrics
from tests.small_run import ROOT, command, environment
from tests.test_sharding import xla_flags

LOG_EVERY = 4
LONGER = ("--config.train.steps=40", "--config.train.checkpoint_every=8", f"--config.train.log_every={LOG_EVERY}",
          "--config.model.denoiser=none", "--config.sample.denoise=none", "--config.train.sheet_clips=0")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir: Path, data: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    return subprocess.Popen(command(workdir, data, "--config.mesh.fsdp=2", *arguments), cwd=ROOT,
                            env=environment(XLA_FLAGS=xla_flags(devices)), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def start_two(workdir: Path, data: Path, *arguments: str) -> list[subprocess.Popen]:
    port = free_port()
    return [start(workdir, data, *arguments, f"--distributed=127.0.0.1:{port},2,{index}") for index in range(2)]


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(workdir) if "loss" in line]


def wait_for(checkpoint: Path, processes: list[subprocess.Popen]) -> None:
    while not checkpoint.exists():
        assert processes[0].poll() is None, processes[0].stdout.read()  # type: ignore[union-attr]
        time.sleep(0.05)


def end_of(processes: list[subprocess.Popen]) -> str:
    """What the first process printed; all must end well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs[0]


def step_in(said: str, line: str) -> int:
    return int(re.search(line.format(r"(\d+)"), said)[1])  # type: ignore[index]


def stopped_at(workdir: Path, pair: list[subprocess.Popen], checkpoint: int) -> int:
    """The step of which both say that it is saved, after SIGTERM to one of them once a checkpoint is there."""
    wait_for(workdir / "checkpoints" / str(checkpoint), pair)
    pair[1].send_signal(signal.SIGTERM)
    stopped = step_in(end_of(pair), "stopped at step {} of 40, saved")
    assert checkpoint <= stopped < 40 and (workdir / "checkpoints" / str(stopped)).exists()
    return stopped


def final_arrays(workdir: Path, step: int = 40) -> list[jax.Array]:
    """All arrays of the last checkpoint, on a device of this process."""
    folder, reader = (workdir / "checkpoints" / str(step) / "state").absolute(), ocp.StandardCheckpointer()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                          reader.metadata(folder).item_metadata)
    return jax.tree.leaves(reader.restore(folder, shapes))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_two_processes_train_as_one_and_stop_together(data: Path, tmp_path: Path) -> None:
    """The losses of one process with two devices, until SIGTERM to one of the two, when both save the same step."""
    one, two = tmp_path / "one", tmp_path / "two"
    stopped = stopped_at(two, start_two(two, data, *LONGER), checkpoint=8)
    alone = start(one, data, *LONGER, devices=2)
    wait_for(one / "checkpoints" / str(8 * math.ceil(stopped / 8)), [alone])
    alone.send_signal(signal.SIGTERM)
    end_of([alone])
    expected = [(step, loss) for step, loss in losses(one) if step <= stopped and step % LOG_EVERY == 0]
    found = losses(two)
    assert [step for step, _ in found] == [step for step, _ in expected] and len(found) >= 2
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_that_dies_stops_the_other_and_both_resume(data: Path, tmp_path: Path) -> None:
    """Killed, stopped by SIGTERM and resumed to its end, a run of two processes is the uninterrupted one."""
    workdir, uninterrupted = tmp_path / "interrupted", tmp_path / "uninterrupted"
    end_of(start_two(uninterrupted, data, *LONGER))
    pair = start_two(workdir, data, *LONGER)
    wait_for(workdir / "checkpoints" / "8", pair)
    pair[1].kill()
    said = pair[0].communicate(timeout=300)[0]
    assert pair[0].returncode == 2 and "another process of this run was lost" in said, said
    stopped = stopped_at(workdir, start_two(workdir, data, *LONGER), checkpoint=24)
    said = end_of(start_two(workdir, data, *LONGER))
    assert step_in(said, "resuming from step {}\n") == stopped and "trained 40 steps" in said
    assert len(losses(workdir)) == 40 // LOG_EVERY and losses(workdir) == losses(uninterrupted)
    for ours, expected in zip(final_arrays(workdir), final_arrays(uninterrupted), strict=True):
        np.testing.assert_array_equal(ours, expected)


SHORT = ("--config.train.steps=12", "--config.train.checkpoint_every=4", "--config.train.evaluate_every=8",
         "--config.train.log_every=4", "--config.model.denoiser=none", "--config.sample.denoise=none",
         "--config.train.sheet_clips=0")
# What a workdir holds when a phase has begun: the pattern of a file's name, and what it must say.
PHASES = {"start": ("in_use.json", ""), "compile": ("metrics.jsonl", ""), "step": ("metrics.jsonl", '"step": 4'),
          "evaluation": ("metrics.jsonl", '"step": 8'), "checkpoint": ("checkpoints/8*", ""),
          "end": ("checkpoints/12", "")}


def has_begun(phase: str, workdir: Path) -> bool:
    pattern, text = PHASES[phase]
    return any(not text or text in path.read_text() for path in workdir.glob(pattern))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the data, the workdir of a short run of two processes)."""
    data, workdir = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("uninterrupted")
    end_of(start_two(workdir, data, *SHORT))
    return data, workdir


@pytest.mark.slow  # tests/io/test_supervised.py and tests/modes/test_alone.py are quick
@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("phase", PHASES)
def test_a_death_at_any_phase_is_one_line_and_the_same_command_goes_on(
    phase: str, killed: int, uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    data, expected = uninterrupted
    pair = start_two(tmp_path, data, *SHORT)
    while not has_begun(phase, tmp_path):
        assert pair[0].poll() is None and pair[1].poll() is None, pair[0].communicate()[0]
        time.sleep(0.005)
    pair[killed].kill()
    said = pair[1 - killed].communicate(timeout=60)[0]
    assert "Traceback" not in said and "stack trace" not in said, said
    if phase != "end" or pair[1 - killed].returncode:  # it may just have ended
        assert pair[1 - killed].returncode == 2, said
        assert said.splitlines()[-1].startswith("starflow_jax: another process of this run was lost"), said
        assert said.count("starflow_jax: ") == 1, said
    assert "trained 12 steps" in end_of(start_two(tmp_path, data, *SHORT))
    assert losses(tmp_path) == losses(expected)
    for ours, theirs in zip(final_arrays(tmp_path, 12), final_arrays(expected, 12), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow  # tests/modes/test_alone.py is quick
def test_a_workdir_in_use_is_refused_to_all_processes(data: Path, tmp_path: Path) -> None:
    with held(tmp_path):
        pair = start_two(tmp_path, data, *SHORT)
        said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [2, 2], said
    assert all(one.count("starflow_jax: ") == 1 and "is using it" in one for one in said), said
