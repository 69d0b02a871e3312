"""The decoder for noised latents that --config.train.target=decoder trains beside a model that stays as it is."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from etils import epy
from flax import traverse_util

from starflow_jax.codec.interface import LatentCodec
from starflow_jax.config import Config, UserError
from starflow_jax.model.beside import (
    KINDS,
    SUFFIX,
    checksum_of,
    read_alone,
    read_checkpoint,
    save_alone,
    shapes_of,
    whole_beside,
)
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


@dataclasses.dataclass(frozen=True)
class NamedDecoder:
    """As it was read from where sample.decoder says, in host memory."""

    params: Params
    backbone: str  # LoadedModel.weights of the model that it was trained beside
    source: str

    @property
    def checksum(self) -> str:
        """Equal for equal parameters."""
        return checksum_of(traverse_util.flatten_dict(self.params, sep="/"))

    def check(self, codec: LatentCodec, weights: str, source: str) -> None:
        """Raises UserError for a codec whose decoders have other shapes, and beside another model. weights, source: of
        the model that it is to decode for."""
        found = shapes_of(self.params)
        # Of a VAE's decoder, whose sizes are the VAE's, these say nothing.
        width, *_ = found.get("head/kernel") or (1,)
        layers = len({name.split("/")[0] for name in found if name.startswith("residuals_")})
        fresh = jax.eval_shape(lambda: codec.fresh_decoder(jax.random.key(0), max(1, width), layers))
        if found != shapes_of(fresh):
            raise UserError(f"{self.source}: this decoder is another codec's")
        if self.backbone != weights:
            raise UserError(f"{self.source}: was trained beside other weights (checksum {self.backbone}) than those of "
                            f"{source} ({weights})")


def read_named_decoder(config: Config) -> NamedDecoder:
    """That of sample.decoder: of a workdir, or what `save_decoder` wrote. Raises UserError where it holds none, and
    where it is damaged."""
    path = Path(config.sample.decoder)
    if path.suffix == SUFFIX:
        return NamedDecoder(*read_alone(path, "decoder"), source=f"decoder {path}")
    return _stored(config, path)


def save_decoder(config: Config, workdir: Path, path: Path, dtype: Any = None) -> str:
    """Write a workdir's decoder, and a checksum of what it was trained beside, as one safetensors file; returns what it
    was. dtype: None: as it is kept."""
    found = _stored(config, workdir)
    save_alone(config, path, found.params, found.backbone, dtype)
    return found.source


def _stored(config: Config, workdir: Path) -> NamedDecoder:
    found = read_checkpoint(workdir, config.sample.checkpoint == "best", "decoder")
    return NamedDecoder(found.within("decoder/"), found.backbone, f"decoder {found.source}")
