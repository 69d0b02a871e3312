"""--config.train.target=student as its users run it: beside a model, resumed, sampled, streamed, measured, drafting for
its teacher, refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import starflow_jax as sf
from starflow_jax import sharding
from starflow_jax.checkpoints.parameters import stored_params
from starflow_jax.checkpoints.released import unstack_to_released
from starflow_jax.config import Config, Mesh, Student, Train, UserError, changed
from starflow_jax.io.arrays import import_arrays
from starflow_jax.io.pictures import read_image
from starflow_jax.io.video import read_video
from starflow_jax.model.beside import save_alone
from starflow_jax.model.own_settings import settings_of
from starflow_jax.model.store import LoadedModel, drafting_model, load_model, weights_of
from starflow_jax.model.student import save_block
from starflow_jax.modes.calibrate import calibrate
from starflow_jax.modes.convert import convert
from starflow_jax.modes.train import train
from starflow_jax.sampling.conditions import make_conditions
from starflow_jax.sampling.generate import deep_frames
from starflow_jax.sampling.mesh import on_mesh
from starflow_jax.training.metrics import read_metrics
from starflow_jax.training.run import open_run
from tests.helpers import random_params
from tests.modes.small_backbone import config_with_data, same_states, stop_and_resume, write_model
from tests.modes.test_train_lora import bits
from tests.small_model import CAPTIONS
from tests.small_run import run_here

PROMPT = CAPTIONS[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The teacher's: three layers of two heads."""
    config = config_with_data(tmp_path_factory.mktemp("data"))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, deep_layers=3))


