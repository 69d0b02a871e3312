"""The paper's curriculum, shrunk: raw videos to latents and features, an image model, a video model, a wider one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import t2i, t2v, ti2v
from starflow_jax.codec.wan_vae import WanConfig
from starflow_jax.codec.wan_weights import to_released
from starflow_jax.config import Config, UserError, from_config_dict
from starflow_jax.model.store import load_model
from starflow_jax.modes.prepare import prepare
from starflow_jax.modes.sample import sample
from starflow_jax.modes.train import train
from starflow_jax.text.tokenizer import train_tokenizer
from starflow_jax.training.metrics import read_metrics
from tests.codec.test_wan_vae import random_params
from tests.helpers import changed
from tests.prepared_input import write_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
VAE = WanConfig(dim=2, dec_dim=2, z_dim=3)
STAGES = {"t2i": (t2i, "3b"), "384p": (t2v, "3b_384p"), "480p": (t2v, "3b"), "7b": (t2v, "7b"), "ti2v": (ti2v, "7b")}

TRAIN = dict(steps=2, batch_size=4, image_batch_size=4, warmup_steps=1, log_every=1, evaluate_every=2,
             validation_clips=4, sheet_clips=2)


def write_vae(path: Path) -> None:
    """Random weights of the released structure, narrow."""
    save_file(to_released(random_params(VAE), VAE)
              | {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}, path)


def write_text_encoder(folder: Path) -> None:
    """The golden encoder with a larger table, and a tokenizer that fits it."""
    folder.mkdir()
    case = json.loads((GOLDEN / "t5_encoder.json").read_text())
    weights = {name[7:]: value for name, value in load_file(GOLDEN / "t5_encoder.safetensors").items()
               if name.startswith("params/")}
    table = np.random.default_rng(0).normal(size=(320, weights["shared.weight"].shape[1])).astype(np.float32)
    save_file({name: table if value.shape == weights["shared.weight"].shape else value
               for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", **case["config"], "vocab_size": 320}))
    (folder / "spiece.model").write_bytes(train_tokenizer(["a block moves over a backdrop", "a tall picture"], 140))


def shrunk(stage: str, folder: Path, **changes: Any) -> Config:
    """A config with everything that says what it is, but small: one bucket, two latent frames, narrow layers."""
    module, variant = STAGES[stage]
    config = from_config_dict(module.get_config(variant))
    frames, deep_width = min(config.model.frames, 2), config.model.deep_width // 32
    data = folder / config.data.directory
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, channels=3, frames=frames, height=2, width=2, shallow_layers=(1,), deep_layers=1,
            shallow_width=64, deep_width=deep_width - deep_width % 64, text_length=24, text_dim=48, denoiser_layers=1),
        text=dataclasses.replace(config.text, weights=str(folder / "flan")),
        codec=dataclasses.replace(config.codec, weights=str(folder / "vae.safetensors"), encoder_width=2,
                                  decoder_width=2),
        data=dataclasses.replace(config.data, directory=str(data)),
        train=dataclasses.replace(config.train, **TRAIN | changes),
        sample=changed(config.sample, block_size=4, prompt="a block moves", batch_size=2, side=0),
        evaluate=dataclasses.replace(config.evaluate, clips=4, batch_size=2, prompts=2),
        prepare=dataclasses.replace(
            config.prepare, input=str(folder / "in"), output=str(data), resolution=24, aspect_ratios="1:1", fps=8,
            min_motion=0.01, validation_share=0.3, test_share=0.3, processes=1, batch_size=3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw videos, a VAE and a text encoder as a user has them."""
    folder = tmp_path_factory.mktemp("curriculum")
    write_inputs(folder / "in")
    write_vae(folder / "vae.safetensors")
    write_text_encoder(folder / "flan")
    return folder


def test_the_first_stage_from_raw_files(folder: Path, tmp_path: Path) -> None:
    config = shrunk("t2i", folder, sheet_clips=0)
    prepare(config, tmp_path)
    train(config, tmp_path)
    last = {name: value for row in read_metrics(tmp_path) for name, value in row.items()}
    assert np.isfinite([last["loss"], last["validation_bits_per_dim"]]).all()
    assert (last["step"], last["skipped"]) == (2, 0)


@pytest.mark.slow
def test_every_stage_begins_with_the_last_ones_checkpoint(folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = ""
    for stage in ("t2i", "480p", "7b"):
        config = shrunk(stage, folder, init_from=before)
        if not Path(config.data.directory).exists():
            prepare(config, folder / "unused")
        train(config, folder / stage)
        said = capsys.readouterr().out
        assert ("starting from" in said) == bool(before)
        if stage == "7b":
            assert "deep_width 64 -> 128: same function" in said
        last = {name: value for row in read_metrics(folder / stage) for name, value in row.items()}
        assert np.isfinite([last["loss"], last["validation_bits_per_dim"]]).all()
        assert (last["step"], last["skipped"]) == (2, 0)
        assert (folder / stage / "sheets" / "samples_step_0000002.png").exists()
        before = str(folder / stage)
    # What was trained serves text to video, and, as it is, a picture to video.
    given = shrunk("ti2v", folder)
    assert given.model == config.model
    image = folder / "7b" / "sheets" / "samples_step_0000002.png"
    for asked in (config, dataclasses.replace(given, sample=dataclasses.replace(given.sample, image=str(image)))):
        sample(asked, folder / "7b")
    _, params, *_ = load_model(config, folder / "7b")
    layer = params["flow"]["deep"]["transformer"]["layers"]["layer"]
    assert layer["qkv"]["kernel"].dtype == "bfloat16" and layer["qkv"]["bias"].dtype == "float32"


def test_weights_that_are_missing_are_asked_for(folder: Path, tmp_path: Path) -> None:
    config = shrunk("t2i", folder)
    without = dataclasses.replace(config, codec=dataclasses.replace(config.codec, weights=""))
    with pytest.raises(UserError, match="codec.kind=wan needs the VAE's weights"):
        train(without, tmp_path)
    without = dataclasses.replace(config, text=dataclasses.replace(config.text, weights=""))
    with pytest.raises(UserError, match="must be a folder with the frozen text encoder"):
        train(without, tmp_path)
