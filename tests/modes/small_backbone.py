"""A small random model in a workdir, beside which tests train other parameters."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from starflow_jax.checkpoints.parameters import save_params
from starflow_jax.checkpoints.training import check_fingerprint
from starflow_jax.config import Config, Data
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.system import make_system, save_system
from starflow_jax.modes.train import train
from starflow_jax.training.stopping import StopOnTerm
from tests.helpers import random_params
from tests.small_model import CONFIG


def config_with_data(folder: Path) -> Config:
    """Of a model of frames of 12 x 12 pixels; its data set is made in the folder."""
    data = Data(size=12, digit_size=8, train_clips=40, validation_clips=8, test_clips=8, directory=str(folder))
    model = dataclasses.replace(CONFIG.model, height=3, width=3)
    return dataclasses.replace(CONFIG, data=data, model=model, sample=dataclasses.replace(CONFIG.sample, batch_size=4),
                               evaluate=dataclasses.replace(CONFIG.evaluate, clips=4, prompts=4, batch_size=4))


def write_model(config: Config, workdir: Path, seed: int) -> Path:
    """A workdir with a random model."""
    arrays = traverse_util.flatten_dict(random_params(config, scale=0.3, seed=seed), sep="/")
    save_params(workdir / "checkpoints", {name: np.asarray(value) for name, value in arrays.items()}, {"batches": 0})
    check_fingerprint(workdir / "checkpoints" / "model.json", model_fingerprint(config))
    save_system(make_system(config), workdir / "system")
    return workdir


def stop_and_resume(config: Config, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run of four steps that is told to stop after two, and then goes on."""
    calls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(StopOnTerm, "agreed", lambda _: next(calls))
        train(config, workdir)
    train(config, workdir)


def same_states(*workdirs: Path) -> None:
    """All arrays of their fourth steps' states are equal."""
    states = [ocp.StandardCheckpointer().restore((folder / "checkpoints" / "4" / "state").absolute())
              for folder in workdirs]
    jax.tree.map(np.testing.assert_array_equal, *states)
