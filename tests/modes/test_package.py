"""--mode=package: a workdir's model where workdirs without one find it, with the licence of its weights."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import starflow_jax as sf
from configs.t2v import tiny
from starflow_jax.checkpoints.licences import KEPT
from starflow_jax.config import Train, UserError
from starflow_jax.io.arrays import import_arrays
from starflow_jax.model.own_settings import PRETRAINED, own_settings
from starflow_jax.model.store import load_model, weights_of
from starflow_jax.modes import run
from tests.model.test_old_workdirs import workdir as workdir
from tests.modes.small_backbone import config_with_data, write_model
from tests.small_model import CAPTIONS


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in ("model.own_settings", "model.store", "modes.package", "sampling.api"):
        monkeypatch.setattr(f"starflow_jax.{module}.PRETRAINED", tmp_path / "package")
    return tmp_path / "package"


def test_a_model_is_packaged_with_its_licence(workdir: Path, package: Path) -> None:
    (workdir / KEPT).write_text("=== the flow\n\nuse it well")
    run("package", tiny(), workdir)
    assert (package / KEPT).read_text() == "=== the flow\n\nuse it well"
    jax.tree.map(np.testing.assert_array_equal,
                 *(import_arrays(folder / "model.safetensors") for folder in (package, PRETRAINED)))
    (workdir / KEPT).unlink()  # weights of one's own: the licence of those before goes with them
    run("package", tiny(), workdir)
    assert not (package / KEPT).exists() and (package / "model.safetensors").exists()


def test_a_control_module_is_packaged_beside_its_model(package: Path, tmp_path: Path) -> None:
    """A model without a workdir then follows a camera as with sample.control; another model in its place does not."""
    config = config_with_data(tmp_path / "data")
    model = write_model(config, tmp_path / "model", seed=1)
    run("package", config, model)
    steered = dataclasses.replace(
        config, train=Train(target="control", steps=2, batch_size=4, learning_rate=3e-2, warmup_steps=1,
                            validation_clips=4, evaluate_every=2, checkpoint_every=2, sheet_clips=0),
        data=dataclasses.replace(config.data, camera=True, image_probability=0.0))
    run("train", steered, tmp_path / "control")
    run("package", own_settings(steered, tmp_path / "control")[0], tmp_path / "control")
    held = import_arrays(package / "control.safetensors")
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), held,
                 load_model(steered, tmp_path / "control").params["control"])
    assert weights_of(config, tmp_path / "none") == load_model(config, tmp_path / "none").weights

    alone = sf.load()
    moved = alone.generate(CAPTIONS[0], camera="pan_left").frames.astype(int)
    assert np.abs(moved - alone.generate(CAPTIONS[0]).frames).max() > 2
    named = sf.load(control=tmp_path / "control").generate(CAPTIONS[0], camera="pan_left").frames
    assert np.abs(moved - named).max() <= 1  # of float32
    run("package", config, model)
    assert (package / "control.safetensors").exists()  # it is the same model
    run("package", config, write_model(config, tmp_path / "other", seed=2))
    with pytest.raises(UserError, match="follows no camera"):
        sf.load().generate(CAPTIONS[0], camera="pan_left")
