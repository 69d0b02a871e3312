"""Solving x = mu(x) + sigma(x) z for tokens each of which depends only on those before it (DESIGN: inversion).

Block Jacobi: a block of tokens at once, over and over until it is consistent, with the tokens before it in the cache.
Sequential decoding is block Jacobi with blocks of one token, which one update solves exactly. Blocks may be as long as
several frames, which then converge together, in fewer passes than one by one.
A wavefront does not wait for blocks: a window of tokens moves on after each update, so that every token gets the same
few updates and the last of them sees final tokens in front of its stride.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.flow import jacobi
from starflow_jax.flow.affine import Affine
from starflow_jax.nn.cache import KVCache

# What each of N slots sees (B, N, C), what is known of the slots themselves (their RoPE (2, N, E) and whatever else,
# as a pytree of arrays with the slots at axis 1), and the cache -> (Affine, keys and values).
Predict = Callable[[jax.Array, Any, KVCache], tuple[Affine, Any]]


@partial(jax.tree_util.register_dataclass, data_fields=["tolerance"],
         meta_fields=["block_size", "max_steps", "frames", "updates", "first_block_size"])
@dataclasses.dataclass(frozen=True)
class Solver:
    """How tokens are solved for: block_size tokens at once until the residual is below tolerance. A pytree, so that one
    program serves any tolerance."""

    block_size: int = 1
    tolerance: float | jax.Array = 1e-3  # 0: until nothing changes, at most block_size steps
    max_steps: int = 0  # 0: block_size, after which the result is exact
    frames: int = 1  # frames that a decoding step solves for; blocks do not reach beyond them
    updates: int = 0  # > 0: a wavefront, in which each token gets so many; tolerance then only says what has converged
    first_block_size: int = 0  # > 0: of a video's first frame, which has no frame before it to start from

    @property
    def of_first_frame(self) -> "Solver":
        """The solver of a video's first frame."""
        if not self.first_block_size:
            return self
        return dataclasses.replace(self, block_size=self.first_block_size, first_block_size=0, frames=1)

    @property
    def stride(self) -> int:
        """Tokens that a wavefront moves on by."""
        return -(-self.block_size // self.updates)


SEQUENTIAL = Solver(block_size=1)


class Report(flax.struct.PyTreeNode):
    """How each block of tokens ended, per sample: (blocks, B) each."""

    steps: jax.Array
    residual: jax.Array
    outcome: jax.Array  # int8: a jacobi.Outcome
    draft: "Report | None" = None  # of what the iteration started from, where a smaller block solved for that


class Known(flax.struct.PyTreeNode):
    """What a block knows of the text and of the tokens before the next slot."""

    cache: KVCache  # of both guidance branches: batch (branches * B)
    last_B1C: jax.Array  # the token before the next slot; SOS at first


class Inverse(flax.struct.PyTreeNode):
    """The tokens of some noise, and what is known when they are."""

    x_BSC: jax.Array
    known: Known
    report: Report


def solve(
    predict: Predict,
    z_BSC: jax.Array,
    start_BSC: jax.Array,
    known: Known,
    slots: Any,
    solver: Solver,
    branches: int = 1,
) -> Inverse:
    """The S tokens after the known ones, block by block or by a wavefront, starting at `start` (B, S, C)."""
    if solver.updates:
        return _wavefront(predict, z_BSC, start_BSC, known, slots, solver)
    return _block_jacobi(predict, _Tokens(z_BSC, start_BSC, slots), known, solver, branches)


class _Tokens(flax.struct.PyTreeNode):
    """A run of tokens to solve for; `blocks` makes it what a scan runs over."""

    z_BNC: jax.Array
    start_BNC: jax.Array
    slots: Any  # as Predict takes them

    def cut(self, first: int, last: int) -> "_Tokens":
        return jax.tree.map(lambda part: part[:, first:last], self)

    def blocks(self, size: int) -> "_Tokens":
        """(N / size, ..., size, ...) of each: the blocks along a leading axis."""
        return jax.tree.map(lambda a: jnp.moveaxis(a.reshape(a.shape[0], -1, size, a.shape[-1]), 1, 0), self)


class _Solved(flax.struct.PyTreeNode):
    """A solved block of tokens; several of them, stacked by a scan."""

    x_BNC: jax.Array
    report: Report


def _block_jacobi(predict: Predict, tokens: _Tokens, known: Known, solver: Solver, branches: int) -> Inverse:
    batch, count, channels = tokens.z_BNC.shape
    size = min(solver.block_size, count)

    def solve_block(known: Known, block: _Tokens) -> tuple[Known, _Solved]:
        def update(x: jax.Array) -> tuple[jax.Array, Any]:
            inputs = jnp.concatenate([known.last_B1C, x[:, :-1]], axis=1)
            affine, kv = predict(inputs, block.slots, known.cache)
            return affine.inverse(block.z_BNC), _split_branches(kv, branches)

        found = jacobi.solve(update, block.start_BNC, tolerance=solver.tolerance,
                             max_steps=solver.max_steps or size, aux_batch_axis=-4)
        known = Known(known.cache.append(_join_branches(found.aux)), found.x[:, -1:])
        return known, _Solved(found.x, Report(found.steps, found.residual, found.outcome))

    whole = count // size * size
    known, solved = lax.scan(solve_block, known, tokens.cut(0, whole).blocks(size))
    x_BSC = jnp.moveaxis(solved.x_BNC, 0, 1).reshape(batch, whole, channels)
    report = solved.report
    if whole < count:
        known, rest = solve_block(known, tokens.cut(whole, count))
        x_BSC = jnp.concatenate([x_BSC, rest.x_BNC], axis=1)
        report = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), report, rest.report)
    return Inverse(x_BSC, known, report)


