"""Which model a mode works with: the workdir's newest or best checkpoint, or the pretrained one in the package."""

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy
from flax import traverse_util
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.config import Config, Model, UserError, changed
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.io.checksums import checksums_of
from starflow_jax.io.files import write_text
from starflow_jax.io.tensor_files import open_safetensors
from starflow_jax.model import control, lora
from starflow_jax.model.beside import SUFFIX, fingerprint_of, whole_beside
from starflow_jax.model.calibration import CALIBRATED, read_calibration
from starflow_jax.model.codec import FITTED_CODEC
from starflow_jax.model.decoder import NamedDecoder, read_decoder, read_named_decoder
from starflow_jax.model.initialise import whole_checkpoint
from starflow_jax.model.own_settings import (
    DESCRIPTION,
    PRETRAINED,
    PRETRAINED_WEIGHTS,
    backbone_config,
    check_pretrained,
    is_pretrained,
    settings_of,
)
from starflow_jax.model.parameters import (
    Convert,
    Params,
    inference_params,
    init_params,
    model_fingerprint,
    placed_params,
    restored_params,
)
from starflow_jax.model.quantize import quantize_param, quantize_params
from starflow_jax.model.student import DEEP, Draft, read_draft
from starflow_jax.model.system import System, load_system, placed, save_system
from starflow_jax.model.text import TOKENIZER, frozen_encoder_params
from starflow_jax.nn.lora import Adapted

with epy.lazy_imports():  # orbax, which the model in the package does not need
    from starflow_jax.checkpoints import checksums, parameters, training

NO_BACKBONE = "train.init_from is empty"
ALL_BUT_DEEP = "(?!flow/deep/)"  # names of parameters


class LoadedModel(NamedTuple):
    """A trained model and where it comes from."""

    system: System
    params: Params
    source: str
    weights: str  # equal for equal parameters: a checksum of the files that they were read from


def load_model(config: Config, workdir: Path, encoder: bool = True) -> LoadedModel:
    """The workdir's model, or the package's where the workdir holds none, on the mesh in force, with the LoRA factors
    of sample.lora, the control module of sample.control (the package's has its own), the draft of sample.draft and the
    decoder of sample.decoder; its parameters as `inference_params` gives them. Where another train.target made the
    workdir, the model that it was trained beside, and what was. encoder: with a frozen text encoder, or without.

    Raises UserError where the workdir holds another model, or none and the package has none of this config.
    """
    loras = lora.read_all(config, workdir)
    convert = _as_kept(config.sample.weights, lora.combined(loras), merge=config.sample.merge_lora)
    if config.train.target == "decoder":
        loaded = load_with_decoder(config, workdir, convert)
    elif config.train.target == "student":
        loaded = load_with_student(config, workdir, convert)
    elif config.train.target in ("lora", "control"):
        loaded = load_backbone(config, convert)
        loaded = loaded._replace(system=dataclasses.replace(
            loaded.system, calibration=read_calibration(workdir / "system", config.model)))
    else:
        loaded = load_trained(config, workdir, convert) or load_pretrained(config, workdir, convert)
    if decoder := _decoder(config):
        weights = loaded.weights if config.train.target == "all" else backbone_weights(config)
        loaded = _with_named_decoder(decoder, loaded, weights)
    module, draft = _control_module(config, workdir), _draft(config)
    params = {**loaded.params, **(load_encoder(config) if encoder else {})}
    loaded = _named_with([*loras, *([module] if module else []), *([draft] if draft else [])], loaded)
    if module:
        params["control"] = module.params
    if draft:
        rounded = _as_kept(config.sample.weights, {}, merge=False)
        params["draft"] = draft.read(rounded)
    return loaded._replace(params=inference_params(config, params))


def _as_kept(weights: str, factors: Mapping[str, lora.Factors], merge: bool) -> Convert | None:
    """What is kept of each parameter: with its factors, quantized as sample.weights says; None where all stay as they
    are."""
    def convert(name: str, param: jax.Array) -> Any:
        own = factors.get(name)
        if own and merge:
            param = lora.merge(param, own)
        kept = quantize_param(name, param, weights) if weights else param
        return Adapted(kept, *own) if own and not merge else kept

    return convert if factors or weights else None


