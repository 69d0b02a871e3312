"""The GPU kernels on a GPU: values and gradients against float64, each mask, head_dim 64 and 128, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.kernels import attention as core
from starflow_jax.kernels import pallas_gpu, reference
from starflow_jax.kernels.mask import Causal, FrameWindow, Full, Mask
from tests.kernels.test_attention import MASKS, allowed, arrays, assert_near, dense, with_gradients

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")

# Frames of several blocks, a prefix that ends within one, and one that ends with one.
WIDE = [FrameWindow(prefix=300, tokens=230, window=3, lookahead=1),
        FrameWindow(prefix=256, tokens=200, window=2, lookahead=0)]
# implementation, dtype, (B, S, H, G), mask
CASES = [("gpu", "bfloat16", shape, mask) for mask in MASKS for shape in ((2, 333, 4, 2),)]
CASES += [("gpu", "bfloat16", (1, 1460, 2, 1), mask) for mask in [*WIDE, Causal()]]
CASES += [("gpu", "bfloat16", (2, slots, 2, 2), Causal()) for slots in (2, 63, 64, 65, 1001)]
CASES += [("triton", "float32", (1, 333, 2, 1), WIDE[0]), ("triton", "float16", (1, 280, 2, 2), MASKS[2]),
          ("triton", "bfloat16", (1, 301, 2, 2), Causal())]


@pytest.fixture(autouse=True)
def kernels_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SHORT", 0)


def compute(function, *inputs):
    with jax.default_matmul_precision("highest"):  # of what surrounds the kernels
        return jax.jit(function)(*inputs)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("implementation, dtype, shape, mask", CASES)
def test_values_and_gradients(implementation: str, dtype: str, shape: tuple[int, ...], mask: Mask, dim: int) -> None:
    batch, slots, heads, kv_heads = shape
    of_keys = (batch, slots, kv_heads, dim)
    q, k, v, dout = arrays(dtype, (batch, slots, heads, dim), of_keys, of_keys, (batch, slots, heads, dim))
    function = functools.partial(core.attention, mask=mask, implementation=implementation)
    ours = compute(functools.partial(with_gradients, function), dout, q, k, v)
    assert all(x.dtype == dtype for x in ours)
    assert_near(ours, dense(*(np.asarray(x, np.float64) for x in (q, k, v)), allowed(mask, slots, slots)[None],
                            np.asarray(dout, np.float64)), dtype)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("slots, mask", [(1, Causal()), (64, Full()), (200, Causal()), (159, Full())])
def test_decoding_against_a_cache(slots: int, mask: Mask, dim: int) -> None:
    """A block of queries behind a cache of which each sample has filled another length; keys in parts."""
    capacity, lengths = 2040, [0, 1131, 2040]
    q, dout, k, v, past_k, past_v = arrays(
        "bfloat16", *2 * [(3, slots, 2, dim)], *2 * [(3, slots, 1, dim)], *2 * [(3, capacity, 1, dim)])

    def function(q, k, v, past_k, past_v):
        return core.attention(q, k, v, mask, (past_k, past_v, jnp.asarray(lengths)), "gpu")

    ours = compute(functools.partial(with_gradients, function), dout, q, k, v, past_k, past_v)
    cached = np.broadcast_to(np.arange(capacity) < np.reshape(lengths, (3, 1, 1)), (3, slots, capacity))
    own = np.broadcast_to(allowed(mask, slots, slots), (3, slots, slots))
    keys, values = (np.concatenate([np.asarray(a, np.float64), np.asarray(b, np.float64)], axis=1)
                    for a, b in ((past_k, k), (past_v, v)))
    out, dq, dk, dv = dense(np.asarray(q, np.float64), keys, values, np.concatenate([cached, own], axis=2),
                            np.asarray(dout, np.float64))
    assert_near(ours[:4], [out, dq, dk[:, capacity:], dv[:, capacity:]], "bfloat16")
    assert_near(ours[4:], [dk[:, :capacity], dv[:, :capacity]], "bfloat16")


@pytest.mark.parametrize("mask, seeing", [(Full(), 40), (FrameWindow(prefix=0, tokens=8, window=1, lookahead=0), 8)])
def test_a_query_that_sees_nothing_gets_nothing(mask: Mask, seeing: int) -> None:
    """Sample 0 has no keys; of sample 1 only the first `seeing` queries see one of its 7."""
    q, k, v, dout = arrays("bfloat16", *4 * [(2, 40, 1, 64)])
    length_B, scale = jnp.asarray([0, 7]), 1 / 8
    q *= scale  # the kernels take queries already scaled
    out, lse = pallas_gpu.forward(q, k, v, mask=mask, length_B=length_B)
    delta = jnp.einsum("bshd,bshd->bhs", out, dout, preferred_element_type=jnp.float32)
    dq, dk, dv = pallas_gpu.backward(q, k, v, lse, delta, dout, mask=mask, length_B=length_B)
    assert all((x[0] == 0).all() for x in (out, dq, dk, dv))
    assert all((x[1, seeing:] == 0).all() for x in (out, dq)) and all((x[1, 7:] == 0).all() for x in (dk, dv))
    lowest = np.float32(reference.MASKED)
    assert (lse[0] == lowest).all() and (lse[1, :, seeing:] == lowest).all()
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    expected = dense(q[1:, :seeing] / scale, k[1:, :7], v[1:, :7], np.ones((1, seeing, 7), bool), dout[1:, :seeing])
    expected[1] = expected[1] / scale
    assert_near([out[1:, :seeing], dq[1:, :seeing], dk[1:, :7], dv[1:, :7]], expected, "bfloat16")


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", [Causal(), FrameWindow(prefix=256, tokens=1590, window=10, lookahead=1)])
def test_full_length(mask: Mask, dim: int) -> None:
    """The 7B model's 33,646 slots, two heads, against the reference in float32, block by block."""
    q, k, v, dout = arrays("bfloat16", *4 * [(1, 256 + 21 * 1590, 2, dim)])

    def run(implementation: str, *inputs):
        function = functools.partial(core.attention, mask=mask, implementation=implementation)
        return compute(functools.partial(with_gradients, function), *inputs)

    ours, again = run("gpu", dout, q, k, v), run("gpu", dout, q, k, v)
    assert_near(ours, run("reference", *(x.astype(jnp.float32) for x in (dout, q, k, v))), "bfloat16")
    # All but dq, which is a sum in no order, is the same every time.
    assert all((ours[i] == again[i]).all() for i in (0, 2, 3))
    assert_near(again, ours, "float16")
