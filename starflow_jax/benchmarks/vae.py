"""How fast the Wan VAE is beside PyTorch, in turns within one run, on the same random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.benchmarks.vae_torch import TorchVAE, can_be_timed, to_tensor
from starflow_jax.codec.wan_stream import WanCodec
from starflow_jax.codec.wan_vae import WanConfig
from starflow_jax.codec.wan_weights import abstract_params
from starflow_jax.io.timing import timed

HALF = WanConfig(dim=80, dec_dim=128)  # half the released widths
# Two, since for single small ones PyTorch takes a slower convolution than it does for large ones.
VIDEOS = 2
FRAMES, SIDE = 5, 96  # of each, SIDE x SIDE pixels: two latent frames of 6 x 6
ROUNDS = 3


def beside_torch(config: WanConfig = HALF, frames: int = FRAMES, side: int = SIDE, rounds: int = ROUNDS
                 ) -> list[dict[str, Any]]:
    """A row each for encoding and decoding: median seconds, how many times as fast as PyTorch, and the largest
    difference between the two results, in standard deviations of PyTorch's.

    Both work on the processor: elsewhere, and without PyTorch, there is a line that says so, and no row.
    """
    if not can_be_timed("the VAE"):
        return []
    codec = random_codec(config)
    theirs = TorchVAE(codec)
    random = np.random.default_rng(1)
    size = side // config.stride
    video = random.uniform(-1, 1, (VIDEOS, frames, side, side, 3))
    latents = random.normal(size=(VIDEOS, 1 + (frames - 1) // config.time_stride, size, size, config.z_dim))
    return [_row("encode", partial(jax.jit(WanCodec.encode), codec), theirs.encode, video, rounds),
            _row("decode", partial(jax.jit(WanCodec.decode), codec), theirs.decode, latents, rounds)]


def _row(step: str, ours: Callable[[jax.Array], jax.Array], theirs: Callable[[Any], Any], x: np.ndarray, rounds: int
         ) -> dict[str, Any]:
    array, tensor = jnp.asarray(x, jnp.float32), to_tensor(np.moveaxis(x, -1, 1))
    found = timed(step, {"PyTorch": lambda: np.moveaxis(theirs(tensor).numpy(), 1, -1),
                         "ours": lambda: np.asarray(ours(array))}, rounds)
    (expected, torch_seconds), (result, seconds) = found["PyTorch"], found["ours"]
    return {"step": step, "PyTorch, s": torch_seconds, "ours, s": seconds, "times as fast": torch_seconds / seconds,
            "largest difference, deviations": float(np.abs(result - expected).max() / expected.std())}


def random_codec(config: WanConfig) -> WanCodec:
    """Weights that keep the variance, biases and norms that are neither 0 nor 1."""
    random = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.random(leaf.shape, np.float32)
        if len(leaf.shape) == 1:
            return jnp.asarray(0.5 + values / 2)
        values -= 0.5
        values *= np.sqrt(12 / np.prod(leaf.shape[:-1]), dtype=np.float32)
        return jnp.asarray(values)

    channels = np.linspace(0.5, 1.5, config.z_dim, dtype=np.float32)
    return WanCodec(jax.tree.map(draw, abstract_params(config, jnp.float32)), jnp.asarray(channels - 1),
                    jnp.asarray(channels), config=config)
