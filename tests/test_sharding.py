"""One code on any mesh: eight simulated devices, and two processes, give what one device gives."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import UserError
from starflow_jax.flow.starflow import STARFlow
from tests.conftest import FAST_COMPILATION
from tests.helpers import latents, text, tiny_model
from tests.small_run import ROOT, command, environment


def xla_flags(devices: int) -> str:
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *FAST_COMPILATION])


def shape_of(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, sharding.AXES)


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory) -> dict:
    """Differences from one device by mesh; one program for all, as each start costs seconds."""
    folder = tmp_path_factory.mktemp("sharded")
    env = {**os.environ, "JAX_PLATFORMS": "cpu",
           "XLA_FLAGS": xla_flags(8)}
    subprocess.run([sys.executable, "-m", "tests.sharded_run", str(folder)], cwd=ROOT, env=env, check=True, timeout=900)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("mesh", ["8x1x1x1", "1x8x1x1", "2x2x2x1", "1x2x2x2"])
def test_training_sampling_and_checkpoints_are_those_of_one_device(eight_devices: dict, mesh: str) -> None:
    found = eight_devices[mesh]
    for name in ("state", "scalars", "many"):
        assert found[name] < 1e-5, (name, found)
    assert found.get("single", 0) < 1e-5, found
    assert found["restored"] == 0  # one device's checkpoint, on this mesh
    assert found["back_on_one"] < 1e-5  # this mesh's, on one device
    assert found["laid_out"]


@pytest.mark.parametrize("choice", ["gather", "ring"])
def test_attention_by_tokens_is_that_of_one_device(eight_devices: dict, choice: str) -> None:
    """Training, the denoiser's first layer with a mask of its own; gathered also a sample, over more devices than
    heads."""
    found = eight_devices[choice]
    assert set(found) == {"state", "scalars"} | ({"single"} if choice == "gather" else set())
    assert all(error < 1e-5 for error in found.values()), found


def test_parameters_lie_in_parts(eight_devices: dict) -> None:
    """A matrix of a layer is cut over fsdp and tensor, and only over those."""
    parts = {mesh: found["kernel_part"] for mesh, found in eight_devices.items() if "x" in mesh}
    assert parts == {"1x1x1x1": 1, "8x1x1x1": 1, "1x8x1x1": 1 / 8, "2x2x2x1": 1 / 4, "1x2x2x2": 1 / 4}


def test_one_table_and_no_collisions() -> None:
    assert sharding.spec(("batch", "tokens", "hidden")) == PartitionSpec(("data", "fsdp"), ("sequence",), ("tensor",))
    with pytest.raises(ValueError, match="fsdp"):
        sharding.spec(("batch", "width"))


def test_a_zero_takes_what_the_others_leave() -> None:
    assert sharding.mesh_shape(settings_of.Mesh(data=1, fsdp=0, tensor=2), 64) == (1, 32, 2, 1)
    with pytest.raises(UserError, match="3 devices|tensor=2"):
        sharding.mesh_shape(settings_of.Mesh(tensor=2), 3)


def test_what_does_not_divide_is_named() -> None:
    model = tiny_model()  # two heads of 20
    sharding.check_model(model, shape_of(1, 2, 2, 1))
    with pytest.raises(UserError, match="mesh.tensor=2, mesh.sequence=2.*2 heads"):
        sharding.check_model(model, shape_of(1, 1, 2, 2))
    sharding.check_model(dataclasses.replace(model, parted_attention="gather"), shape_of(1, 1, 2, 2))
    with pytest.raises(UserError, match="mesh.fsdp=3"):
        sharding.check_model(model, shape_of(1, 3, 1, 1))
    with pytest.raises(UserError, match="train.batch_size=6.*= 4"):
        sharding.check_batch("train.batch_size", 6, shape_of(2, 2, 2, 1))


def test_what_every_process_holds_is_laid_out() -> None:
    batch = {"latents_BNhwC": np.arange(24.0).reshape(4, 6)}
    assert sharding.lay_out(batch) is batch
    mesh = sharding.make_mesh(settings_of.Mesh(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = sharding.lay_out(batch)["latents_BNhwC"]
        odd = {"latents_BNhwC": np.zeros((3, 2))}
        assert sharding.lay_out(odd) is odd
    assert placed.addressable_shards[0].data.shape == (2, 6)
    np.testing.assert_array_equal(placed, batch["latents_BNhwC"])


def test_what_is_not_trained_is_spread() -> None:
    mesh = sharding.make_mesh(settings_of.Mesh(fsdp=4, data=1), jax.devices()[:4])
    tree = {"table": np.arange(24.0).reshape(3, 8), "odd": np.arange(3.0)}
    spread = sharding.spread(tree, mesh)
    assert spread["table"].addressable_shards[0].data.shape == (3, 2)
    assert spread["odd"].addressable_shards[0].data.shape == (3,)
    for name, value in tree.items():
        np.testing.assert_array_equal(spread[name], value)


def test_only_the_layers_matrices_change_their_dtype() -> None:
    model = tiny_model(denoiser="first_layer", denoiser_layers=1)
    params = jax.eval_shape(STARFlow(model).init, jax.random.key(0), latents(model), text(model))["params"]
    kinds = {sharding._name(path): leaf.dtype for path, leaf in
             jax.tree_util.tree_flatten_with_path(sharding.layers_as(params, jnp.bfloat16))[0]}
    halved = {name for name, dtype in kinds.items() if dtype == jnp.bfloat16}
    assert halved == {name for name in kinds if "layers/layer" in name and name.endswith("kernel")}
    assert any("qkv" in name for name in halved) and any("denoiser" in name for name in halved)


def test_without_a_mesh_nothing_happens() -> None:
    x = np.ones((2, 3, 4))
    assert sharding.constrain(x, "batch", "tokens", None) is x
    assert sharding.over_heads(lambda q, k, v, past: q, x, x, x, None) is x


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(workdir: Path, data: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    env = environment(data / "compiled")
    env["XLA_FLAGS"] = xla_flags(devices)
    return subprocess.Popen(command(workdir, data, "--config.mesh.fsdp=2", *arguments), cwd=ROOT, env=env, text=True,
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
    """Same losses as one process with two devices. After a kill the other ends, after SIGTERM to one both save the same
    step, and both times they go on from the checkpoint."""
    data, one, two = tmp_path / "data", tmp_path / "one", tmp_path / "two"
    data.mkdir()
    longer = ("--config.train.steps=40", "--config.train.checkpoint_every=8", "--config.train.log_every=4",
              "--config.model.denoiser=none", "--config.sample.denoise=none")
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
    pair = start_two(two, data, *longer)
    outputs = [process.communicate(timeout=600)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert f"going on from step {stopped}\n" in outputs[0]
    assert [step for step, _ in losses(two)] == [step for step, _ in losses(one)]
    np.testing.assert_allclose([x for _, x in losses(two)], [x for _, x in losses(one)], rtol=1e-5, atol=1e-5)
