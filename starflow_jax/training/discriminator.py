"""Real frames or decoded ones? A small discriminator of patches, and both sides' hinge losses."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

SLOPE = 0.2  # of the leaky ReLU


class PatchDiscriminator(nn.Module):
    """Pixels in [-1, 1], (B, T, H, W, 3) -> a logit for each patch, (B, T, H/4, W/4, 1), sides rounded up.

    It sees a frame and its difference from the one before, in which flicker shows. Strided convolutions in time, too,
    would be slow to differentiate on a CPU.
    """

    width: int

    @nn.compact
    def __call__(self, pixels_BTHWC: jax.Array) -> jax.Array:
        change = jnp.diff(pixels_BTHWC, axis=1, prepend=pixels_BTHWC[:, :1])
        x = jnp.concatenate([pixels_BTHWC, change], axis=-1)
        for index, features in enumerate((self.width, 2 * self.width)):
            x = nn.Conv(features, (4, 4), (2, 2), name=f"conv_{index}")(x)
            x = nn.leaky_relu(x, SLOPE)
        return nn.Conv(1, (3, 3), name="logits")(x)


def fresh_discriminator(key: jax.Array, width: int) -> dict[str, Any]:
    """Its parameters."""
    return PatchDiscriminator(width).init(key, jnp.zeros((1, 1, 4, 4, 3)))["params"]


def logits(params: dict[str, Any], pixels_BTHWC: jax.Array) -> jax.Array:
    """Of the discriminator with these parameters; positive: real."""
    discriminator: Any = PatchDiscriminator(params["conv_0"]["bias"].shape[0])
    return discriminator.apply({"params": params}, pixels_BTHWC)


def discriminator_loss(params: dict[str, Any], real_BTHWC: jax.Array, made_BTHWC: jax.Array) -> jax.Array:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(made))."""
    real, made = logits(params, real_BTHWC), logits(params, made_BTHWC)
    return jnp.mean(nn.relu(1 - real)) + jnp.mean(nn.relu(1 + made))


def generator_loss(params: dict[str, Any], made_BTHWC: jax.Array) -> jax.Array:
    """-mean D(made): what the decoder's side lessens."""
    return -jnp.mean(logits(params, made_BTHWC))
