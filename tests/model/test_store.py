"""The pretrained model, and what is said of a workdir without a model."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ti2v
from configs.t2v import get_config, tiny
from starflow_jax.config import UserError, from_config_dict
from starflow_jax.data.batch import Batch
from starflow_jax.evaluation.adherence import adherence_of_samples
from starflow_jax.model.own_settings import PRETRAINED, own_settings, settings_of
from starflow_jax.model.parameters import inference_params, init_params
from starflow_jax.model.store import load_model, load_pretrained
from starflow_jax.modes.package import LARGEST, package
from starflow_jax.sampling.likelihood import bits_per_frame
from tests.small_run import run_here


def test_the_pretrained_model_is_tiny_and_small_enough(tmp_path: Path) -> None:
    config = tiny()
    held = settings_of(PRETRAINED)
    assert all(getattr(held, name) == getattr(config, name) for name in ("model", "text", "codec", "sample"))
    assert held.data == from_config_dict(get_config("tiny_long")).data
    system, params, source, _ = load_pretrained(config, tmp_path)
    assert source == "the pretrained model"
    shapes = jax.tree.map(lambda leaf: leaf.shape, params)
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(
        lambda: init_params(config, jax.random.key(0))))
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) <= LARGEST
    assert system.tokenizer.vocab_size <= config.text.vocab_size


def test_parameters_for_inference_stay_what_they_are(tmp_path: Path) -> None:
    config, (_, params, *_) = tiny(), load_model(tiny(), tmp_path)
    assert isinstance(params["control"]["layers"], tuple)
    again = inference_params(config, params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_it_knows_black_frames_from_noise(tmp_path: Path) -> None:
    system, params, *_ = load_model(tiny(), tmp_path)

    def bits(frames: np.ndarray) -> float:
        batch = Batch(frames_BTHWC=frames, text_ids_BS=system.text_ids([system.prompt("a red one moves up")]),
                      valid_B=np.ones(1, bool))
        return float(bits_per_frame(system, params, iter([batch])).mean())

    black = np.zeros((1, 13, 24, 24, 3), np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, black.shape, np.uint8)
    entropy = np.log2(system.config.model.noise_std * np.sqrt(2 * np.pi * np.e))
    assert entropy < bits(black) < entropy + 0.5 < bits(noise)


def test_other_models_are_not_in_the_package(tmp_path: Path) -> None:
    config = tiny()
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, denoiser_window=3))
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_model(other, tmp_path)
    with pytest.raises(UserError, match="no checkpoint to put"):
        package(config, tmp_path)


def test_parameters_come_back_as_float32(tmp_path: Path) -> None:
    _, params, *_ = load_model(tiny(), tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.slow  # sampling/test_api.py reads one video
def test_it_shows_what_the_prompt_asks_for(tmp_path: Path) -> None:
    config = dataclasses.replace(tiny(), sample=dataclasses.replace(tiny().sample, batch_size=16))
    system, params, *_ = load_model(config, tmp_path)
    shares = adherence_of_samples(system, params, "validation", 16)
    assert min(shares.values()) > 0.8


def test_how_later_windows_are_prompted_is_the_models_choice(tmp_path: Path) -> None:
    """configs/ti2v.py shows every clip with its first frame; the model in the package was trained on others too."""
    asked = from_config_dict(ti2v.get_config())
    trained = settings_of(PRETRAINED).data.first_frame_drop
    assert asked.data.first_frame_drop == 0 < trained
    config, line = own_settings(asked, tmp_path)
    assert config.data == dataclasses.replace(asked.data, first_frame_drop=trained) and not line
    other = dataclasses.replace(asked, model=dataclasses.replace(asked.model, deep_layers=5))
    assert own_settings(other, tmp_path) == (other, "")


@pytest.mark.slow
def test_both_configs_of_the_pretrained_model_make_the_same_long_video(tmp_path: Path) -> None:
    for config in ("t2v", "ti2v"):
        code, _, error = run_here([f"--config=configs/{config}.py", "--mode=sample", f"--workdir={tmp_path / config}",
                                   "--config.sample.prompt=a red seven moves left", "--config.sample.frames=21"])
        assert code == 0, error
    video, other = (next((tmp_path / config).glob("samples/*.mp4")).read_bytes() for config in ("t2v", "ti2v"))
    assert video == other
