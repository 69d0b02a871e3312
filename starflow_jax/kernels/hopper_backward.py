"""The gradient of pallas_gpu.py's attention: a program has 128 keys and walks over the queries.

All five products are taken once; dq, to which every program contributes, is summed in float32 by the copy engine's
add (so its last bits depend on the order of the programs).
"""

import functools

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


def backward(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, *, mask: Mask, length_B,
             blocks: Blocks | None = None):
    """As reference.backward: (dq, dk, dv)."""
    blocks = blocks or TUNED[q_BSHD.shape[-1]]
    batch_size, queries, heads, dim = q_BSHD.shape
    keys, kv_heads = k_BKGD.shape[1:3]
    q_BSHD, k_BKGD, v_BKGD, dout_BSHD = pad(q_BSHD, k_BKGD, v_BKGD, dout_BSHD)
    group, panels = heads // kv_heads, dim // ROWS
    k_tile, q_block, stages = COMPUTING * ROWS, blocks.q_backward, blocks.backward_stages
    if q_block // ROWS * panels != COMPUTING:
        raise ValueError(f"{q_block=}: a step makes {COMPUTING} blocks of dq, {ROWS} x {ROWS} each")
    runs = block_runs(visible_blocks(mask, queries, keys, q_block, k_tile).T)
    tiles, missing = runs.shape[1], -queries % q_block

    def kernel(q_ref, k_ref, v_ref, lse_ref, delta_ref, dout_ref, runs_ref, length_ref, dq_ref, dk_ref, dv_ref,
               *, scratch):
        (k_smem, v_smem, q_smem, dout_smem, lse_smem, delta_smem, ds_smem, dq_smem,
         kv_full, full, free, ds_full) = scratch
        batch, kv_head, tile, warpgroup = (lax.axis_index(name) for name in ("batch", "kv_head", "tile", "warpgroup"))
        length = length_ref[batch]
        walk = Walk.over_queries(runs_ref, tile, length, k_tile)
        steps = group * walk.steps  # one query head after the other

        @pl.when(warpgroup == COMPUTING)
        def _copy():
            def fetch(step, slot):
                head = kv_head * group + lax.div(step, walk.steps)
                rows = pl.ds(walk.block(lax.rem(step, walk.steps)) * q_block, q_block)
                for panel in range(panels):
                    source = (batch, rows, head, pl.ds(panel * ROWS, ROWS))
                    plgpu.copy_gmem_to_smem(q_ref.at[source], q_smem.at[slot, panel], full.at[slot])
                    plgpu.copy_gmem_to_smem(dout_ref.at[source], dout_smem.at[slot, panel], full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_smem.at[slot], full.at[slot])

            prefetch(fetch, steps, stages, (free,), COMPUTING)

        @pl.when(warpgroup < COMPUTING)
        def _compute():
            take_registers(COMPUTING)
            k_start = tile * k_tile + warpgroup * ROWS
            for panel in range(panels):
                source = (batch, pl.ds(k_start, ROWS), kv_head, pl.ds(panel * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[warpgroup, panel], kv_full.at[warpgroup])
                plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[warpgroup, panel], kv_full.at[warpgroup])
            # Each warpgroup also reads the other's keys, for dq.
            for other in range(COMPUTING):
                plgpu.barrier_wait(kv_full.at[other])

            def step_over_queries(of_group, is_cut, index, carry):
                step = of_group * walk.steps + index
                slot, ds_slot = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
                block = walk.cut_block(index) if is_cut else walk.whole_block(index - walk.cut)
                plgpu.barrier_wait(full.at[slot])

                def products(scores_ref, dweights_ref):
                    for panel in range(panels):
                        plgpu.wgmma(scores_ref, k_smem.at[warpgroup, panel],
                                    q_smem.at[slot, panel].transpose((1, 0)))
                    for panel in range(panels):
                        plgpu.wgmma(dweights_ref, v_smem.at[warpgroup, panel],
                                    dout_smem.at[slot, panel].transpose((1, 0)))
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=panels)
                    if is_cut:
                        scores = hide(scores, mask, block * q_block, k_start, keys, length, q_axis=1)
                    lse = lax.broadcast_in_dim(load_row(lse_smem.at[slot]), scores.shape, [1])
                    weights = jnp.exp2(scores * LOG2_E - lse)
                    return weights, dweights_ref[...]

                tile_of_scores = plgpu.ACC((ROWS, q_block), jnp.float32)
                weights, dweights = pl.run_scoped(products, tile_of_scores, tile_of_scores)

                def add(refs, _):
                    *dkv_refs, dq_block_ref = refs
                    for panel in range(panels):
                        plgpu.wgmma(dkv_refs[panels + panel], weights.astype(q_ref.dtype), dout_smem.at[slot, panel])
                    delta = lax.broadcast_in_dim(load_row(delta_smem.at[slot]), weights.shape, [1])
                    dscores = (weights * (dweights - delta)).astype(q_ref.dtype)
                    for part in range(q_block // ROWS):
                        ds_smem.at[ds_slot, warpgroup, part][...] = dscores[:, part * ROWS:(part + 1) * ROWS]
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(ds_full)
                    for panel in range(panels):
                        plgpu.wgmma(dkv_refs[panel], dscores, q_smem.at[slot, panel])
                    plgpu.barrier_wait(ds_full)
                    dq_part, dq_panel = (warpgroup, 0) if panels == 1 else (0, warpgroup)
                    for other in range(COMPUTING):
                        plgpu.wgmma(dq_block_ref, ds_smem.at[ds_slot, other, dq_part].transpose((1, 0)),
                                    k_smem.at[other, dq_panel])

                (*dkv, dq_block), _ = accumulate(add, (*carry, filled((ROWS, ROWS), 0.0)))
                plgpu.barrier_arrive(free.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem.at[warpgroup][...] = dq_block
                plgpu.commit_smem()
                row, column = (warpgroup * ROWS, 0) if panels == 1 else (0, warpgroup * ROWS)
                rows, head = pl.ds(block * q_block + row, ROWS), kv_head * group + of_group
                plgpu.copy_smem_to_gmem(
                    dq_smem.at[warpgroup], dq_ref.at[batch, rows, head, pl.ds(column, ROWS)], reduction_op="add")
                return tuple(dkv)

            def step_over_heads(of_group, dkv):
                dkv = lax.fori_loop(0, walk.cut, functools.partial(step_over_queries, of_group, True), dkv)
                return lax.fori_loop(walk.cut, walk.steps, functools.partial(step_over_queries, of_group, False), dkv)

            dkv = lax.fori_loop(0, group, step_over_heads, 2 * panels * (filled((ROWS, ROWS), 0.0),))
            # The other warpgroup may still be reading keys for its last block of dq.
            plgpu.barrier_arrive(ds_full)
            plgpu.barrier_wait(ds_full)
            for panel in range(panels):
                target = (batch, pl.ds(k_start, ROWS), kv_head, pl.ds(panel * ROWS, ROWS))
                for smem, ref, array in ((k_smem, dk_ref, dkv[panel]), (v_smem, dv_ref, dkv[panels + panel])):
                    smem.at[warpgroup, panel][...] = array.astype(q_ref.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(smem.at[warpgroup, panel], ref.at[target])
            plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        def panels_of(*shape: int):
            return plgpu.SMEM(shape, q_BSHD.dtype, transforms=SWIZZLED)

        row = plgpu.SMEM((stages, q_block), jnp.float32)
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch=scratch),
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
