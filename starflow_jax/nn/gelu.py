"""The exact GELU by erf, which a CPU computes in half the time of erfc."""

import math

import jax
import jax.numpy as jnp


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), Φ the cumulative normal distribution (Hendrycks & Gimpel 2016, section 2); of x's dtype and shape,
    computed in at least float32: 1 + erf would round the small values of half precision's negative side away."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """With a slope of x's dtype, which is what the backward pass keeps."""
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    density = jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return gelu(x), tangent * (_normal_cdf(wide) + wide * density).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x / math.sqrt(2))
