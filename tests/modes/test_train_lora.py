"""--config.train.target=lora as its users run it: beside a model, resumed, sampled, streamed, added to it, exported,
refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import starflow_jax as sf
from docs.new_class import draw
from starflow_jax.checkpoints.parameters import stored_params
from starflow_jax.config import Config, Lora, Train, UserError, changed
from starflow_jax.data.batch import Batch
from starflow_jax.io.video import read_video
from starflow_jax.model.own_settings import settings_of
from starflow_jax.model.store import LoadedModel, load_model
from starflow_jax.modes.calibrate import calibrate
from starflow_jax.modes.convert import convert
from starflow_jax.modes.train import train
from starflow_jax.sampling.likelihood import bits_per_frame
from starflow_jax.training.metrics import read_metrics
from tests.modes.small_backbone import config_with_data, same_states, stop_and_resume, write_model
from tests.small_model import CAPTIONS
from tests.small_run import run_here

PROMPT = CAPTIONS[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_with_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(config, tmp_path_factory.mktemp("model"), seed=1)


def beside(config: Config, model: Path) -> Config:
    settings = Train(target="lora", init_from=str(model), steps=4, batch_size=4, image_batch_size=4,
                     learning_rate=3e-2, warmup_steps=1, log_every=1, checkpoint_every=2, evaluate_every=4, ema=0.5,
                     validation_clips=4, sheet_clips=0)
    return dataclasses.replace(config, train=settings, lora=Lora(rank=2, alpha=4.0))


@pytest.fixture(scope="module")
def workdir(config: Config, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("lora")
    train(beside(config, model), workdir)
    return workdir


def with_sample(config: Config, workdir: Path, **sample: Any) -> LoadedModel:
    return load_model(changed(config, "sample", sample), workdir)


def bits(loaded: LoadedModel) -> np.ndarray:
    """Per dimension, of fixed clips."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 9, 12, 12, 3), np.uint8)
    text_ids = loaded.system.text_ids([loaded.system.prompt(caption) for caption in CAPTIONS[:2]])
    batch = Batch(frames_BTHWC=frames, text_ids_BS=text_ids, valid_B=np.ones(2, bool))
    return np.asarray(bits_per_frame(loaded.system, loaded.params, iter([batch])))


def test_checkpoints_hold_the_factors_alone(config: Config, workdir: Path) -> None:
    folder = workdir / "checkpoints" / "4"
    params, width = stored_params(folder), config.model.deep_width
    assert {name.rsplit("/", 1)[0] for name in params} == {
        f"flow/deep/transformer/layers/layer/{name}" for name in ("qkv", "proj", "mlp_in", "mlp_out")}
    # A and B of qkv, proj, and the MLP's two, in one layer of rank 2.
    factors = 4 * 2 * width * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    assert sum(array.nbytes for array in params.values()) == factors
    state = ocp.StandardCheckpointer().restore((folder / "state").absolute())
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    assert 4 * factors <= held < 4 * factors + 64  # parameters, average, AdamW's two moments; counters and a key
    rows = read_metrics(workdir)
    assert "denoiser_loss" not in rows[0] and rows[-1]["validation_bits_per_dim"] > 0


def test_merged_and_apart_are_the_same_model_and_not_its_backbone(config: Config, model: Path, workdir: Path) -> None:
    loaded, plain = with_sample(beside(config, model), workdir), with_sample(config, model)
    assert loaded.source == f"{model}, step 0, with LoRA {workdir}, step 4" and plain.weights != loaded.weights
    merged = bits(loaded)
    assert np.abs(merged - bits(plain)).max() > 1e-3
    np.testing.assert_allclose(bits(with_sample(beside(config, model), workdir, merge_lora=False)), merged, rtol=1e-5)
    same = with_sample(config, model, lora=f"{workdir / 'checkpoints' / '4'}:1.0").params
    jax.tree.map(np.testing.assert_array_equal, same, loaded.params)


