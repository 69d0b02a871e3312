"""Several processes of one run: what one process gives, and what happens when one of them is killed or told to stop."""

import json
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np

from tests.small_run import ROOT, command, environment
from tests.test_sharding import xla_flags


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
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def wait_for(checkpoint: Path, pair: list[subprocess.Popen]) -> None:
    while not checkpoint.exists():
        assert pair[0].poll() is None, pair[0].stdout.read()  # type: ignore[union-attr]
        time.sleep(0.05)


def test_two_processes_train_as_one_and_one_that_dies_stops_the_other(tmp_path: Path) -> None:
    """Same losses as one process with two devices. After a kill the other ends, and both resume from the checkpoint;
    after SIGTERM to one both save the same step."""
    data, one, two = tmp_path / "data", tmp_path / "one", tmp_path / "two"
    data.mkdir()
    longer = ("--config.train.steps=40", "--config.train.checkpoint_every=8", "--config.train.log_every=4",
              "--config.model.denoiser=none", "--config.sample.denoise=none", "--config.train.sheet_clips=0")
    alone = start(one, data, *longer, devices=2)
    assert alone.wait(600) == 0, alone.stdout.read()  # type: ignore[union-attr]
    pair = start_two(two, data, *longer)
    wait_for(two / "checkpoints" / "8", pair)
    pair[1].kill()
    said = pair[0].communicate(timeout=300)[0]
    # At once by the line of ours, or, where it was waiting for the other to save, by JAX's after 100 seconds.
    assert pair[0].returncode, said
    assert "another process of this run was lost" in said or "another task died" in said, said
    pair = start_two(two, data, *longer)
    wait_for(two / "checkpoints" / "24", pair)
    pair[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    stopped = int(re.search(r"stopped at step (\d+) of 40, saved", outputs[0])[1])  # type: ignore[index]
    assert 24 <= stopped < 40 and (two / "checkpoints" / str(stopped)).exists()
    resumed = int(re.search(r"resuming from step (\d+)\n", outputs[0])[1])  # type: ignore[index]
    assert 8 <= resumed < 24
    expected = [(step, loss) for step, loss in losses(one) if step <= stopped]
    assert [step for step, _ in losses(two)] == [step for step, _ in expected]
    np.testing.assert_allclose([x for _, x in losses(two)], [x for _, x in expected], rtol=1e-5, atol=1e-5)
