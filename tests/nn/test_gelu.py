"""The exact GELU against the normal distribution, in each dtype, with its slope."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.nn.gelu import gelu

X = np.linspace(-9, 9, 401)


def expected(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and slopes, in double precision."""
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in points])
    return points * cdf, cdf + points * np.exp(-0.5 * points**2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_slopes_are_those_of_the_normal_distribution(dtype: str) -> None:
    x = jnp.asarray(X, dtype)
    values, slope = expected(np.asarray(x, np.float64))  # of the points as they are in this dtype
    found, pull_back = jax.vjp(gelu, x)
    (slopes,) = pull_back(jnp.ones_like(x))
    assert found.dtype == slopes.dtype == x.dtype
    # 1 + erf is rounded to half a unit of 1 before it is multiplied by x, of up to 9.
    step = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(found, np.float64), values, atol=1e-6, rtol=step)
    np.testing.assert_allclose(np.asarray(slopes, np.float64), slope, atol=1e-6, rtol=step)


def test_in_double_precision() -> None:
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        values, slopes = expected(X)
        np.testing.assert_allclose(gelu(x), values, atol=1e-15)
        np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slopes, atol=1e-14)


def test_the_backward_pass_keeps_one_array_of_the_inputs_dtype() -> None:
    """And not the float32 ones that it is computed by: in a layer this is the largest array."""
    _, pull_back = jax.vjp(gelu, jnp.asarray(X, jnp.bfloat16))
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size == X.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]
