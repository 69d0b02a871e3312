"""configs/ablations.py: what each variant changes, and nothing else."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from configs.ablations import START, VARIANTS, get_config, multiply_adds
from starflow_jax.checkpoints.growth import RESHAPING, changes
from starflow_jax.config import Config, Model, UserError, from_config_dict
from starflow_jax.evaluation import ablations
from starflow_jax.model.own_settings import PRETRAINED


def variant(name: str) -> Config:
    return from_config_dict(get_config(name))


def differences(config: Config, other: Config) -> dict[str, Any]:
    """{"model.noise_std": value of `config`, ...}."""
    found = {}
    for section in dataclasses.fields(Config):
        ours, theirs = getattr(config, section.name), getattr(other, section.name)
        if ours == theirs:
            continue
        fields = dataclasses.fields(ours) if dataclasses.is_dataclass(ours) else []
        found |= {f"{section.name}.{field.name}": getattr(ours, field.name) for field in fields
                  if getattr(ours, field.name) != getattr(theirs, field.name)}
    return found


def test_each_variant_changes_one_thing() -> None:
    base = variant("base")
    trained_on = [name for name in VARIANTS if not name.startswith("width") and name != "decoder"]
    assert {name: differences(variant(name), base) for name in trained_on} == {
        "base": {}, "global_shallow": {"model.local_shallow": False},
        "noise_0": {"model.noise_std": 0.001, "model.reference_noise": 0.0},
        "noise_0.05": {"model.noise_std": 0.05, "model.reference_noise": 0.0},
        "noise_0.3": {"model.noise_std": 0.3, "model.reference_noise": 0.0},
        "no_images": {"data.image_probability": 0.0}, "no_drop": {"data.first_frame_drop": 0.0}}
    assert set(differences(variant("decoder"), variant("width_192"))) == {
        "train.target", "train.steps", "train.evaluate_every", "evaluate.prompts"}
    packaged = Model(**{**json.loads((PRETRAINED / "settings.json").read_text())["model"], "shallow_layers": (1, 1)})
    for name in trained_on:  # the model in the package becomes it
        assert variant(name).train.init_from == START
        assert all(name not in RESHAPING for name, *_ in changes(packaged, variant(name).model))
    assert f"--workdir={START}\n" in Path("docs/pages/experiments.md").read_text()
    assert set(ablations.VARIANTS) | {"decoder"} == set(VARIANTS)
    assert dict(zip(ablations.NOISE, ablations.LEVELS)) == {
        name: variant(name).model.noise_std for name in ablations.NOISE}


def test_widths_differ_at_equal_compute() -> None:
    work = {}
    for name in ablations.WIDTHS:
        config = variant(name)
        assert config.model.deep_width == int(name.removeprefix("width_"))
        assert not config.train.init_from
        work[name] = config.train.steps * multiply_adds(config.model)
    for value in work.values():
        assert abs(value / work["width_192"] - 1) < 0.01


def test_seeds_and_names() -> None:
    config = variant("no_drop-2")
    assert (config.name, config.train.seed) == ("ablations/no_drop-2", 2)
    assert variant("no_drop").name == "ablations/no_drop-0"
    with pytest.raises(UserError, match="base-two: the seed behind the variant must be a whole number"):
        get_config("base-two")
    with pytest.raises(UserError, match="no such variant; there are base, "):
        get_config("nothing")
