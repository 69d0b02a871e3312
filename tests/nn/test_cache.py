"""The cache of keys and values: what lies in which slot, and how many count."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.nn.cache import BLOCK, KVCache, rounded_slots

LAYERS, BATCH, HEADS, DIM = 2, 3, 2, 4


def kv(slots: int, first: float, unstacked: bool = False):
    """Keys first, first + 1, ... along the slots, and values ten times that."""
    k = jnp.broadcast_to((first + jnp.arange(slots, dtype=jnp.float32))[:, None, None],
                         (LAYERS, BATCH, slots, HEADS, DIM))
    return (tuple(k), tuple(10 * k)) if unstacked else (k, 10 * k)


def slots_of(cache: KVCache) -> list[float]:
    """The key in each slot, the same in all layers, samples, heads and channels; a tenth of the value."""
    k, v = (np.asarray(jnp.stack(part) if isinstance(part, tuple) else part)
            for part in (cache.k_LBPHD, cache.v_LBPHD))
    np.testing.assert_array_equal(v, 10 * k)
    row = k[0, 0, :, 0, 0]
    np.testing.assert_array_equal(k, np.broadcast_to(row[:, None, None], k.shape))
    return row.tolist()


@pytest.mark.parametrize("unstacked", [False, True])
def test_what_is_appended_lies_behind_what_was_there(unstacked: bool) -> None:
    cache = KVCache.empty(LAYERS, BATCH, 6, HEADS, DIM, jnp.float32, unstacked)
    cache = cache.append(kv(2, 1, unstacked)).append(kv(3, 7, unstacked))
    assert slots_of(cache) == [1, 2, 7, 8, 9, 0] and int(cache.length) == 5


@pytest.mark.parametrize("unstacked", [False, True])
def test_what_is_written_over_others_does_not_add_to_the_length(unstacked: bool) -> None:
    """A ring of two places of two slots behind one that stays."""
    cache, lengths = KVCache.filled(kv(3, 1, unstacked), 5), []
    for place, first in ((3, 4.0), (1, 6.0), (3, 8.0)):
        cache = cache.write(kv(2, first, unstacked), jnp.int32(place))
        lengths.append(int(cache.length))
    assert slots_of(cache) == [1, 6, 7, 8, 9] and lengths == [5, 5, 5]


@pytest.mark.parametrize("unstacked", [False, True])
def test_int8_keeps_every_slot_and_head_to_a_127th_of_its_largest(unstacked: bool) -> None:
    random = np.random.default_rng(0)
    k, v = (jnp.asarray(random.normal(size=(LAYERS, BATCH, 5, HEADS, DIM)) * 10.0 ** random.integers(
        -3, 3, (LAYERS, BATCH, 5, HEADS, 1)), jnp.float32) for _ in range(2))
    cache = KVCache.empty(LAYERS, BATCH, 6, HEADS, DIM, jnp.int8, unstacked)
    for first, last in ((0, 2), (2, 5)):
        kv = k[:, :, first:last], v[:, :, first:last]
        cache = cache.append((tuple(kv[0]), tuple(kv[1])) if unstacked else kv)
    assert int(cache.length) == 5
    assert len(cache.k_LBPHD) == LAYERS if unstacked else cache.k_LBPHD.shape == (LAYERS, BATCH, 6, HEADS, DIM)
    for kept, x in ((cache.k_LBPHD, k), (cache.v_LBPHD, v)):
        whole = jax.tree.map(lambda *layers: jnp.stack(layers), *kept) if unstacked else kept
        assert whole.q_BPGD.dtype == jnp.int8 and whole.scale_BG1P.shape == (LAYERS, BATCH, HEADS, 1, 6)
        error = np.abs(whole.scaled_back(jnp.float32)[:, :, :5] - x)
        assert (error <= np.abs(x).max(axis=-1, keepdims=True) / 127 * 0.501).all()
        assert not whole.q_BPGD[:, :, 5].any()


def test_many_slots_are_rounded_up_and_do_not_count() -> None:
    assert [rounded_slots(slots) for slots in (1, BLOCK, BLOCK + 1)] == [1, BLOCK, 2 * BLOCK]
    cache = KVCache.filled(kv(2, 1), BLOCK + 1)
    assert cache.k_LBPHD.shape[2] == 2 * BLOCK and int(cache.length) == 2
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(
        jnp.shape, KVCache.empty(LAYERS, BATCH, BLOCK + 1, HEADS, DIM, jnp.float32))


@pytest.mark.parametrize("unstacked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_mesh_shards_samples_and_heads(dtype, unstacked: bool) -> None:
    mesh = sharding.make_mesh(settings_of.Mesh(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    run = partial(KVCache.empty, LAYERS, 2, 6, HEADS, DIM, dtype, unstacked)
    with jax.set_mesh(mesh):
        cache = jax.jit(run)()
    shardings = jax.eval_shape(run).shardings(mesh)
    for leaf, placed in zip(jax.tree.leaves(cache), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(placed, leaf.ndim)
        assert math.prod(placed.shard_shape(leaf.shape)) == max(leaf.size // 4, 1)
