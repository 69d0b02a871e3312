"""The paper's experiments as their users run them: one command, a table, a picture and a file of figures each."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.config import Config, UserError, changed
from starflow_jax.io.pictures import read_image
from starflow_jax.modes.evaluate import evaluate
from tests.modes.test_train_decoder import config, write_model

__all__ = ["config"]  # a fixture


def asked(config: Config, task: str) -> Config:
    return changed(config, "evaluate", {"task": task})


def test_a_folder_without_runs_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run of configs/ablations.py; train some, such as .*base-0"):
        evaluate(asked(config, "ablations"), tmp_path)
    with pytest.raises(UserError, match="evaluate.guidance=.*must be a tuple of numbers, 0 or more"):
        changed(config, "evaluate", {"guidance": (1.0, -1.0)})


@pytest.mark.slow  # the parts have quick tests in tests/evaluation
def test_ablations_measure_the_runs_that_are_there(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = dataclasses.replace(config, model=dataclasses.replace(config.model, local_shallow=False))
    for name, of, seed in (("base-0", config, 1), ("base-1", config, 2), ("global_shallow-0", whole, 1)):
        write_model(of, tmp_path / name, seed)
    evaluate(asked(config, "ablations"), tmp_path)
    said = capsys.readouterr().out
    assert "not trained yet: base-2, global_shallow-1, " in said and "nothing measured past the training length" in said
    held = json.loads((tmp_path / "ablations.json").read_text())
    assert held["variants"]["base"]["seeds"] == [0, 1] and held["variants"]["base"]["bits_per_dim"][1] > 0
    np.testing.assert_array_equal(np.triu(held["causality"]["base-0"], 1), 0)
    assert np.triu(held["causality"]["global_shallow-0"], 1).sum() > 0
    assert all(read_image(tmp_path / name).size for name in ("ablations.png", "ablations_causality.png"))
    (tmp_path / "base-0" / "evaluate_samples.gif").unlink()
    evaluate(asked(config, "ablations"), tmp_path)  # measured already
    assert not (tmp_path / "base-0" / "evaluate_samples.gif").exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["denoisers", "guidance"])
def test_denoisers_and_guidance(config: Config, tmp_path: Path, task: str, capsys: pytest.CaptureFixture) -> None:
    write_model(config, tmp_path, seed=1)
    evaluate(changed(asked(config, task), "evaluate", {"guidance": (0.0, 2.0)}), tmp_path)
    held = json.loads((tmp_path / f"{task}.json").read_text())
    if task == "denoisers":
        assert set(held["ways"]) == {"denoiser", "score", "none"}
        assert {"temporal_flickering", "digit", "psnr_to_the_clip"} <= set(held["ways"]["score"])
    else:
        assert [row["guidance"] for row in held["weights"]] == [0.0, 2.0] and "direction" in held["weights"][0]
        assert 5 < held["brightness_of_real_clips"] < 12
    assert read_image(tmp_path / f"{task}.png").size and "±" in capsys.readouterr().out
