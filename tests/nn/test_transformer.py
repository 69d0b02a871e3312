"""The stack of layers: one result however it is iterated over, and what a first layer may see beyond the others."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.kernels.mask import Causal, FrameWindow, Full
from starflow_jax.nn import rope
from starflow_jax.nn.transformer import Transformer, run_behind_prefix, unstacked
from tests.helpers import HEAD_DIM, randomised

LAYERS, SLOTS, WIDTH = 3, 6, 2 * HEAD_DIM
STACK = Transformer(LAYERS, HEAD_DIM)
ROPE = rope.rope_table(rope.grid_positions(SLOTS, 1, 1, 1.0), HEAD_DIM)


@pytest.fixture(scope="module")
def variables() -> Any:
    return randomised(jax.jit(lambda: STACK.init(jax.random.key(0), hidden(), Causal(), ROPE))())


def hidden() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, SLOTS, WIDTH)), jnp.float32)


def layers_of(variables: Any, unstack: bool) -> Any:
    return unstacked(variables) if unstack else variables


@pytest.mark.parametrize("unstack", [False, True])
def test_a_cache_stands_for_the_slots_before(variables: Any, unstack: bool) -> None:
    apply = jax.jit(partial(STACK.apply, layers_of(variables, unstack)), static_argnums=1)
    whole, (k, v) = jax.jit(partial(STACK.apply, variables), static_argnums=1)(hidden(), Causal(), ROPE)
    assert k.shape == v.shape == (LAYERS, 2, SLOTS, 2, HEAD_DIM)
    cache = STACK.apply(layers_of(variables, unstack), 2, SLOTS, WIDTH, method=Transformer.empty_cache)
    _, first = apply(hidden()[:, :4], Causal(), ROPE[:, :4])
    rest, made = apply(hidden()[:, 4:], Causal(), ROPE[:, 4:], cache.append(first))
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-5)
    for ours, expected in zip(made, (k, v)):
        np.testing.assert_allclose(jnp.stack(list(ours)), expected[:, :, 4:], atol=1e-5)


@pytest.mark.parametrize("unstack", [False, True])
def test_only_the_first_layer_sees_what_is_not_kept(variables: Any, unstack: bool) -> None:
    """Four slots kept of six, against masks that hide the last two from the other layers."""
    kept, (k, _) = jax.jit(lambda of: STACK.apply(of, hidden(), Full(), ROPE, kept=4))(layers_of(variables, unstack))
    hides = FrameWindow(prefix=0, tokens=1, window=SLOTS, lookahead=SLOTS, frames=4)  # slots behind the fourth
    expected, (k_expected, _) = jax.jit(
        lambda: STACK.apply(variables, hidden(), hides, ROPE, first_mask=Full()))()
    np.testing.assert_allclose(kept, expected[:, :4], atol=1e-5)
    np.testing.assert_allclose(jnp.stack(list(k)), k_expected[:, :, :4], atol=1e-5)
    never, _ = jax.jit(lambda: STACK.apply(variables, hidden()[:, :4], Full(), ROPE[:, :4]))()
    assert np.abs(never - kept).max() > 1e-2  # the first layer did look


def test_the_head_gets_the_slots_behind_the_prefix(variables: Any) -> None:
    stack = STACK.bind(variables)
    whole, (k, _) = stack(hidden(), Causal(), ROPE)
    out, (k_found, _) = run_behind_prefix(stack, lambda x: {"twice": 2 * x}, hidden(), ROPE, Causal(), prefix=2)
    np.testing.assert_allclose(out["twice"], 2 * whole[:, 2:], atol=1e-6)
    np.testing.assert_allclose(k_found, k, atol=1e-6)
