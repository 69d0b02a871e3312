"""The settings that a model was trained with: a workdir's own, or those of the package's model."""

import dataclasses
import json
from pathlib import Path

from starflow_jax.config import Config, UserError, changed, from_dict
from starflow_jax.io.checksums import check_file
from starflow_jax.io.files import read_json
from starflow_jax.model.initialise import model_of, whole_checkpoint
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.system import SETTINGS

PRETRAINED = Path(__file__).parents[1] / "assets" / "tiny"
PRETRAINED_WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
# Settings of a model's sections that may differ between runs.
FREE = {"model": ("dtype", "remat", "sequence_parallel", "unroll_layers"), "text": ("weights",),
        "codec": ("weights", "dtype", "tile", "tile_overlap")}


def settings_of(workdir: Path) -> Config:
    """The settings that a workdir's model, or PRETRAINED's, was trained with.

    Where they were not written, those that the parameters depend on were, and the others are the defaults. Raises
    UserError where a folder holds no model.
    """
    system = workdir if workdir == PRETRAINED else workdir / "system"
    for path in (system / SETTINGS, workdir / "checkpoints" / "model.json"):
        if path.exists():
            check_file(path)
            try:
                held = read_json(path)
                return _placed(from_dict(held if path.name == SETTINGS else {"name": workdir.name, **held}), system)
            except (OSError, ValueError, TypeError, AttributeError, UserError) as error:
                raise UserError(f"{path}: can't be read as settings ({error})") from error
    raise UserError(f"{workdir}: holds no trained model; name a workdir that --mode=train or --mode=convert wrote")


def _placed(config: Config, system: Path) -> Config:
    """The settings with files inside the workdir named by their present paths, so that a workdir may be moved."""
    for section in ("text", "codec"):
        weights = getattr(config, section).weights
        if weights and (system / weights).exists():
            config = changed(config, section, {"weights": str(system / weights)})
    return config


def own_settings(config: Config, workdir: Path) -> tuple[Config, str]:
    """The settings with those of a workdir's model in place of what contradicts them, and a line that says so, "" where
    nothing does or the workdir holds no model. Files that the config does not name are the model's; and so is
    data.first_frame_drop, also of the package's model: whether its prompts say "(extend)" is not the config's choice.
    """
    if not (workdir / "system" / SETTINGS).exists():
        uses_pretrained = not (workdir / "checkpoints").exists() and is_pretrained(config)
        return _prompted_as(settings_of(PRETRAINED), config) if uses_pretrained else config, ""
    own, passed_over = settings_of(workdir), []
    config = _prompted_as(own, config)
    for section, free in FREE.items():
        asked, held = getattr(config, section), getattr(own, section)
        values = {field.name: getattr(held, field.name) for field in dataclasses.fields(held)}
        values |= {name: getattr(asked, name) for name in free if name != "weights" or asked.weights}
        passed_over += [f"{section}.{name}={value} (not {getattr(asked, name)})" for name, value in values.items()
                        if value != getattr(asked, name) and name != "weights"]
        config = changed(config, section, values)
    if own.train.target != "all":  # made beside a model, which the config may name at another place
        beside = {"target": own.train.target, "init_from": config.train.init_from or own.train.init_from}
        config = dataclasses.replace(changed(config, "train", beside), decoder=own.decoder, lora=own.lora,
                                     control=own.control, student=own.student)
    line = f"{workdir} holds a model with settings of its own, which are used: {', '.join(passed_over)}"
    return config, line if passed_over else ""


def _prompted_as(own: Config, config: Config) -> Config:
    return changed(config, "data", {"first_frame_drop": own.data.first_frame_drop})


def backbone_config(config: Config) -> Config:
    """The settings of the model that config.train.target trains beside: for a student, its teacher's, whose deep block
    has other sizes. Raises UserError where these are not known."""
    if config.train.target != "student":
        return config
    layers, width, source = config.student.teacher_layers, config.student.teacher_width, config.train.init_from
    if not (layers and width):
        held = model_of(whole_checkpoint(Path(source))) if source else settings_of(PRETRAINED).model
        layers, width = layers or held.deep_layers, width or held.deep_width
    model = dataclasses.replace(config.model, deep_layers=layers, deep_width=width)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, target="all"))


def is_pretrained(config: Config) -> bool:
    """Whether the package's is the model of the config, or that which train.target trains beside."""
    description = PRETRAINED / DESCRIPTION
    check_file(description)
    return description.exists() and json.loads(description.read_text())["fingerprint"] == model_fingerprint(
        backbone_config(config))


def check_pretrained(config: Config, why: str, setting: str = "--workdir") -> None:
    """Raises UserError, which begins with `why`, where the package's model is another config's."""
    if not is_pretrained(config):
        raise UserError(f"{why}, and the package carries no model of {config.name}; "
                        "train one (--mode=train), convert released weights (--mode=convert "
                        f"--config.convert.source=FILE_OR_DIR), or name the folder of one with {setting}")


def check_there(config: Config, workdir: Path) -> None:
    """Raises UserError where a workdir has no checkpoints, and the package no model of the config."""
    if config.train.target == "all" and not (workdir / "checkpoints").exists():
        check_pretrained(config, f"{workdir} holds no checkpoint")