def test_several_are_added_each_with_its_scale(config: Config, model: Path, workdir: Path) -> None:
    once, scaled = (with_sample(config, model, lora=lora).params for lora in (
        f"{workdir}", f"{workdir}:2.5,{workdir}:-1.5"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scaled, once)
    apart = with_sample(config, model, lora=f"{workdir}:0.5,{workdir}", merge_lora=False).params
    kernel = apart["flow"]["deep"]["transformer"]["layers"]["layer"]["proj"]["kernel"]
    assert kernel.lora_a.shape == (1, config.model.deep_width, 4)
    np.testing.assert_allclose(2 * kernel.lora_b[:, :2], kernel.lora_b[:, 2:])


def test_factors_of_other_ranks_and_matrices_add_up(config: Config, model: Path, workdir: Path, tmp_path: Path) -> None:
    """Beside one in int8 that it was trained on, which keeps them apart by itself."""
    base = beside(config, model)
    other = dataclasses.replace(base, lora=Lora(rank=3, targets="qkv,mlp_in", blocks="deep,shallow", weights="int8"))
    train(other, tmp_path)
    with pytest.raises(UserError, match="sample.lora=.*a calibration is of the workdir"):
        calibrate(changed(config, "sample", {"lora": str(workdir)}), model)
    both, plain = f"{workdir},{tmp_path}:0.5", bits(with_sample(config, model))
    merged = bits(with_sample(config, model, lora=both))
    np.testing.assert_allclose(bits(with_sample(config, model, lora=both, merge_lora=False)), merged, rtol=1e-5)
    change = merged - plain
    alone = [bits(with_sample(config, model, lora=one)) - plain for one in both.split(",")]
    assert all(np.abs(change - one).max() > 0.1 * np.abs(change).max() for one in alone)
    own = load_model(settings_of(tmp_path), tmp_path)
    kernel = own.params["flow"]["deep"]["transformer"]["layers"]["layer"]["qkv"]["kernel"]
    assert kernel.lora_a.shape[-1] == 3 and own.system.config.sample.weights == "int8"
    assert np.abs(bits(own) - plain).max() > 1e-3


@pytest.mark.slow  # quick: tests/nn/test_lora.py and tests/model/test_lora.py
def test_int8_rounds_what_was_merged_or_what_is_apart(config: Config, model: Path, workdir: Path) -> None:
    merged = bits(with_sample(config, model, lora=f"{workdir}"))
    for merge in (True, False):
        in_int8 = bits(with_sample(config, model, lora=f"{workdir}", weights="int8", merge_lora=merge))
        assert 0 < np.abs(in_int8 - merged).max() < 0.02


def test_samples_differ_from_the_backbones_and_are_those_of_the_merged_model(
    model: Path, workdir: Path, tmp_path: Path
) -> None:
    """The user's commands, on a workdir alone and on the model with sample.lora."""
    def video(name: str, *arguments: str) -> np.ndarray:
        code, out, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", *arguments,
                                   f"--config.sample.output={tmp_path / name}"])
        assert code == 0, err
        assert ("with LoRA" in out) == (name != "backbone")
        path, = (tmp_path / name).glob("*.mp4")
        return read_video(path)[0].astype(int)

    alone = video("alone", f"--workdir={workdir}")
    np.testing.assert_array_equal(alone, video("added", f"--workdir={model}", f"--config.sample.lora={workdir}"))
    assert np.abs(alone - video("backbone", f"--workdir={model}")).max() > 0


@pytest.mark.slow
def test_from_ones_own_clips_to_samples_with_factors(tmp_path: Path) -> None:
    """The user's four commands on drawn clips, in a world that the package's model knows but for what moves in it."""
    def run(mode: str, *arguments: str) -> None:
        code, _, err = run_here(["--config=configs/t2v.py", f"--mode={mode}", *arguments])
        assert code == 0, err

    draw(tmp_path / "clips", digits=8)
    run("prepare", f"--config.prepare.input={tmp_path / 'clips'}", f"--config.prepare.output={tmp_path / 'data'}",
        "--config.prepare.resolution=18", "--config.prepare.aspect_ratios=1:1", "--config.prepare.fps=8",
        "--config.prepare.min_brightness=1", "--config.prepare.min_motion=0.1", "--config.prepare.cut_threshold=0",
        "--config.prepare.validation_share=0.1")
    lora, plain = tmp_path / "lora", tmp_path / "plain"
    run("train", f"--workdir={lora}", "--config.train.target=lora", "--config.data.source=prepared",
        f"--config.data.directory={tmp_path / 'data'}", "--config.data.image_probability=0", "--config.train.steps=20",
        "--config.train.learning_rate=5e-3", "--config.train.warmup_steps=2", "--config.train.evaluate_every=5",
        "--config.train.validation_clips=16", "--config.train.batch_size=8", "--config.train.ema=0.5",
        "--config.train.sheet_clips=0")
    first, *_, last = (row["validation_bits_per_dim"] for row in read_metrics(lora) if "validation_bits_per_dim" in row)
    assert last < first - 0.003

    def video(workdir: Path, *arguments: str) -> np.ndarray:
        run("sample", f"--workdir={workdir}", "--config.sample.prompt=a red star moves left", *arguments)
        path, = workdir.glob("samples/*.mp4")
        frames, _ = read_video(path)
        path.unlink()
        return frames.astype(int)

    added = video(plain, f"--config.sample.lora={lora}")
    np.testing.assert_array_equal(added, video(lora))
    apart = video(plain, f"--config.sample.lora={lora}", "--config.sample.merge_lora=false")
    assert np.abs(added - apart).max() <= 2 < np.abs(added - video(plain)).max()


