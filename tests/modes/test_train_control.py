"""--config.train.target=control as its users run it: beside a model, resumed, sampled and streamed along a camera,
measured, refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import starflow_jax as sf
from starflow_jax.checkpoints.parameters import stored_params
from starflow_jax.config import Config, Lora, Serve, Train, UserError, changed
from starflow_jax.data.digits.camera_reader import read_cameras
from starflow_jax.data.digits.captions import DIRECTION_NAMES
from starflow_jax.io.arrays import import_arrays
from starflow_jax.io.cameras import named_cameras
from starflow_jax.io.video import read_video, write_mp4
from starflow_jax.model.store import load_model
from starflow_jax.modes.serve import load_served
from starflow_jax.modes.train import train
from starflow_jax.serving.engine import Engine
from starflow_jax.serving.live import Ended, Frames
from starflow_jax.serving.metrics import Metrics
from starflow_jax.training.metrics import read_metrics
from tests.modes.small_backbone import config_with_data, same_states, stop_and_resume, write_model
from tests.prepared_input import scene
from tests.small_model import CAPTIONS
from tests.small_run import ROOT, run_here

PROMPT, MOVES = CAPTIONS[0], "pan_right:4; zoom_in:5"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_with_data(tmp_path_factory.mktemp("data"))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, camera=True, image_probability=0.0))


@pytest.fixture(scope="module")
def model(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(config, tmp_path_factory.mktemp("model"), seed=1)


def beside(config: Config, model: Path) -> Config:
    settings = Train(target="control", init_from=str(model), steps=4, batch_size=4, learning_rate=3e-2, warmup_steps=1,
                     log_every=1, checkpoint_every=2, evaluate_every=4, ema=0.5, validation_clips=4, sheet_clips=0)
    return dataclasses.replace(config, train=settings)


@pytest.fixture(scope="module")
def workdir(config: Config, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("control")
    train(beside(config, model), workdir)
    return workdir


def video(folder: Path, *arguments: str) -> np.ndarray:
    """What --mode=sample writes, as int."""
    code, _, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", *arguments,
                             f"--config.sample.output={folder}"])
    assert code == 0, err
    path, = folder.glob("*.mp4")
    return read_video(path)[0].astype(int)


def test_checkpoints_hold_the_module_alone_and_resume_bit_for_bit(
    config: Config, model: Path, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {name.split("/")[0] for name in stored_params(workdir / "checkpoints" / "4")} == {"control"}
    rows = read_metrics(workdir)
    assert "denoiser_loss" not in rows[0] and rows[-1]["validation_bits_per_dim"] > 0
    stop_and_resume(beside(config, model), tmp_path, monkeypatch)
    same_states(workdir, tmp_path)


def test_a_camera_changes_the_video_of_the_workdir_and_of_the_model_with_sample_control(
    model: Path, workdir: Path, tmp_path: Path
) -> None:
    own = video(tmp_path / "own", f"--workdir={workdir}", f"--config.sample.camera={MOVES}")
    named = video(tmp_path / "named", f"--workdir={model}", f"--config.sample.camera={MOVES}",
                  f"--config.sample.control={workdir}")
    np.testing.assert_array_equal(own, named)
    backbone = video(tmp_path / "backbone", f"--workdir={model}")
    still = video(tmp_path / "still", f"--workdir={workdir}")
    np.testing.assert_array_equal(still, backbone)  # without a camera the module has no part in it
    assert np.abs(own - backbone).mean() > 1
    facts = json.loads(next((tmp_path / "own").glob("*.json")).read_text())
    assert facts["settings"]["camera"] == MOVES and "control module" in facts["model"]


def test_a_file_gives_the_video_of_its_poses_and_streams_and_the_api_agree(workdir: Path, tmp_path: Path) -> None:
    camera = tmp_path / "still.txt"
    camera.write_text("".join(f"{frame} 1 1 0.5 0.5 0 0 1 0 0 {0.3 * frame} 0 1 0 0 0 0 1 0\n" for frame in range(17)))
    loaded = sf.load(workdir)
    whole = loaded.generate(PROMPT, camera=str(camera), frames=17)
    parts = list(loaded.stream(PROMPT, camera=str(camera), frames=17))
    assert np.abs(np.concatenate(parts).astype(int) - whole.frames).max() <= 1
    other = loaded.generate(PROMPT, camera="still", frames=17)
    assert np.abs(other.frames.astype(int) - whole.frames).max() > 1
    assert np.isfinite(whole.log_likelihood) and whole.log_likelihood != other.log_likelihood


def test_a_file_of_the_module_alone_follows_as_its_workdir_does(
    config: Config, model: Path, workdir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "module.safetensors"
    code, out, err = run_here(["--mode=convert", f"--workdir={workdir}", f"--config.convert.target={file}"])
    assert code == 0 and f"--config.sample.control={file}" in out, err
    module = beside(config, model).control.width * config.model.deep_layers
    assert set(import_arrays(file)) == {"proj_in", "proj_out", "layers"} and file.stat().st_size > 4 * module
    made = [load_model(changed(config, "sample", {"control": str(named)}), model).params["control"]
            for named in (file, workdir)]
    jax.tree.map(np.testing.assert_array_equal, *made)
    other = write_model(config, tmp_path / "other", seed=2)
    code, _, err = run_here(["--mode=sample", f"--workdir={other}", f"--config.sample.control={file}",
                             "--config.sample.camera=orbit", f"--config.sample.prompt={PROMPT}"])
    assert code == 2 and "was trained beside other weights" in err.splitlines()[-1] and "Traceback" not in err
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="module.safetensors: can't be read as safetensors"):
        load_model(changed(config, "sample", {"control": str(file)}), model)


def test_the_likelihood_of_a_given_video_is_that_along_its_camera(workdir: Path, tmp_path: Path) -> None:
    """By the API and by evaluate.task=video, which sums up tokens."""
    loaded = sf.load(workdir)
    made = loaded.generate(PROMPT, camera=MOVES, seed=1)
    made.save(tmp_path / "made.mp4")
    given = read_video(tmp_path / "made.mp4")[0]
    right, other, none = (loaded.log_likelihood(given, PROMPT, camera=camera, draws=2)
                          for camera in (MOVES, "pan_left", ""))
    assert len({right, other, none}) == 3
    code, out, err = run_here([
        "--mode=evaluate", f"--workdir={workdir}", "--config.evaluate.task=video", "--config.evaluate.draws=2",
        f"--config.evaluate.video={tmp_path / 'made.mp4'}", f"--config.evaluate.caption={PROMPT}",
        f"--config.sample.camera={MOVES}"])
    assert code == 0, err
    facts, = (json.loads(path.read_text()) for path in (workdir / "inspected").glob("*.json"))
    assert facts["log_likelihood_nats"] == pytest.approx(right, rel=1e-5)


@pytest.mark.slow  # quick: tests/flow/test_steering_computed.py
def test_a_base_in_bfloat16_or_int8_is_steered_alike(model: Path, workdir: Path, tmp_path: Path) -> None:
    """Its videos are those of the float32 model along the same camera, but for a tenth of what the camera changes."""
    def made(name: str, *arguments: str) -> np.ndarray:
        return video(tmp_path / name, f"--workdir={model}", f"--config.sample.control={workdir}", *arguments)

    camera = f"--config.sample.camera={MOVES}"
    exact = made("float32", camera)
    for name, setting in (("bfloat16", "--config.model.dtype=bfloat16"), ("int8", "--config.sample.weights=int8")):
        rough, still = made(name, setting, camera), made(f"{name}_still", setting)
        assert 0 < np.abs(rough - exact).mean() < 0.1 * np.abs(rough - still).mean(), name


def test_what_does_not_fit_is_one_line(config: Config, model: Path, workdir: Path, tmp_path: Path) -> None:
    def line(*arguments: str) -> str:
        code, _, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", *arguments])
        assert code == 2
        return err.splitlines()[-1]

    assert "this model follows no camera" in line(f"--workdir={model}", "--config.sample.camera=orbit")
    assert "holds no control module" in line(f"--workdir={model}", f"--config.sample.control={model}")
    assert "missing.txt: the camera can't be read" in line(f"--workdir={workdir}", "--config.sample.camera=missing.txt")
    other = write_model(config, tmp_path / "other", seed=2)
    assert "was trained beside other weights" in line(f"--workdir={other}", f"--config.sample.control={workdir}")
    with pytest.raises(UserError, match="its control module was trained beside other weights"):
        train(beside(config, other), workdir)
    with pytest.raises(UserError, match="data.camera"):
        dataclasses.replace(beside(config, model), data=dataclasses.replace(config.data, camera=False))


@pytest.mark.slow
def test_from_ones_own_videos_with_moves_beside_them_to_a_camera_that_is_followed(tmp_path: Path) -> None:
    """The user's commands, beside the package's model. How well a trained one follows: evaluate.task=camera."""
    inputs, control = tmp_path / "inputs", tmp_path / "control"
    inputs.mkdir()
    for index, moves in enumerate(2 * ("pan_right:20; zoom_in", "orbit", "tilt_up*0.5", "roll_left")):
        write_mp4(inputs / f"{index}.mp4", scene(40, 48, 48, seed=index), 8)
        (inputs / f"{index}.txt").write_text("a block moves")
        (inputs / f"{index}.camera.txt").write_text(moves)

    def run(mode: str, *arguments: str) -> None:
        code, _, err = run_here(["--config=configs/t2v.py", f"--mode={mode}", *arguments])
        assert code == 0, err

    for latents in ("false", "true"):
        data = tmp_path / f"data_{latents}"
        run("prepare", f"--workdir={tmp_path / 'plain'}", f"--config.prepare.input={inputs}",
            "--config.prepare.camera=true", f"--config.prepare.output={data}", "--config.prepare.resolution=18",
            "--config.prepare.aspect_ratios=1:1", "--config.prepare.fps=8", "--config.prepare.min_brightness=0",
            "--config.prepare.min_motion=0", "--config.prepare.cut_threshold=0",
            "--config.prepare.validation_share=0.3", f"--config.prepare.latents={latents}")
        run("train", f"--workdir={control}_{latents}", "--config.train.target=control", "--config.data.source=prepared",
            f"--config.data.directory={data}", "--config.data.image_probability=0", "--config.train.steps=3",
            "--config.train.learning_rate=1e-2", "--config.train.warmup_steps=0", "--config.train.batch_size=4",
            "--config.train.ema=0", "--config.train.evaluate_every=3", "--config.train.validation_clips=4",
            "--config.train.sheet_clips=0")
    followed = video(tmp_path / "followed", f"--workdir={control}_true", "--config.sample.camera=pan_right")
    assert np.abs(followed - video(tmp_path / "backbone", f"--workdir={control}_true")).mean() > 0.5


@pytest.mark.slow
def test_a_picture_is_what_the_first_camera_sees_and_the_others_move_from_there() -> None:
    """sample.image and sample.camera on the package's model, read back from the frames."""
    picture, model = ROOT / "docs/pages/pictures/green_five.png", sf.load()
    made = np.stack([model.generate("a green five moves right", image=picture, camera="tilt_down", seed=seed).frames
                     for seed in range(4)])
    given = np.asarray(Image.open(picture).convert("RGB").resize(made.shape[3:1:-1], Image.Resampling.BICUBIC))
    mean_square = ((made[:, 0].astype(float) - given) ** 2).mean()
    assert 10 * np.log10(255**2 / mean_square) > 25
    path = read_cameras(made, np.full(len(made), DIRECTION_NAMES.index("right"))).path
    asked = named_cameras("tilt_down", made.shape[1], 24, 24).world_to_camera_T34
    np.testing.assert_allclose(path.y_BT[:, -1].mean(), -asked[-1, 1, 3], rtol=0.25)
    assert abs(path.x_BT[:, -1].mean()) < 0.1


