"""One flow block: its log-determinant, its order, its inverse and its prefix."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.flow import decode
from starflow_jax.flow.block import FlowBlock, block_rope
from starflow_jax.nn.cache import KVCache
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
        variables = jax.jit(self.block.init)(jax.random.key(0), self.x_BSC, self.rope, self.text_BTD)
        self.variables = variables if is_fresh else randomised(variables)

    @partial(jax.jit, static_argnums=0)
    def forward(self, x_BSC: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = None if self.text_BTD is None else self.text_BTD[: x_BSC.shape[0]]
        return self.block.apply(self.variables, x_BSC, self.rope, text)

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


@pytest.mark.parametrize("with_text", [False, True])
def test_inverse_of_forward_is_the_input(with_text: bool) -> None:
    case = Case(with_text)
    z, _ = case.forward(case.x_BSC)
    assert np.abs(z - case.x_BSC).max() > 0.1

    @jax.jit
    def inverse(z: jax.Array) -> Any:
        apply = partial(case.block.apply, case.variables)
        cache = KVCache.empty(2, 2, case.text_length + TOKENS, 2, HEAD_DIM, jnp.float64)
        if with_text:
            cache = cache.append(apply(case.text_BTD, case.rope[:, :TEXT], method=FlowBlock.prefill_text))
        return decode.solve_tokens(
            partial(apply, method=FlowBlock.predict), z, jnp.zeros_like(z), apply(2, method=FlowBlock.start), cache,
            case.rope[:, case.text_length:], decode.SEQUENTIAL)

    x, filled, last, report = inverse(z)
    np.testing.assert_allclose(x, case.x_BSC, atol=1e-9)
    np.testing.assert_array_equal(last, x[:, -1:])
    assert int(filled.length) == case.text_length + TOKENS
    assert np.array_equal(report.steps, np.ones((TOKENS, 2)))


def test_prefill_predicts_as_forward_does_and_text_alone_is_its_prefix() -> None:
    case = Case(with_text=True)
    apply = lambda method, *args: jax.jit(partial(case.block.apply, case.variables, method=method))(*args)  # noqa: E731
    affine, (k, _) = apply(FlowBlock.prefill, case.x_BSC, case.rope, case.text_BTD)
    z, logdet = case.forward(case.x_BSC)
    np.testing.assert_allclose((case.x_BSC - affine.mu_BSC) / affine.sigma_BSC, z, atol=1e-12)
    np.testing.assert_allclose(-np.log(affine.sigma_BSC), logdet, atol=1e-12)
    text_k, _ = apply(FlowBlock.prefill_text, case.text_BTD, case.rope[:, :TEXT])
    np.testing.assert_allclose(k[:, :, :TEXT], text_k, atol=1e-12)


def test_a_fresh_block_changes_nothing() -> None:
    case = Case(with_text=True, is_fresh=True)
    z, logdet = case.forward(case.x_BSC)
    np.testing.assert_allclose(z, case.x_BSC, atol=1e-7)
    np.testing.assert_allclose(logdet, 0, atol=1e-7)
