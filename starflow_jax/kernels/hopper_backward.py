"""The gradient of pallas_gpu.py's attention: a program has 128 keys and walks over the queries.

All five products are taken once; dq, to which every program contributes, is summed in float32 by the copy engine's
add (so its last bits depend on the order of the programs).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from starflow_jax.kernels.hopper import (
    LOG2_E,
    ROWS,
    SWIZZLED,
    SWIZZLED_F32,
    TUNED,
    Blocks,
    Walk,
    accumulate,
    filled,
    hide,
    launcher,
    lengths,
    load_row,
    pad,
    prefetch,
    take_registers,
)
from starflow_jax.kernels.mask import Mask, block_runs, visible_blocks
from starflow_jax.kernels.reference import MASKED

COMPUTING = 2  # warpgroups; one more copies
K_TILE = COMPUTING * ROWS  # keys of a program


def backward(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, *, mask: Mask, length_B,
             blocks: Blocks | None = None):
    """As reference.backward: (dq, dk, dv)."""
    blocks = blocks or TUNED[q_BSHD.shape[-1]]
    batch_size, queries, heads, dim = q_BSHD.shape
    keys, kv_heads = k_BKGD.shape[1:3]
    q_BSHD, k_BKGD, v_BKGD, dout_BSHD = pad(q_BSHD, k_BKGD, v_BKGD, dout_BSHD)
    sizes = _Sizes(mask, keys, heads // kv_heads, dim // ROWS, blocks.q_backward, blocks.backward_stages)
    q_block, stages, panels = sizes.q_block, sizes.stages, sizes.panels
    if q_block // ROWS * panels != COMPUTING:
        raise ValueError(f"{q_block=}: a step makes {COMPUTING} blocks of dq, {ROWS} x {ROWS} each")
    runs = block_runs(visible_blocks(mask, queries, keys, q_block, K_TILE).T)
    tiles, missing = runs.shape[1], -queries % q_block

    def entry(*refs):
        def panels_of(*shape: int):
            return plgpu.SMEM(shape, q_BSHD.dtype, transforms=SWIZZLED)

        row = plgpu.SMEM((stages, q_block), jnp.float32)
        pl.run_scoped(
            lambda *scratch: _program(sizes, _Shared(*scratch), *refs),
            *2 * [panels_of(COMPUTING, panels, ROWS, ROWS)], *2 * [panels_of(stages, panels, q_block, ROWS)],
            row, row, panels_of(2, COMPUTING, q_block // ROWS, ROWS, ROWS),
            plgpu.SMEM((COMPUTING, ROWS, ROWS), jnp.float32, transforms=SWIZZLED_F32),
            plgpu.Barrier(num_arrivals=2 * panels, num_barriers=COMPUTING),
            plgpu.Barrier(num_arrivals=2 * panels + 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages), plgpu.Barrier(num_arrivals=COMPUTING),
            collective_axes="warpgroup",
        )

    dq_BSHD = jax.new_ref(jnp.zeros((batch_size, queries + missing, heads, dim), jnp.float32))
    # Of a query that saw nothing every score is MASKED; its weights are to be 0.
    lse_BHS = jnp.where(lse_BHS > MASKED / 2, lse_BHS * LOG2_E, 0.0)
    rows = [jnp.pad(row, ((0, 0), (0, 0), (0, missing))) for row in (lse_BHS, delta_BHS)]
    out_type = 2 * (jax.ShapeDtypeStruct(k_BKGD.shape, k_BKGD.dtype),)
    launch = launcher(entry, out_type, "attention_backward", COMPUTING, batch=batch_size, kv_head=kv_heads, tile=tiles)
    dk_BKGD, dv_BKGD = launch(
        q_BSHD, k_BKGD, v_BKGD, *rows, dout_BSHD, runs, lengths(length_B, batch_size, keys), dq_BSHD)
    return dq_BSHD[...][:, :queries].astype(q_BSHD.dtype), dk_BKGD[:, :keys], dv_BKGD[:, :keys]


class _Sizes(NamedTuple):
    """What the program is compiled for."""

    mask: Mask
    keys: int
    group: int  # query heads of a key head
    panels: int  # of ROWS channels, that a head has
    q_block: int
    stages: int  # blocks of queries in shared memory


class _Shared(NamedTuple):
    """Shared memory, in panels of ROWS channels, and the barriers that guard it."""

    k: Any
    v: Any
    q: Any
    dout: Any
    lse: Any
    delta: Any
    ds: Any  # the gradient of the scores, of both warpgroups: each reads all of it for its block of dq
    dq: Any
    kv_full: Any
    full: Any
    free: Any
    ds_full: Any


def _program(sizes: _Sizes, shared: _Shared, q_ref, k_ref, v_ref, lse_ref, delta_ref, dout_ref, runs_ref, length_ref,
             dq_ref, dk_ref, dv_ref) -> None:
    batch, kv_head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "kv_head", "tile", "warpgroup"))
    length = length_ref[batch]
    walk = Walk.over_queries(runs_ref, tile, length, K_TILE)
    steps = sizes.group * walk.steps  # one query head after the other

    @pl.when(warpgroup == COMPUTING)
    def _copy():
        def fetch(step, slot):
            full, head = shared.full.at[slot], kv_head * sizes.group + lax.div(step, walk.steps)
            rows = pl.ds(walk.block(lax.rem(step, walk.steps)) * sizes.q_block, sizes.q_block)
            for panel in range(sizes.panels):
                source = (batch, rows, head, pl.ds(panel * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(q_ref.at[source], shared.q.at[slot, panel], full)
                plgpu.copy_gmem_to_smem(dout_ref.at[source], shared.dout.at[slot, panel], full)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], shared.lse.at[slot], full)
            plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], shared.delta.at[slot], full)

        prefetch(fetch, steps, sizes.stages, (shared.free,), COMPUTING)

    @pl.when(warpgroup < COMPUTING)
    def _compute():
        take_registers(COMPUTING)
        k_start = tile * K_TILE + warpgroup * ROWS
        keys = [(batch, pl.ds(k_start, ROWS), kv_head, pl.ds(panel * ROWS, ROWS)) for panel in range(sizes.panels)]
        for panel, source in enumerate(keys):
            for smem, ref in ((shared.k, k_ref), (shared.v, v_ref)):
                plgpu.copy_gmem_to_smem(ref.at[source], smem.at[warpgroup, panel], shared.kv_full.at[warpgroup])
        # Each warpgroup also reads the other's keys, for dq.
        for other in range(COMPUTING):
            plgpu.barrier_wait(shared.kv_full.at[other])
        dkv = _Keys(sizes, shared, walk, dq_ref, batch, kv_head, warpgroup, k_start, length).gradients()
        # The other warpgroup may still be reading keys for its last block of dq.
        plgpu.barrier_arrive(shared.ds_full)
        plgpu.barrier_wait(shared.ds_full)
        for panel, target in enumerate(keys):
            for smem, ref, array in ((shared.k, dk_ref, dkv[panel]), (shared.v, dv_ref, dkv[sizes.panels + panel])):
                smem.at[warpgroup, panel][...] = array.astype(q_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem.at[warpgroup, panel], ref.at[target])
        plgpu.wait_smem_to_gmem(0)


class _Keys(NamedTuple):
    """The ROWS keys of one computing warpgroup. Its carry between steps: the panels of dk, then those of dv."""

    sizes: _Sizes
    shared: _Shared
    walk: Walk
    dq_ref: Any
    batch: jax.Array
    kv_head: jax.Array
    warpgroup: jax.Array
    k_start: jax.Array
    length: jax.Array

    def gradients(self) -> tuple[jax.Array, ...]:
        """The panels of dk and of dv; dq is added to its sum on the way."""
        def step_over_heads(of_group, dkv):
            over_cut, over_whole = (functools.partial(self._step, of_group, is_cut) for is_cut in (True, False))
            dkv = lax.fori_loop(0, self.walk.cut, over_cut, dkv)
            return lax.fori_loop(self.walk.cut, self.walk.steps, over_whole, dkv)

        zeros = 2 * self.sizes.panels * (filled((ROWS, ROWS), 0.0),)
        return lax.fori_loop(0, self.sizes.group, step_over_heads, zeros)

    def _step(self, of_group, is_cut: bool, index, dkv):
        """A block of queries of one of the group's heads."""
        walk, shared = self.walk, self.shared
        step = of_group * walk.steps + index
        slot, ds_slot = lax.rem(step, jnp.int32(self.sizes.stages)), lax.rem(step, jnp.int32(2))
        block = walk.cut_block(index) if is_cut else walk.whole_block(index - walk.cut)
        plgpu.barrier_wait(shared.full.at[slot])
        weights, dweights = self._weights(slot, block if is_cut else None)
        add = functools.partial(self._add, slot, ds_slot, weights, dweights)
        (*dkv, dq_block), _ = accumulate(add, (*dkv, filled((ROWS, ROWS), 0.0)))
        plgpu.barrier_arrive(shared.free.at[slot])
        self._add_to_dq(dq_block, block, of_group)
        return tuple(dkv)

    def _weights(self, slot, cut_block) -> tuple[jax.Array, jax.Array]:
        """(the softmax's weights (keys, queries), their gradient); cut_block: None where the mask cuts nothing."""
        sizes, shared = self.sizes, self.shared

        def products(scores_ref, dweights_ref):
            for ref, keys, queries in ((scores_ref, shared.k, shared.q), (dweights_ref, shared.v, shared.dout)):
                for panel in range(sizes.panels):
                    plgpu.wgmma(ref, keys.at[self.warpgroup, panel], queries.at[slot, panel].transpose((1, 0)))
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=sizes.panels)
            if cut_block is not None:
                q_start = cut_block * sizes.q_block
                scores = hide(scores, sizes.mask, q_start, self.k_start, sizes.keys, self.length, q_axis=1)
            lse = lax.broadcast_in_dim(load_row(shared.lse.at[slot]), scores.shape, [1])
            weights = jnp.exp2(scores * LOG2_E - lse)
            return weights, dweights_ref[...]

        tile_of_scores = plgpu.ACC((ROWS, sizes.q_block), jnp.float32)
        return pl.run_scoped(products, tile_of_scores, tile_of_scores)

    def _add(self, slot, ds_slot, weights, dweights, sums, _) -> None:
        """The step's products, added to dk, dv and a block of dq."""
        sizes, shared = self.sizes, self.shared
        *dkv_refs, dq_block_ref = sums
        dtype = shared.q.dtype
        for panel in range(sizes.panels):
            plgpu.wgmma(dkv_refs[sizes.panels + panel], weights.astype(dtype), shared.dout.at[slot, panel])
        delta = lax.broadcast_in_dim(load_row(shared.delta.at[slot]), weights.shape, [1])
        dscores = (weights * (dweights - delta)).astype(dtype)
        for part in range(sizes.q_block // ROWS):
            shared.ds.at[ds_slot, self.warpgroup, part][...] = dscores[:, part * ROWS:(part + 1) * ROWS]
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.ds_full)
        for panel in range(sizes.panels):
            plgpu.wgmma(dkv_refs[panel], dscores, shared.q.at[slot, panel])
        plgpu.barrier_wait(shared.ds_full)
        dq_part, dq_panel = (self.warpgroup, 0) if sizes.panels == 1 else (0, self.warpgroup)
        for other in range(COMPUTING):
            plgpu.wgmma(dq_block_ref, shared.ds.at[ds_slot, other, dq_part].transpose((1, 0)),
                        shared.k.at[other, dq_panel])

    def _add_to_dq(self, dq_block, block, of_group) -> None:
        """One of the step's COMPUTING blocks of dq, added by the copy engine to the sum over all programs."""
        smem = self.shared.dq.at[self.warpgroup]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = dq_block
        plgpu.commit_smem()
        row, column = (self.warpgroup * ROWS, 0) if self.sizes.panels == 1 else (0, self.warpgroup * ROWS)
        rows, head = pl.ds(block * self.sizes.q_block + row, ROWS), self.kv_head * self.sizes.group + of_group
        target = self.dq_ref.at[self.batch, rows, head, pl.ds(column, ROWS)]
        plgpu.copy_smem_to_gmem(smem, target, reduction_op="add")