@pytest.mark.slow  # quick: tests/data/test_digits_camera_reader.py, and the samples above
def test_the_evaluation_reads_paths_back(workdir: Path, tmp_path: Path) -> None:
    code, out, err = run_here(["--mode=evaluate", f"--workdir={workdir}", "--config.evaluate.task=camera"])
    assert code == 0, err
    found = json.loads((workdir / "camera.json").read_text())
    names = ("correlation_x", "correlation_y", "scale_error", "roll_error_degrees", "right_camera_preferred", "digit",
             "colour")
    assert all(np.isfinite(found[name]) for name in names)
    assert found["backbone_alone"]["scale_error"] > 0 < found["intervals"]["roll_error_degrees"]
    assert set(found["backbone_alone"]["intervals"]) == {"digit", "colour", "scale_error", "roll_error_degrees"}
    assert 0 < found["intervals"]["right_camera_preferred"] < 0.5
    real, turning = found["real_clips"], found["turning_in_the_middle"]
    assert set(turning) == set(real) and turning["correlation_x"] != found["correlation_x"]
    assert set(real["intervals"]) == set(real) - {"intervals"} and 0 < real["intervals"]["correlation_x"] < 0.1
    assert real["correlation_x"] > 0.9 and (workdir / "camera.png").exists() and "real clips" in out