def _named_with(added: Sequence[lora.Lora | control.ControlModule | Draft], loaded: LoadedModel) -> LoadedModel:
    """The model with what was added to it in its name and checksum. Raises UserError for what belongs to another."""
    if not added:
        return loaded
    backbone = fingerprint_of(traverse_util.flatten_dict(loaded.params, sep="/"))
    for one in added:
        if one.backbone not in ("", backbone):
            raise UserError(f"{one.source}: was trained beside other weights (checksum {one.backbone}) than those of "
                            f"{loaded.source} ({backbone})")
    named = [one.source for one in added if one.source != control.OF_PACKAGE]
    return loaded._replace(source=", with ".join([loaded.source, *named]),
                           weights=loaded.weights + "".join(one.checksum for one in added))


def _control_module(config: Config, workdir: Path) -> control.ControlModule | None:
    """That of sample.control or of the workdir, else the package's beside the package's model."""
    if config.sample.control or config.train.target == "control":
        return control.read_module(config, workdir)
    packaged = has_packaged_module(config) and (config.train.target != "all"
                                                or _trained_checkpoint(config, workdir) is None)
    return control.packaged_module(config, PRETRAINED) if packaged else None


def has_packaged_module(config: Config) -> bool:
    """Whether the package's control module fits these settings' model, where no workdir holds another."""
    elsewhere = config.train.target != "all" and config.train.init_from
    return not elsewhere and config.train.target != "student" and is_pretrained(config)


def _decoder(config: Config) -> NamedDecoder | None:
    if not config.sample.decoder:
        return None
    config.sample.require("decoder", config.train.target != "decoder",
                          "the workdir of train.target=decoder has its own; leave it out")
    _settings_named(config, "decoder", "decoder")
    return read_named_decoder(config)


def _with_named_decoder(decoder: NamedDecoder, loaded: LoadedModel, weights: str) -> LoadedModel:
    """weights: `LoadedModel.weights` of the model that it has to be trained beside."""
    decoder.check(loaded.system.codec, weights, loaded.source)
    # It is the system's from here on, whatever way of denoising is asked for then.
    config = changed(loaded.system.config, "sample", {"decoder": ""})
    return loaded._replace(system=placed(dataclasses.replace(loaded.system, config=config, decoder=decoder.params)),
                           source=f"{loaded.source}, with the {decoder.source}",
                           weights=loaded.weights + decoder.checksum)


def _draft(config: Config) -> Draft | None:
    if not config.sample.draft:
        return None
    return read_draft(config, _settings_named(config, "draft", "student"))


def drafting_model(config: Config) -> Model:
    """The sizes of sample.draft's model, whose checkpoints need not be there. Raises UserError for what is no student's
    workdir, or no file of one's block."""
    own = _settings_named(config, "draft", "student")
    return own.model if own else read_draft(config, None).model


def _settings_named(config: Config, name: str, target: str) -> Config | None:
    """Those of the workdir that the setting `name` of sample names; None where it names a file. Raises UserError for a
    workdir that another train.target made."""
    path = Path(getattr(config.sample, name))
    if path.suffix == SUFFIX:
        return None
    own = settings_of(path)
    config.sample.require(name, own.train.target == target, f"is no workdir of train.target={target}")
    return own


def load_encoder(config: Config) -> Params:
    """{"text": parameters} of a frozen text encoder on the mesh in force, quantized as sample.weights says; {} where
    there is none."""
    mesh, weights = sharding.current_mesh(), config.sample.weights

    def placed(name: str, value: np.ndarray) -> Any:
        array: Any = sharding.spread(value, mesh) if mesh else jax.device_put(value)
        return quantize_param(name, array, weights) if weights else array

    return frozen_encoder_params(config, placed)


def abstract_params(config: Config, mesh: Mesh, weights: str) -> Params:
    """What `load_model` gives of flow, denoiser and a trained text encoder on a mesh, in shapes. weights: as
    sample.weights is."""
    params = sharding.layers_as(jax.eval_shape(lambda: init_params(config, jax.random.key(0))),
                                jnp.dtype(config.model.dtype))
    if weights:
        params = jax.eval_shape(partial(quantize_params, weights=weights), params)
    return sharding.abstract(params, mesh)


