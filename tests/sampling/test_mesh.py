"""A trained model on a mesh: what users ask of it is what one device gives; its bytes a device are those that are said.
"""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import starflow_jax as sf
from configs.t2v import get_config
from starflow_jax import config as settings_of
from starflow_jax.config import Config, UserError, from_config_dict
from starflow_jax.flow import decode
from starflow_jax.model.parameters import decoding_variables
from starflow_jax.sampling.mesh import sampling_mesh, suited
from starflow_jax.sampling.origin import bytes_per_device, cache_bytes_per_device
from tests.sharded_sampling import CONFIG_OF_TEST, PROMPTS, write_module, write_workdir
from tests.small_run import ROOT, environment
from tests.test_sharding import xla_flags


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    write_workdir(folder)
    return folder


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_module(tmp_path_factory.mktemp("control"), CONFIG_OF_TEST)


def test_a_video_and_its_likelihood_are_those_of_one_device(workdir: Path, module: str) -> None:
    """Along a camera, over two devices, heads sharded; the slow test below asks more, on eight."""
    one, two = (sf.load(workdir, control=module, mesh=mesh) for mesh in ({"data": 1}, {"data": 1, "tensor": 2}))
    kernels = [model.params["flow"]["deep"]["transformer"]["layers"]["layer"]["mlp_in"]["kernel"]
               for model in (one, two)]
    assert [len(kernel.sharding.device_set) for kernel in kernels] == [1, 2]
    steering = [model.params["control"]["layers"]["qkv"]["kernel"] for model in (one, two)]
    for of_both in (kernels, steering):
        assert [kernel.addressable_shards[0].data.size / kernel.size for kernel in of_both] == [1, 1 / 2]
    videos = [model.generate(PROMPTS[0], seed=3, batch_size=1, camera="orbit") for model in (one, two)]
    assert np.abs(videos[0].frames.astype(int) - videos[1].frames).max() <= 1
    assert math.isclose(videos[0].log_likelihood, videos[1].log_likelihood, rel_tol=1e-5)


@pytest.mark.slow
def test_what_users_ask_on_eight_devices_is_what_one_gives(tmp_path: Path) -> None:
    meshes = {"8x1x1x1": 1, "1x8x1x1": 1 / 8, "2x1x4x1": 1 / 4, "1x2x2x2": 1 / 4}  # parts of a matrix
    subprocess.run([sys.executable, "-m", "tests.sharded_sampling", tmp_path, *meshes], cwd=ROOT, check=True,
                   timeout=1800, env=environment(XLA_FLAGS=xla_flags(8)))
    found = json.loads((tmp_path / "results.json").read_text())
    for name, part in meshes.items():
        row, facts = found[name], found[name]["facts"]
        assert max(row[key] for key in ("many", "single", "stream", "extended", "steered")) <= 1, (name, row)  # shades
        assert max(row["nats"], row["given"], row["steered_nats"]) < 1e-5, (name, row)
        assert row["kernel_part"] == row["module_part"] == part and row["videos"] == 8
        assert "x".join(map(str, facts["mesh"].values())) == name and facts["dtype"] == "float32"
    whole = found["8x1x1x1"]["facts"]["parameter_bytes_per_device"]
    for name in ("1x8x1x1", "2x1x4x1", "1x2x2x2"):
        assert found[name]["facts"]["parameter_bytes_per_device"] < whole / 3
    # Guided: 16 sequences of 36 slots, 4 heads of 20, 2 layers, keys and values; of each an eighth.
    assert {row["facts"]["cache_bytes_per_device"] for row in found.values()} == {16 * 36 * 80 * 2 * 2 * 4 // 8 + 4}


def test_the_cache_takes_what_is_said_of_it(workdir: Path) -> None:
    model = sf.load(workdir, mesh={"data": 2, "tensor": 2})
    flow, settings, grid = model.system.flow, model.config.model, model.system.token_grid
    with jax.set_mesh(model.mesh):
        said = cache_bytes_per_device(model.system, model.params, videos=8)
        known = jnp.zeros((8, 0, settings.tokens_per_frame, settings.token_channels))
        texts = jnp.zeros((2, 8, settings.text_length, settings.text_dim))
        state = decode.start_window(flow, decoding_variables(model.params), known, texts, window=settings.frames,
                                    token_grid=grid)
    assert said == bytes_per_device(state.known.cache)
    assert said < sum(leaf.nbytes for leaf in jax.tree.leaves(state.known.cache)) / 3


def large() -> Config:
    return from_config_dict(get_config("7b"))


@pytest.mark.parametrize(("devices", "videos", "mesh"), [
    (1, 1, (1, 1, 1, 1)), (4, 1, (1, 1, 4, 1)), (64, 1, (1, 1, 16, 1)), (64, 4, (4, 1, 16, 1)), (64, 3, (1, 1, 16, 1))])
def test_by_default_weights_are_spread_and_further_devices_take_further_videos(devices, videos, mesh) -> None:
    """64 deep heads and 48 shallow ones have 16 for their greatest common divisor."""
    assert dataclasses.astuple(suited(large(), devices, videos)) == mesh


def test_a_small_model_stays_on_one_device_for_each_video() -> None:
    assert dataclasses.astuple(suited(CONFIG_OF_TEST, 8, 1)) == (1, 1, 1, 1)
    assert dataclasses.astuple(suited(CONFIG_OF_TEST, 8, 8)) == (8, 1, 1, 1)
    assert sampling_mesh(CONFIG_OF_TEST, 1).size == 1 and sampling_mesh(CONFIG_OF_TEST, 32).size == 4


def test_a_mesh_that_does_not_suit_is_refused() -> None:
    for mesh, message in ((dict(data=1, tensor=3), "3.*4 devices|heads"), (dict(data=1, tensor=8), "4 devices"),
                          (dict(fsdp=3), "4 devices")):
        with pytest.raises(UserError, match=message):
            sampling_mesh(dataclasses.replace(CONFIG_OF_TEST, mesh=settings_of.Mesh(**mesh)), 1)
    streamed = dataclasses.replace(CONFIG_OF_TEST.sample, stream=True, devices=2)
    config = dataclasses.replace(CONFIG_OF_TEST, sample=streamed)
    assert sampling_mesh(config, 1).size == 1
    with pytest.raises(UserError, match="sample.devices=2"):
        sampling_mesh(dataclasses.replace(config, mesh=settings_of.Mesh(data=1, tensor=2)), 1)
