"""Classifier-free guidance of an affine flow step (DESIGN: guidance)."""

import jax
import jax.numpy as jnp

from starflow_jax.flow.affine import Affine


def guide(conditional: Affine, unconditional: Affine, weight: float | jax.Array) -> Affine:
    """Mean and scale of the guided Gaussian for a weight w >= 0; w = 0 gives the conditional one.

    With s = min(sigma_c / sigma_u, 1)^2:  sigma = sigma_c / sqrt(1 + w - w s) and
    mu = ((1 + w) mu_c - w s mu_u) / (1 + w - w s).
    """
    s = jnp.minimum(conditional.sigma_BSC / unconditional.sigma_BSC, 1.0) ** 2
    norm = 1.0 + weight - weight * s
    mu = ((1.0 + weight) * conditional.mu_BSC - weight * s * unconditional.mu_BSC) / norm
    return Affine(mu, conditional.sigma_BSC / jnp.sqrt(norm))