@pytest.fixture(scope="module")
def model(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(config, tmp_path_factory.mktemp("model"), seed=1)


def beside(config: Config, model: Path, layers: int = 2, width: int = 20, chosen: str = "", **student: Any) -> Config:
    settings = Train(target="student", init_from=str(model), steps=4, batch_size=4, image_batch_size=4,
                     learning_rate=3e-2, warmup_steps=1, log_every=1, checkpoint_every=2, evaluate_every=4, ema=0.5,
                     validation_clips=4, sheet_clips=0)
    sizes = dataclasses.replace(config.model, deep_layers=layers, deep_width=width)
    return dataclasses.replace(config, model=sizes, train=settings, student=Student(clips=8, layers=chosen, **student))


@pytest.fixture(scope="module")
def workdir(config: Config, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a student with two of its teacher's layers and one of its heads."""
    workdir = tmp_path_factory.mktemp("student")
    train(beside(config, model), workdir)
    return workdir


def at_the_start(config: Config, workdir: Path) -> LoadedModel:
    """The model of a run's step 0."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        run = open_run(mesh, config, workdir)
        run.checkpoints.save(0, run.state, {}, None)
        run.checkpoints.close()
    return load_model(settings_of(workdir), workdir)


def frames_of(loaded: LoadedModel, tolerance: float) -> tuple[np.ndarray, list[Any]]:
    """(u of three videos, the reports of its steps)."""
    settings = changed(loaded.system.config, "sample", {"solver": {"block_size": 0, "tolerance": tolerance}}).sample
    given = make_conditions(loaded.system, loaded.params, CAPTIONS, [5, 6, 7], settings)
    made, reports = zip(*deep_frames(loaded.system, loaded.params, given, settings))
    return np.concatenate(made, axis=1), list(reports)


def test_checkpoints_hold_the_smaller_block_alone(config: Config, model: Path, workdir: Path) -> None:
    params, teacher = stored_params(workdir / "checkpoints" / "4"), stored_params(model / "checkpoints" / "0")
    assert set(params) == {name for name in teacher if name.startswith("flow/deep/")}
    assert params["flow/deep/transformer/layers/layer/mlp_in/kernel"].shape == (2, 20, 80)
    rows = read_metrics(workdir)
    assert {"mean_error", "scale_error", "bits_per_dim"} <= set(rows[0]) and "denoiser_loss" not in rows[0]
    assert rows[-1]["validation_bits_per_dim"] > 0
    loaded = load_model(settings_of(workdir), workdir)
    assert loaded.source == f"{model}, step 0, with the smaller deep block of {workdir}, step 4"
    np.testing.assert_array_equal(loaded.params["denoiser"]["proj_in"]["kernel"], teacher["denoiser/proj_in/kernel"])
    np.testing.assert_array_equal(loaded.params["flow"]["deep"]["proj_in"]["kernel"],
                                  params["flow/deep/proj_in/kernel"])


def test_with_all_of_its_teacher_it_begins_as_that(config: Config, model: Path, tmp_path: Path) -> None:
    start = at_the_start(beside(config, model, layers=3, width=40), tmp_path / "whole")
    plain = load_model(config, model)
    jax.tree.map(np.testing.assert_array_equal, start.params, plain.params)


@pytest.mark.slow  # above: its parameters and sizes are the teacher's
def test_its_likelihood_and_samples_are_then_the_teachers(config: Config, model: Path, tmp_path: Path) -> None:
    start = at_the_start(beside(config, model, layers=3, width=40), tmp_path / "whole")
    plain = load_model(config, model)
    np.testing.assert_array_equal(bits(start), bits(plain))
    np.testing.assert_array_equal(frames_of(start, 1e-6)[0], frames_of(plain, 1e-6)[0])
    part = at_the_start(beside(config, model, width=40, chosen="0,1"), tmp_path / "part").params["flow"]["deep"]
    np.testing.assert_array_equal(*(of["transformer"]["layers"]["layer"]["qkv"]["kernel"][:2] for of in (
        part, plain.params["flow"]["deep"])))
    other = at_the_start(beside(config, model, start="random"), tmp_path / "random")
    assert not np.asarray(other.params["flow"]["deep"]["proj_out"]["kernel"]).any()


@pytest.mark.slow  # quick: tests/flow/test_decode.py
def test_its_draft_changes_where_the_teacher_starts_and_not_where_it_ends(
    config: Config, model: Path, workdir: Path
) -> None:
    drafted = load_model(changed(config, "sample", {"draft": str(workdir)}), model)
    plain = load_model(config, model)
    assert drafted.source == f"{model}, step 0, with drafts of {workdir}, step 4" and drafted.weights != plain.weights
    u, reports = frames_of(drafted, 0.0)
    np.testing.assert_array_equal(u, frames_of(plain, 0.0)[0])
    assert all(report.draft.steps.shape == report.steps.shape for report in reports)
    (near, reports), (expected, _) = frames_of(drafted, 1e-8), frames_of(plain, 1e-8)
    np.testing.assert_allclose(near, expected, atol=1e-3)


def test_what_does_not_fit_is_one_line(config: Config, model: Path, workdir: Path, tmp_path: Path) -> None:
    def line(*arguments: str) -> str:
        code, _, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", *arguments])
        assert code == 2
        line, = err.splitlines()
        return line

    other = write_model(config, tmp_path / "other", seed=2)
    assert "its smaller deep block was trained beside other weights" in line(
        f"--workdir={workdir}", f"--config.train.init_from={other}")
    assert f"drafts of {workdir}, step 4: was trained beside other weights" in line(
        f"--workdir={other}", f"--config.sample.draft={workdir}")
    assert "is no workdir of train.target=student" in line(f"--workdir={model}", f"--config.sample.draft={other}")
    assert "sample.solver.kind=sequential has none" in line(
        f"--workdir={model}", f"--config.sample.draft={workdir}", "--config.sample.solver.kind=sequential")
    with pytest.raises(UserError, match="sample.draft=.*a calibration is of the workdir"):
        calibrate(changed(config, "sample", {"draft": str(workdir)}), model)
    with pytest.raises(UserError, match="its smaller deep block was trained beside other weights"):
        train(beside(config, other), workdir)
    with pytest.raises(UserError, match="model.deep_layers=4: a student begins with parts of its teacher, which has 3"):
        train(beside(config, model, layers=4), tmp_path / "larger")
    with pytest.raises(UserError, match="holds no smaller deep block; train one there"):
        load_model(beside(config, model), tmp_path / "none")


@pytest.mark.slow  # its parts are above
def test_the_users_commands_from_training_to_videos(
    config: Config, model: Path, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and resumed; sampled and streamed alone, and drafting for its teacher; calibrated and measured."""
    stop_and_resume(beside(config, model), tmp_path / "resumed", monkeypatch)
    same_states(workdir, tmp_path / "resumed")

    def video(name: str, *arguments: str) -> np.ndarray:
        code, _, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", *arguments,
                                 f"--config.sample.output={tmp_path / name}"])
        assert code == 0, err
        path, = (tmp_path / name).glob("*.mp4")
        return read_video(path)[0].astype(int)

    exact = "--config.sample.solver.tolerance=0"
    alone = video("alone", f"--workdir={workdir}", exact)
    teacher = video("teacher", f"--workdir={model}", exact)
    assert np.abs(alone - teacher).max() > 1
    draft = f"--config.sample.draft={workdir}"
    np.testing.assert_array_equal(teacher, video("drafted", f"--workdir={model}", exact, draft))
    file = tmp_path / "block.safetensors"
    code, _, err = run_here([f"--workdir={workdir}", "--mode=convert", "--config.convert.alone=true",
                             f"--config.convert.target={file}"])
    assert code == 0, err
    np.testing.assert_array_equal(teacher, video("drafted_by_file", f"--workdir={model}", exact,
                                                 f"--config.sample.draft={file}"))
    steps = [json.loads(next((tmp_path / name).glob("*.json")).read_text())["draft_steps_per_block"]
             for name in ("drafted", "drafted_by_file")]
    assert steps[0] == steps[1]
    facts = json.loads(next((tmp_path / "drafted").glob("*.json")).read_text())
    assert len(facts["draft_steps_per_block"]) == len(facts["deep_steps_per_block"])
    own, plain, drafted = sf.load(workdir), sf.load(model), sf.load(model, draft=workdir)
    for one, other, frames in ((own, own, 9), (plain, drafted, 25)):  # whole videos and streams
        whole = one.generate(PROMPT, frames=frames, solver={"tolerance": 0}).frames
        streamed = np.concatenate(list(other.stream(PROMPT, frames=frames, solver={"tolerance": 0})))
        assert np.abs(streamed.astype(int) - whole).max() <= 1
    whole_file = tmp_path / "whole.safetensors"
    code, _, err = run_here([f"--workdir={workdir}", "--mode=convert", f"--config.convert.target={whole_file}"])
    assert code == 0, err
    assert set(load_file(whole_file)) == set(unstack_to_released(
        {name.removeprefix("flow/"): value for name, value in traverse_util.flatten_dict(
            random_params(beside(config, model)), sep="/").items() if not name.startswith("text/")},
        beside(config, model).model))
    for mode in ("calibrate", "evaluate"):
        code, out, err = run_here([f"--workdir={workdir}", f"--mode={mode}"])
        assert code == 0 and "with the smaller deep block of" in out, err


