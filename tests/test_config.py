"""Settings: bad ones fail when they are made, naming field and value."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.t2v import tiny
from starflow_jax import config
from starflow_jax.config import Config, UserError, from_config_dict, from_dict, to_config_dict
from starflow_jax.settings import listing
from tests.helpers import tiny_model

MODEL = {field.name: getattr(tiny_model(), field.name) for field in dataclasses.fields(config.Model)}

BAD = [
    (config.Model, "channels", 0, "greater than 0"),
    (config.Model, "frames", -1, "greater than 0"),
    (config.Model, "noise_std", float("inf"), "greater than 0"),
    (config.Model, "shallow_layers", (), "layer counts"),
    (config.Model, "shallow_layers", (2, 0), "layer counts"),
    (config.Model, "head_dim", 22, "multiple of 4"),
    (config.Model, "head_dim", 16, "20 to 1024"),
    (config.Model, "shallow_width", 50, "head_dim=20"),
    (config.Model, "deep_width", 50, "head_dim=20"),
    (config.Model, "text_length", -1, "no text"),
    (config.Model, "rope_extent", -1.0, "0 "),
    (config.Model, "denoiser_lookahead", -1, "0 or more"),
    (config.Model, "denoiser", "all", "none, first_layer, every_layer"),
    (config.Model, "dtype", "float16", "float32, bfloat16"),
    (config.Model, "remat", "all", "none, layer"),
    (config.Text, "encoder", "clip", "trained, frozen"),
    (config.Text, "heads", 0, "greater than 0"),
    (config.Text, "fps", -1, "image model"),
    (config.Codec, "kind", "jpeg", "patch, wan"),
    (config.Codec, "stride", 0, "greater than 0"),
    (config.Codec, "later_frames_scale", float("nan"), "greater than 0"),
    (config.Data, "size", 0, "greater than 0"),
    (config.Data, "caption_drop", 1.5, "probability"),
    (config.Data, "image_probability", -0.1, "probability"),
    (config.Train, "learning_rate", 0.0, "greater than 0"),
    (config.Train, "warmup_steps", -1, "0 (none) or more"),
    (config.Train, "outlier_factor", 1.0, "greater than 1"),
    (config.Train, "ema", 1.0, "below 1"),
    (config.Train, "weight_decay", -1e-4, "0 or more"),
    (config.Sample, "guidance", -0.5, "0 (none)"),
    (config.Sample, "frames", -1, "training length"),
    (config.Solver, "max_steps", -1, "block size"),
    (config.Sample, "context_frames", -1, "three quarters"),
    (config.Solver, "kind", "newton", "jacobi, wavefront, sequential"),
    (config.Sample, "denoise", "blur", "denoiser, score, decoder, none"),
    (config.Evaluate, "prompts", 0, "greater than 0"),
    (config.Sample, "frames", "49", "a whole number"),
    (config.Sample, "frames", 49.0, "a whole number"),
    (config.Sample, "count", True, "a whole number"),
    (config.Sample, "guidance", "2", "a number"),
    (config.Sample, "stream", 1, "true or false"),
    (config.Sample, "prompt", None, "text"),
    (config.Codec, "latent_std", (1.0, 0.0), "greater than 0"),
    (config.Prepare, "aspect_ratios", "16:9,,1:1", "comma-separated"),
    (config.Benchmark, "parts", "data,weather", "of start, data, "),
]


@pytest.mark.parametrize("kind, field, value, allowed", BAD, ids=[f"{k.__name__}.{f}={v}" for k, f, v, _ in BAD])
def test_a_bad_value_names_itself(kind: Any, field: str, value: Any, allowed: str) -> None:
    good = MODEL if kind is config.Model else {}
    kind(**good)
    with pytest.raises(UserError) as error:
        kind(**{**good, field: value})
    message = str(error.value)
    assert message.startswith(f"{kind.path or kind.__name__.lower()}.{field}={value!r}: ")
    assert allowed in message
    assert "\n" not in message


def numbers(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each setting that is a number or holds numbers."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{name}.")
        elif isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
            yield path + name, value


@pytest.mark.parametrize("bad", [10**30, -10**30, math.nan, math.inf, -math.inf])
def test_every_number_has_a_lower_and_an_upper_bound(bad: float) -> None:
    taken = []
    for name, value in numbers(dataclasses.asdict(tiny())):
        if isinstance(value, int) and not isinstance(bad, int):
            continue
        values = section = dataclasses.asdict(tiny())
        *parents, last = name.split(".")
        for parent in parents:
            section = section[parent]
        section[last] = (bad,) if isinstance(value, tuple) else type(value)(bad)
        with contextlib.suppress(UserError):
            taken.append((name, getattr(from_dict(values), parents[0])))
    assert taken == []


def test_the_last_seed_is_one_too() -> None:
    assert config.Sample(seed=2**32 - 3, count=3)
    with pytest.raises(UserError, match="sample.seed=4294967294: with count=3 the last seed must"):
        config.Sample(seed=2**32 - 2, count=3)


@pytest.mark.parametrize("field, value", [("height", 3), ("width", 5)])
def test_patches_have_to_tile_the_latents(field: str, value: int) -> None:
    with pytest.raises(UserError, match=f"model.{field}={value}: .*patch_size=2"):
        tiny_model(**{"height": 4, "width": 6, "patch_size": 2, field: value})


@pytest.mark.parametrize("field", ["batch_size", "image_batch_size"])
def test_microbatches_have_to_divide_the_batch(field: str) -> None:
    with pytest.raises(UserError, match=f"train.{field}=10: .*accumulate=4"):
        config.Train(**{"batch_size": 8, "accumulate": 4, field: 10})


def settings() -> Config:
    return Config(name="a", model=tiny_model(noise_std=0.25), sample=config.Sample(guidance=1.5))


def test_round_trip() -> None:
    again = from_config_dict(to_config_dict(settings()))
    assert again == settings()
    assert isinstance(again.model.shallow_layers, tuple)
    assert again != dataclasses.replace(settings(), name="b")


def test_overrides_are_checked_again() -> None:
    overridden = to_config_dict(settings())
    overridden.train.steps = 2_000
    assert from_config_dict(overridden).train.steps == 2_000
    overridden.sample.solver.kind = "newton"
    with pytest.raises(UserError, match="sample.solver.kind='newton'"):
        from_config_dict(overridden)
    with pytest.raises(AttributeError):
        overridden.train.step = 1  # locked: a mistyped override does not pass in silence


def test_unknown_and_missing_fields() -> None:
    values = to_config_dict(settings()).to_dict()
    unknown = {**values, "train": {**values["train"], "lr": 1.0}}
    with pytest.raises(UserError, match=r"train.lr: no such setting; train has steps, "):
        from_config_dict(ConfigDict(unknown))
    values["model"].pop("channels")
    with pytest.raises(UserError, match=r"model.channels: this setting has no default"):
        from_config_dict(ConfigDict(values))


def test_numbers_of_numpy_are_numbers() -> None:
    assert config.Sample(seed=np.int64(3), guidance=np.float32(2)).seed == 3


UNKNOWN = {
    "sample.guidence": "did you mean sample.guidance",  # mistyped
    "guidance": "did you mean sample.guidance",  # without its section
    "model.steps": "did you mean train.steps or evaluate.steps",  # of another section
    "mesh.zzz": "mesh has data, fsdp, tensor, sequence",
    "zzz": "the sections are model, text, codec",
    "sample.solver": "another name now: sample.solver.kind",
    "sample.block_size": "another name now: sample.solver.block_size",
    "evaluate.recognise": "evaluate.task=classify",
    "sample.solver.blocksize": "did you mean sample.solver.block_size",
    "model.parted_attention": "model.sequence_parallel=ulysses|all_gather|ring",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_setting_is_answered_with_one_that_exists(name: str) -> None:
    message = str(config.unknown_setting(name))
    assert message.startswith(f"{name}: ") and UNKNOWN[name] in message
    assert "\n" not in message


def test_a_value_in_place_of_a_section() -> None:
    values = to_config_dict(settings()).to_dict()
    with pytest.raises(UserError, match=r"mesh: is a section of settings; it has data, fsdp"):
        from_config_dict(ConfigDict({**values, "mesh": 4}))


def test_renamed_settings_lead_to_settings_that_exist() -> None:
    known = {one.name for one in listing.describe(Config)}
    for old, now in config.RENAMED.items():
        assert old not in known
        assert re.split("[=, ]", now)[0] in known
    variants = {"tiny_gpu"}
    assert set(config.RENAMED_VARIANTS.values()) <= variants


def test_every_setting_is_described() -> None:
    described = list(listing.describe(Config))
    assert len({one.name for one in described}) == len(described) > 150
    assert [one.name for one in described if not one.description] == []
    assert next(one for one in described if one.name == "sample.guidance") == listing.Described(
        "sample.guidance", "a number", 2.5, "0 (none) or more, at most 100", "weight of classifier-free guidance")
    assert next(one for one in described if one.name == "model.channels").default is dataclasses.MISSING


def test_settings_that_follow_from_others() -> None:
    model = tiny_model(height=4, width=6, patch_size=2)
    assert (model.token_channels, model.tokens_per_frame) == (8, 6)
    assert model.extent == pytest.approx(24**0.5 / 2)
    assert tiny_model(rope_extent=40).extent == 40


def test_an_error_is_one_line_whatever_is_in_it() -> None:
    """A library's message of several lines, and what a file's content would do to a terminal."""
    assert str(UserError("a.mp4: a\nb\r\x1b[2Jc\u2028d")) == "a.mp4: a b  [2Jc d"
