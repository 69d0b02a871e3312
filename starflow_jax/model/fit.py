"""A system from the training data: the tokenizer trained on captions, the patch codec fitted to clips."""

from pathlib import Path

import numpy as np

from starflow_jax.codec import patch
from starflow_jax.codec.interface import LatentCodec
from starflow_jax.codec.wan_stream import load_codec
from starflow_jax.config import Config
from starflow_jax.model.shapes import patch_shape, pixel_frames, prompt_text
from starflow_jax.model.sources import data_source
from starflow_jax.model.system import System
from starflow_jax.text.pretrained import load_tokenizer
from starflow_jax.text.prompt import EXTEND
from starflow_jax.text.tokenizer import Tokenizer, train_tokenizer

FITTED_CLIPS = 1_000  # training clips that the patch codec is fitted to
TOKENIZED_CLIPS = 3_000  # training clips whose captions the tokenizer is trained on


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
