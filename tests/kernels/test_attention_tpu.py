"""The attention core compiled for TPUs that are not here, at full size."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.kernels import attention as core
from starflow_jax.kernels import pallas_tpu
from starflow_jax.kernels.int8 import Int8Slots
from starflow_jax.kernels.mask import Causal, Mask
from starflow_jax.kernels.stacked import Stacked
from tests.kernels.test_attention import DENOISER, DENOISER_HEADS, HEAD_DIM, HEADS, SLOTS, with_gradients
from tests.kernels.test_attention import small_blocks as small_blocks

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
slow = pytest.mark.slow


@pytest.fixture
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> jax.sharding.Sharding:
    """One chip of a kind of TPU that is not here."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, TPUs' compiler, is not installed: pip install -e '.[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[request.param])
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


@pytest.mark.parametrize("chip, heads, mask, backward, calls", [
    pytest.param(chip, heads, mask, backward, 1 + backward, marks=[] if quick else [slow],
                 id=f"{chip}-{'causal' if mask == Causal() else 'denoiser'}-{'backward' if backward else 'forward'}")
    for chip in TOPOLOGIES for heads, mask in ((HEADS, Causal()), (DENOISER_HEADS, DENOISER))
    for backward in (False, True) for quick in [chip == "v5p" and mask == Causal() and backward]
], indirect=["chip"])
def test_tpu_kernels_compile_at_full_size(chip, heads: int, mask: Mask, backward: bool, calls: int) -> None:
    x = jax.ShapeDtypeStruct((1, SLOTS, heads, HEAD_DIM), jnp.bfloat16, sharding=chip)
    function = functools.partial(core.attention, mask=mask)
    program = jax.jit(functools.partial(with_gradients, function) if backward else function)
    compiled = program.lower(*(3 + backward) * [x]).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == calls
    # What the compiler counts is what the kernels say of themselves: four operations per channel and pair forward,
    # ten backward; not less than the mask leaves, and little more.
    low, high = (np.asarray(bound, np.int64) for bound in np.broadcast_arrays(*mask.interval(np.arange(SLOTS), SLOTS)))
    pairs = int((high - low).sum()) + mask.prefix * SLOTS
    operations = (14 if backward else 4) * HEAD_DIM * heads * pairs
    assert operations < compiled.cost_analysis()["flops"] < 1.2 * operations
    operands = SLOTS * heads * HEAD_DIM * 2
    assert compiled.memory_analysis().temp_size_in_bytes < (8 if backward else 5) * operands


@slow
@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_tpu_decoding_reads_the_cache_where_it_is(chip) -> None:
    """A cache of whole blocks is turned by its layout: no copy of it is made."""
    def of(slots: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((2, slots, HEADS, HEAD_DIM), jnp.bfloat16, sharding=chip)

    def step(q, k, v, past_k, past_v, length_B):
        return core.attention(q, k, v, Causal(), (past_k, past_v, length_B))

    capacity = 33 * pallas_tpu.BLOCK
    length_B = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=chip)
    compiled = jax.jit(step).lower(*3 * [of(256)], *2 * [of(capacity)], length_B).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    assert compiled.memory_analysis().temp_size_in_bytes < capacity * HEADS * HEAD_DIM * 2 / 10


@slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("chip", ["v5p"], indirect=True)
def test_tpu_decoding_takes_each_layer_from_the_stack_where_it_is(chip, dtype) -> None:
    """A loop over layers copies none of their caches."""
    layers, capacity = 4, 33 * pallas_tpu.BLOCK

    def of(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=chip)

    def step(q, k, v, stack_k, stack_v, length_B):
        def layer(q, index):
            past = (Stacked(stack_k, index), Stacked(stack_v, index), length_B)
            return core.attention(q, k, v, Causal(), past), None

        return jax.lax.scan(layer, q, jnp.arange(layers))[0]

    stack = of(layers, 2, capacity, HEADS, HEAD_DIM, dtype=dtype)
    if dtype == jnp.int8:
        stack = Int8Slots(stack, of(layers, 2, HEADS, 1, capacity, dtype=jnp.float32))
    compiled = jax.jit(step).lower(*3 * [of(2, 256, HEADS, HEAD_DIM)], stack, stack, of(2, dtype=jnp.int32)).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    one_layer = 2 * capacity * HEADS * HEAD_DIM * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer / 10