@pytest.mark.slow  # its siblings above are quick
def test_streams_the_api_and_other_modes_take_them_too(config: Config, model: Path, workdir: Path) -> None:
    loaded = sf.load(workdir, merge_lora=False)
    frames = loaded.generate(PROMPT, seed=3).frames
    added = sf.load(model, lora=workdir)
    assert np.abs(frames.astype(int) - added.generate(PROMPT, seed=3).frames).max() <= 1
    streamed = np.concatenate(list(added.stream(PROMPT, seed=3, frames=len(frames))))
    assert np.abs(frames.astype(int) - streamed).max() <= 1
    with pytest.raises(UserError, match=r"sample.lora: is chosen when a model is loaded, as in sf.load\(lora=...\)"):
        added.generate(PROMPT, lora="x")
    code, _, err = run_here([f"--workdir={workdir}", "--mode=evaluate"])
    assert code == 0, err
    assert json.loads((workdir / "evaluate.json").read_text())["model"] == added.source


@pytest.mark.slow  # the loop is that of every target; quick: test_train.py
def test_a_run_that_was_stopped_ends_with_the_same_factors(
    config: Config, model: Path, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture
) -> None:
    stop_and_resume(beside(config, model), tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert "LoRA factors of rank 2 beside" in said and "resuming from step 2" in said
    same_states(workdir, tmp_path)


def test_another_model_is_refused_in_one_line(config: Config, model: Path, workdir: Path, tmp_path: Path) -> None:
    other = write_model(config, tmp_path / "other", seed=2)
    code, _, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", f"--workdir={workdir}",
                             f"--config.train.init_from={other}"])
    line, = err.splitlines()
    assert code == 2 and f"LoRA {workdir}, step 4: was trained beside other weights" in line and str(other) in line
    with pytest.raises(UserError, match="was trained beside other weights"):
        with_sample(config, other, lora=f"{workdir}")
    with pytest.raises(UserError, match="its LoRA factors were trained beside other weights"):
        train(beside(config, other), workdir)
    with pytest.raises(UserError, match="holds no LoRA factors"):
        with_sample(config, model, lora=f"{model}")
    with pytest.raises(UserError, match="is neither a workdir of train.target=lora nor PEFT's"):
        with_sample(config, model, lora=f"{tmp_path / 'nothing'}")


def test_an_export_under_pefts_names_is_read_back(config: Config, model: Path, workdir: Path, tmp_path: Path) -> None:
    target = tmp_path / "adapter" / "adapter_model.safetensors"
    code, out, err = run_here([f"--workdir={workdir}", "--mode=convert", f"--config.convert.target={target}"])
    assert code == 0 and f"--config.sample.lora={target}" in out, err
    found, expected = (with_sample(config, model, lora=f"{of}") for of in (target.parent, workdir))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found.params, expected.params)
    assert found.source.endswith(f"LoRA {target.parent}")
    other = write_model(config, tmp_path / "other", seed=2)
    with pytest.raises(UserError, match=f"LoRA {target}: was trained beside other weights"):
        with_sample(config, other, lora=f"{target}")
    with pytest.raises(UserError, match="PEFT reads adapter_model.safetensors alone"):
        convert(changed(config, "convert", {"target": f"{tmp_path}/x.safetensors"}), workdir)
