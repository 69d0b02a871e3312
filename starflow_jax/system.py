"""The whole system of a configuration: codec, text encoder and flow, wired together.

`System` holds what is fixed (modules, settings, tokenizer, codec); parameters go in and come out of its
methods, which are pure and can be jitted.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.checkpoint import export_arrays, import_arrays
from starflow_jax.codec import patch
from starflow_jax.codec.interface import LatentCodec, decode_latents, encode_frames
from starflow_jax.codec.wan_stream import load_codec
from starflow_jax.config import Config, UserError
from starflow_jax.data import moving_digits, prepared
from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.nn.transformer import unstacked
from starflow_jax.optimizer import Params, TrainState, create_state
from starflow_jax.text.pretrained import encoder_config, load_tokenizer
from starflow_jax.text.prompt import EXTEND, format_prompt
from starflow_jax.text.t5 import T5Config, T5Encoder, mask_padding
from starflow_jax.text.tokenizer import Tokenizer, train_tokenizer
from starflow_jax.video_io import atomic_path

FITTED_CLIPS = 1_000  # training clips that the patch codec is fitted to
# What calibration writes:
FIRST_GUESS, NOISE_GUESS, DECODING = "first_guess.safetensors", "noise_guess.safetensors", "decoding.json"
TOKENIZED_CLIPS = 3_000  # training clips whose captions the tokenizer is trained on


def model_fingerprint(config: Config) -> dict[str, Any]:
    """What a checkpoint's parameters depend on; a workdir holds one such model."""
    model = dataclasses.asdict(config.model)
    for name in ("dtype", "remat", "parted_attention", "unroll_layers"):
        del model[name]
    text = dataclasses.asdict(config.text)
    del text["weights"]  # where they lie
    codec = {name: getattr(config.codec, name) for name in ("kind", "stride", "time_stride", "later_frames_scale")}
    return json.loads(json.dumps({"model": model, "text": text, "codec": codec}))


def build_flow(config: Config) -> STARFlow:
    return STARFlow(config.model)


def build_text_encoder(config: Config) -> T5Encoder:
    """The small T5 that is trained along with the flow, or the frozen one of text.weights."""
    text = config.text
    if text.encoder == "frozen":
        t5 = encoder_config(Path(text.weights), config.model.text_dim)
        return T5Encoder(t5, dtype=jnp.dtype(config.model.dtype))
    t5 = T5Config(vocab_size=text.vocab_size, d_model=text.d_model, d_kv=text.d_kv, d_ff=text.d_ff,
                  num_layers=text.layers, num_heads=text.heads)
    return T5Encoder(t5, dtype=jnp.dtype(config.model.dtype))


def pixel_frames(config: Config) -> int:
    """Frames of a training clip in pixels."""
    return 1 + (config.model.frames - 1) * config.codec.time_stride


def prompt_text(config: Config, caption: str, is_image: bool = False, fps: int = 0, aspect_ratio: str = "") -> str:
    """A caption with its metadata, as the text encoder is given it; fps and aspect ratio: as trained by default."""
    return format_prompt(caption, fps=0 if is_image else fps or config.text.fps,
                         aspect_ratio=aspect_ratio or config.text.aspect_ratio)


def patch_shape(config: Config) -> patch.PatchShape:
    return patch.PatchShape(config.codec.time_stride, config.codec.stride)


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

    def text_of(self, params: Params, batch: dict[str, Any]) -> jax.Array:
        """A batch's features: prepared, or of its ids."""
        return batch["features_BSD"] if "features_BSD" in batch else self.features(params, batch["text_ids_BS"])

    def latents_of(self, batch: dict[str, Any]) -> jax.Array:
        """A batch's latents, float32: prepared, or of its frames."""
        if "latents_BNhwC" in batch:
            return jnp.asarray(batch["latents_BNhwC"], jnp.float32)
        return self.encode(jnp.asarray(batch["frames_BTHWC"]))

    def encode(self, frames_BTHWC: jax.Array) -> jax.Array:
        """uint8 frames -> latents (B, N, h, w, C)."""
        return encode_frames(self.codec, frames_BTHWC, self.config.codec.later_frames_scale)

    def decode(self, latents_BNhwC: jax.Array) -> jax.Array:
        """Latents -> uint8 frames."""
        return decode_latents(self.codec, latents_BNhwC, self.config.codec.later_frames_scale)


def flow_variables(params: Params) -> dict[str, Any]:
    """What STARFlow's methods take: the flow's parameters and the denoiser's."""
    denoiser = {"denoiser": params["denoiser"]} if "denoiser" in params else {}
    return {"params": {**params["flow"], **denoiser}}


