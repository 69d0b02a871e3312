"""Block Jacobi: the fixed point of a triangular update, for many samples at once (DESIGN: inversion).

The solver knows no model. A sample stops when its own update is small; from then on it is frozen, so that
its solution never depends on the samples beside it.
"""

from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


class Solution(flax.struct.PyTreeNode):
    """The fixed point and how each sample's iteration ended."""

    x: jax.Array  # (B, N, C)
    aux: Any  # what the last update of each sample returned beside its x
    steps: jax.Array  # (B,) int32: updates that the sample took part in
    residual: jax.Array  # (B,) ||x+ - x||^2 / ||x+||^2 of its last update
    converged: jax.Array  # (B,) bool: residual < tolerance, or exact after max_steps = N


class _Iteration(flax.struct.PyTreeNode):
    """The loop's carry."""

    count: jax.Array  # int32: updates so far
    solution: Solution


def residual(new_BNC: jax.Array, old_BNC: jax.Array) -> jax.Array:
    """(B,) squared relative change per sample; 0 where nothing changed, also at zero."""
    axes = tuple(range(1, new_BNC.ndim))
    change = jnp.sum((new_BNC - old_BNC) ** 2, axis=axes)
    return change / jnp.maximum(jnp.sum(new_BNC**2, axis=axes), jnp.finfo(new_BNC.dtype).tiny)


def solve(
    update: Callable[[jax.Array], tuple[jax.Array, Any]],
    start_BNC: jax.Array,
    *,
    tolerance: float | jax.Array,
    max_steps: int,
    aux_batch_axis: int = 0,
) -> Solution:
    """Iterate x <- update(x) until each sample's residual is below `tolerance`, at most `max_steps` times.

    update: (B, N, C) -> ((B, N, C), aux); entry n may depend only on entries before n, so that N steps are
        exact. aux is any pytree whose leaves have the batch at `aux_batch_axis`.
    Raises ValueError for max_steps < 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: the solver needs at least one step")
    batch = start_BNC.shape[0]
    x, aux = update(start_BNC)
    chex.assert_equal_shape((x, start_BNC))
    first_residual = residual(x, start_BNC)
    first = Solution(x, aux, jnp.ones(batch, jnp.int32), first_residual, first_residual < tolerance)

    def unfinished(now: _Iteration) -> jax.Array:
        return (now.count < max_steps) & ~jnp.all(now.solution.converged)

    def step(now: _Iteration) -> _Iteration:
        old = now.solution
        x, aux = update(old.x)
        change = residual(x, old.x)
        updated = Solution(x, aux, old.steps + 1, change, change < tolerance)
        return _Iteration(now.count + 1, _keep_finished(old, updated, aux_batch_axis))

    solution = lax.while_loop(unfinished, step, _Iteration(jnp.int32(1), first)).solution
    exact = max_steps >= start_BNC.shape[1]
    return solution.replace(converged=solution.converged | (exact & (solution.steps >= max_steps)))


def _keep_finished(old: Solution, new: Solution, aux_batch_axis: int) -> Solution:
    """`new`, but with what `old` has of the samples that had converged."""
    done_B = old.converged

    def keep(axis: int, was: Any, now: Any) -> Any:
        def choose(was: jax.Array, now: jax.Array) -> jax.Array:
            shape = [1] * was.ndim
            shape[axis] = done_B.shape[0]
            return jnp.where(done_B.reshape(shape), was, now)

        return jax.tree.map(choose, was, now)

    aux = keep(aux_batch_axis, old.aux, new.aux)
    return keep(0, old.replace(aux=None), new.replace(aux=None)).replace(aux=aux)