@pytest.mark.slow  # quick: tests/evaluation/test_students.py
def test_students_are_measured_beside_their_teacher(
    config: Config, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "students"
    train(beside(config, model), folder / "half")
    train(beside(config, model, width=40, mean=0.0, scale=0.0), folder / "half_alone")
    code, out, err = run_here(["--config=configs/t2v.py", f"--workdir={folder}", "--mode=evaluate",
                               "--config.evaluate.task=students", "--config.evaluate.clips=4",
                               "--config.evaluate.prompts=4", "--config.sample.batch_size=4"])
    assert code == 0, err
    rows = json.loads((folder / "students.json").read_text())["models"]
    assert list(rows) == ["teacher", "half", "half_alone"] and rows["teacher"]["bits_above_teacher"] == [0, 0]
    assert rows["half"]["kind"] == "distilled" and rows["half_alone"]["kind"] == "likelihood alone"
    assert (rows["half"]["layers"], rows["half"]["width"], rows["half_alone"]["width"]) == (2, 20, 40)
    for row in (rows["half"], rows["half_alone"]):
        saved = 1 - row["as_draft"]["passes"] / rows["teacher"]["passes"]
        assert row["as_draft"]["passes_saved"] == pytest.approx(saved) and row["as_draft"]["draft_passes"] > 0
        assert 0 <= row["digit"][0] <= 1 and row["bits_above_teacher"][1] > 0 and row["seconds_per_video"] > 0
    assert read_image(folder / "students.png").size and "the teacher, drafted by" in out
    code, _, err = run_here([f"--workdir={tmp_path / 'none'}", "--mode=evaluate", "--config=configs/t2v.py",
                             "--config.evaluate.task=students"])
    assert code == 2 and "holds no workdir of train.target=student" in err


def test_a_file_of_its_block_alone_drafts_as_its_workdir_does(
    config: Config, model: Path, workdir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "block.safetensors"
    code, out, err = run_here(["--mode=convert", f"--workdir={workdir}", "--config.convert.alone=true",
                               f"--config.convert.target={file}"])
    assert code == 0 and f"--config.sample.draft={file}" in out, err
    asked = [changed(config, "sample", {"draft": str(named)}) for named in (file, workdir)]
    of_file, of_workdir = (load_model(one, model) for one in asked)
    jax.tree.map(np.testing.assert_array_equal, of_file.params["draft"], of_workdir.params["draft"])
    assert of_file.source == f"{model}, step 0, with drafts of {file}"
    assert of_file.weights == weights_of(asked[0], model)
    assert drafting_model(asked[0]) == dataclasses.replace(config.model, deep_layers=2, deep_width=20)
    other = write_model(config, tmp_path / "other", seed=2)
    with pytest.raises(UserError, match="drafts of .*block.safetensors: was trained beside other weights"):
        load_model(asked[0], other)
    with pytest.raises(UserError, match=f"convert.alone=True: {model} holds a whole model"):
        convert(changed(config, "convert", {"target": str(file), "alone": True}), model)
    deep = import_arrays(file)
    del deep["sos"]
    save_alone(beside(config, model), file, deep, "0")
    with pytest.raises(UserError, match="block.safetensors: its smaller deep block belongs to another model"):
        load_model(asked[0], model)


@pytest.mark.slow  # quick: above, of one device
def test_a_file_of_its_block_is_kept_as_the_layers_are(config: Config, model: Path, workdir: Path, tmp_path: Path
                                                       ) -> None:
    """In their dtype, quantized, and over a mesh, as a workdir's."""
    file = tmp_path / "block.safetensors"
    save_block(settings_of(workdir), workdir, file)
    halved = changed(config, "model", {"dtype": "bfloat16"})
    for one, mesh in ((halved, None), (changed(config, "sample", {"weights": "int8"}), None),
                      (config, Mesh(data=1, fsdp=2))):
        with on_mesh(sharding.make_mesh(mesh or Mesh(), jax.devices()[:2 if mesh else 1])):
            drafts = [load_model(changed(one, "sample", {"draft": str(named)}), model).params["draft"]
                      for named in (file, workdir)]
        jax.tree.map(np.testing.assert_array_equal, *drafts)
        assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), drafts[0]) == jax.tree.map(
            lambda leaf: (leaf.dtype, leaf.sharding), drafts[1])
