"""The decoder for noised latents that --config.train.target=decoder trains beside a model that stays as it is."""

from pathlib import Path

import jax
from etils import epy

from starflow_jax.codec.interface import LatentCodec
from starflow_jax.config import Config
from starflow_jax.model.beside import KINDS, whole_beside
from starflow_jax.model.parameters import Params

with epy.lazy_imports():
    from starflow_jax.checkpoints import parameters

BEST = KINDS["decoder"].best


def initial_decoder(config: Config, codec: LatentCodec, key: jax.Array) -> Params:
    """What its training begins with, {"decoder": parameters}, float32."""
    return {"decoder": codec.fresh_decoder(key, config.decoder.width, config.decoder.layers)}


def read_decoder(config: Config, workdir: Path, codec: LatentCodec, backbone: str) -> tuple[Params, Path]:
    """(the averaged parameters of the decoder of a workdir, the checkpoint that they are from). Raises UserError as
    `whole_beside` does."""
    folder = whole_beside(config, workdir, backbone)
    abstract = jax.eval_shape(lambda: initial_decoder(config, codec, jax.random.key(0)))
    return parameters.restore_params(folder, abstract)["decoder"], folder
