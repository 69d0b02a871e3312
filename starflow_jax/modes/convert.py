"""--mode=convert: released weights and other workdirs -> workdirs, and back to the release's names.

A workdir made of a release holds all that sampling needs: the flow as a checkpoint, every setting, the VAE and the text
encoder or where it lies, and the licence. Array by array: no more than one of our parameters (all layers of a kind,
stacked) is in memory.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from starflow_jax.checkpoints import peft
from starflow_jax.checkpoints.growth import Change
from starflow_jax.checkpoints.licences import KEPT, beside, keep_licence, licence_text
from starflow_jax.checkpoints.parameters import newest_first, save_params, stored_params
from starflow_jax.checkpoints.released import flow_shapes, stack_released, unstack_to_released
from starflow_jax.checkpoints.torch_files import open_weights
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.codec.wan_weights import STATISTICS
from starflow_jax.config import Config, Convert, UserError, changed
from starflow_jax.io.checksums import CHECKSUMS, checksums_of
from starflow_jax.io.files import atomic_path, check_writable, size_in_words, write_text
from starflow_jax.io.hub import on_disk
from starflow_jax.io.progress import ProgressBar, table
from starflow_jax.io.tensor_files import StoredArray, check_shapes, write_safetensors
from starflow_jax.model.calibration import CALIBRATED
from starflow_jax.model.codec import FITTED_CODEC, released_codec, sizes_of_codec
from starflow_jax.model.control import save_module
from starflow_jax.model.decoder import save_decoder
from starflow_jax.model.initialise import inherited_arrays, is_ours, whole_checkpoint
from starflow_jax.model.lora import read_workdir
from starflow_jax.model.own_settings import PRETRAINED, check_pretrained, own_settings, settings_of
from starflow_jax.model.parameters import model_fingerprint
from starflow_jax.model.store import backbone_arrays
from starflow_jax.model.student import save_block
from starflow_jax.model.system import save_settings
from starflow_jax.model.text import TOKENIZER
from starflow_jax.modes.alone import alone_in
from starflow_jax.text.pretrained import encoder_channels

PACKAGED = "pretrained"  # convert.source: the model in the package
UNFINISHED = ".converting"  # in a workdir until all of it is there
VAE, TEXT_ENCODER = "vae.safetensors", "text_encoder"  # in WORKDIR/system


def convert(config: Config, workdir: Path) -> None:
    """config.convert.source -> a workdir that samples, with the VAE of convert.codec and the encoder of convert.text;
    the workdir's newest checkpoint -> config.convert.target.

    Raises UserError for a source or target that can't be, for tensors that are not this config's, and where another run
    has the workdir.
    """
    settings = config.convert
    if not (settings.source or settings.target or settings.codec):
        raise UserError("there is nothing to convert; name released weights with --config.convert.source=FILE_OR_DIR, "
                        "or a file to write them to with --config.convert.target=FILE.safetensors")
    if settings.target and not settings.target.endswith(".safetensors"):
        raise UserError(f"convert.target={settings.target!r}: must end in .safetensors")
    settings.require("alone", bool(settings.target) or not settings.alone, "needs convert.target")
    if settings.target:
        target = Path(settings.target)
        check_writable(target.parent, "convert.target", [target.name])
    if settings.source == PACKAGED:
        check_pretrained(config, f"convert.source={PACKAGED}", "--config.convert.source")
        config = dataclasses.replace(settings_of(PRETRAINED), convert=settings)
    config = with_sizes_of_files(with_hub_files(config))
    settings = config.convert
    # Both are opened and checked before anything is written.
    source = open_source(config) if settings.source else None
    vae = read_vae(config, workdir) if settings.codec else None
    with alone_in(workdir) if source else contextlib.nullcontext():
        if source:
            _begin(workdir)
            write_checkpoint(config, workdir, source)
        if vae:
            config = write_vae(config, workdir, *vae)
        if source:
            write_system(config, workdir, source.system)
            keep_licences(config, workdir, source.licence)
            (workdir / UNFINISHED).unlink(missing_ok=True)
    if settings.target:
        config = own_settings(config, workdir)[0]
        config.convert.require("alone", not settings.alone or config.train.target != "all",
                               f"{workdir} holds a whole model; name the workdir of a smaller deep block "
                               "(train.target=student)")
        write = {"lora": write_adapter, "control": write_alone, "decoder": write_alone}.get(
            config.train.target, write_alone if settings.alone else write_released)
        write(config, workdir)


def _begin(workdir: Path) -> None:
    """Mark the workdir as unfinished; where it is already, what a conversion left that failed or was killed goes."""
    made = newest_first(workdir / "checkpoints")
    if (workdir / UNFINISHED).exists() and made == [0]:
        shutil.rmtree(workdir / "checkpoints" / "0")
    elif not made:
        write_text(workdir / UNFINISHED, "")


def with_hub_files(config: Config) -> Config:
    """The settings with names on a model hub as the files that they are."""
    names = ("source", "text", "codec", "statistics")
    files = {name: on_disk(getattr(config.convert, name), f"convert.{name}") for name in names}
    return changed(config, "convert", files)


def with_sizes_of_files(config: Config) -> Config:
    """The settings with the sizes that the given text encoder and VAE have."""
    text, codec = config.convert.text or config.text.weights, config.convert.codec
    if text and config.text.encoder == "frozen":
        config = changed(config, "text", {"weights": str(Path(text).absolute())})
        if config.convert.source:
            config = changed(config, "model", {"text_dim": encoder_channels(Path(text))})
    if codec:
        tensors = open_weights(Path(codec), _vae_prefix(config))
        config = changed(config, "codec", sizes_of_codec(config, tensors, Path(codec)))
    return config


def _vae_prefix(config: Config) -> str:
    """convert.prefix is the flow's where both are converted."""
    return "" if config.convert.source else config.convert.prefix


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a flow comes from."""

    params: dict[str, Any]  # by our names, each read when it is asked for
    licence: Path | None  # beside what it lies; None: it has none
    changes: list[Change] = dataclasses.field(default_factory=list)  # what was changed of another workdir's
    system: list[Path] = dataclasses.field(default_factory=list)  # files of its tokenizer, codec and calibration


def open_source(config: Config) -> Source:
    """convert.source: the package's model, another workdir, or released weights. Raises UserError where it holds no
    flow of this config's."""
    path = Path(config.convert.source)
    if config.convert.source == PACKAGED:
        return _packaged(config)
    if is_ours(path):
        params, changes = inherited_arrays(config, path)
        theirs = (path if (path / "checkpoints").is_dir() else path.absolute().parent.parent) / "system"
        kept = (TOKENIZER, FITTED_CODEC) if config.text.encoder == "trained" else ()
        return Source(params, path, changes, _those_there(theirs, kept))
    found = stack_released(open_weights(path, config.convert.prefix), config.model, str(path))
    if config.text.encoder == "trained" and config.model.text_length:
        raise UserError(f"{path}: released weights hold no text encoder; set --config.text.encoder=frozen and "
                        "--config.text.weights=DIR")
    return Source({name if name.startswith("denoiser/") else f"flow/{name}": array for name, array in found.items()},
                  path)


