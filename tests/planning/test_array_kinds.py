"""Where the bytes of compiled programs go: weights, cache, activations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from starflow_jax.kernels import attention as core
from starflow_jax.kernels.mask import Causal
from starflow_jax.nn.cache import KVCache
from starflow_jax.planning.array_kinds import Contents, contents_of
from starflow_jax.planning.program_cost import Cost, count
from tests.planning.test_program_cost import ASYNC, chip  # noqa: F401  (a fixture)

SIDE, LAYERS = 64, 5
MATRIX = 4 * SIDE**2


def of(*shape: int, dtype: Any = jnp.float32, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def planned(function: Any, weights: Any, *args: Any) -> Cost:
    """Of a jitted function of weights and others."""
    lowered = function.lower(weights, *args)
    cost = count(lowered.compile(), contents=contents_of(function, (weights, *args), {}, lowered.out_info, weights))
    assert sum(cost.hbm_parts.values()) == pytest.approx(cost.hbm_bytes) and cost.hbm_bytes > 0
    return cost


def test_a_products_weights_are_weights() -> None:
    cost = planned(jax.jit(lambda params, x: jnp.tanh(params["w_KN"] @ x)), {"w_KN": of(SIDE, SIDE)}, of(SIDE))
    assert cost.hbm_parts["weights"] == MATRIX
    assert 2 * 4 * SIDE <= cost.hbm_parts["activations"] <= 4 * 4 * SIDE
    assert cost.hbm_parts["cache_read"] == cost.hbm_parts["cache_written"] == 0


def test_weights_of_scanned_layers_are_weights_and_what_is_made_of_them_and_others_is_not() -> None:
    """Also where the state of the loop begins with rows of a table of weights."""
    @jax.jit
    def run(params, ids):
        return lax.scan(lambda x, w_KN: (jnp.tanh(x @ w_KN), None), params["table"][ids], params["w_LKN"])[0]

    params = {"w_LKN": of(LAYERS, SIDE, SIDE), "table": of(8, SIDE)}
    parts = planned(run, params, of(SIDE, dtype=jnp.int32)).hbm_parts
    # Read where they lie, or a slice written and read again; and the table's rows, as often as they are asked for.
    assert LAYERS * MATRIX <= parts["weights"] <= 3 * LAYERS * MATRIX + MATRIX
    assert parts["activations"] >= 2 * LAYERS * MATRIX


def test_a_layer_of_weights_that_a_loop_has_ready_for_its_next_trip_is_weights() -> None:
    @jax.jit
    def run(w_LKN, x):
        def trip(i, state):
            x, w_KN = state
            return jnp.tanh(x @ w_KN), lax.dynamic_index_in_dim(w_LKN, i + 1, keepdims=False)

        return lax.fori_loop(0, LAYERS, trip, (x, w_LKN[0]))[0]

    parts = planned(run, of(LAYERS + 1, SIDE, SIDE), of(1, SIDE)).hbm_parts
    assert parts["weights"] >= 2 * LAYERS * MATRIX and parts["activations"] < MATRIX


def test_a_cache_is_read_and_written() -> None:
    """Its values in a product; of its keys one of SIDE slots, in place."""
    @functools.partial(jax.jit, donate_argnames="cache")
    def run(w_KN, cache, x):
        key = jnp.broadcast_to(x @ w_KN, (LAYERS, 1, 1, 1, SIDE))
        k = lax.dynamic_update_slice_in_dim(cache.k_LBPHD, key, cache.length, axis=2)
        return KVCache(k, cache.v_LBPHD, cache.length + 1), cache.v_LBPHD @ x[0]

    cache = KVCache(of(LAYERS, 1, SIDE, 1, SIDE), of(LAYERS, 1, SIDE, 1, SIDE), of(dtype=jnp.int32))
    parts = planned(run, of(SIDE, SIDE), cache, of(1, SIDE)).hbm_parts
    assert parts["weights"] == MATRIX
    assert parts["cache_read"] == pytest.approx(LAYERS * MATRIX, rel=0.01)
    assert parts["cache_written"] == pytest.approx(LAYERS * 4 * SIDE, abs=64)  # and numbers


def test_a_cache_that_is_begun_counts_as_written_and_one_that_is_kept_as_copied() -> None:
    begun = jax.jit(lambda w_KN, x: KVCache.empty(LAYERS, 1, SIDE, 1, SIDE, jnp.float32).append(
        (jnp.broadcast_to(x @ w_KN, (LAYERS, 1, 1, 1, SIDE)),) * 2))
    parts = planned(begun, of(SIDE, SIDE), of(1, SIDE)).hbm_parts
    assert parts["cache_written"] >= 2 * LAYERS * MATRIX
    cache = KVCache(of(LAYERS, 1, SIDE, 1, SIDE), of(LAYERS, 1, SIDE, 1, SIDE), of(dtype=jnp.int32))
    kept = jax.jit(lambda w_KN, cache, x: cache.append((jnp.broadcast_to(x @ w_KN, (LAYERS, 1, 1, 1, SIDE)),) * 2))
    parts = planned(kept, of(SIDE, SIDE), cache, of(1, SIDE)).hbm_parts
    assert parts["cache_written"] >= 4 * LAYERS * MATRIX and parts["cache_read"] == 0  # each copied


TPU = """HloModule m, input_output_alias={ {1}: (1, {}, may-alias) }

