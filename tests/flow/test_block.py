"""One flow block: forward and inverse, their log-determinants, the order, the prefix."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.flow.block import FlowBlock, block_rope
from starflow_jax.flow.inversion import SEQUENTIAL, Inverse, Known, Solver
from starflow_jax.flow.jacobi import Outcome
from tests.helpers import HEAD_DIM, randomised

GRID, CHANNELS, TEXT = (2, 2, 2), 2, 3
TOKENS = 8
EXTENT = 2.0


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Case:
    """A block in float64 with an input for it."""

    def __init__(self, with_text: bool, is_fresh: bool = False):
        self.text_length = TEXT if with_text else 0
        self.block = FlowBlock(CHANNELS, width=40, layers=2, head_dim=HEAD_DIM, dtype=jnp.float64, text=with_text)
        random = np.random.default_rng(5)
        self.x_BSC = jnp.asarray(random.normal(size=(2, TOKENS, CHANNELS)))
        self.text_BTD = jnp.asarray(random.normal(size=(2, TEXT, 4))) if with_text else None
        self.rope = block_rope(GRID, EXTENT, self.text_length, HEAD_DIM)
        init = partial(self.block.init, method=FlowBlock.forward)
        variables = jax.jit(init)(jax.random.key(0), self.x_BSC, self.rope, self.text_BTD)
        self.variables = variables if is_fresh else randomised(variables)

    @partial(jax.jit, static_argnums=0)
    def forward(self, x_BSC: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = None if self.text_BTD is None else self.text_BTD[: x_BSC.shape[0]]
        return self.apply(FlowBlock.forward, x_BSC, self.rope, text)

    def apply(self, method: Callable, *args: Any) -> Any:
        return self.block.apply(self.variables, *args, method=method)

    @partial(jax.jit, static_argnums=0)
    def begin(self, x_BSC: jax.Array) -> Known:
        """The text and these tokens, in a cache with room for all."""
        text = None if self.text_BTD is None else self.text_BTD[None]
        return self.apply(FlowBlock.begin, self.text_length + TOKENS, x_BSC, self.rope, text)

    @partial(jax.jit, static_argnums=(0, 3))
    def inverse(self, z_BSC: jax.Array, known: Known, solver: Solver) -> Inverse:
        """Of the last tokens' noise, behind the known ones."""
        rope = self.rope[:, -z_BSC.shape[1]:]
        return self.apply(FlowBlock.inverse, z_BSC, rope, known, jnp.zeros_like(z_BSC), solver)

    def jacobian(self) -> np.ndarray:
        """(S, C, S, C) of the first sample."""
        return np.asarray(jax.jit(jax.jacfwd(lambda x: self.forward(x[None])[0][0]))(self.x_BSC[0]))


@pytest.mark.parametrize("with_text", [False, True])
def test_log_determinant_is_the_jacobians(with_text: bool) -> None:
    case = Case(with_text)
    jacobian = case.jacobian().reshape(TOKENS * CHANNELS, TOKENS * CHANNELS)
    sign, expected = np.linalg.slogdet(jacobian)
    _, logdet = case.forward(case.x_BSC)
    assert sign == 1
    assert abs(expected) > 0.1  # the block does something
    np.testing.assert_allclose(logdet[0].sum(), expected, atol=1e-5)


def test_jacobian_is_triangular_in_the_blocks_order() -> None:
    case = Case(with_text=True)
    jacobian = case.jacobian()
    per_token = np.abs(jacobian).max(axis=(1, 3))
    assert np.array_equal(per_token > 0, np.tril(np.ones((TOKENS, TOKENS), bool)))
    _, logdet = case.forward(case.x_BSC)
    own = jacobian[np.arange(TOKENS), :, np.arange(TOKENS), :]  # a token's channels do not mix
    np.testing.assert_allclose(own, np.exp(logdet[0])[:, :, None] * np.eye(CHANNELS), atol=1e-12)


@pytest.mark.parametrize("solver", [SEQUENTIAL, Solver(3, tolerance=0.0), Solver(16, updates=8)],
                         ids=["sequential", "blocks", "wavefront"])
@pytest.mark.parametrize("with_text", [False, True])
def test_inverse_undoes_forward(with_text: bool, solver: Solver) -> None:
    """Blocks of three leave a block of two; a wavefront of as many updates as tokens is exact."""
    case = Case(with_text)
    z, logdet = case.forward(case.x_BSC)
    assert np.abs(z - case.x_BSC).max() > 0.1 and np.abs(logdet).max() > 0.1
    found = case.inverse(z, case.begin(z[:, :0]), solver)
    np.testing.assert_allclose(found.x_BSC, case.x_BSC, atol=1e-9)
    np.testing.assert_array_equal(found.known.last_B1C, found.x_BSC[:, -1:])
    assert int(found.known.cache.length) == case.text_length + TOKENS
    steps = {SEQUENTIAL: [1] * TOKENS, Solver(3, tolerance=0.0): [3, 3, 2]}.get(solver, [8] * 4)
    np.testing.assert_array_equal(found.report.steps, np.tile(np.array(steps)[:, None], 2))
    assert solver.updates or (np.asarray(found.report.outcome) == Outcome.EXACT).all()


@pytest.mark.parametrize("with_text", [False, True])
def test_given_tokens_are_those_that_the_inverse_found(with_text: bool) -> None:
    """`begin` with some tokens knows what `inverse` knows behind them, and the rest follows from there."""
    case = Case(with_text)
    z, _ = case.forward(case.x_BSC)
    given = case.begin(case.x_BSC[:, :5])
    found = case.inverse(z, case.begin(z[:, :0]), SEQUENTIAL).known.cache
    assert int(given.cache.length) == case.text_length + 5
    slots = slice(0, case.text_length + 5)
    for ours, expected in zip((given.cache.k_LBPHD, given.cache.v_LBPHD), (found.k_LBPHD, found.v_LBPHD)):
        assert np.abs(expected[:, :, slots]).min(axis=(0, 1, 3, 4)).max() > 0
        np.testing.assert_allclose(ours[:, :, slots], expected[:, :, slots], atol=1e-9)
    rest = case.inverse(z[:, 5:], given, SEQUENTIAL)
    np.testing.assert_allclose(rest.x_BSC, case.x_BSC[:, 5:], atol=1e-9)


def test_a_fresh_block_changes_nothing() -> None:
    case = Case(with_text=True, is_fresh=True)
    z, logdet = case.forward(case.x_BSC)
    np.testing.assert_allclose(z, case.x_BSC, atol=1e-7)
    np.testing.assert_allclose(logdet, 0, atol=1e-7)
