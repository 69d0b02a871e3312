"""--mode=package: put a trained small model into the package, where it serves workdirs without a model."""

from pathlib import Path

from starflow_jax.checkpoints.licences import KEPT, carry_licence
from starflow_jax.config import Config, UserError
from starflow_jax.model.store import PRETRAINED, load_trained, save_pretrained

LARGEST = 15 * 2**20  # bytes that the package may carry


def package(config: Config, workdir: Path) -> None:
    """Write the workdir's averaged parameters, tokenizer, codec, config and the licence of its weights into the
    package.

    Raises UserError where the workdir holds no checkpoint, and where the package grows too large.
    """
    config.sample.require("lora", not config.sample.lora, "the package carries a model alone; leave it out")
    config.train.require("target", config.train.target == "all", "the package carries a whole model")
    trained = load_trained(config, workdir)
    if trained is None:
        raise UserError(f"{workdir} holds no checkpoint to put into the package; train one first")
    system, params, source, _ = trained
    save_pretrained(config, system, params, {"source": f"{config.name}: {source.rsplit(', ', 1)[-1]}"})
    (PRETRAINED / KEPT).unlink(missing_ok=True)  # of the model that was there before
    carry_licence(workdir, PRETRAINED)
    size = sum(path.stat().st_size for path in PRETRAINED.iterdir())
    if size > LARGEST:
        raise UserError(f"{PRETRAINED} is now {size / 2**20:.1f} MiB, more than the {LARGEST / 2**20:.0f} MiB allowed; "
                        "make the model smaller")
    print(f"{PRETRAINED}: {source}, {size / 2**20:.1f} MiB")
