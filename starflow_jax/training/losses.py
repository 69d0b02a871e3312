"""The weight of the likelihood in training (DESIGN: losses)."""

import jax

from starflow_jax.flow.likelihood import REFERENCE_NOISE


def weighted_loss(loss: jax.Array, noise_std: float) -> jax.Array:
    """sigma / 0.3 times the loss, as the noise level stands in the prompt."""
    return loss * (noise_std / REFERENCE_NOISE)
