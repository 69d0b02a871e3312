"""Dense layers whose kernel may be an array, int8 with scales, or either of them with low-rank factors beside it.

This is the one place where a Transformer's matrices enter its layers: what a matrix that is not trained is kept as, and
what is trained beside it, is no concern of the modules above.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.nn.lora import Adapted, added
from starflow_jax.nn.products import product
from starflow_jax.nn.quantized import Quantized, scaled_product


def _dot_general(inputs: jax.Array, kernel: jax.Array, dimensions: Any, precision: Any = None) -> jax.Array:
    """As Linen's layers call it. Raises ValueError for any axis but the last, and for axes of a batch."""
    if dimensions != (((inputs.ndim - 1,), (0,)), ((), ())):
        raise ValueError(f"{dimensions}: these layers map the last axis, without axes of a batch")
    return product(inputs, kernel, precision)


class Dense(nn.Dense):
    """nn.Dense whose kernel may be Quantized along its input axis, or Adapted."""

    dot_general: Any = _dot_general

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs) if _is_plain(self) else _product(self, inputs)


class DenseGeneral(nn.DenseGeneral):
    """nn.DenseGeneral over the last axis, whose kernel may be Quantized along its input axis, or Adapted."""

    dot_general: Any = _dot_general

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(inputs) if _is_plain(self) else _product(self, inputs)


def _is_plain(layer: nn.Module) -> bool:
    return not isinstance(layer.get_variable("params", "kernel"), Quantized | Adapted)


def _product(layer: Dense | DenseGeneral, inputs: jax.Array) -> jax.Array:
    """(..., *features) in the layer's dtype; of int8 summed, scaled and shifted in float32 at least."""
    kernel: Any = layer.get_variable("params", "kernel")
    base, dtype = kernel.base if isinstance(kernel, Adapted) else kernel, jnp.dtype(layer.dtype)
    inputs = inputs.astype(dtype)
    if isinstance(base, Quantized):
        out = scaled_product(inputs, base)
    else:
        out = lax.dot_general(inputs, base.astype(dtype), (((inputs.ndim - 1,), (0,)), ((), ())))
    out = (out + layer.get_variable("params", "bias").astype(out.dtype) if layer.use_bias else out).astype(dtype)
    return out + added(inputs, kernel) if isinstance(kernel, Adapted) else out
