"""What is too large is said with the figures before it is tried; the estimates are never above what is there."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax import sharding
from starflow_jax.config import Mesh as MeshSettings
from starflow_jax.config import UserError, changed
from starflow_jax.data.digits import dataset, scene
from starflow_jax.io import memory as machine
from starflow_jax.io.command_line import load_config
from starflow_jax.model.parameters import inference_params, init_params
from starflow_jax.sampling import memory
from starflow_jax.sampling.origin import cache_bytes_per_device
from tests.helpers import random_params
from tests.small_model import CONFIG, small_system
from tests.small_run import run_here

GIB = 2**30


@pytest.fixture(autouse=True)
def machine_of_16_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (memory, dataset):
        monkeypatch.setattr(module, "host_bytes", lambda: 16 * GIB)


def one_device() -> Any:
    return sharding.make_mesh(MeshSettings(1), jax.local_devices()[:1])


@pytest.mark.parametrize("arguments, words", [
    (["--mode=sample", "--config.sample.prompt=a", "--config.sample.frames=999997"], "a video of 999997 frames"),
    (["--mode=sample", "--config.sample.prompt=a", "--config.sample.count=100000", "--config.sample.keep=2",
      "--config.sample.frames=49"], "100000 kept to compare"),
    (["--mode=sample", "--config.sample.prompt=a", "--config.sample.count=10000", "--config.sample.frames=9997",
      "--config.sample.batch_size=10000"], "10000 videos of 9997 frames together"),
    (["--mode=evaluate", "--config.evaluate.batch_size=10000", "--config.model.frames=1000",
      "--config.sample.batch_size=1"], "evaluate.batch_size=10000"),
    (["--mode=train", "--config.model.deep_width=30720", "--config.model.deep_layers=100"], "training this model"),
    (["--mode=train", "--config.train.batch_size=1000000"], "train.batch_size=1000000")])
def test_it_is_one_line_before_anything_is_loaded(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("sample.load_model", "evaluate.load_model", "train.open_run"):
        monkeypatch.setattr(f"starflow_jax.modes.{mode}", None)
    code, _, error = run_here(["--config=configs/t2v.py", f"--workdir={tmp_path}", *arguments])
    assert code == 2 and len(error.splitlines()) == 1, error
    assert words in error and "GiB of the machine's memory are needed, and there are 16.0 GiB; " in error


def test_data_that_is_too_large_to_render(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.size=1024, .* GiB of the machine's memory are needed"):
        dataset.prepare(scene.MovingDigitsConfig(size=1024), str(tmp_path))


@pytest.mark.parametrize("settings", [{}, {"guidance": 0.0}, {"cache": "int8"}])
def test_the_caches_estimate_is_what_is_allocated(settings: dict[str, Any]) -> None:
    config = changed(CONFIG, "sample", settings)
    params = inference_params(config, random_params(CONFIG))
    held = cache_bytes_per_device(small_system(config), params, 3)
    assert 0.8 * held < 3 * memory.cache_bytes(config) <= held


@pytest.mark.parametrize("name", ["configs/t2v.py", "configs/t2v.py:7b"])
def test_no_model_is_estimated_larger_than_it_is(name: str) -> None:
    config = load_config(name)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))["flow"]
    held = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert 0.8 * held < memory.layer_parameters(config.model) <= held


def test_several_devices_share(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform, process_index = "gpu", jax.process_index()

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_limit": 16 * GIB}

    class Mesh:
        def __init__(self, size: int) -> None:
            self.size, self.devices = size, np.array([Device()] * size)

    memory.check_devices("x", 60 * GIB, Mesh(4), "")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="x: at least 20.0 GiB of the device's memory are needed, and there are 16.0"):
        memory.check_devices("x", 60 * GIB, Mesh(3), "take more")  # type: ignore[arg-type]


def test_what_runs_is_not_refused() -> None:
    for settings in ({}, {"frames": 9}, {"frames": 4001, "stream": True}, {"frames": 401, "count": 100, "keep": 3}):
        memory.check_videos(changed(CONFIG, "sample", settings), one_device(), together=32, kept=100)
    for config in (CONFIG, load_config("configs/t2v.py")):
        memory.check_training(config, one_device())
        memory.check_evaluation(config, one_device())


def test_the_machines_own_memory() -> None:
    assert GIB // 2 < machine.host_bytes() < 2**50
