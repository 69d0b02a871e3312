"""The fixed-point solver, on linear triangular systems x = c + A x whose solution is known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.flow import jacobi
from starflow_jax.flow.jacobi import Outcome

TOKENS = 6


def system(batch: int, strength: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A (B, N, N) strictly lower triangular and c (B, N, 2)."""
    random = np.random.default_rng(seed)
    matrix = strength * np.tril(random.uniform(0.5, 1.5, size=(batch, TOKENS, TOKENS)), -1)
    return matrix.astype(np.float32), random.normal(size=(batch, TOKENS, 2)).astype(np.float32)


def updates(matrix: np.ndarray, constant: np.ndarray) -> Callable[[jax.Array], tuple[jax.Array, Any]]:
    """The update, whose aux is twice what it was given."""
    return lambda x: (constant + jnp.sum(matrix[..., None] * x[:, None], axis=2), {"given": 2 * x})


def exact(matrix: np.ndarray, constant: np.ndarray) -> np.ndarray:
    return np.linalg.solve(np.eye(TOKENS) - matrix.astype(np.float64), constant.astype(np.float64))


def test_as_many_steps_as_tokens_are_exact() -> None:
    matrix, constant = system(2)
    start = np.ones_like(constant)
    solution = jax.jit(lambda x: jacobi.solve(updates(matrix, constant), x, tolerance=0.0, max_steps=TOKENS))(start)
    np.testing.assert_allclose(solution.x, exact(matrix, constant), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(solution.steps, [TOKENS, TOKENS])
    np.testing.assert_array_equal(solution.outcome, [Outcome.EXACT] * 2)
    fewer = jacobi.solve(updates(matrix, constant), start, tolerance=0.0, max_steps=TOKENS - 1)
    assert np.abs(fewer.x - exact(matrix, constant)).max() > 1e-2
    np.testing.assert_array_equal(fewer.outcome, [Outcome.OUT_OF_STEPS] * 2)
    np.testing.assert_array_equal(fewer.steps, [TOKENS - 1, TOKENS - 1])


def iterated(matrix: np.ndarray, constant: np.ndarray, tolerance: float) -> tuple[np.ndarray, int, float]:
    """x <- c + A x of one sample until ||x+ - x||^2 / ||x+||^2 < tolerance, written out."""
    new, steps, residual = np.zeros(constant.shape), 0, np.inf
    while residual >= tolerance and steps < TOKENS:
        old, new = new, constant + matrix @ new
        residual, steps = np.sum((new - old) ** 2) / np.sum(new**2), steps + 1
    return new, steps, residual


def test_stops_at_the_tolerance() -> None:
    matrix, constant = system(3, strength=0.1)
    matrix *= np.array([0.2, 1.0, 3.0], np.float32)[:, None, None]
    solution = jacobi.solve(updates(matrix, constant), jnp.zeros_like(constant), tolerance=1e-3, max_steps=TOKENS)
    x, steps, residuals = (np.array(part) for part in zip(*map(iterated, matrix, constant, [1e-3] * 3)))
    assert len(set(steps)) > 1 and steps.max() < TOKENS
    np.testing.assert_array_equal(solution.steps, steps)
    np.testing.assert_allclose(solution.x, x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(solution.residual, residuals, rtol=1e-3)
    np.testing.assert_array_equal(solution.outcome, [Outcome.CONVERGED] * 3)


def test_a_sample_that_is_not_finite_ends_and_the_others_go_on() -> None:
    matrix, constant = system(2)
    matrix[0] *= 1e15  # squares of what the third update adds are beyond float32
    calls: list[int] = []

    def counted(matrix: np.ndarray, constant: np.ndarray) -> jacobi.Solution:
        def update(x: jax.Array) -> tuple[jax.Array, Any]:
            jax.debug.callback(lambda: calls.append(1))
            return updates(matrix, constant)(x)

        calls.clear()
        solution = jacobi.solve(update, jnp.zeros_like(constant), tolerance=0.0, max_steps=TOKENS)
        jax.effects_barrier()
        return solution

    both = counted(matrix, constant)
    np.testing.assert_array_equal(both.outcome, [Outcome.NOT_FINITE, Outcome.EXACT])
    np.testing.assert_array_equal(both.steps, [3, TOKENS])
    np.testing.assert_allclose(both.x[1], exact(matrix, constant)[1], rtol=1e-4, atol=1e-4)
    assert len(calls) == TOKENS
    np.testing.assert_array_equal(counted(matrix[:1], constant[:1]).outcome, [Outcome.NOT_FINITE])
    assert len(calls) == 3  # no further updates where no sample needs any
    nan = counted(matrix, np.full_like(constant, np.nan))
    np.testing.assert_array_equal(nan.outcome, [Outcome.NOT_FINITE] * 2)
    assert len(calls) == 1


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    matrix, constant = system(2)
    matrix[0] *= 0.1  # converges at once; its batch-mate takes all steps
    solve = lambda m, c: jacobi.solve(  # noqa: E731
        updates(m, c), jnp.zeros_like(c), tolerance=0.05, max_steps=TOKENS)
    together, alone = solve(matrix, constant), solve(matrix[:1], constant[:1])
    assert int(together.steps[0]) < int(together.steps[1])
    for ours, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
        np.testing.assert_array_equal(ours[0], expected[0])
    assert np.abs(together.x[0] - exact(matrix, constant)[0]).max() > 1e-4  # frozen before it was exact


def test_aux_is_frozen_along_its_own_batch_axis() -> None:
    matrix, constant = system(2)
    matrix[0] *= 0.1
    given = lambda x: (updates(matrix, constant)(x)[0], jnp.moveaxis(x, 0, 1))  # noqa: E731
    solution = jacobi.solve(given, jnp.zeros_like(constant), tolerance=0.05, max_steps=TOKENS, aux_batch_axis=1)
    again = constant + jnp.sum(matrix[..., None] * jnp.moveaxis(solution.aux, 1, 0)[:, None], axis=2)
    np.testing.assert_allclose(again, solution.x, rtol=1e-5, atol=1e-5)  # aux belongs to the update that gave x


def test_residual_of_nothing_is_zero() -> None:
    zeros, ones = jnp.zeros((1, 3, 2)), jnp.ones((1, 3, 2))
    np.testing.assert_array_equal(jacobi.residual(zeros, zeros), [0.0])
    np.testing.assert_allclose(jacobi.residual(2 * ones, ones), [0.25])


@pytest.mark.parametrize("steps", [0, -1])
def test_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_steps={steps}"):
        jacobi.solve(lambda x: (x, ()), jnp.zeros((1, 2, 1)), tolerance=1e-3, max_steps=steps)