@pytest.mark.slow  # quick: tests/serving with a module of its own
def test_the_server_serves_it_with_lora_factors(config: Config, model: Path, workdir: Path, tmp_path: Path) -> None:
    """Sessions of --mode=serve show what the API streams from the same model, along the camera."""
    factors = Train(target="lora", init_from=str(model), steps=2, batch_size=4, image_batch_size=4, learning_rate=3e-2,
                    warmup_steps=1, validation_clips=4, sheet_clips=0)
    train(dataclasses.replace(config, train=factors, lora=Lora(rank=2)), tmp_path / "lora")
    added = {"control": str(workdir), "lora": str(tmp_path / "lora")}
    served = load_served(changed(config, "sample", added), model)
    assert "LoRA" in served.source and "control module" in served.source
    engine = Engine(served, Serve(sessions=1), Metrics())
    engine.start(warm=False)
    try:
        live = engine.begin(PROMPT, paced=False, frames=17, seed=3, camera=MOVES)
        held: list[Any] = []
        while not (held and isinstance(held[-1], Ended)):
            events = live.wait(120)
            assert events
            held += events
    finally:
        engine.stop()
    shown = np.concatenate([event.frames_THWC for event in held if isinstance(event, Frames)])
    loaded = sf.load(model, **added)
    streamed = np.concatenate(list(loaded.stream(PROMPT, frames=17, seed=3, camera=MOVES)))
    assert np.abs(shown.astype(int) - streamed).max() <= 1
    for other in (dict(control=added["control"]), dict(lora=added["lora"])):
        camera = MOVES if "control" in other else ""
        alone = np.concatenate(list(sf.load(model, **other).stream(PROMPT, frames=17, seed=3, camera=camera)))
        assert np.abs(shown.astype(int) - alone).max() > 1
