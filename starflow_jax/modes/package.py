"""--mode=package: put a trained small model into the package, where it serves workdirs without a model; or the control
module that was trained beside it."""

from pathlib import Path

from starflow_jax.checkpoints.licences import KEPT, carry_licence
from starflow_jax.config import Config, UserError
from starflow_jax.io.arrays import import_with_metadata
from starflow_jax.io.checksums import checksums_of
from starflow_jax.io.tensor_files import open_safetensors
from starflow_jax.model.beside import fingerprint_of
from starflow_jax.model.control import PACKAGED, save_packaged
from starflow_jax.model.own_settings import PRETRAINED, PRETRAINED_WEIGHTS
from starflow_jax.model.store import load_model, load_trained, save_pretrained

LARGEST = 15 * 2**20  # bytes that the package may carry


def package(config: Config, workdir: Path) -> None:
    """Write the workdir's averaged parameters, tokenizer, codec, config and the licence of its weights into the
    package.

    Raises UserError where the workdir holds no checkpoint, and where the package grows too large.
    """
    for name in ("lora", "draft", "decoder"):
        config.sample.require(name, not getattr(config.sample, name), "the package carries a model alone; leave it out")
    config.sample.require("control", not config.sample.control, "name its workdir with --workdir instead")
    config.train.require("target", config.train.target in ("all", "control"),
                         "the package carries a whole model, and a control module beside it")
    source = package_control(config, workdir) if config.train.target == "control" else package_model(config, workdir)
    size = sum(path.stat().st_size for path in PRETRAINED.iterdir())
    if size > LARGEST:
        raise UserError(f"{PRETRAINED} is now {size / 2**20:.1f} MiB, more than the {LARGEST / 2**20:.0f} MiB allowed; "
                        "make the model smaller")
    print(f"{PRETRAINED}: {source}, {size / 2**20:.1f} MiB")


def package_control(config: Config, workdir: Path) -> str:
    """The workdir's averaged control module, beside the package's model. Raises UserError for another model's."""
    load_model(config, workdir, encoder=False)  # which checks that it belongs to its model
    config.train.require("init_from", not config.train.init_from, "the package carries the control module of its model")
    return save_packaged(config, workdir, PRETRAINED)


def package_model(config: Config, workdir: Path) -> str:
    """The workdir's model in place of the package's."""
    trained = load_trained(config, workdir)
    if trained is None:
        raise UserError(f"{workdir} holds no checkpoint to put into the package; train one first")
    system, params, source, _ = trained
    (PRETRAINED / KEPT).unlink(missing_ok=True)  # of the model that was there before
    save_pretrained(config, system, params, {"source": f"{config.name}: {source.rsplit(', ', 1)[-1]}"})
    carry_licence(workdir, PRETRAINED)
    _remove_control_of_another(fingerprint_of(open_safetensors(PRETRAINED / PRETRAINED_WEIGHTS)))  # as rounded there
    return source


def _remove_control_of_another(backbone: str) -> None:
    """Where the package has a control module that was trained beside another model than this one."""
    path = PRETRAINED / PACKAGED
    if path.exists() and import_with_metadata(path)[1].get("backbone") != backbone:
        with checksums_of(PRETRAINED, [PACKAGED]):
            path.unlink()
        print(f"{path}: removed, it was trained beside the model that was there before")
