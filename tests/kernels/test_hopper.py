"""The order in which Hopper's kernels meet blocks, and that the programs hold what they are to hold."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.kernels import pallas_gpu
from starflow_jax.kernels.hopper import Walk
from starflow_jax.kernels.mask import HIDDEN, WHOLLY, Causal, FrameWindow, Full, Mask, block_runs, seen, visible_blocks
from starflow_jax.kernels.unsupported import Unsupported

SLOTS, Q_BLOCK, K_BLOCK = 321, 48, 40
MASKS = [Causal(), Full(), FrameWindow(prefix=130, tokens=50, window=2, lookahead=0),
         FrameWindow(prefix=0, tokens=90, window=1, lookahead=0)]


def blocks_of(walk: Walk) -> tuple[list[int], list[int]]:
    """(cut, whole)"""
    met = walk.block(jnp.arange(int(walk.steps))).tolist()
    return met[:int(walk.cut)], met[int(walk.cut):]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [SLOTS, 200, 40, 0])
def test_tiles_of_queries_meet_what_they_see_once(mask: Mask, length: int) -> None:
    in_front = -(-mask.prefix // K_BLOCK)
    runs = jnp.asarray(block_runs(visible_blocks(mask, SLOTS, SLOTS, Q_BLOCK, K_BLOCK), in_front))
    query, key = np.arange(SLOTS)[:, None], np.arange(-(-SLOTS // K_BLOCK) * K_BLOCK)
    sees = np.broadcast_to(seen(mask, query, key, SLOTS), (SLOTS, len(key))) & (key < length)
    for tile in range(runs.shape[1]):
        cut, whole = blocks_of(Walk.over_keys(runs, tile, jnp.int32(length), K_BLOCK, mask.prefix))
        mine = sees[tile * Q_BLOCK:(tile + 1) * Q_BLOCK].reshape(-1, len(key) // K_BLOCK, K_BLOCK)
        assert len({*cut, *whole}) == len(cut) + len(whole)
        some, all_ = (set(np.flatnonzero(which).tolist()) for which in (mine.any((0, 2)), mine.all((0, 2))))
        assert some <= {*cut, *whole} and set(whole) <= all_
        # A block in which the prefix ends counts as cut, whatever follows it.
        assert all_ - set(whole) <= ({mask.prefix // K_BLOCK} if mask.prefix % K_BLOCK else set())
        if length == SLOTS:  # no work for nothing
            assert {*cut, *whole} == some | set(range(in_front))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [SLOTS, 200, 40, 0])
def test_tiles_of_keys_meet_the_queries_that_see_them_once(mask: Mask, length: int) -> None:
    visible = visible_blocks(mask, SLOTS, SLOTS, Q_BLOCK, K_BLOCK).T
    runs = jnp.asarray(block_runs(visible))
    for tile in range(runs.shape[1]):
        cut, whole = blocks_of(Walk.over_queries(runs, tile, jnp.int32(length), K_BLOCK))
        expected = visible[tile] != HIDDEN if tile * K_BLOCK < length else np.zeros(len(visible[tile]), bool)
        assert sorted(cut + whole) == list(np.flatnonzero(expected))
        assert whole == list(np.flatnonzero(visible[tile] == WHOLLY) if (tile + 1) * K_BLOCK <= length else [])


@pytest.mark.parametrize("queries, batch, dim, parts", [(64, 1, 64, 2), (64, 2, 128, 1), (256, 1, 128, 1)])
def test_few_queries_split_the_keys(queries: int, batch: int, dim: int, parts: int) -> None:
    """So that all multiprocessors have work; 64 heads, a long cache."""
    q = jax.ShapeDtypeStruct((batch, queries, 64, dim), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((batch, 33_648, 64, dim), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((batch,), jnp.int32)

    def forward(q, k, v, length_B):
        return pallas_gpu.forward(q, k, v, mask=Full(), length_B=length_B)

    text = jax.jit(forward).trace(q, k, k, length).lower(lowering_platforms=("cuda",)).as_text()
    assert f"tensor<{parts * batch}x{queries}x64x{dim}xbf16>" in text and text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize("dim", [64, 128])
def test_gradients_lower_for_grouped_heads(dim: int) -> None:
    q, k = (jax.ShapeDtypeStruct((1, 301, heads, dim), jnp.bfloat16) for heads in (4, 2))
    row = jax.ShapeDtypeStruct((1, 4, 301), jnp.float32)

    def backward(*arrays):
        return pallas_gpu.backward(*arrays, mask=MASKS[2], length_B=None)

    text = jax.jit(backward).trace(q, k, k, row, row, q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1


@pytest.mark.parametrize(("capability", "refused"), [("8.6", True), ("9.0", False)])
def test_they_are_for_hoppers_alone(monkeypatch: pytest.MonkeyPatch, capability: str, refused: bool) -> None:
    """The kind of a GPU that programs are only compiled for is in its name (planning/topology.py)."""
    q_BSHD = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    device = types.SimpleNamespace(device_kind=f"GPU of compute capability {capability}")
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: types.SimpleNamespace(abstract_device=device))
    with pytest.raises(Unsupported, match="compute capability 8.6") if refused else contextlib.nullcontext():
        pallas_gpu.check(q_BSHD, q_BSHD)
