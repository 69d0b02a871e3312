"""--config.train.target=decoder as its users run it: beside a model, resumed, sampled, streamed, measured, refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import starflow_jax as sf
from starflow_jax.checkpoints.parameters import stored_params
from starflow_jax.config import Config, Decoder, Train, UserError, changed
from starflow_jax.evaluation.split import denoise_choices
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.model.beside import save_alone
from starflow_jax.model.decoder import save_decoder
from starflow_jax.model.own_settings import settings_of
from starflow_jax.model.store import load_model, weights_of
from starflow_jax.model.system import make_system
from starflow_jax.modes.evaluate import evaluate
from starflow_jax.modes.train import train
from starflow_jax.training.metrics import read_metrics
from tests.modes.small_backbone import config_with_data, same_states, stop_and_resume, write_model
from tests.small_model import CAPTIONS
from tests.small_run import run_here

PROMPT = CAPTIONS[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return config_with_data(tmp_path_factory.mktemp("data"))


def beside(config: Config, model: Path) -> Config:
    settings = Train(target="decoder", init_from=str(model), steps=4, batch_size=4, image_batch_size=4,
                     learning_rate=1e-2, warmup_steps=1, log_every=1, checkpoint_every=2, evaluate_every=4, ema=0.5,
                     validation_clips=4, sheet_clips=1)
    return dataclasses.replace(config, train=settings,
                               decoder=Decoder(width=8, layers=1, lpips=0.0, discriminator_width=4))


@pytest.fixture(scope="module")
def model(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(config, tmp_path_factory.mktemp("model"), seed=1)


@pytest.fixture(scope="module")
def workdir(config: Config, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("decoder")
    train(beside(config, model), workdir)
    return workdir


def test_checkpoints_hold_the_new_parameters_alone(config: Config, workdir: Path) -> None:
    assert {name.split("/")[0] for name in stored_params(workdir / "checkpoints" / "4")} == {"decoder"}
    state = ocp.StandardCheckpointer().restore((workdir / "checkpoints" / "4" / "state").absolute())
    assert "flow" not in json.dumps(jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(state)[0][0][0]))
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    params = stored_params(workdir / "checkpoints" / "4")
    decoder = sum(4 * int(np.prod(array.shape)) for array in params.values())
    discriminator = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state["discriminator"]))
    # Parameters, their average and AdamW's two moments; the discriminator and Adam's two; counters and a key.
    assert 4 * decoder + 3 * discriminator <= held < 4 * decoder + 3 * discriminator + 64
    rows = {name for row in read_metrics(workdir) for name in row}
    assert {"l1", "adversarial", "discriminator_loss", "validation_l1", "validation_psnr"} <= rows
    assert (workdir / "sheets" / "decoded_step_0000004.png").exists()


def test_a_run_that_was_stopped_ends_with_the_same_parameters(
    config: Config, model: Path, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture
) -> None:
    stop_and_resume(beside(config, model), tmp_path, monkeypatch)
    said, bar = capsys.readouterr()
    assert "stopped at step 2 of 4" in said and "resuming from step 2" in said and "PSNR" in said
    assert " L1]" in bar and "bits/dim" not in bar
    same_states(workdir, tmp_path)


def test_samples_and_streams_go_through_the_decoder(workdir: Path) -> None:
    loaded = sf.load(workdir)
    assert loaded.config.sample.denoise == "decoder" and "with the decoder of" in loaded.source
    tuned = loaded.generate(PROMPT, seed=3).frames
    assert np.abs(tuned.astype(int) - loaded.generate(PROMPT, seed=3, denoise="none").frames).max() > 0
    streamed = np.concatenate(list(loaded.stream(PROMPT, seed=3, frames=len(tuned))))
    assert np.abs(tuned.astype(int) - streamed).max() <= 1


def test_evaluation_knows_all_ways_of_denoising(config: Config, model: Path, workdir: Path) -> None:
    ways = ("denoiser", "score", "none")
    assert denoise_choices(load_model(config, model).system) == ways
    assert denoise_choices(load_model(beside(config, model), workdir).system) == (*ways, "decoder")


@pytest.mark.slow  # its sibling above is quick
def test_evaluation_measures_it_beside_the_other_ways(config: Config, model: Path, workdir: Path) -> None:
    evaluate(changed(beside(config, model), "sample", {"denoise": "decoder"}), workdir)
    found = json.loads((workdir / "evaluate.json").read_text())
    ways = {"denoiser", "score", "none", "decoder"}
    assert set(found["denoising"]) == set(found["psnr_of_denoised_test_clips"]) == ways
    assert found["psnr_of_denoised_test_clips"]["decoder"] != found["psnr_of_denoised_test_clips"]["none"]


def test_another_model_is_refused_in_one_line(config: Config, workdir: Path, tmp_path: Path) -> None:
    other = write_model(config, tmp_path / "other", seed=2)
    code, _, err = run_here([f"--workdir={workdir}", "--mode=sample", f"--config.sample.prompt={PROMPT}",
                             f"--config.train.init_from={other}"])
    line, = err.splitlines()
    assert code == 2 and "its decoder was trained beside other weights" in line and str(other) in line
    with pytest.raises(UserError, match="trained beside other weights"):
        train(beside(config, other), workdir)


def test_what_is_missing_is_said(config: Config, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no decoder; train one there"):
        load_model(beside(config, model), tmp_path)
    with pytest.raises(UserError, match="neither a workdir that holds a checkpoint nor"):
        train(beside(config, tmp_path / "nothing"), tmp_path)
    with pytest.raises(UserError, match="sample.denoise=decoder: this model has no decoder for noised latents"):
        sf.load(model).generate(PROMPT, denoise="decoder")
    assert settings_of(model).train.target == "all"


def test_a_file_of_the_decoder_alone_decodes_as_its_workdir_does(
    config: Config, model: Path, workdir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "decoder.safetensors"
    code, out, err = run_here(["--mode=convert", f"--workdir={workdir}", f"--config.convert.target={file}"])
    assert code == 0 and f"--config.sample.denoise=decoder --config.sample.decoder={file}" in out, err
    own = load_model(settings_of(workdir), workdir)
    jax.tree.map(np.testing.assert_array_equal, import_arrays(file), own.system.decoder)
    expected = sf.load(workdir).generate(PROMPT, seed=3).frames
    for named in (file, workdir):
        loaded = sf.load(model, decoder=named)
        assert "with the decoder" in loaded.source
        assert np.abs(loaded.generate(PROMPT, seed=3, denoise="none").frames.astype(int) - expected).max() > 0
        np.testing.assert_array_equal(loaded.generate(PROMPT, seed=3).frames, expected)
        asked = changed(config, "sample", {"decoder": str(named), "denoise": "decoder"})
        assert load_model(asked, model).weights == weights_of(asked, model) != load_model(config, model).weights


def test_what_is_no_decoder_of_this_model_is_one_line(config: Config, model: Path, workdir: Path, tmp_path: Path
                                                      ) -> None:
    file, own = tmp_path / "decoder.safetensors", load_model(settings_of(workdir), workdir)
    save_decoder(settings_of(workdir), workdir, file)

    def line(*arguments: str) -> str:
        code, _, err = run_here(["--mode=sample", f"--config.sample.prompt={PROMPT}", *arguments])
        assert code == 2
        line, = err.splitlines()
        return line

    asked = ("--config.sample.denoise=decoder", f"--config.sample.decoder={file}")
    other = write_model(config, tmp_path / "other", seed=2)
    assert "was trained beside other weights" in line(f"--workdir={other}", *asked)
    assert f"sample.decoder={str(file)!r}: needs sample.denoise=decoder" in line(f"--workdir={model}", asked[1])
    assert "is no workdir of train.target=decoder" in line(f"--workdir={model}", asked[0],
                                                           f"--config.sample.decoder={other}")
    settings = {"decoder": str(file), "denoise": "decoder"}
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="decoder.safetensors: can't be read as safetensors"):
        load_model(changed(config, "sample", settings), model)
    export_arrays(file, own.system.decoder)
    with pytest.raises(UserError, match="decoder.safetensors: holds no decoder; write one with --mode=convert"):
        load_model(changed(config, "sample", settings), model)
    with pytest.raises(UserError, match="sample.decoder=.*: the workdir of train.target=decoder has its own"):
        load_model(changed(settings_of(workdir), "sample", settings), workdir)
    integers = jax.tree.map(lambda leaf: np.asarray(leaf, np.int32), own.system.decoder)
    empty, more = {"head": {"kernel": np.zeros(0)}}, {**own.system.decoder, "residuals_9": {"x": np.ones(2)}}
    for params, words in ((integers, "holds other numbers than floats"), (empty, "this decoder is another codec's"),
                          (more, "this decoder is another codec's")):
        save_alone(beside(config, model), file, params, load_model(config, model).weights)
        with pytest.raises(UserError, match=f"decoder.safetensors: {words}"):
            load_model(changed(config, "sample", settings), model)


def test_a_file_of_a_decoder_of_any_size_is_read(config: Config, model: Path, tmp_path: Path) -> None:
    """Its sizes are its own, not the settings'."""
    file, params = tmp_path / "decoder.safetensors", make_system(config).codec.fresh_decoder(jax.random.key(0), 4, 2)
    save_alone(beside(config, model), file, params, load_model(config, model).weights)
    loaded = load_model(changed(config, "sample", {"decoder": str(file), "denoise": "decoder"}), model)
    jax.tree.map(np.testing.assert_array_equal, loaded.system.decoder, params)
