"""Settings: frozen dataclasses, checked when they are made; an error names field, value and what is allowed.

`Config` holds all of them. A file in configs/ builds one, of the variant after the colon, and hands it to
`to_config_dict`, whose result ml_collections makes overridable from the command line; `from_config_dict` checks it
again. Nothing else in the package sees a ConfigDict. Each field carries its description and its allowed values
(settings/fields.py).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ml_collections import ConfigDict

from starflow_jax.settings import listing
from starflow_jax.settings.data import Convert, Data, Prepare
from starflow_jax.settings.fields import Settings, UserError, required, type_hints, whole_number
from starflow_jax.settings.model import METADATA, REMAT, SEQUENCE_PARALLEL, Codec, Mesh, Model, Text
from starflow_jax.settings.sampling import EVALUATIONS, Evaluate, Sample, Solver
from starflow_jax.settings.serving import Serve
from starflow_jax.settings.training import BENCHMARKS, Benchmark, Control, Decoder, Lora, Plan, Student, Train

__all__ = [
    "BENCHMARKS", "EVALUATIONS", "METADATA", "REMAT", "SEQUENCE_PARALLEL", "Benchmark", "Codec", "Config", "Control",
    "Convert", "Data", "Decoder", "Evaluate", "Lora", "Mesh", "Model", "Plan", "Prepare", "Sample", "Serve", "Solver",
    "Student", "Text", "Train", "UserError", "changed", "choose_variant", "from_config_dict", "from_dict",
    "to_config_dict", "unknown_setting", "whole_number"]


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """All settings."""

    path: ClassVar[str] = "config"

    name: str = required("what the config is called; the workdir is runs/NAME by default")
    model: Model = required("")
    text: Text = Text()
    codec: Codec = Codec()
    data: Data = Data()
    train: Train = Train()
    lora: Lora = Lora()
    control: Control = Control()
    student: Student = Student()
    decoder: Decoder = Decoder()
    sample: Sample = Sample()
    mesh: Mesh = Mesh()
    plan: Plan = Plan()
    benchmark: Benchmark = Benchmark()
    evaluate: Evaluate = Evaluate()
    convert: Convert = Convert()
    prepare: Prepare = Prepare()
    serve: Serve = Serve()

    def check(self) -> None:
        self.train.require(
            "adherence_prompts", self.data.source == "digits" or not self.train.adherence_prompts,
            "must be 0 with prepared data: only moving digits can be read")
        self.train.require("target", self.train.target != "decoder" or not self.data.latents,
                           "needs pixels beside the latents; set data.latents=false")
        if self.train.target == "control":
            self.data.require("camera", self.data.source != "digits" or self.data.camera,
                              "must be true with train.target=control, which needs clips with their cameras")
            self.data.require("image_probability", not self.data.image_probability,
                              "must be 0 with train.target=control: a picture has no path of a camera")
        if self.train.target == "student":
            self.student.require("layers", len(self.student.chosen_layers) in (0, self.model.deep_layers),
                                 f"must name as many as model.deep_layers={self.model.deep_layers}")
        self.lora.require("blocks", "denoiser" not in self.lora.blocks or self.model.denoiser != "none",
                          "this model has no denoiser")


# Settings that were renamed, and what to write instead.
RENAMED = {
    "model.parted_attention": "model.sequence_parallel=ulysses|all_gather|ring (was heads|gather|ring)",
    "evaluate.recognise": "evaluate.task=classify, of evaluate.clips test clips",
    "sample.solver": "sample.solver.kind",
    **{f"sample.{name}": f"sample.solver.{name}"
       for name in ("block_size", "updates", "frames_per_step", "start", "tolerance", "max_steps")},
}
RENAMED_VARIANTS = {"box": "tiny_gpu"}


def unknown_setting(name: str) -> UserError:
    """The error for a dotted name that is no setting, such as "sample.guidence"."""
    return listing.unknown_setting(Config, name, RENAMED)


def choose_variant(file: str, variants: Mapping[str, Callable[[], Config]], variant: str) -> Config:
    """A variant of a config, by its name. Raises UserError, listing those there are, for another name."""
    if variant in variants:
        return variants[variant]()
    if RENAMED_VARIANTS.get(variant) in variants:
        raise UserError(f"{file}:{variant}: this variant is called :{RENAMED_VARIANTS[variant]} now")
    raise UserError(f"{file}:{variant}: no such variant; there are {', '.join(variants)}")


def to_config_dict(config: Config) -> ConfigDict:
    """The settings as a locked ConfigDict, for ml_collections' command-line overrides."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(settings: ConfigDict) -> Config:
    """The checked settings. Raises UserError for unknown or missing fields and bad values, and for what is no settings.
    """
    if not isinstance(settings, ConfigDict):
        raise UserError(f"a config gave {settings!r:.60}: its get_config must return settings, as in configs/t2v.py: "
                        "to_config_dict(Config(...))")
    return _build(Config, settings.to_dict(), "")


def from_dict(values: Mapping[str, Any]) -> Config:
    """The settings from `dataclasses.asdict`, or from JSON of that. Raises UserError as `from_config_dict` does."""
    return _build(Config, dict(values), "")


def changed(config: Config, section: str, changes: Mapping[str, Any]) -> Config:
    """The settings with some of one section changed; a nested section's are given as a dict, or as a whole instance.

    Raises UserError for unknown fields and bad values.
    """
    values = dataclasses.asdict(config)
    for name, value in changes.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        held = values[section].get(name)
        values[section][name] = held | value if isinstance(held, dict) and isinstance(value, dict) else value
    return from_dict(values)


def _build(section: Any, values: dict[str, Any], prefix: str) -> Any:
    fields, hints = {field.name: field for field in dataclasses.fields(section)}, type_hints(section)
    built = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_setting(prefix + name)
        if not dataclasses.is_dataclass(hints[name]):
            built[name] = tuple(value) if isinstance(value, list) else value
        elif isinstance(value, dict):
            built[name] = _build(hints[name], value, f"{prefix}{name}.")
        else:
            raise unknown_setting(prefix + name)
    for name, field in fields.items():
        if name not in built and field.default is dataclasses.MISSING:
            raise UserError(f"{prefix}{name}: this setting has no default and must be given")
    return section(**built)

