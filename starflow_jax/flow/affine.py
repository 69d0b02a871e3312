"""The affine map of a block's tokens, with its inverse (DESIGN: the flow block)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Affine(NamedTuple):
    """Mean and scale of each token element, float32 at least."""

    mu_BSC: jax.Array
    sigma_BSC: jax.Array

    def forward(self, x_BSC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """z = (x - mu) / sigma and its log-determinant -log sigma, elementwise."""
        return (x_BSC - self.mu_BSC) / self.sigma_BSC, -jnp.log(self.sigma_BSC)

    def inverse(self, z_BSC: jax.Array) -> jax.Array:
        """x = mu + sigma z."""
        return self.mu_BSC + self.sigma_BSC * z_BSC
