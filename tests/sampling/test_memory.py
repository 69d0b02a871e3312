"""What is too large is said with the figures before it is tried; the estimates are never above what is there."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax import sharding
from starflow_jax.config import Config, UserError, changed
from starflow_jax.config import Mesh as MeshSettings
from starflow_jax.data.digits import dataset, scene
from starflow_jax.evaluation import memory as evaluation
from starflow_jax.io import memory as machine
from starflow_jax.io.command_line import load_config
from starflow_jax.io.video import write_mp4
from starflow_jax.model.parameters import inference_params, init_params
from starflow_jax.modes import prepare
from starflow_jax.sampling import memory
from starflow_jax.sampling.origin import cache_bytes_per_device
from tests.helpers import random_params
from tests.small_model import CONFIG, small_system
from tests.small_run import run_here

GIB = 2**30


@pytest.fixture(autouse=True)
def machine_of_16_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    set_memory(monkeypatch, 16 * GIB)


def set_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in (memory, dataset, evaluation, prepare):
        monkeypatch.setattr(module, "host_bytes", lambda: size)


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
    (["--mode=evaluate", "--config.evaluate.task=camera", "--config.data.camera=true", "--config.model.frames=1000",
      "--config.sample.batch_size=10000"], "10000 videos of 15997 frames together"),
    (["--mode=evaluate", "--config.evaluate.task=camera", "--config.data.camera=true",
      "--config.evaluate.prompts=1000000", "--config.data.test_clips=1000000"], "evaluate.prompts=1000000, "),
    (["--mode=evaluate", "--config.evaluate.task=camera", "--config.data.camera=true", "--config.sample.batch_size=1",
      "--config.model.frames=1000", "--config.evaluate.prompts=1", "--config.evaluate.batch_size=10000"],
     "evaluate.batch_size=10000"),
    (["--mode=evaluate", "--config.evaluate.task=classify", "--config.evaluate.clips=10000000",
      "--config.data.test_clips=10000000"], "evaluate.clips=10000000"),
    (["--mode=prepare", "--config.prepare.resolution=16384", "--config.prepare.frames=100000"],
     "a clip of 100000 frames of "),
    (["--mode=prepare", "--config.prepare.latents=true", "--config.prepare.batch_size=10000"],
     "prepare.batch_size=10000, each a clip of 17 frames of "),
    (["--mode=prepare", "--config.prepare.text_features=true", "--config.prepare.batch_size=10000",
      "--config.model.text_dim=4096", "--config.model.text_length=512"], "prepare.batch_size=10000 prompts"),
    (["--mode=train", "--config.model.deep_width=30720", "--config.model.deep_layers=100"], "training this model"),
    (["--mode=train", "--config.train.target=control", "--config.data.camera=true",
      "--config.data.image_probability=0", "--config.model.deep_width=30720", "--config.model.deep_layers=100"],
     "training this model"),
    (["--mode=train", "--config.train.target=student", "--config.student.teacher_width=30720",
      "--config.student.teacher_layers=100"], "training this model"),
    (["--mode=train", "--config.train.batch_size=1000000"], "train.batch_size=1000000")])
def test_it_is_one_line_before_anything_is_loaded(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("sample.load_model", "evaluate.load_model", "train.open_run", "prepare._prepare"):
        monkeypatch.setattr(f"starflow_jax.modes.{mode}", None)
    assert words in refused(tmp_path, *arguments)


def refused(workdir: Path, *arguments: str) -> str:
    """The line that says it."""
    code, _, error = run_here(["--config=configs/t2v.py", f"--workdir={workdir}", *arguments])
    assert code == 2 and len(error.splitlines()) == 1, error
    assert "of the machine's memory are needed, and there are " in error and "; " in error, error
    return error


def test_a_video_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many draws of its noise, and as many videos between it and another, as there is memory for, and no more."""
    config = load_config(evaluate={"task": "video", "video": "a", "caption": "a", "draws": 10})
    flow, latents = memory.flow_bytes(config), memory.latent_bytes(config, 4)
    set_memory(monkeypatch, flow + 10 * latents)
    evaluation.check_given(config, one_device(), 13)
    with pytest.raises(UserError, match="11 draws of a video of 13 frames: at least"):
        evaluation.check_given(changed(config, "evaluate", {"draws": 11}), one_device(), 13)
    evaluation.check_given(changed(config, "evaluate", {"draws": 11, "batch_size": 10}), one_device(), 13)
    between = changed(config, "evaluate", {"draws": 1, "other": "b", "steps": 10})
    set_memory(monkeypatch, flow + 20 * latents + 10 * memory.pixel_bytes(config, 4))
    evaluation.check_given(between, one_device(), 13)
    with pytest.raises(UserError, match="evaluate.steps=11: at least"):
        evaluation.check_given(changed(between, "evaluate", {"steps": 11}), one_device(), 13)
    write_mp4(tmp_path / "a.mp4", np.zeros((13, 24, 24, 3), np.uint8), 8)
    monkeypatch.setattr("starflow_jax.modes.evaluate.load_model", None)
    assert "64 draws of a video of 13 frames" in refused(
        tmp_path, "--mode=evaluate", "--config.evaluate.task=video", f"--config.evaluate.video={tmp_path / 'a.mp4'}",
        "--config.evaluate.caption=a", "--config.evaluate.draws=100")


def test_students_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are there at once; their sizes are those of their own workdirs."""
    config = load_config(train={"target": "student"}, sample={"batch_size": 1},
                         evaluate={"prompts": 1, "batch_size": 10_000})
    for name in ("half", "third"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "system").mkdir()
        (tmp_path / name / "system" / "settings.json").write_text(json.dumps(dataclasses.asdict(config)))
    flow = memory.flow_bytes(config)
    measured = flow + config.evaluate.batch_size * memory.latent_bytes(config, config.model.frames)

    def check(students: list[Config], size: int) -> None:
        set_memory(monkeypatch, size)
        evaluation.check_students(students, one_device())

    check([config], measured)
    check([config, config], measured + flow)
    with pytest.raises(UserError, match="evaluate.batch_size=10000: at least"):
        check([config, config], measured + flow - 1)
    set_memory(monkeypatch, 2 * flow - 1)
    monkeypatch.setattr("starflow_jax.modes.experiments.backbone_weights", None)
    assert "GiB" in refused(tmp_path, "--mode=evaluate", "--config.evaluate.task=students",
                            "--config.sample.batch_size=1", "--config.evaluate.prompts=1")


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
        for task in ("test_set", "horizon", "ti2v", "camera", "classify"):
            evaluation.check_evaluation(changed(config, "evaluate", {"task": task}), one_device())
        evaluation.check_students([config] * 3, one_device())
        for settings in ({}, {"latents": True}, {"latents": True, "media": False, "text_features": True}):
            asked = changed(config, "prepare", settings)
            prepare.check_memory(asked, prepare.job_of(asked, "out"))


def test_the_machines_own_memory() -> None:
    assert GIB // 2 < machine.host_bytes() < 2**50