def load_trained(config: Config, workdir: Path, convert: Convert | None = None) -> LoadedModel | None:
    """A workdir's newest or best checkpoint, its averaged parameters on the mesh in force, without a frozen text
    encoder's; None where there is none.

    convert: see `restore_params`. Raises UserError where it is another model's, and where all checkpoints are damaged.
    """
    folder = _trained_checkpoint(config, workdir)
    return _load_checkpoint(config, workdir, folder, convert) if folder else None


def _trained_checkpoint(config: Config, workdir: Path) -> Path | None:
    if not (workdir / "checkpoints").exists():
        return None
    checkpoints = training.Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints,
                                       model_fingerprint=model_fingerprint(config))
    steps = checkpoints.steps(best=config.sample.checkpoint == "best")
    checkpoints.close()
    step = checksums.first_whole(checkpoints.directory, steps)
    return None if step is None else checkpoints.directory / str(step)


def _load_checkpoint(config: Config, workdir: Path, folder: Path, convert: Convert | None, deep: bool = True
                     ) -> LoadedModel:
    """The model of one of a workdir's checkpoints. deep: with its deep block, or without."""
    return LoadedModel(placed(load_system(config, workdir / "system")),
                       restored_params(config, folder, convert, "" if deep else ALL_BUT_DEEP),
                       f"{workdir}, step {folder.name}", _checksum(folder / checksums.CHECKSUMS))


def load_backbone(config: Config, convert: Convert | None = None, deep: bool = True) -> LoadedModel:
    """The model of train.init_from, or the package's. deep: with its deep block; without, it need not be there. Raises
    UserError where the model is missing, or another config's."""
    if config.train.init_from:
        folder = backbone_checkpoint(config)
        return _load_checkpoint(backbone_config(config), folder.parents[1], folder, convert, deep)
    check_pretrained(config, NO_BACKBONE, "--config.train.init_from")
    return load_pretrained(config, PRETRAINED, convert)


def load_teacher(config: Config) -> LoadedModel:
    """The whole model that a student of these settings was trained beside, as `load_model` gives one."""
    loaded = load_backbone(config, _as_kept(config.sample.weights, {}, merge=False))
    params = inference_params(config, {**loaded.params, **load_encoder(config)})
    return loaded._replace(params=params, system=dataclasses.replace(loaded.system, config=backbone_config(config)))


def load_with_student(config: Config, workdir: Path, convert: Convert | None = None) -> LoadedModel:
    """The model of train.init_from, or the package's, with the smaller deep block that was trained beside it in place
    of its own.

    Raises UserError where one of them is missing, and where the block was trained beside another model.
    """
    folder = whole_beside(config, workdir, backbone_fingerprint(config))
    teacher = load_backbone(config, convert, deep=False)
    system = dataclasses.replace(teacher.system, config=config,
                                 calibration=read_calibration(workdir / "system", config.model))
    block = restored_params(config, folder, convert, DEEP)["flow"]
    return LoadedModel(system, {**teacher.params, "flow": {**teacher.params["flow"], **block}},
                       f"{teacher.source}, with the smaller deep block of {workdir}, step {folder.name}",
                       f"{teacher.weights}{_checksum(folder / checksums.CHECKSUMS)}")


def load_with_decoder(config: Config, workdir: Path, convert: Convert | None = None) -> LoadedModel:
    """The model of train.init_from, or the package's, with the decoder for noised latents that was trained beside it.

    Raises UserError where one of them is missing, and where the decoder was trained beside another model.
    """
    backbone = load_backbone(config, convert)
    decoder, folder = read_decoder(config, workdir, backbone.system.codec, backbone.weights)
    system = dataclasses.replace(backbone.system, decoder=decoder,
                                 calibration=read_calibration(workdir / "system", config.model))
    both = f"{backbone.weights}{_checksum(folder / checksums.CHECKSUMS)}"
    return LoadedModel(placed(system), backbone.params,
                       f"{backbone.source}, with the decoder of {workdir}, step {folder.name}", both)


def backbone_checkpoint(config: Config) -> Path:
    """The checkpoint that train.init_from names. Raises UserError where it holds another model than the config's."""
    folder = whole_checkpoint(Path(config.train.init_from)).absolute()
    training.check_fingerprint(folder.parent / "model.json", model_fingerprint(backbone_config(config)))
    return folder