ENTRY %e (w: bf16[8,1024], k: bf16[8,1024], x: bf16[1,1024]) -> (bf16[1,1024], bf16[8,1024]) {
  %w = bf16[8,1024]{1,0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %k = bf16[8,1024]{1,0} parameter(1), metadata={op_name="state.k"}
  %x = bf16[1,1024]{1,0} parameter(2), metadata={op_name="x"}
  %i = s32[]{:S(6)} constant(3)
  %fetch = (bf16[8,1024]{1,0:S(1)}, bf16[8,1024]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %near = bf16[8,1024]{1,0:S(1)} copy-done(%fetch)
  %layer = bf16[1,1024]{1,0} dynamic-slice(%k, %i, %i), dynamic_slice_sizes={1,1024}
  %sliced = ((bf16[8,1024]{1,0}), bf16[2,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%k), slice={[0:2], [0:1024]}
  %two = bf16[2,1024]{1,0:S(1)} slice-done(%sliced)
  %y = bf16[1,1024]{1,0} custom-call(%near, %layer, %two, %x), custom_call_target="tpu_custom_call"
  %written = bf16[8,1024]{1,0} dynamic-update-slice(%k, %y, %i, %i)
  ROOT %out = (bf16[1,1024]{1,0}, bf16[8,1024]{1,0}) tuple(%y, %written)
}
"""


def test_what_tpus_fetch_into_their_fast_memory_is_read_and_slices_in_the_main_one_are_copies() -> None:
    row, contents = 2 * 1024, Contents({"params['w']": "weights", "state.k": "cache"})
    cost = count(TPU, contents=contents)
    assert cost.hbm_parts == {
        "weights": 8 * row, "cache_read": 2 * row + row, "cache_written": 2 * row + row,
        "activations": 2 * row + row}  # x, y, and y where it is written into the cache
    assert cost.hbm_bytes == sum(cost.hbm_parts.values()) == count(TPU).hbm_parts["activations"]
    moments = count(TPU, contents=Contents({"state.k": "weights"}))  # as a training step updates what it is given
    assert moments.hbm_parts["weights"] == 2 * row + 2 * row + row + row


def test_gathered_weights_are_weights() -> None:
    """A gather that is started and ended in fusions of its own, and what else lies beside."""
    text = ASYNC.replace("GROUPS", "replica_groups={}").replace(
        "ENTRY %main (x: bf16[128,256], m: f32[64,64]) -> bf16[128,256] {\n  %x = bf16[128,256]{1,0} parameter(0)",
        'ENTRY %main (x: bf16[128,256], m: f32[64,64]) -> bf16[128,256] {\n  %x = bf16[128,256]{1,0} parameter(0), '
        'metadata={op_name="w"}')
    shard, whole, matrix = 128 * 256 * 2, 512 * 256 * 2, 64 * 64 * 4
    assert count(text, contents=Contents({"w": "weights"})).hbm_parts == {
        "weights": (shard + whole) + whole + shard, "cache_read": 0, "cache_written": 0, "activations": 2 * matrix}


def test_bytes_on_a_tpu(chip) -> None:  # noqa: F811
    """Scanned layers of weights, and a kernel's attention to a cache of which a quarter is filled."""
    @jax.jit
    def run(params, cache, q):
        seen = core.attention(q, q, q, Causal(), (cache.k_LBPHD, cache.v_LBPHD, cache.length))
        return lax.scan(lambda x, w_KN: (jnp.tanh(x @ w_KN), None), seen, params["w_LKN"])[0]

    w, k, q = (of(*shape, dtype=jnp.bfloat16, sharding=chip) for shape in (
        (3, 128, 128), (1, 4096, 2, 128), (1, 128, 2, 128)))
    cache = KVCache(k, k, of(dtype=jnp.int32, sharding=chip))
    lowered = run.lower({"w_LKN": w}, cache, q)
    contents = contents_of(run, ({"w_LKN": w}, cache, q), {}, lowered.out_info, w)
    compiled = lowered.compile()
    full, cost = (count(compiled, filled=share, contents=contents) for share in (1, 0.25))
    assert sum(cost.hbm_parts.values()) == pytest.approx(cost.hbm_bytes)
    assert 3 * 2 * 128**2 <= cost.hbm_parts["weights"] <= 2 * 3 * 2 * 128**2
    assert full.hbm_parts["cache_read"] >= 2 * 2 * 4096 * 2 * 128
    assert full.hbm_parts["cache_read"] - cost.hbm_parts["cache_read"] == pytest.approx(
        0.75 * 2 * 2 * 4096 * 2 * 128, rel=0.1)
    assert cost.hbm_parts["activations"] > 0