def decoding_variables(config: Config, params: Params) -> dict[str, Any]:
    """What decoding takes, the flow's parameters; their layers one by one where the configuration unrolls them."""
    variables = {"params": params["flow"]}
    return jax.jit(unstacked)(variables) if config.model.unroll_layers else variables


def init_params(config: Config, key: jax.Array) -> Params:
    """Fresh parameters; pure, so that jax.eval_shape gives a full-size model's shapes without its memory."""
    model = config.model
    flow_key, text_key = jax.random.split(key)
    x = jnp.zeros((1, model.frames, model.height, model.width, model.channels))
    text = jnp.zeros((1, model.text_length, model.text_dim)) if model.text_length else None
    flow = dict(build_flow(config).init(flow_key, x, text)["params"])
    params: Params = {}
    if "denoiser" in flow:
        params["denoiser"] = flow.pop("denoiser")
    params["flow"] = flow
    if config.text.encoder == "trained" and model.text_length:
        ids = jnp.zeros((1, model.text_length), jnp.int32)
        params["text"] = build_text_encoder(config).init(text_key, ids)["params"]
    return params


def abstract_state(config: Config) -> TrainState:
    """Shapes and dtypes of a training state."""
    return jax.eval_shape(lambda: create_state(init_params(config, jax.random.key(0)), config.train))


def data_source(config: Config, split: str) -> Sequence[dict[str, Any]]:
    """The examples of the built-in data set, made on first use, or prepared ones; recorded one latent frame longer
    than trained on."""
    data, stride = config.data, config.codec.time_stride
    if data.source == "prepared":
        return prepared.source(data.directory, split)
    settings = moving_digits.MovingDigitsConfig(
        size=data.size, digit_size=data.digit_size, frames=1 + config.model.frames * stride,
        train_clips=data.train_clips, validation_clips=data.validation_clips, test_clips=data.test_clips)
    return moving_digits.source(settings, split, data.directory or default_data_directory())


def training_source(system: System, split: str = "train") -> Sequence[dict[str, Any]]:
    """A split's examples as training takes them: with data.latents their prepared latents and, of a frozen text
    encoder, features."""
    config = system.config
    if not config.data.latents:
        return data_source(config, split)
    features_by = text_fingerprint(config) if config.text.encoder == "frozen" else None
    return prepared.source(config.data.directory, split, latents_by=codec_fingerprint(system), features_by=features_by)


def codec_fingerprint(system: System) -> dict[str, Any]:
    """What prepared latents depend on."""
    settings = {name: value for name, value in dataclasses.asdict(system.config.codec).items() if name != "weights"}
    return {**settings, "arrays": digest(system.codec)}


def text_fingerprint(config: Config) -> dict[str, Any]:
    """What prepared features of a text encoder depend on, but its weights; each is found by its whole prompt."""
    sizes = {name: value for name, value in dataclasses.asdict(config.text).items()
             if name not in ("fps", "aspect_ratio", "weights")}
    return {**sizes, "text_length": config.model.text_length}


def digest(arrays: Any) -> str:
    """A short hash of a tree of arrays."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()[:16]


def default_data_directory() -> str:
    """A cache folder of the user's."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "starflow_jax", "data")


def make_system(config: Config) -> System:
    """Load codec and tokenizer, or fit them to the training clips and train it on their captions; deterministic."""
    return System(config, make_tokenizer(config), make_codec(config))


def make_codec(config: Config) -> LatentCodec:
    """The VAE of codec.weights, or a codec fitted to training clips."""
    if config.codec.kind == "wan":
        return load_codec(config.codec, config.model.channels)
    source = data_source(config, "train")
    frames = np.stack([source[i]["frames"] for i in range(min(FITTED_CLIPS, len(source)))])
    return patch.fit(frames[:, :pixel_frames(config)], patch_shape(config), config.model.channels)


def make_tokenizer(config: Config) -> Tokenizer:
    """That of a frozen text encoder, or one trained on the training captions."""
    if config.text.encoder == "frozen":
        return load_tokenizer(Path(config.text.weights))
    source, texts = data_source(config, "train"), []
    for index in range(min(TOKENIZED_CLIPS, len(source))):
        example = source[index]
        for caption in (example["caption_long"].decode(), example["caption_short"].decode(), ""):
            texts += [prompt_text(config, caption), prompt_text(config, EXTEND + caption),
                      prompt_text(config, caption, is_image=True)]
    return Tokenizer(train_tokenizer(texts, config.text.vocab_size))


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