def _split_branches(kv, branches: int):
    """(..., branches*B, S, H, D) -> (..., branches, B, S, H, D), so that the solver finds the samples at axis -4."""
    return jax.tree.map(lambda a: a.reshape(*a.shape[:-4], branches, -1, *a.shape[-3:]), kv)


def _join_branches(kv):
    return jax.tree.map(lambda a: a.reshape(*a.shape[:-5], -1, *a.shape[-3:]), kv)


class _Front(flax.struct.PyTreeNode):
    """A wavefront between two passes."""

    x_BSC: jax.Array
    known: Known
    finished: Any  # keys and values of the tokens that the last pass finished, which the cache does not have yet


def _wavefront(predict: Predict, z_BSC, start_BSC, known: Known, slots: Any, solver: Solver) -> Inverse:
    """`solve` by windows of `updates` strides: the first stride of a window is at its last update, after which its keys
    and values are kept and the window moves on; the last stride is at its first. All samples take the same steps."""
    tokens, stride, updates = z_BSC.shape[1], solver.stride, solver.updates

    def update(front: _Front, low: int | jax.Array, width: int, final: int) -> tuple[_Front, jax.Array]:
        """One pass over `width` tokens, `final` of which it finishes; returns also those tokens' residual.

        What the pass before finished goes into the cache here, before anything reads it: afterwards, XLA would copy
        the whole cache at each pass."""
        known, finished = front.known, front.finished
        known = known if finished is None else known.replace(cache=known.cache.append(finished))
        old, z, of_slots = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, low, width, axis=1),
                                        (front.x_BSC, z_BSC, slots))
        affine, kv = predict(jnp.concatenate([known.last_B1C, old[:, :-1]], axis=1), of_slots, known.cache)
        new = affine.inverse(z)
        x_BSC = lax.dynamic_update_slice_in_dim(front.x_BSC, new, low, axis=1)
        if final:
            finished = jax.tree.map(lambda part: part[..., :final, :, :], kv)
            known = known.replace(last_B1C=new[:, final - 1:final])
        return _Front(x_BSC, known, finished), jacobi.residual(new[:, :final], old[:, :final])

    front = _Front(start_BSC, known, None)
    residuals, whole = [], tokens // stride
    passes = list(range(-(-tokens // stride) + updates - 1))
    alike = [p for p in passes if updates - 1 <= p < whole]  # full windows
    for p in passes:
        low, high = max(0, p - updates + 1) * stride, min((p + 1) * stride, tokens)
        final = min(stride, high - low) if p >= updates - 1 else 0
        if p not in alike:
            front, change = update(front, low, high - low, final)
            residuals += [change[None]] * bool(final)
        elif p == alike[0]:
            front, change = update(front, low, high - low, final)
            lows = (jnp.asarray(alike[1:], jnp.int32) - updates + 1) * stride
            front, rest = lax.scan(lambda front, low: update(front, low, updates * stride, stride), front, lows)
            residuals += [change[None], rest]
    residual = jnp.concatenate(residuals)
    outcome = jacobi.outcome(residual, solver.tolerance, exact=stride == 1)  # one by one, all before a token is final
    report = Report(jnp.full(residual.shape, updates, jnp.int32), residual, outcome)
    known = front.known.replace(cache=front.known.cache.append(front.finished))
    return Inverse(front.x_BSC, known, report)
