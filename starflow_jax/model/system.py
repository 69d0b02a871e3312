"""The whole system of a config: tokenizer, codec and calibration beside the flow and the text encoder.

A `System` never enters a jitted function: those take arrays and the modules `flow` and `text_encoder`, which for equal
settings compare and hash equal. So a system can be made again, or replaced, without compiling anything again.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epy

from starflow_jax import sharding
from starflow_jax.codec.interface import Decoded, LatentCodec, decode_latents, encode_frames
from starflow_jax.config import Config, UserError
from starflow_jax.data.batch import Batch
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.checksums import checksums_of
from starflow_jax.io.files import atomic_path, write_text
from starflow_jax.model.calibration import Calibration, read_calibration, remove_calibration, save_calibration
from starflow_jax.model.codec import codec_fingerprint, make_codec, pixel_frames, read_codec, save_codec
from starflow_jax.model.parameters import Params, init_params
from starflow_jax.model.sources import data_source
from starflow_jax.model.text import (
    TOKENIZER,
    encode_text,
    make_tokenizer,
    prompt_text,
    read_tokenizer,
    text_encoder,
    text_fingerprint,
)
from starflow_jax.sharding import to_devices
from starflow_jax.text.t5 import T5Encoder
from starflow_jax.text.tokenizer import Tokenizer

with epy.lazy_imports():  # TFDS and grain, which sampling does not need
    from starflow_jax.data import prepared

SETTINGS = "settings.json"


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A config with its tokenizer, its codec and what calibration found; parameters come as arguments."""

    config: Config
    tokenizer: Tokenizer
    codec: LatentCodec
    calibration: Calibration = Calibration()
    encoded: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # features of whole prompts, made ahead
    decoder: Params | None = None  # the codec's, fine-tuned on noised latents; where train.target=decoder trained one

    @property
    def flow(self) -> STARFlow:
        return STARFlow(self.config.model)

    @property
    def text_encoder(self) -> T5Encoder:
        return text_encoder(self.config)

    @property
    def as_released(self) -> bool:
        """Whether sampling follows the release's own program in its details (docs: released weights)."""
        return self.config.sample.as_released

    @property
    def pixel_frames(self) -> int:
        """Frames of a training clip."""
        return pixel_frames(self.config)

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of a frame's tokens."""
        return self.config.model.token_grid

    def init(self, seed: int) -> Params:
        """Parameters at the start of training."""
        return init_params(self.config, jax.random.key(seed))

    def prompt(self, caption: str, is_image: bool = False, fps: int = 0, aspect_ratio: str = "") -> str:
        """The text that the encoder is given for a caption; fps and aspect ratio are as trained by default."""
        return prompt_text(self.config, caption, is_image, fps, aspect_ratio)

    def text_ids(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids of prompts, (B, text_length) int32."""
        return self.tokenizer.encode(list(prompts), self.config.model.text_length)

    def features(self, params: Params, ids_BS: jax.Array | np.ndarray) -> jax.Array:
        """Text features of token ids, (B, text_length, text_dim), padding zeroed."""
        return encode_text(self.text_encoder, params["text"], ids_BS)

    def prompt_features(self, params: Params, prompts: Sequence[str]) -> jax.Array:
        """(B, text_length, text_dim) features of whole prompts: those made ahead, or else encoded."""
        if self.encoded and all(prompt in self.encoded for prompt in prompts):
            return jnp.asarray(np.stack([self.encoded[prompt] for prompt in prompts]))
        return self.features(params, self.text_ids(prompts))

    def caption_features(self, params: Params, captions: Sequence[str], is_image: bool = False) -> jax.Array:
        """(B, text_length, text_dim) features of captions with the metadata of training."""
        return self.prompt_features(params, [self.prompt(caption, is_image) for caption in captions])

    def text_of(self, params: Params, text: jax.Array) -> jax.Array:
        """(B, S, D) features of a batch's text, which is features already or token ids (B, S)."""
        return text if text.ndim == 3 else self.features(params, text)

    def latents_of(self, batch: Batch) -> jax.Array:
        """(B, N, h, w, C) float32 latents of a batch as trained on: the prepared ones, or those of its frames."""
        return _latents_of(self.codec, batch, self.config.codec.later_frames_scale)

    def encode(self, frames_BTHWC: jax.Array | np.ndarray) -> jax.Array:
        """uint8 frames -> latents (B, N, h, w, C) float32."""
        return encode_frames(to_devices(self.codec), frames_BTHWC, self.config.codec.later_frames_scale)

    def codec_behind(self, denoise: str) -> LatentCodec:
        """The codec that decodes latents which went through a way of denoising, of sample.denoise: with `decoder` they
        still have their noise. Raises UserError where the model has no such decoder."""
        if denoise != "decoder":
            return self.codec
        if self.decoder is None:
            raise UserError("sample.denoise=decoder: this model has no decoder for noised latents; name one with "
                            "--config.sample.decoder=WORKDIR or FILE (sf.load: decoder), or train one with "
                            "--config.train.target=decoder --config.train.init_from=WORKDIR in a workdir of its own")
        return self.codec.with_decoder(self.decoder)

    def decode(self, latents_BNhwC: jax.Array | np.ndarray, denoise: str = "none") -> jax.Array:
        """Latents -> frames (B, T, H, W, 3) uint8. denoise: as for `codec_behind`."""
        return self.decoded(latents_BNhwC, denoise).frames_BTHWC

    def decoded(self, latents_BNhwC: jax.Array | np.ndarray, denoise: str = "none") -> Decoded:
        """The same, and whether they are finite."""
        codec = to_devices(self.codec_behind(denoise), after=latents_BNhwC)
        return decode_latents(codec, latents_BNhwC, self.config.codec.later_frames_scale, self.as_released)


@jax.jit
def _latents_of(codec: LatentCodec, batch: Batch, later_scale: float) -> jax.Array:
    if batch.latents_BNhwC is None:
        assert batch.frames_BTHWC is not None
        return batch.without_one_end(encode_frames(codec, batch.frames_BTHWC, later_scale))
    return batch.without_one_end(batch.latents_BNhwC.astype(jnp.float32))


def make_system(config: Config) -> System:
    """The codec, loaded or fitted to the training clips, and the tokenizer, loaded or trained on their captions;
    deterministic."""
    return System(config, make_tokenizer(config), make_codec(config))


def save_settings(config: Config, folder: Path) -> None:
    """Write all settings; model/own_settings.py reads them."""
    with checksums_of(folder, [SETTINGS]):
        write_text(folder / SETTINGS, json.dumps(dataclasses.asdict(config), indent=1))


def save_system(system: System, folder: Path) -> None:
    """Write the settings, the tokenizer, a fitted codec and the calibration; a VAE's weights stay in the file that
    codec.weights names."""
    save_codec(system.codec, folder)
    save_settings(system.config, folder)
    with checksums_of(folder, [TOKENIZER]), atomic_path(folder / TOKENIZER) as path:
        path.write_bytes(system.tokenizer.model)
    if system.calibration.first_guess is not None:
        save_calibration(system.calibration, folder)
    else:  # another model may have been calibrated in the same folder before
        remove_calibration(folder)


def load_system(config: Config, folder: Path) -> System:
    """Read what `save_system` wrote. Raises UserError where a file is missing, damaged or another model's."""
    return System(config, read_tokenizer(config, folder), read_codec(config, folder),
                  read_calibration(folder, config.model))


def placed(system: System) -> System:
    """With a copy of the codec, and of a decoder trained for it, on every device of the mesh in force."""
    mesh = sharding.current_mesh()
    if mesh is None:
        return system
    codec, decoder = jax.device_put((system.codec, system.decoder), sharding.replicated(mesh))
    return dataclasses.replace(system, codec=codec, decoder=decoder)


def training_source(system: System, split: str = "train") -> Sequence[dict[str, Any]]:
    """A split's examples as training takes them: with data.latents their prepared latents and, for a frozen text
    encoder, their features."""
    config = system.config
    if not config.data.latents:
        return data_source(config, split)
    features_by = text_fingerprint(config) if config.text.encoder == "frozen" else None
    return prepared.source(config.data.directory, split, latents_by=codec_fingerprint(config, system.codec),
                           features_by=features_by)
