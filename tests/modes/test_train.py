"""Training as its users run it: killed and restarted it gives what an uninterrupted run gives."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import starflow_jax as sf
from starflow_jax.io.lock import held
from starflow_jax.io.pictures import read_image
from tests.small_run import ROOT, command, environment, run_here

TIMES = ("seconds", "tokens_per_second")


def losses(workdir: Path) -> dict[int, dict]:
    """Every step's row of metrics.jsonl without the wall-clock numbers."""
    rows: dict[int, dict] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = {name: value for name, value in json.loads(line).items() if name not in TIMES}
        rows.setdefault(row["step"], {}).update(row)
    return rows


def final_arrays(workdir: Path) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    folder = workdir / "checkpoints" / "8" / "state"
    return [np.asarray(leaf) for leaf in jax.tree.leaves(ocp.StandardCheckpointer().restore(folder.absolute()))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    said = succeeds(workdir, data)
    assert "bits per dimension" in said and "next: " in said
    return workdir


def succeeds(workdir: Path, data: Path, *arguments: str) -> str:
    """What a run in this process prints."""
    code, out, err = run_here(command(workdir, data, *arguments)[3:])
    assert code == 0, err[-2000:]
    return out


def interrupt(workdir: Path, data: Path, how: signal.Signals, after_step: int) -> tuple[int, str]:
    """Start a run and send it a signal once it has logged a step and saved one; returns (exit status, output). What an
    earlier run logged does not count: the file is replaced when another one starts."""
    process = subprocess.Popen(command(workdir, data), cwd=ROOT, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    metrics, saved = workdir / "metrics.jsonl", workdir / "checkpoints" / "3"
    earlier = metrics.stat().st_ino if metrics.exists() else None
    while process.poll() is None and not (saved.exists() and metrics.stat().st_ino != earlier
                                          and f'"step": {after_step}' in metrics.read_text()):
        time.sleep(0.001)
    process.send_signal(how)
    out, _ = process.communicate()
    return process.returncode, out


def test_the_api_loads_a_workdir_with_its_own_settings(uninterrupted: Path) -> None:
    model = sf.load(uninterrupted)
    assert model.config.model.deep_width == 64 and model.source == f"{uninterrupted}, step 8"
    video = model.generate("a red seven moves left", seed=1)
    assert video.frames.shape == (13, 24, 24, 3) and np.isfinite(video.log_likelihood)
    (uninterrupted / "system" / "settings.json").unlink()  # a workdir of before they were kept
    assert sf.load(uninterrupted).config.model.deep_width == 64


def test_metrics_have_every_key(uninterrupted: Path) -> None:
    rows = losses(uninterrupted)
    keys = {"loss", "bits_per_dim", "denoiser_loss", "grad_norm", "learning_rate", "skipped"}
    assert sorted(rows) == list(range(1, 9))
    assert all(keys <= set(row) for row in rows.values())
    assert "validation_bits_per_dim" in rows[8]
    assert (uninterrupted / "sheets" / "samples_step_0000008.png").exists()
    assert list((uninterrupted / "tensorboard").iterdir())


def test_killed_then_stopped_equals_uninterrupted(uninterrupted: Path, data: Path, tmp_path: Path) -> None:
    """SIGKILL loses the steps since the last checkpoint, Ctrl-C saves first (as SIGTERM does: test_processes.py), and
    nothing of either is left at the end."""
    assert interrupt(tmp_path, data, signal.SIGKILL, after_step=4)[0] == -signal.SIGKILL
    code, said = interrupt(tmp_path, data, signal.SIGINT, after_step=5)
    assert code == 130 and "saved; the same command resumes from there" in said, said
    assert re.search(r"resuming from step [36]\n", said), said
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit())
    assert 5 <= saved < 8 and saved == max(losses(tmp_path))
    assert f"resuming from step {saved}\n" in succeeds(tmp_path, data)
    assert losses(tmp_path) == losses(uninterrupted)
    for ours, expected in zip(final_arrays(tmp_path), final_arrays(uninterrupted), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("metrics", ['{}\n[3\n{"step": 8, "validation_bits_per_dim": null}\n', None],
                         ids=["damaged", "gone"])
def test_a_finished_run_started_again_needs_no_metrics(uninterrupted: Path, data: Path, tmp_path: Path,
                                                       metrics: str | None) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    if metrics is None:
        (tmp_path / "run" / "metrics.jsonl").unlink()
    else:
        (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    assert "trained 8 steps: validation ? bits per dimension" in succeeds(tmp_path / "run", data)


@pytest.mark.slow  # its sibling in training/test_optimizer.py is quick
def test_a_short_run_is_all_warm_up(data: Path, tmp_path: Path) -> None:
    """As with --config.train.steps=3 alone: the config's warm-up of 50 steps follows."""
    said = succeeds(tmp_path, data, "--config.train.warmup_steps=50", "--config.train.steps=3")
    assert "trained 3 steps" in said
    rates = [row["learning_rate"] for _, row in sorted(losses(tmp_path).items())]
    np.testing.assert_allclose(rates, [0, 0.5e-3, 1e-3], rtol=1e-6)  # of 1.5e-3


def test_a_workdir_has_one_run_that_changes_it(uninterrupted: Path, data: Path) -> None:
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    with held(uninterrupted):
        for arguments in (["--config.train.steps=9"], ["--mode=calibrate"],
                          ["--mode=convert", f"--config.convert.source={uninterrupted}"]):
            code, out, err = run_here(command(uninterrupted, data, *arguments)[3:])
            assert code == 2 and len(err.splitlines()) == 1 and f"process {os.getpid()}, since" in err, (out, err)
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_workdir_of_another_model_is_refused(uninterrupted: Path, data: Path) -> None:
    code, _, err = run_here(command(uninterrupted, data, "--config.model.denoiser_window=3")[3:])
    assert code == 2
    assert "denoiser_window" in err and "Traceback" not in err


def test_sample_and_evaluate_the_trained_model(uninterrupted: Path, data: Path) -> None:
    succeeds(uninterrupted, data, "--mode=sample", "--config.sample.prompt=a blue three moves right",
             "--config.sample.solver.block_size=12")
    made, = (uninterrupted / "samples").glob("a_blue_three_moves_right_seed0_*.mp4")
    facts = json.loads(made.with_suffix(".json").read_text())
    assert facts["frames"] == 13 and facts["outcome"] in ("exact", "converged")
    assert len(facts["deep_steps_per_block"]) == len(facts["deep_residual_per_block"]) == 4 * 3
    assert np.isfinite(facts["log_likelihood_nats"])
    assert made.with_suffix(".png").exists()
    succeeds(uninterrupted, data, "--mode=evaluate")
    found = json.loads((uninterrupted / "evaluate.json").read_text())
    assert set(found["adherence"]) == {"digit", "colour", "direction"}
    assert all(0 <= value <= 1 for value in found["adherence"].values())
    assert len(found["bits_per_dim_per_frame"]) == 4
    np.testing.assert_allclose(np.mean(found["bits_per_dim_per_frame"]), found["bits_per_dim"], rtol=1e-6)
    assert found["real_clips"]["colour"] == 1.0
    denoised = found["psnr_of_denoised_test_clips"]
    assert set(denoised) == {"denoiser", "score", "none"} and min(denoised.values()) > 10
    assert 0 <= found["two_sample_balanced_accuracy"] <= 1


@pytest.mark.slow  # its sibling in evaluation/test_horizon.py is quick
def test_the_horizon_of_the_trained_model(uninterrupted: Path, data: Path) -> None:
    said = succeeds(uninterrupted, data, "--mode=evaluate", "--config.evaluate.task=horizon",
                    "--config.evaluate.prompts=5", "--config.evaluate.latent_frames=16")
    found = json.loads((uninterrupted / "horizon.json").read_text())
    assert len(found["stretches"]) == 4 and len(found["change"]["changes"]) == 1
    assert all(0 <= row[name] <= 1 for row in found["stretches"] for name in ("digit", "colour", "direction"))
    assert all(np.isfinite(row["bits_per_dim"]) for row in (*found["stretches"], *found["real_stretches"]))
    assert found["real_stretches"][0]["colour"] == 1.0 and "samples, 3" in said
    assert read_image(uninterrupted / "horizon.png").shape[1] > 1000


@pytest.mark.slow  # quick: tests/data/test_pipeline.py (clips that change), tests/evaluation/test_horizon.py
def test_a_model_is_trained_and_measured_far_beyond_its_length(data: Path, tmp_path: Path) -> None:
    succeeds(tmp_path, data, "--config.train.steps=3")
    assert np.isfinite(losses(tmp_path)[3]["bits_per_dim"])
    succeeds(tmp_path, data, "--mode=evaluate", "--config.evaluate.task=horizon",
             "--config.evaluate.latent_frames=12")
    found = json.loads((tmp_path / "horizon.json").read_text())
    assert len(found["stretches"]) == len(found["real_stretches"]) == 3
    for row in found["real_stretches"]:  # real clips hold on
        assert row["colour"] == row["direction"] == 1 and row["digit"] >= 0.75