def backbone_weights(config: Config) -> str:
    """`LoadedModel.weights` of train.init_from's model, or the package's. Raises UserError as loading it would."""
    if config.train.init_from:
        return _checksum(backbone_checkpoint(config) / checksums.CHECKSUMS)
    check_pretrained(config, NO_BACKBONE, "--config.train.init_from")
    return _checksum(PRETRAINED / PRETRAINED_WEIGHTS)


def backbone_checksum(config: Config) -> str:
    """What checkpoints of config.train.target name that model by. Raises UserError as loading it would."""
    return backbone_weights(config) if config.train.target == "decoder" else backbone_fingerprint(config)


def backbone_fingerprint(config: Config) -> str:
    """`fingerprint_of` that model, of which few arrays are read. Raises UserError as loading it would."""
    return fingerprint_of(backbone_arrays(config))


def backbone_arrays(config: Config) -> Mapping[str, Any]:
    """{"flow/deep/...": array} of that model, each read when it is used. Raises UserError as loading it would."""
    if config.train.init_from:
        return parameters.stored_params(backbone_checkpoint(config))
    check_pretrained(config, NO_BACKBONE, "--config.train.init_from")
    return open_safetensors(PRETRAINED / PRETRAINED_WEIGHTS)


def backbone_system(config: Config) -> System:
    """The tokenizer, codec and calibration of that model."""
    workdir = backbone_checkpoint(config).parents[1] if config.train.init_from else None
    return load_system(config, workdir / "system" if workdir else PRETRAINED)


def load_pretrained(config: Config, workdir: Path, convert: Convert | None = None) -> LoadedModel:
    """The same of the pretrained model in the package. Raises UserError where that is another config's."""
    check_pretrained(config, f"{workdir} holds no checkpoint")
    params = placed_params(import_arrays(PRETRAINED / PRETRAINED_WEIGHTS), convert)
    return LoadedModel(placed(load_system(config, PRETRAINED)), params, "the pretrained model",
                       _checksum(PRETRAINED / PRETRAINED_WEIGHTS))


def weights_of(config: Config, workdir: Path) -> str:
    """`LoadedModel.weights` of the model that `load_model` loads, which is not loaded. Raises UserError where that
    would."""
    if config.train.target != "all":
        weights = backbone_weights(config)
    elif folder := _trained_checkpoint(config, workdir):
        weights = _checksum(folder / checksums.CHECKSUMS)
    else:
        check_pretrained(config, f"{workdir} holds no checkpoint")
        weights = _checksum(PRETRAINED / PRETRAINED_WEIGHTS)
    if config.train.target in ("student", "decoder"):
        weights += _checksum(whole_beside(config, workdir, backbone_checksum(config)) / checksums.CHECKSUMS)
    added = (_decoder(config), *lora.read_all(config, workdir), _control_module(config, workdir), _draft(config))
    return weights + "".join(one.checksum for one in added if one)


def system_checksum(config: Config, workdir: Path) -> str:
    """Of the files of its tokenizer, codec, frozen text encoder and calibration, wherever they lie."""
    beside, source = config.train.target != "all", Path(config.train.init_from)
    if not beside:
        folder = workdir / "system" if (workdir / "checkpoints").exists() else PRETRAINED
    elif config.train.init_from:
        folder = (source if (source / "checkpoints").exists() else source.absolute().parents[1]) / "system"
    else:
        folder = PRETRAINED
    calibrated = workdir / "system" if beside else folder
    paths = [*(folder / name for name in (TOKENIZER, FITTED_CODEC)), *(calibrated / name for name in CALIBRATED)]
    paths += [Path(section.weights) for section in (config.text, config.codec) if section.weights]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors*")))]
    held = {file.name: checksums.quick_checksum(file) for file in files}
    return f"{zlib.crc32(json.dumps(held).encode()):08x}"


def _checksum(path: Path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def save_pretrained(config: Config, system: System, params: Params, facts: dict[str, Any]) -> None:
    """Write a model into the package: parameters in float16, the system, and `facts` about its making."""
    PRETRAINED.mkdir(parents=True, exist_ok=True)
    save_system(system, PRETRAINED)
    with checksums_of(PRETRAINED, [PRETRAINED_WEIGHTS, DESCRIPTION]):
        export_arrays(PRETRAINED / PRETRAINED_WEIGHTS, jax.tree.map(np.asarray, params), dtype=np.float16)
        write_text(PRETRAINED / DESCRIPTION, json.dumps({"fingerprint": model_fingerprint(config), **facts}, indent=1))
