"""The whole system of a configuration: codec, text encoder and flow, wired together.

`System` holds what is fixed (modules, settings, tokenizer, codec); parameters go in and come out of its
methods, which are pure and can be jitted.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.codec import patch
from starflow_jax.codec.interface import LatentCodec, decode_latents, encode_frames
from starflow_jax.codec.wan_stream import load_codec
from starflow_jax.config import Config, UserError
from starflow_jax.data.batch import Batch
from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.io.files import atomic_path
from starflow_jax.model.parameters import Params, build_flow, build_text_encoder, init_params
from starflow_jax.model.shapes import patch_shape, pixel_frames, prompt_text
from starflow_jax.text.pretrained import load_tokenizer
from starflow_jax.text.t5 import mask_padding
from starflow_jax.text.tokenizer import Tokenizer

# What calibration writes:
FIRST_GUESS, NOISE_GUESS, DECODING = "first_guess.safetensors", "noise_guess.safetensors", "decoding.json"


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Decoding settings measured by --mode=calibrate, under their names in config.Sample; 0: none, a whole frame at a
    time is taken."""

    block_size: int = 0
    frames_per_step: int = 0
    updates: int = 0  # > 0: the wavefront solver
    start: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """A configuration with its tokenizer and fitted codec."""

    config: Config
    tokenizer: Tokenizer
    codec: LatentCodec
    guess: FirstGuess | None = None  # fitted by --mode=calibrate
    calibrated: Calibrated = Calibrated()
    noise_guess: NoiseGuess | None = None  # fitted with it

    @property
    def flow(self) -> STARFlow:
        return build_flow(self.config)

    @property
    def pixel_frames(self) -> int:
        """Frames of a training clip."""
        return pixel_frames(self.config)

    def init(self, seed: int) -> Params:
        """Parameters at the start of training."""
        return init_params(self.config, jax.random.key(seed))

    def prompt(self, caption: str, is_image: bool = False, **told: Any) -> str:
        """The text that the encoder is given for a caption; told: fps and aspect_ratio, else as trained."""
        return prompt_text(self.config, caption, is_image, **told)

    def text_ids(self, prompts: Sequence[str]) -> np.ndarray:
        """(B, text_length) int32."""
        return self.tokenizer.encode(list(prompts), self.config.model.text_length)

    def features(self, params: Params, ids_BS: jax.Array) -> jax.Array:
        """(B, text_length, text_dim), padding zeroed."""
        features: Any = build_text_encoder(self.config).apply({"params": params["text"]}, ids_BS)
        return mask_padding(features, ids_BS)

    def text_of(self, params: Params, text: jax.Array) -> jax.Array:
        """(B, S, D) features of a batch's text: itself where it is features, else of its ids (B, S)."""
        return text if text.ndim == 3 else self.features(params, text)

    def latents_of(self, batch: Batch) -> jax.Array:
        """(B, N, h, w, C) float32 latents of a batch as trained on: prepared ones, or of its frames."""
        if batch.latents_BNhwC is None:
            return batch.without_one_end(self.encode(jnp.asarray(batch.frames_BTHWC)))
        return batch.without_one_end(jnp.asarray(batch.latents_BNhwC, jnp.float32))

    def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
        """uint8 frames -> latents (B, N, h, w, C)."""
        return encode_frames(self.codec, frames_BTHWC, self.config.codec.later_frames_scale)

    def decode(self, latents_BNhwC: jax.Array) -> jax.Array:
        """Latents -> uint8 frames."""
        return decode_latents(self.codec, latents_BNhwC, self.config.codec.later_frames_scale)


def save_system(system: System, folder: Path) -> None:
    """Write the tokenizer and a fitted codec; a VAE's weights stay in the file that codec.weights names."""
    if isinstance(system.codec, patch.PatchCodec):
        codec = {name: getattr(system.codec, name) for name in ("mean_P", "basis_PC", "scale")}
        export_arrays(folder / "codec.safetensors", codec)
    with atomic_path(folder / "tokenizer.model") as path:
        path.write_bytes(system.tokenizer.model)
    if system.guess is not None:
        save_decoding(system, folder)
        return
    for name in (FIRST_GUESS, NOISE_GUESS, DECODING):  # another model's, calibrated in the same folder before
        (folder / name).unlink(missing_ok=True)


def save_decoding(system: System, folder: Path) -> None:
    """Write what calibration found."""
    assert system.guess is not None
    export_arrays(folder / FIRST_GUESS, dataclasses.asdict(system.guess), dtype=np.float16)
    if system.noise_guess is None:
        (folder / NOISE_GUESS).unlink(missing_ok=True)
    else:
        export_arrays(folder / NOISE_GUESS, dataclasses.asdict(system.noise_guess))
    with atomic_path(folder / DECODING) as path:
        path.write_text(json.dumps(dataclasses.asdict(system.calibrated), indent=1))


def load_system(config: Config, folder: Path) -> System:
    """Read what `save_system` wrote. Raises UserError where a file is missing, damaged or of another model."""
    frozen = config.text.encoder == "frozen"
    tokenizer = load_tokenizer(Path(config.text.weights)) if frozen else Tokenizer.load(folder / "tokenizer.model")
    wan = config.codec.kind == "wan"
    codec = load_codec(config.codec, config.model.channels) if wan else _fitted_codec(config, folder)
    guess, noise_guess, calibrated = None, None, Calibrated()
    if (folder / DECODING).exists():
        guess = FirstGuess(**import_arrays(folder / FIRST_GUESS))
        if (folder / NOISE_GUESS).exists():
            noise_guess = NoiseGuess(**import_arrays(folder / NOISE_GUESS))
        calibrated = Calibrated(**json.loads((folder / DECODING).read_text()))
    return System(config, tokenizer, codec, guess, calibrated, noise_guess)


def _fitted_codec(config: Config, folder: Path) -> patch.PatchCodec:
    shape = patch_shape(config)
    arrays = {name: jnp.asarray(value) for name, value in import_arrays(folder / "codec.safetensors").items()}
    codec = patch.PatchCodec(**arrays, shape=shape)
    expected = (shape.pixels, config.model.channels)
    if codec.basis_PC.shape != expected:
        raise UserError(f"{folder / 'codec.safetensors'}: its projection is {codec.basis_PC.shape}, this "
                        f"configuration's is {expected}; use the configuration that made it")
    return codec
