"""Attention of several lanes of jax.vmap, as sessions that are made together have them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.kernels import attention as core
from starflow_jax.kernels.mask import Causal
from starflow_jax.kernels.stacked import Stacked
from tests.kernels.test_attention import H100, MARKS, arrays, with_gradients
from tests.kernels.test_attention import small_blocks as small_blocks
from tests.kernels.test_attention import small_tpu_blocks as small_tpu_blocks


@pytest.mark.parametrize("stacked", [False, True])
def test_lanes_see_each_their_own_length_and_share_the_branch_of_the_fullest(stacked: bool, monkeypatch) -> None:
    monkeypatch.setattr(core, "SHORT", 1024)
    q, k, v, past_k, past_v = arrays("float32", (3, 2, 5, 4, 16), *2 * [(3, 2, 5, 2, 16)], *2 * [(3, 2, 2, 90, 2, 16)])
    lengths = jnp.asarray([0, 20, 50])

    def attend(q, k, v, past_k, past_v, length):
        kept = [Stacked(stack, jnp.int32(1)) if stacked else stack[1] for stack in (past_k, past_v)]
        return core.attention(q, k, v, Causal(), (*kept, length))

    lanes = jax.jit(jax.vmap(attend)).lower(q, k, v, past_k, past_v, lengths).compile()
    together = np.asarray(lanes(q, k, v, past_k, past_v, lengths))
    for lane in range(3):
        one = [x[lane] for x in (q, k, v, past_k, past_v, lengths)]
        np.testing.assert_allclose(together[lane], attend(*one), atol=1e-6)
    assert lanes.as_text().count(" conditional(") == 1
    gradient = jax.grad(lambda q, lane: attend(q, *(x[lane] for x in (k, v, past_k, past_v, lengths))).sum())
    with_past = np.stack([gradient(q[lane], lane) for lane in range(3)])
    assert np.isfinite(with_past).all() and (np.abs(with_past).max((1, 2, 3, 4)) > 1e-3).all()
    past_k = past_k.at[:, :, :, 69:].set(jnp.nan)  # of the last of four quarters, which no lane has begun
    np.testing.assert_array_equal(lanes(q, k, v, past_k, past_v, lengths), together)


@pytest.mark.parametrize("implementation", ["reference", "tpu on CPU", "triton on CPU"])
@pytest.mark.usefixtures("small_tpu_blocks")
def test_lanes_are_as_each_alone_with_a_long_cache(implementation: str) -> None:
    """In gradients too."""
    q, k, v, past_k, past_v = arrays("float32", (3, 2, 40, 2, 64), *2 * [(3, 2, 40, 1, 64)], *2 * [(2, 300, 1, 64)])
    dout, = arrays("float32", q.shape, seed=1)
    lengths = jnp.asarray([[0, 20], [131, 299], [300, 1]])

    def attend(dout, q, k, v, length_B):
        return with_gradients(lambda q, k, v: core.attention(
            q, k, v, Causal(), (past_k, past_v, length_B), implementation), dout, q, k, v)

    together = jax.jit(jax.vmap(attend))(dout, q, k, v, lengths)
    alone = [jax.jit(attend)(*(x[lane] for x in (dout, q, k, v, lengths))) for lane in range(3)]
    for found, *expected in zip(together, *alone):
        np.testing.assert_allclose(found, np.stack(expected), atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lanes_of_a_full_size_cache_lower_for(platform: str, monkeypatch) -> None:
    monkeypatch.setattr(core, "SHORT", 1024)

    def attend(q, k, v, past_k, past_v, length):
        return core.attention(q, k, v, Causal(), (past_k, past_v, length))

    def of(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    inputs = *3 * [of(3, 1, 64, 4, 64)], *2 * [of(3, 1, 4096, 4, 64)], of(3, dtype=jnp.int32)
    text = jax.jit(jax.vmap(attend)).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    assert MARKS["triton" if platform == "cuda" else "tpu"] in text or platform == "cpu"


def test_kernels_for_hoppers_take_no_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SHORT", 1024)

    def takes(slots: int, dtype) -> bool:
        return core.takes_lanes(*(jax.ShapeDtypeStruct((1, length, 4, 64), dtype) for length in (64, slots)))

    assert takes(4096, jnp.bfloat16)  # without a GPU
    with jax.sharding.use_abstract_mesh(H100):
        assert not takes(4096, jnp.bfloat16) and takes(1024, jnp.bfloat16) and takes(4096, jnp.float32)
