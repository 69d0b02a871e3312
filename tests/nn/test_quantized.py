"""int8 and int4 arrays with scales: their rounding, and dense layers that multiply by them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.nn.dense import Dense, DenseGeneral
from starflow_jax.nn.quantized import HIGHEST, LOWEST, Quantized, quantize, quantize_in_groups


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def test_each_channel_is_rounded_to_a_scale_of_its_own() -> None:
    x = normal(3, 50, 7) * jnp.asarray([1.0, 1e-4, 1e3, 1, 1, 1, 0])
    found = quantize(x, axis=1)
    assert found.q.dtype == jnp.int8 and found.scale.dtype == jnp.float32
    assert found.shape == x.shape and found.scale.shape == (3, 7)
    error = np.abs(found.q * found.scale[:, None] - x)
    assert (error <= found.scale[:, None] * 0.501).all()
    np.testing.assert_array_equal(np.abs(found.q[..., :6]).max(axis=1), 127)
    assert not error[..., 6].any() and np.isfinite(found.scale).all()  # what is zero stays zero


def test_a_stack_in_bfloat16_is_rounded_without_a_copy_of_it() -> None:
    x = normal(4, 64, 256).astype(jnp.bfloat16)
    found, expected = jax.jit(quantize, static_argnames="axis")(x, axis=1), quantize(x.astype(jnp.float32), axis=1)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    memory = jax.jit(quantize, static_argnames="axis").lower(x, axis=1).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.nbytes / 10


def scaled_back(kernel: Quantized) -> jax.Array:
    if kernel.q.dtype == jnp.int8:
        return kernel.q * kernel.scale
    groups = kernel.scale.shape[0]
    grouped = kernel.q.astype(jnp.float32).reshape(groups, -1, *kernel.shape[1:])
    return (grouped * kernel.scale[:, None].astype(jnp.float32)).reshape(kernel.shape)


def test_each_group_of_inputs_is_rounded_to_a_scale_of_its_own() -> None:
    """In int4: none of a group's values is off by more than half a step, or by what lies beyond the largest one; and no
    other share of the largest value, of those that are tried, has a smaller error."""
    x = normal(96, 7) * jnp.repeat(jnp.asarray([1.0, 1e-4, 1e3]), 32)[:, None] * jnp.asarray([1, 1, 1, 1, 1, 1, 0])
    found = quantize_in_groups(x)
    assert found.q.dtype == jnp.int4 and found.shape == x.shape
    assert found.scale.dtype == jnp.bfloat16 and found.scale.shape == (3, 7)
    values, step = np.asarray(x).reshape(3, 32, 7), np.asarray(found.scale, np.float32)[:, None]
    error = np.abs(np.asarray(scaled_back(found)).reshape(3, 32, 7) - values)
    steps = values / step
    beyond = np.maximum(LOWEST - steps, steps - HIGHEST)
    assert (error <= np.maximum(0.5, beyond) * np.abs(step) * 1.001).all() and not error[..., 6].any()
    values, error = values[..., :6], error[..., :6]
    plain = np.abs(values).max(axis=1, keepdims=True) / HIGHEST  # from -7 to 7
    expected = np.round(values / plain) * plain - values
    assert ((error**2).sum(axis=1) <= (expected**2).sum(axis=1) * 1.02).all()  # the scale is in bfloat16
    assert (error**2).sum() < 0.8 * (expected**2).sum()
    assert quantize_in_groups(normal(40, 3)).scale.shape == (5, 3)  # where 32 does not divide them: groups of 8


@pytest.mark.parametrize("rounded", [lambda kernel: quantize(kernel, axis=0), quantize_in_groups], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("layer", [Dense(5), DenseGeneral((3, 5)), Dense(5, use_bias=False)])
def test_a_layer_multiplies_by_its_quantized_kernel(layer: nn.Module, dtype, rounded) -> None:
    layer, x = layer.clone(dtype=dtype), normal(2, 4, 8)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), layer.init(jax.random.key(0), x)["params"])
    quantized = rounded(params["kernel"])
    found = layer.apply({"params": {**params, "kernel": quantized}}, x)
    expected = layer.apply({"params": {**params, "kernel": scaled_back(quantized)}}, x)
    assert found.dtype == expected.dtype == dtype and found.shape == expected.shape
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32),
                               atol=1e-5 if dtype == jnp.float32 else 0.1)
    whole = layer.apply({"params": params}, x)
    assert 0 < np.abs(whole.astype(jnp.float32) - found.astype(jnp.float32)).max() < 1


@pytest.mark.parametrize("shape", [(2, 8), (2, 3, 8)])
def test_a_layer_with_a_float_kernel_is_linens(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    for ours, linens in ((Dense(5), nn.Dense(5)), (DenseGeneral((3, 5)), nn.DenseGeneral((3, 5)))):
        params = ours.init(jax.random.key(0), x)
        jax.tree.map(np.testing.assert_array_equal, params, linens.init(jax.random.key(0), x))

        def of(layer: nn.Module, params: dict = params) -> tuple:
            return jax.value_and_grad(lambda params, x: jnp.sum(layer.apply(params, x) ** 2), (0, 1))(params, x)

        (out, grads), (linens_out, linens_grads) = of(ours), of(linens)
        np.testing.assert_allclose(out, linens_out, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, linens_grads)


def test_a_layer_maps_the_last_axis_alone() -> None:
    with pytest.raises(ValueError, match="last axis"):
        DenseGeneral(8, axis=0).init(jax.random.key(0), normal(8, 8))


def test_it_is_a_pytree_of_both_arrays() -> None:
    leaves = jax.tree.leaves(Quantized(jnp.zeros(2, jnp.int8), jnp.ones(())))
    assert [leaf.dtype for leaf in leaves] == [jnp.int8, jnp.float32]
