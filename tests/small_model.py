"""A small random model with tokenizer and codec; tests/conftest.py has it as the fixtures `system` and `params`."""

import numpy as np

from starflow_jax.codec import patch
from starflow_jax.config import Codec, Config, Model, Sample, Solver, Text
from starflow_jax.model.system import System
from starflow_jax.model.text import prompt_text
from starflow_jax.text.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = ["a red seven moves right", "a blue three drifts left", "a green one floats up"]
CONFIG = Config(
    name="small",
    model=Model(channels=4, frames=3, height=2, width=2, shallow_layers=(1, 1), shallow_width=40, deep_layers=1,
                deep_width=40, head_dim=20, text_length=24, text_dim=16, denoiser_layers=1, denoiser_window=2,
                noise_std=0.3),
    text=Text(vocab_size=256, layers=1, d_model=16, d_kv=8, d_ff=16, heads=2), codec=Codec(stride=4, time_stride=4))
SETTINGS = Sample(guidance=1.5, solver=Solver(block_size=2, tolerance=1e-6), batch_size=3)


def small_system(config: Config = CONFIG) -> System:
    """Its tokenizer knows CAPTIONS, its codec is fitted to noise."""
    model, codec = config.model, config.codec
    shape = (4, 1 + codec.time_stride * 2, codec.stride * model.height, codec.stride * model.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    fitted = patch.fit(frames, patch.PatchShape(codec.time_stride, codec.stride), model.channels)
    tokenizer = Tokenizer(train_tokenizer([prompt_text(config, caption) for caption in CAPTIONS], 256))
    return System(config, tokenizer, fitted)
