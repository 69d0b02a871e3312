"""A kernel that stays as it is, with the product of two small matrices added to it (LoRA)."""

import flax.struct
import jax
import jax.numpy as jnp

from starflow_jax.nn.products import product
from starflow_jax.nn.quantized import Quantized

Kernel = jax.Array | Quantized


class Adapted(flax.struct.PyTreeNode):
    """base + lora_a @ lora_b, of one layer or of a stack of them, which is never computed as a whole."""

    base: Kernel  # (in, *features)
    lora_a: jax.Array  # (in, r)
    lora_b: jax.Array  # (r, *features), any scale included

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape


def added(inputs: jax.Array, kernel: Adapted) -> jax.Array:
    """What the two small matrices add to a layer's output, (..., *features) in the dtype of its inputs (..., in)."""
    low = product(inputs, kernel.lora_a.astype(inputs.dtype))
    return product(low, kernel.lora_b.astype(inputs.dtype))


def merged(base: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
    """base + lora_a @ lora_b of stacked layers, (L, in, *features) in the dtype of `base`; summed in float32 at least.
    """
    dtype = jnp.promote_types(base.dtype, jnp.float32)
    change = jnp.einsum("lir,lr...->li...", lora_a.astype(dtype), lora_b.astype(dtype), precision="highest")
    return (base.astype(dtype) + change).astype(base.dtype)