def _packaged(config: Config) -> Source:
    # It lies there in half the bytes that training has, and has a licence only if it was made of others' weights.
    params = {name: _cast(array, "float32") for name, array in backbone_arrays(config).items()}
    return Source(params, PRETRAINED if (PRETRAINED / KEPT).exists() else None,
                  system=_those_there(PRETRAINED, (TOKENIZER, FITTED_CODEC, *CALIBRATED)))


def _those_there(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def write_checkpoint(config: Config, workdir: Path, flow: Source) -> None:
    """The parameters as the workdir's checkpoint of step 0, which sampling and evaluation read and training begins
    with (train.init_from)."""
    source = config.convert.source
    arrays = {name: _cast(array, config.convert.dtype) for name, array in flow.params.items()}
    _check_room(workdir, sum(array.nbytes for array in arrays.values()))
    directory = workdir / "checkpoints"
    # Refuses a folder of another model, and marks a new one as this model's.
    Checkpoints(directory, keep=config.train.keep_checkpoints, model_fingerprint=model_fingerprint(config)).close()
    with ProgressBar("convert", len(arrays), unit="array") as progress:
        save_params(directory, {name: _counted(array, progress) for name, array in arrays.items()},
                    {"converted_from": source})
    facts: dict[str, Any] = {
        "source": source, "parameters": sum(array.size for array in arrays.values()),
        "bytes": sum(array.nbytes for array in arrays.values()),
        "changes": [dict(zip(("setting", "from", "to", "effect"), change)) for change in flow.changes]}
    with atomic_path(workdir / "converted.json") as path:
        path.write_text(json.dumps(facts, indent=1))
    if flow.changes:
        print(table(flow.changes, ("setting", "source", "here", "what it does")))
    print(f"{source} -> {directory / '0'}: {facts['parameters']:,} parameters, {size_in_words(facts['bytes'])}")


def read_vae(config: Config, workdir: Path) -> tuple[dict[str, Any], Path]:
    """(the VAE's tensors under their own names with its channel statistics, the file to write: that of codec.weights
    or, where it names none, one in the workdir)."""
    source, settings = Path(config.convert.codec), config.convert
    target = Path(config.codec.weights or workdir / "system" / VAE)
    if config.codec.kind == "patch" or target.suffix != ".safetensors":
        raise UserError(f"convert.codec: needs codec.kind=wan or kl (it is {config.codec.kind}) and the file to write, "
                        f"--config.codec.weights=FILE.safetensors (it is {config.codec.weights!r})")
    tensors = released_codec(config, open_weights(source, _vae_prefix(config)), source, settings.statistics)
    return {name: tensor if name in STATISTICS else _cast(tensor, settings.dtype)
            for name, tensor in tensors.items()}, target


def write_vae(config: Config, workdir: Path, tensors: dict[str, Any], target: Path) -> Config:
    """Returns the settings that name the file."""
    source = Path(config.convert.codec)
    ours = target.parent.absolute() == (workdir / "system").absolute()  # not a folder of the user's
    with checksums_of(target.parent, [target.name]) if ours else contextlib.nullcontext():
        _write(target, tensors)
    text, lines = licence_text({"the VAE": source})
    if not config.convert.source:
        print("\n".join(lines))
    keep_licence(text, beside(target))
    print(f"{source} -> {target}: {_size(tensors)}")
    return changed(config, "codec", {"weights": str(target)})


def write_system(config: Config, workdir: Path, files: list[Path]) -> None:
    """Every setting, as WORKDIR/system/settings.json, with the text encoder and the VAE or their places, and the files
    of the source's system."""
    folder = workdir / "system"
    folder.mkdir(parents=True, exist_ok=True)
    if files:
        _copy(files, folder)
    if config.text.weights and config.convert.copy:
        _copy([path for path in Path(config.text.weights).iterdir() if path.is_file()], folder / TEXT_ENCODER)
        config = changed(config, "text", {"weights": TEXT_ENCODER})
    vae = Path(config.codec.weights)
    if config.codec.weights and vae.parent.absolute() != folder.absolute():
        if config.convert.copy:
            _copy([vae], folder, VAE)
        config = changed(config, "codec", {"weights": VAE if config.convert.copy else str(vae.absolute())})
    elif config.codec.weights:
        config = changed(config, "codec", {"weights": vae.name})
    save_settings(dataclasses.replace(config, convert=Convert()), folder)
    missing = [f"--config.{name}=..." for name, held in (
        ("text.weights", config.text.weights or config.text.encoder != "frozen"),
        ("codec.weights", config.codec.weights or config.codec.kind == "patch")) if not held]
    print(f"settings -> {folder}" + (f"; sampling still needs {' and '.join(missing)}" if missing else
                                     f"; sample with --mode=sample --workdir={workdir} --config.sample.prompt=..."))


def _copy(files: list[Path], folder: Path, name: str = "") -> None:
    """Files, or the one file under another name, into a folder of the workdir."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name or path.name: path for path in files if path.name != CHECKSUMS}
    with checksums_of(folder, names):
        for kept, path in names.items():
            with atomic_path(folder / kept) as arriving:
                shutil.copy2(path, arriving)


def keep_licences(config: Config, workdir: Path, of_flow: Path | None) -> None:
    """The licences of all that the workdir was made of, shown and kept in it."""
    asked = config.convert
    given = {"the flow": str(of_flow or ""), "the VAE": asked.codec,
             "the text encoder": asked.text or config.text.weights}
    if not any(given.values()):
        return
    text, lines = licence_text({what: Path(source) for what, source in given.items() if source})
    print("\n".join(lines))
    keep_licence(text, workdir / KEPT)
    print(f"kept in {workdir / KEPT}")


def write_released(config: Config, workdir: Path) -> None:
    """The workdir's newest averaged parameters as one safetensors file under the release's names; of a student with the
    rest of its teacher, a whole model."""
    target = Path(config.convert.target)
    arrays: Mapping[str, Any] = stored_params(whole_checkpoint(workdir))
    if config.train.target == "student":
        arrays = {**backbone_arrays(config), **arrays}
    flow = {name.removeprefix("flow/"): array for name, array in arrays.items() if not name.startswith("text/")}
    check_shapes(str(workdir), flow, flow_shapes(config.model))
    tensors = unstack_to_released({name: _cast(array, config.convert.dtype) for name, array in flow.items()},
                                  config.model)
    _write(target, tensors)
    if (workdir / KEPT).exists():
        keep_licence((workdir / KEPT).read_text(encoding="utf-8", errors="replace"), beside(target))
    print(f"{workdir} -> {target}: {_size(tensors)}")


def write_adapter(config: Config, workdir: Path) -> None:
    """The workdir's newest averaged LoRA factors as PEFT keeps them."""
    target = Path(config.convert.target)
    config.convert.require("target", target.name == peft.WEIGHTS, f"PEFT reads {peft.WEIGHTS} alone; name that, in a "
                           "folder of its own")
    scale = config.lora.alpha / config.lora.rank
    lora = read_workdir(workdir, best=config.sample.checkpoint == "best")
    factors = {name: (a, b / np.float32(scale)) for name, (a, b) in lora.factors.items()}
    tensors = peft.write_peft(target, factors, config.model, rank=config.lora.rank, alpha=config.lora.alpha,
                              backbone=lora.backbone, base=config.train.init_from or config.name)
    if (workdir / KEPT).exists():
        keep_licence((workdir / KEPT).read_text(encoding="utf-8", errors="replace"), beside(target))
    print(f"{lora.source} -> {target}: {_size(tensors)}; it is added to its model with --config.sample.lora={target}")


def write_alone(config: Config, workdir: Path) -> None:
    """The workdir's newest averaged control module, decoder or smaller deep block, with the checksum of what it was
    trained beside."""
    target, dtype = Path(config.convert.target), config.convert.dtype
    save, use = {"control": (save_module, "its model follows a camera with it by --config.sample.control={}"),
                 "student": (save_block, "it drafts for its teacher by --config.sample.draft={}"),
                 "decoder": (save_decoder, "its model decodes with it by --config.sample.denoise=decoder "
                                           "--config.sample.decoder={}")}[config.train.target]
    source = save(config, workdir, target, None if dtype == "stored" else jnp.dtype(dtype))
    if (workdir / KEPT).exists():
        keep_licence((workdir / KEPT).read_text(encoding="utf-8", errors="replace"), beside(target))
    print(f"{source} -> {target}: {size_in_words(target.stat().st_size)}; {use.format(target)}")


def _write(target: Path, tensors: Mapping[str, Any]) -> None:
    _check_room(target.absolute().parent, sum(tensor.nbytes for tensor in tensors.values()))
    with ProgressBar("convert", len(tensors), unit="tensor") as progress:
        write_safetensors(target, {name: _counted(tensor, progress) for name, tensor in tensors.items()})


def _size(tensors: Mapping[str, Any]) -> str:
    return f"{len(tensors)} tensors, {size_in_words(sum(tensor.nbytes for tensor in tensors.values()))}"


def _cast(array: Any, dtype: str) -> StoredArray:
    kept = array.dtype if dtype == "stored" else jnp.dtype(dtype)
    return StoredArray(array.shape, kept, lambda: np.asarray(array, kept))


def _counted(array: StoredArray, progress: ProgressBar) -> StoredArray:
    def read() -> np.ndarray:
        progress.update()
        return np.asarray(array)

    return StoredArray(array.shape, array.dtype, read)


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        # What is missing is said too: rounded, the two may look alike.
        raise UserError(f"{folder}: {size_in_words(needed)} are needed and {size_in_words(free)} free, "
                        f"{size_in_words(needed - free)} too little; make room, or write half as much with "
                        "--config.convert.dtype=bfloat16")
