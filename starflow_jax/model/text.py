"""Text of a config: what a prompt says, its tokens, its features."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from starflow_jax import sharding
from starflow_jax.config import Config
from starflow_jax.model.sources import data_source
from starflow_jax.text.pretrained import encoder_config, load_tokenizer, open_encoder
from starflow_jax.text.prompt import EXTEND, format_prompt
from starflow_jax.text.t5 import T5Config, T5Encoder, mask_padding
from starflow_jax.text.tokenizer import Tokenizer, train_tokenizer

TOKENIZER = "tokenizer.model"
TOKENIZED_CLIPS = 3_000  # training clips whose captions the tokenizer is trained on


def prompt_text(config: Config, caption: str, is_image: bool = False, fps: int = 0, aspect_ratio: str = "") -> str:
    """A caption with the metadata that text.metadata names, as the text encoder is given it; fps and aspect ratio are
    as trained by default."""
    text = config.text
    return format_prompt(
        caption,
        fps=(0 if is_image else fps or text.fps) if text.states("fps") else None,
        noise_std=config.model.noise_std if text.states("noise_level") else None,
        aspect_ratio=(aspect_ratio or text.aspect_ratio) if text.states("aspect_ratio") else None)


def text_encoder(config: Config) -> T5Encoder:
    """The small T5 that is trained along with the flow, or the frozen one of text.weights."""
    text, dtype = config.text, jnp.dtype(config.model.dtype)
    if text.encoder == "frozen":
        return T5Encoder(encoder_config(Path(text.weights), config.model.text_dim), dtype=dtype)
    return T5Encoder(T5Config(vocab_size=text.vocab_size, d_model=text.d_model, d_kv=text.d_kv, d_ff=text.d_ff,
                              num_layers=text.layers, num_heads=text.heads), dtype=dtype)


@partial(jax.jit, static_argnums=0)
def encode_text(encoder: T5Encoder, params: Any, ids_BS: jax.Array) -> jax.Array:
    """Token ids -> features (B, text_length, text_dim), padding zeroed."""
    features: Any = encoder.apply({"params": params}, ids_BS)
    return mask_padding(features, ids_BS)


def frozen_encoder_params(config: Config, convert: Callable[[str, np.ndarray], Any] | None = None) -> dict[str, Any]:
    """{"text": parameters} of the frozen text encoder, which no checkpoint holds; {} where there is none. They are read
    one by one, the layers' matrices in the dtype that they are multiplied in.

    convert: ("text/...", array) -> what is kept of it, by default the array on this process's first device. Raises
    UserError where text.weights can't be read.
    """
    if config.text.encoder != "frozen" or not config.model.text_length:
        return {}
    params = {}
    for part, array in open_encoder(Path(config.text.weights), config.model.text_dim).items():
        name = f"text/{part}"
        value = np.asarray(array, jnp.dtype(config.model.dtype) if sharding.is_layer_matrix(name) else None)
        params[name] = jax.block_until_ready(convert(name, value) if convert else jax.device_put(value))
    return traverse_util.unflatten_dict(params, sep="/")


def text_fingerprint(config: Config) -> dict[str, Any]:
    """What prepared text features depend on besides the encoder's weights; each is looked up by its whole prompt."""
    sizes = {name: value for name, value in dataclasses.asdict(config.text).items()
             if name not in ("metadata", "fps", "aspect_ratio", "weights")}
    return {**sizes, "text_length": config.model.text_length}


def make_tokenizer(config: Config) -> Tokenizer:
    """The frozen text encoder's tokenizer, or one trained on the training captions."""
    if config.text.encoder == "frozen":
        return load_tokenizer(Path(config.text.weights))
    source, texts = data_source(config, "train"), []
    for index in range(min(TOKENIZED_CLIPS, len(source))):
        example = source[index]
        for caption in (example["caption_long"].decode(), example["caption_short"].decode(), ""):
            texts += [prompt_text(config, caption), prompt_text(config, EXTEND + caption),
                      prompt_text(config, caption, is_image=True)]
    return Tokenizer(train_tokenizer(texts, config.text.vocab_size))


def read_tokenizer(config: Config, folder: Path) -> Tokenizer:
    """The frozen text encoder's tokenizer, or the one in a workdir's system folder."""
    if config.text.encoder == "frozen":
        return load_tokenizer(Path(config.text.weights))
    return Tokenizer.load(folder / TOKENIZER)
