"""A layer's product of its inputs with a matrix."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.sharding import on_one_device


def product(inputs: jax.Array, kernel: jax.Array, precision: Any = None) -> jax.Array:
    """(..., in) @ (in, *features): (..., *features), all of one dtype.

    On one device the leading axes become one. With several of them, the gradient of the kernel begins on a CPU by
    turning the gradient of the outputs, computed anew for it value by value: a step of LoRA took twice as long. Over a
    mesh, clips and tokens may be sharded over different axes, and stay apart.
    """
    if not on_one_device():
        return lax.dot_general(inputs, kernel, (((inputs.ndim - 1,), (0,)), ((), ())), precision)
    rows, columns = inputs.reshape(-1, inputs.shape[-1]), kernel.reshape(kernel.shape[0], -1)
    return jnp.matmul(rows, columns, precision=precision).reshape(*inputs.shape[:-1], *kernel.shape[1:])
