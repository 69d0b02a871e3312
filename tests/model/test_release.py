"""The release's YAML: every key is used, or said to be without effect; what can't be honoured is one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.released import IMAGE, VIDEO_7B
from starflow_jax.config import Config, UserError
from starflow_jax.model.release import KEYS, config_of, read_arguments, released_config

PIPELINE = Path(__file__).parents[1] / "golden" / "pipeline"


def setting(config: Config, name: str) -> Any:
    section, _, field = name.partition(".")
    value = getattr(config, section)
    for part in field.split("."):
        value = getattr(value, part)
    return value


def test_the_published_video_model() -> None:
    config = config_of(VIDEO_7B, "x", "y")
    expected: dict[str, Any] = {
        "model.channels": 48, "model.frames": 21, "model.height": 30, "model.width": 53, "model.rope_extent": 32.0,
        "model.shallow_layers": (2, 2, 2, 2, 2), "model.deep_layers": 24, "model.deep_width": 4096,
        "model.shallow_width": 3072, "model.text_length": 256, "model.text_dim": 2048, "model.noise_std": 0.5,
        "model.denoising_step": 0.3, "model.denoiser": "every_layer", "model.denoiser_window": 10,
        "model.denoiser_lookahead": 1, "text.metadata": "noise_level,fps,aspect_ratio", "text.fps": 16,
        "codec.kind": "wan", "codec.later_frames_scale": 0.6, "train.batch_size": 192, "train.image_batch_size": 1536,
        "data.image_probability": 0.2, "train.ema": 0.0, "train.denoiser_beta2": 0.999, "train.skip_over_clip": True,
        "sample.guidance": 3.5, "sample.context_frames": 16, "sample.side": 640, "sample.solver.first_block_size": 32,
        "sample.solver.block_size": 128, "sample.solver.max_steps": 32, "sample.solver.tolerance": 1e-3,
        "sample.as_released": True, "prepare.aspect_ratios": "1:1,2:3,3:2,16:9,9:16,4:5,5:4,21:9,9:21"}
    assert {name: setting(config, name) for name in expected} == expected


def test_the_published_image_model() -> None:
    config = config_of(IMAGE, "x", "y")
    expected: dict[str, Any] = {
        "text.metadata": "", "model.frames": 1, "model.denoiser": "none", "model.local_shallow": False,
        "model.height": 32, "model.width": 32, "model.denoising_step": 0.3, "codec.kind": "kl", "codec.stride": 8,
        "model.noise_std": 0.3, "model.rope_extent": 32.0}
    assert {name: setting(config, name) for name in expected} == expected


@pytest.mark.parametrize("key, value, name, expected", [
    ("channel_size", 16, "model.channels", 16), ("patch_size", 2, "model.patch_size", 2),
    ("channels", 128, "model.shallow_width", 128), ("top_block_channels", 256, "model.deep_width", 256),
    ("layers_per_block", "1 3 1 1 1 7", "model.shallow_layers", (1, 3, 1, 1, 1)),
    ("layers_per_block", "1 3 1 1 1 7", "model.deep_layers", 7), ("head_dim", 128, "model.head_dim", 128),
    ("pt_seq_len", 40, "model.rope_extent", 40.0), ("shallow_block_local", 0, "model.local_shallow", False),
    ("temporal_causal", 3, "model.denoiser_lookahead", 2), ("learnable_self_denoiser", 0, "model.denoiser", "none"),
    ("denoiser_window", 4, "model.denoiser_window", 4), ("noise_std", 0.4, "model.noise_std", 0.4),
    ("cond_noise_level", 0, "text.metadata", "fps,aspect_ratio"), ("fps_cond", 0, "text.metadata",
                                                                  "noise_level,aspect_ratio"),
    ("mix_aspect", 0, "prepare.aspect_ratios", "1:1"), ("txt_size", 64, "model.text_length", 64),
    ("text", "google/flan-t5-large", "model.text_dim", 1024), ("img_size", 320, "sample.side", 320),
    ("vid_size", "17:8", "model.frames", 5), ("vid_size", "17:8", "text.fps", 8),
    ("vae", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "codec.later_frames_scale", 1.0),
    ("batch_size", 8, "train.batch_size", 8), ("secondary_batch_size", 64, "train.image_batch_size", 64),
    ("secondary_ratio", 0.5, "data.image_probability", 0.5),
    ("lr", "1e-4", "train.learning_rate", 1e-4), ("min_lr", "1e-7", "train.final_learning_rate", 1e-7),
    ("warmup_steps", 7, "train.warmup_steps", 7), ("drop_label", 0.2, "data.caption_drop", 0.2),
    ("drop_image", 0.5, "data.first_frame_drop", 0.5), ("grad_clip", 2, "train.clip", 2.0),
    ("grad_skip", 0, "train.skip_over_clip", False), ("acc", 2, "train.accumulate", 2),
])
def test_what_a_key_becomes(key: str, value: Any, name: str, expected: Any) -> None:
    before, after = config_of(VIDEO_7B, "x", "y"), config_of({**VIDEO_7B, key: value}, "x", "y")
    assert setting(after, name) == expected != setting(before, name)


def test_the_loss_is_not_weighted_where_the_prompt_does_not_state_the_noise() -> None:
    without = {**VIDEO_7B, "cond_noise_level": 0, "learnable_self_denoiser": 0}
    assert config_of(without, "x", "y").model.denoising_step == 0.5  # the noise: a weight of 1


@pytest.mark.parametrize("case", ["t2v", "ti2v", "long"])
def test_the_cases_files(case: str) -> None:
    told = json.loads((PIPELINE / case / "case.json").read_text())
    config = released_config(PIPELINE / case / "starflow-v.yaml")
    assert config.model.frames == told["local_attn_window"] and config.text.fps == told["out_fps"]
    assert set(told["merged_arguments"]) <= set(KEYS)
    assert math.isclose(config.train.learning_rate, told["merged_arguments"]["lr"])


@pytest.mark.parametrize("changes, words", [
    ({"chanels": 3}, "unknown key chanels; see KEYS"), ({"adaln": 1}, "adaln=1: only 0 can be honoured"),
    ({"soft_clip": 3}, "soft_clip=3: only 4"), ({"seq_order": "R2L"}, "seq_order=R2L: only L2R"),
    ({"blocks": 5}, "blocks=5: layers_per_block names 6"), ({"layers_per_block": "2 x"}, "must be numbers of layers"),
    ({"vid_size": "80:16"}, "vid_size='80:16': must be frames:fps"),
    ({"noise_std": "much"}, "noise_std='much': must be a"),
    ({"vae": "mine"}, "vae='mine': only the Wan2.2 VAE"), ({"text": "bert"}, "text='bert': only flan-t5-small"),
    ({"conditional_denoiser": 0}, "conditional_denoiser=0: only 1"), ({"fps_cond": 2}, "fps_cond=2: only 0 or 1"),
    ({"finetuned_vae": "mine.pth"}, "finetuned_vae=mine.pth: only none"),
])
def test_what_cannot_be_honoured_is_one_line(changes: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"arguments": [{key: value} for key, value in {**VIDEO_7B, **changes}.items()]}))
    with pytest.raises(UserError) as error:
        released_config(path)
    assert words in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_what_is_missing_or_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for text in ("- 1", "arguments: 3", "arguments: [3]", "{", "arguments: !!python/object/apply:os.getcwd []"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.yaml: can't be read as a YAML of the release"):
            read_arguments(path)
    path.write_text("arguments: {channels: 64}")
    with pytest.raises(UserError, match="has no channel_size, layers_per_block, noise_std"):
        released_config(path)


def test_every_key_says_what_it_becomes_or_why_it_has_no_effect() -> None:
    for name, key in KEYS.items():
        assert bool(key.becomes) != bool(key.without_effect), name
