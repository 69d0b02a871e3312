"""Block Jacobi: the fixed point of a triangular update, for many samples at once (DESIGN: inversion).

The solver knows no model. A sample stops when its own update is small, or no longer finite; from then on it is frozen,
so that its solution never depends on the samples beside it.
"""

import enum
from collections.abc import Callable
from typing import Any

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


class Outcome(enum.IntEnum):
    """How a solution ended; the larger, the worse, so that the largest of several says how all of them did."""

    EXACT = 0  # as many updates as tokens
    CONVERGED = 1  # the last update's residual is below the tolerance
    OUT_OF_STEPS = 2  # neither, after all the updates that were allowed
    NOT_FINITE = 3  # the last update gave NaN or infinity, and there was no further one

    @property
    def words(self) -> str:
        """As files and tables say it."""
        return self.name.lower().replace("_", " ")


class Solution(flax.struct.PyTreeNode):
    """The fixed point and how each sample's iteration ended."""

    x: jax.Array  # (B, N, C)
    aux: Any  # what the last update of each sample returned beside its x
    steps: jax.Array  # (B,) int32: updates that the sample took part in
    residual: jax.Array  # (B,) ||x+ - x||^2 / ||x+||^2 of its last update
    outcome: jax.Array  # (B,) int8: an Outcome


class _Iteration(flax.struct.PyTreeNode):
    """The loop's carry."""

    count: jax.Array  # int32: updates so far
    solution: Solution


def outcome(residual: jax.Array, tolerance: float | jax.Array, exact: bool | jax.Array) -> jax.Array:
    """int8: the Outcome of each last update's residual. exact: whether there were as many updates as tokens."""
    within = jnp.where(residual < tolerance, Outcome.CONVERGED, Outcome.OUT_OF_STEPS)
    finite = jnp.where(exact, Outcome.EXACT, within)
    return jnp.where(jnp.isfinite(residual), finite, Outcome.NOT_FINITE).astype(jnp.int8)


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
    """Iterate x <- update(x) until each sample's residual is below `tolerance` or not finite, at most `max_steps` times
    and never more than N.

    update: (B, N, C) -> ((B, N, C), aux); entry n may depend only on entries before n, so that N steps are
        exact. aux is any pytree whose leaves have the batch at `aux_batch_axis`.
    Raises ValueError for max_steps < 1.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: the solver needs at least one step")
    tokens = start_BNC.shape[1]

    def updated(x: jax.Array, steps: jax.Array) -> Solution:
        new, aux = update(x)
        chex.assert_equal_shape((new, x))
        change = residual(new, x)
        return Solution(new, aux, steps + 1, change, outcome(change, tolerance, steps + 1 >= tokens))

    def unfinished(now: _Iteration) -> jax.Array:
        return (now.count < max_steps) & jnp.any(now.solution.outcome == Outcome.OUT_OF_STEPS)

    def step(now: _Iteration) -> _Iteration:
        old = now.solution
        return _Iteration(now.count + 1, _keep_finished(old, updated(old.x, old.steps), aux_batch_axis))

    first = updated(start_BNC, jnp.zeros(start_BNC.shape[0], jnp.int32))
    return lax.while_loop(unfinished, step, _Iteration(jnp.int32(1), first)).solution


def _keep_finished(old: Solution, new: Solution, aux_batch_axis: int) -> Solution:
    """`new`, but with what `old` has of the samples that need no further update."""
    done_B = old.outcome != Outcome.OUT_OF_STEPS

    def keep(axis: int, was: Any, now: Any) -> Any:
        def choose(was: jax.Array, now: jax.Array) -> jax.Array:
            shape = [1] * was.ndim
            shape[axis] = done_B.shape[0]
            return jnp.where(done_B.reshape(shape), was, now)

        return jax.tree.map(choose, was, now)

    aux = keep(aux_batch_axis, old.aux, new.aux)
    return keep(0, old.replace(aux=None), new.replace(aux=None)).replace(aux=aux)
