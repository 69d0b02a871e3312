"""Patches: latents <-> tokens."""

import jax
import jax.numpy as jnp


def patchify(x_BTHWC: jax.Array, patch: int) -> jax.Array:
    """(B, T, H, W, C) -> (B, T, H/p, W/p, p*p*C), channel order (row in patch, column in patch, channel)."""
    batch, frames, height, width, channels = x_BTHWC.shape
    x = x_BTHWC.reshape(batch, frames, height // patch, patch, width // patch, patch, channels)
    return jnp.moveaxis(x, 3, 4).reshape(batch, frames, height // patch, width // patch, patch * patch * channels)


def unpatchify(x_BThwK: jax.Array, patch: int) -> jax.Array:
    """The inverse of `patchify`."""
    batch, frames, height, width, size = x_BThwK.shape
    x = x_BThwK.reshape(batch, frames, height, width, patch, patch, size // patch**2)
    return jnp.moveaxis(x, 4, 3).reshape(batch, frames, height * patch, width * patch, size // patch**2)
