"""Low-rank factors beside kernels of every kind: what a layer then gives, and what is differentiated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.nn.dense import Dense, DenseGeneral
from starflow_jax.nn.lora import Adapted, merged
from starflow_jax.nn.quantized import quantize
from tests.nn.test_quantized import normal


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("layer", [Dense(5), DenseGeneral((3, 5))])
def test_a_layer_adds_the_product_of_its_factors(layer: nn.Module, kind: str) -> None:
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    layer, x = layer.clone(dtype=dtype), normal(2, 4, 8)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape).astype(dtype), layer.init(jax.random.key(0), x)["params"])
    base = quantize(params["kernel"], axis=0) if kind == "int8" else params["kernel"]
    a, b = normal(8, 2), normal(2, *params["kernel"].shape[1:])

    def out(lora_b: jax.Array) -> jax.Array:
        return layer.apply({"params": {**params, "kernel": Adapted(base, a, lora_b)}}, x)

    alone = layer.apply({"params": {**params, "kernel": base}}, x)
    np.testing.assert_array_equal(out(jnp.zeros_like(b)), alone)
    assert out(b).dtype == dtype
    expected = np.tensordot(np.asarray(x) @ a, b, 1)
    np.testing.assert_allclose(np.asarray(out(b), np.float32) - np.asarray(alone, np.float32), expected,
                               atol=2e-5 if dtype == jnp.float32 else 0.3)


def test_a_merged_kernel_gives_the_same() -> None:
    x, base, a, b = normal(4, 8), normal(3, 8, 3, 5), normal(3, 8, 2), normal(3, 2, 3, 5)
    layer, bias = DenseGeneral((3, 5), dtype=jnp.float32), normal(3, 5)
    for index, kernel in enumerate(merged(base, a, b)):
        apart = Adapted(base[index], a[index], b[index])
        outs = [layer.apply({"params": {"kernel": one, "bias": bias}}, x) for one in (kernel, apart)]
        np.testing.assert_allclose(*outs, atol=1e-5)
    assert merged(base.astype(jnp.bfloat16), a, b).dtype == jnp.bfloat16


def test_what_an_int8_base_passes_back_is_that_of_its_scaled_kernel() -> None:
    base, x, a, b = quantize(normal(8, 5), axis=0), normal(4, 8), normal(8, 2), normal(2, 5)

    def gradients(kernel):
        return jax.grad(lambda x, a, b: (Dense(5, use_bias=False, dtype=jnp.float32).apply(
            {"params": {"kernel": Adapted(kernel, a, b)}}, x)**2).sum(), argnums=(0, 1, 2))(x, a, b)

    for found, expected in zip(gradients(base), gradients(base.q * base.scale)):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
