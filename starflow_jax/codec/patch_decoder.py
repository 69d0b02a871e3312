"""The patch codec's second decoder, for noised latents: a small causal convolutional network beside the linear one.

It works at the latents' resolution and gives what is to be added to the linear decoder's patches, at first 0. Like the
Wan VAE, of whose layers it is made, it is a stream by construction.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from starflow_jax.codec.wan_vae import CausalConv, Past, Residual, RMSNorm

Params = dict[str, Any]


class PatchDecoder(nn.Module):
    """A 3x3x3 convolution, residuals, and a 1x1x1 convolution that starts at 0."""

    width: int
    layers: int
    pixels: int  # of a patch

    @nn.compact
    def __call__(self, latents_BNhwC: jax.Array, past: Past) -> tuple[jax.Array, Past]:
        """(B, N, h, w, C) -> (B, N, h, w, pixels), and the past of the next latent frames; None where a video begins.
        """
        before = past or (None,) * (1 + self.layers)
        x, kept = CausalConv(self.width, jnp.float32, name="stem")(latents_BNhwC, before[0])
        after = [kept]
        for layer in range(self.layers):
            x, kept = Residual(self.width, jnp.float32, name=f"residuals_{layer}")(x, before[1 + layer])
            after.append(kept)
        x = nn.silu(RMSNorm(name="norm")(x))
        return nn.Dense(self.pixels, kernel_init=nn.initializers.zeros, name="head")(x), tuple(after)


def decoder_of(params: Params) -> PatchDecoder:
    """The network whose parameters these are."""
    layers = sum(name.startswith("residuals_") for name in params)
    width, pixels = params["head"]["kernel"].shape
    return PatchDecoder(width, layers, pixels)
