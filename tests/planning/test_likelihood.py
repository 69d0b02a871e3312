"""What a plan of measuring a given clip accounts for is what evaluation and the API run: the same programs, to the
letter."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import starflow_jax as sf
from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.evaluation import likelihood as evaluation
from starflow_jax.flow import decode
from starflow_jax.io.video import write_mp4
from starflow_jax.model import system
from starflow_jax.planning.likelihood import likelihood_programs
from starflow_jax.sampling import conditions, denoise, likelihood, shallow
from tests.planning.test_sampling import Recorder, by_function
from tests.sharded_sampling import CONFIG_OF_TEST, PROMPTS, write_workdir
from tests.small_run import run_here

PROGRAMS = [(system, "encode_text"), (system, "encode_frames"), (system, "decode_latents"),
            (conditions, "draw_noise"), (conditions, "with_noise"), (evaluation, "window_nll_per_token"),
            (likelihood, "window_nll"), (evaluation, "encode_z"), (evaluation, "joined"), (decode, "start_window"),
            (decode, "decode_frames"), (decode, "invert_shallow"), (shallow, "part_of"), (shallow, "parts_together"),
            (denoise, "denoiser_step"), (denoise, "score_step")]


@pytest.mark.parametrize("how", ["denoiser", pytest.param("score", marks=pytest.mark.slow)])
def test_the_plans_programs_are_those_that_measure_a_clip(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two devices, heads sharded; three draws of the training noise, two at once, one frame at once in shallow
    blocks."""
    recorded: dict[str, list[str]] = {}
    write_workdir(tmp_path / "model")
    frames = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    write_mp4(tmp_path / "clip.mp4", frames, CONFIG_OF_TEST.text.fps or 1)
    monkeypatch.setattr(shallow, "TOKENS", 1)
    for module, name in PROGRAMS:
        monkeypatch.setattr(module, name, Recorder(name, getattr(module, name), recorded))
    mesh = {"data": 1, "tensor": 2}
    code, _, error = run_here([
        "--config=configs/t2v.py", "--mode=evaluate", f"--workdir={tmp_path / 'model'}", "--config.evaluate.task=video",
        f"--config.evaluate.video={tmp_path / 'clip.mp4'}", f"--config.evaluate.caption={PROMPTS[0]}",
        "--config.evaluate.draws=3", "--config.evaluate.batch_size=2", "--config.model.unroll_layers=false",
        f"--config.sample.denoise={how}",
        *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items())])
    assert code == 0, error
    model = sf.load(tmp_path / "model", mesh=mesh)
    of_two = dataclasses.replace(model.config, evaluate=settings_of.Evaluate(batch_size=2, draws=3))
    system_of_two = dataclasses.replace(model.system, config=of_two)
    dataclasses.replace(model, system=system_of_two).log_likelihood(frames, PROMPTS[0])
    monkeypatch.undo()
    monkeypatch.setattr(shallow, "TOKENS", 1)
    config = dataclasses.replace(CONFIG_OF_TEST, evaluate=of_two.evaluate,
                                 sample=dataclasses.replace(CONFIG_OF_TEST.sample, denoise=how))
    with jax.set_mesh(sharding.make_mesh(settings_of.Mesh(**mesh), jax.devices()[:2])):
        planned = by_function([program.lowered.as_text()
                               for program in likelihood_programs(config, jax.sharding.get_mesh())])
    run = by_function([text for texts in recorded.values() for text in texts])
    assert {name: len(texts) for name, texts in planned.items()} == {name: len(texts) for name, texts in run.items()}
    assert [name for name in planned if planned[name] != run[name]] == []
    other = {"denoiser": "score_step", "score": "denoiser_step"}[how]
    assert {name for _, name in PROGRAMS} - {other} == set(planned)
