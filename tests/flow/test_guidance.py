"""Guidance of one affine step."""

import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.flow.affine import Affine
from starflow_jax.flow.guidance import guide


def affine(seed: int, low: float, high: float) -> Affine:
    random = np.random.default_rng(seed)
    shape = (2, 3, 4)
    return Affine(jnp.asarray(random.normal(size=shape), jnp.float32),
                  jnp.asarray(random.uniform(low, high, size=shape), jnp.float32))


def log_normal(x: np.ndarray, mu: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    return -0.5 * ((x - mu) / sigma) ** 2 - np.log(sigma)


def as_numpy(*parts: Affine) -> list[np.ndarray]:
    return [np.asarray(value, np.float64) for part in parts for value in part]


def test_weight_zero_is_the_conditional_one_exactly() -> None:
    conditional, unconditional = affine(0, 0.2, 3.0), affine(1, 0.2, 3.0)
    guided = guide(conditional, unconditional, 0.0)
    np.testing.assert_array_equal(guided.mu_BSC, conditional.mu_BSC)
    np.testing.assert_array_equal(guided.sigma_BSC, conditional.sigma_BSC)


def test_equal_branches_are_left_alone() -> None:
    conditional = affine(0, 0.2, 3.0)
    guided = guide(conditional, conditional, 2.5)
    np.testing.assert_allclose(guided.mu_BSC, conditional.mu_BSC, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(guided.sigma_BSC, conditional.sigma_BSC, rtol=1e-6)


def test_formula_element_by_element() -> None:
    conditional, unconditional, w = affine(0, 0.2, 3.0), affine(1, 0.2, 3.0), 2.5
    guided = guide(conditional, unconditional, w)
    mu_c, sigma_c, mu_u, sigma_u = as_numpy(conditional, unconditional)
    assert (sigma_c > sigma_u).any() and (sigma_c < sigma_u).any()
    for index in np.ndindex(mu_c.shape):
        ratio = sigma_c[index] / sigma_u[index]
        s = ratio**2 if ratio < 1 else 1.0
        sigma = sigma_c[index] / (1 + w - w * s) ** 0.5
        mu = ((1 + w) * mu_c[index] - w * s * mu_u[index]) / (1 + w - w * s)
        np.testing.assert_allclose((guided.mu_BSC[index], guided.sigma_BSC[index]), (mu, sigma), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.5, 3.5])
def test_density_is_the_power_of_the_ratio(weight: float) -> None:
    """Where sigma_c <= sigma_u the guided density is p_c^(1+w) / p_u^w up to a constant."""
    conditional, unconditional = affine(0, 0.2, 1.0), affine(1, 1.0, 3.0)
    mu, sigma, mu_c, sigma_c, mu_u, sigma_u = as_numpy(
        guide(conditional, unconditional, weight), conditional, unconditional)
    x = np.linspace(-3, 3, 7)[:, None, None, None]
    wanted = (1 + weight) * log_normal(x, mu_c, sigma_c) - weight * log_normal(x, mu_u, sigma_u)
    difference = log_normal(x, mu, sigma) - wanted
    size = np.abs(wanted).max(axis=0)
    assert (np.ptp(difference, axis=0) <= 1e-5 * size).all()


def test_a_narrower_unconditional_branch_only_moves_the_mean() -> None:
    """s is clipped to 1: the scale stays sigma_c, however narrow p_u is, and the mean is extrapolated."""
    conditional, unconditional, w = affine(0, 1.0, 3.0), affine(1, 0.05, 0.9), 3.5
    guided = guide(conditional, unconditional, w)
    np.testing.assert_allclose(guided.sigma_BSC, conditional.sigma_BSC, rtol=1e-6)
    expected = (1 + w) * conditional.mu_BSC - w * unconditional.mu_BSC
    np.testing.assert_allclose(guided.mu_BSC, expected, rtol=1e-5, atol=1e-5)
