"""The decoder for noised latents that --config.train.target=decoder trains beside a model that stays as it is."""

from pathlib import Path
from typing import Any

import jax
from etils import epy

from starflow_jax.codec.interface import LatentCodec
from starflow_jax.config import Config, UserError
from starflow_jax.model.beside import check_backbone
from starflow_jax.model.parameters import Params, model_fingerprint

with epy.lazy_imports():
    from starflow_jax.checkpoints import checksums, parameters, training

BEST = "validation_l1"  # of the decoder's validations; the smaller the better


def initial_decoder(config: Config, codec: LatentCodec, key: jax.Array) -> Params:
    """What its training begins with, {"decoder": parameters}, float32."""
    return {"decoder": codec.fresh_decoder(key, config.decoder.width, config.decoder.layers)}


def decoder_fingerprint(config: Config, backbone: str) -> dict[str, Any]:
    """What a decoder's checkpoints depend on. backbone: a checksum of the weights that it was trained beside."""
    sizes = {"width": config.decoder.width, "layers": config.decoder.layers} if config.codec.kind == "patch" else {}
    return {**model_fingerprint(config), "target": "decoder", "decoder": sizes, "backbone": backbone}


def open_decoder_checkpoints(config: Config, workdir: Path, backbone: str) -> "training.Checkpoints":
    """The workdir's. Raises UserError where they are another model's, or were trained beside other weights."""
    check_backbone(workdir, "decoder was", config, backbone)
    return training.Checkpoints(workdir / "checkpoints", keep=config.train.keep_checkpoints, best=BEST,
                                model_fingerprint=decoder_fingerprint(config, backbone))


def whole_decoder(config: Config, workdir: Path, backbone: str) -> Path:
    """The checkpoint of a workdir that its decoder is read from.

    Raises UserError where there is none, where all are damaged, and where it was trained beside other weights.
    """
    if not (workdir / "checkpoints" / "model.json").exists():
        raise UserError(f"{workdir} holds no decoder; train one there with --config.train.target=decoder")
    checkpoints = open_decoder_checkpoints(config, workdir, backbone)
    steps = checkpoints.steps(best=config.sample.checkpoint == "best")
    checkpoints.close()
    step = checksums.first_whole(checkpoints.directory, steps)
    if step is None:
        raise UserError(f"{workdir} holds no checkpoint of a decoder yet; its training goes on with the same command")
    return checkpoints.directory / str(step)


def read_decoder(config: Config, workdir: Path, codec: LatentCodec, backbone: str) -> tuple[Params, Path]:
    """(the averaged parameters of the decoder of a workdir, the checkpoint that they are from). Raises UserError as
    `whole_decoder` does."""
    folder = whole_decoder(config, workdir, backbone)
    abstract = jax.eval_shape(lambda: initial_decoder(config, codec, jax.random.key(0)))
    return parameters.restore_params(folder, abstract)["decoder"], folder
