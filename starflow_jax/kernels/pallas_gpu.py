"""Flash attention for Hopper GPUs in Pallas's Mosaic GPU dialect: wgmma, TMA copies, warp specialisation.

Some warpgroups compute, the last one only copies blocks into shared memory ahead of them. Softmax runs in
float32 and base 2. Blocks that the mask rules out are neither copied nor computed; only blocks which it cuts
are compared with it, element by element.

Forward: a program has 64 queries per computing warpgroup and walks over the keys; the softmax of one block runs
beside the product of the last one's weights and values.
Backward: a program has 128 keys and walks over the queries. All five products are taken once; dq, to which
every program contributes, is summed in float32 in device memory by the copy engine's add (so its last bits
depend on the order of the programs).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from starflow_jax.kernels.mask import Mask, block_runs, seen, visible_blocks
from starflow_jax.kernels.reference import MASKED
from starflow_jax.kernels.unsupported import Unsupported

ROWS = 64  # of a wgmma instruction, and so of a warpgroup's tile; also the width of a 128 byte swizzle
COMPUTING = 2  # warpgroups in the backward kernel; one more copies
# By how many compute: the most each of those and of the copying one may have of an SM's 65,536.
REGISTERS = {2: (240, 24), 3: (160, 32)}
LOG2_E = math.log2(math.e)
SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # as wgmma reads 16 bit operands
SWIZZLED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


class Blocks(NamedTuple):
    """Sizes that may be tuned: computing warpgroups and keys per step forward, queries per step backward, buffers."""

    forward_computing: int
    k_forward: int
    forward_stages: int
    q_backward: int
    backward_stages: int


TUNED = {64: Blocks(3, 128, 3, 128, 2), 128: Blocks(2, 128, 2, 64, 2)}


def check(q_BSHD: jax.Array, k_BKGD: jax.Array) -> None:
    """Raises Unsupported, with the reason, where these kernels do not serve such arrays on this machine."""
    dim = q_BSHD.shape[-1]
    if dim not in TUNED:
        raise Unsupported(f"head_dim {dim}: the Hopper kernels have {sorted(TUNED)}")
    if q_BSHD.dtype != jnp.bfloat16 or k_BKGD.dtype != jnp.bfloat16:
        raise Unsupported(f"{q_BSHD.dtype}: Hopper's matrix units multiply bfloat16")
    if jax.default_backend() == "gpu" and jax.local_devices()[0].compute_capability != "9.0":
        raise Unsupported(f"compute capability {jax.local_devices()[0].compute_capability}: made for 9.0")


def forward(q_BSHD, k_BKGD, v_BKGD, *, mask: Mask, length_B, blocks: Blocks | None = None):
    """As reference.forward: (out (B, S, H, D) bfloat16, log-sum-exp (B, H, S) float32)."""
    blocks = blocks or TUNED[q_BSHD.shape[-1]]
    batch, queries, heads, dim = q_BSHD.shape
    keys, group = k_BKGD.shape[1], heads // k_BKGD.shape[2]
    q_BSHD, k_BKGD, v_BKGD = _pad(q_BSHD, k_BKGD, v_BKGD)
    computing, k_block = blocks.forward_computing, blocks.k_forward
    q_tile, (registers, registers_to_copy) = computing * ROWS, REGISTERS[computing]
    in_front = -(-mask.prefix // k_block)  # blocks with prefix in them, which all queries see
    runs = block_runs(visible_blocks(mask, queries, keys, q_tile, k_block), in_front)
    tiles, stages = runs.shape[1], blocks.forward_stages

    def kernel(q_ref, k_ref, v_ref, runs_ref, length_ref, out_ref, lse_ref, *, scratch):
        qo_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free = scratch
        batch, head, warpgroup = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = tiles - 1 - lax.axis_index("tile")  # under a causal mask the last ones take longest
        length = length_ref[batch]
        first, last, whole_first, whole_last = (runs_ref[i, tile] for i in range(4))
        last = jnp.minimum(last, lax.div(length + (k_block - 1), jnp.int32(k_block)))
        whole_last = jnp.minimum(whole_last, lax.div(length, jnp.int32(k_block)))
        steps = jnp.maximum(in_front + last - first, 1)  # at least one, which masks do not rule out but hide

        def block_of(step):
            return jnp.where(step < in_front, step, step + (first - in_front))

        @pl.when(warpgroup == computing)
        def _copy():
            plgpu.set_max_registers(registers_to_copy, action="decrease")
            kv_head = lax.div(head, jnp.int32(group))

            def fetch(step, slot):
                source = (batch, pl.ds(block_of(step) * k_block, k_block), kv_head)
                plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[slot], v_full.at[slot])

            @pl.loop(0, steps + stages)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])
                    plgpu.barrier_wait(v_free.at[slot])

                pl.when(step < steps)(lambda: fetch(step, slot))

        @pl.when(warpgroup < computing)
        def _compute():
            plgpu.set_max_registers(registers, action="increase")
            q_start = tile * q_tile + warpgroup * ROWS
            qo, lse_row = qo_smem.at[warpgroup], lse_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(q_start, ROWS), head], qo, q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def soften(scores, step, largest, total):
                """(weights, the new largest score and total of weights, what the old weights shrink by)."""
                block = block_of(step)
                is_whole = (block < mask.prefix // k_block) | ((block >= whole_first) & (block < whole_last))
                scores = lax.cond(is_whole, lambda scores: scores, lambda scores: _hide(
                    scores, mask, q_start, block * k_block, keys, length, q_axis=0), scores)
                new_largest = jnp.maximum(largest, scores.max(axis=1) * LOG2_E)
                weights = jnp.exp2(scores * LOG2_E - lax.broadcast_in_dim(new_largest, scores.shape, [0]))
                shrink = jnp.exp2(largest - new_largest)
                return weights.astype(q_ref.dtype), new_largest, total * shrink + weights.sum(axis=1), shrink

            def first_scores(scores_ref):
                plgpu.wgmma(scores_ref, qo, plgpu.transpose_ref(k_smem.at[0], (1, 0)))
                return scores_ref[...]

            plgpu.barrier_wait(k_full.at[0])
            scores = pl.run_scoped(first_scores, plgpu.ACC((ROWS, k_block), jnp.float32))
            plgpu.barrier_arrive(k_free.at[0])
            weights, largest, total, _ = soften(scores, jnp.int32(0), _full((ROWS,), -jnp.inf), _full((ROWS,), 0.0))

            def step_over_keys(step, carry):
                out, *softmax = carry
                slot, before = (lax.rem(x, jnp.int32(stages)) for x in (step, step - 1))
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[before])

                # This step's softmax runs beside the product with the last step's values.
                def overlap(products, softmax):
                    scores_ref, out_ref = products
                    weights_ref, largest_ref, total_ref, shrink_ref = softmax
                    plgpu.wgmma(scores_ref, qo, plgpu.transpose_ref(k_smem.at[slot], (1, 0)))
                    plgpu.wgmma(out_ref, weights_ref[...], v_smem.at[before])
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    softened = soften(scores, step, largest_ref[...], total_ref[...])
                    weights_ref[...], largest_ref[...], total_ref[...], shrink_ref[...] = softened

                (_, out), (weights, largest, total, shrink) = _accumulate(
                    overlap, (_full((ROWS, k_block), 0.0), out), (*softmax, _full((ROWS,), 0.0)))
                plgpu.barrier_arrive(v_free.at[before])
                return out * lax.broadcast_in_dim(shrink, out.shape, [0]), weights, largest, total

            out = _full((ROWS, dim), 0.0)
            out, weights, largest, total = lax.fori_loop(1, steps, step_over_keys, (out, weights, largest, total))
            last_slot = lax.rem(steps - 1, jnp.int32(stages))
            plgpu.barrier_wait(v_full.at[last_slot])
            (out,), _ = _accumulate(lambda refs, _: plgpu.wgmma(refs[0], weights, v_smem.at[last_slot]), (out,))
            plgpu.barrier_arrive(v_free.at[last_slot])

            # A query that saw nothing has only masked scores, or not even those.
            nothing = (largest < MASKED / 2) | (total == 0)
            total = jnp.where(nothing, 1.0, total)
            scale = jnp.where(nothing, 0.0, 1 / total)
            qo[...] = (out * lax.broadcast_in_dim(scale, out.shape, [0])).astype(q_ref.dtype)
            lse_row[...] = jnp.where(nothing, MASKED, largest / LOG2_E + jnp.log(total))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(qo, out_ref.at[batch, pl.ds(q_start, ROWS), head])
            plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[batch, head, pl.ds(q_start, ROWS)])
            plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        block = plgpu.SMEM((stages, k_block, dim), q_BSHD.dtype, transforms=SWIZZLED)
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch=scratch),
            plgpu.SMEM((computing, ROWS, dim), q_BSHD.dtype, transforms=SWIZZLED), block, block,
            plgpu.SMEM((computing, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=computing), *2 * [plgpu.Barrier(num_barriers=stages)],
            *2 * [plgpu.Barrier(num_arrivals=computing, num_barriers=stages)],
            collective_axes="warpgroup",
        )

    out_type = (jax.ShapeDtypeStruct(q_BSHD.shape, q_BSHD.dtype),
                jax.ShapeDtypeStruct((batch, heads, tiles * q_tile), jnp.float32))
    launch = _launcher(entry, out_type, "attention_forward", computing, tile=tiles, head=heads, batch=batch)
    out, lse_BHS = launch(q_BSHD, k_BKGD, v_BKGD, runs, _lengths(length_B, batch, keys))
    return out[:, :queries], lse_BHS[..., :queries]


def backward(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, *, mask: Mask, length_B,
             blocks: Blocks | None = None):
    """As reference.backward: (dq, dk, dv)."""
    blocks = blocks or TUNED[q_BSHD.shape[-1]]
    batch, queries, heads, dim = q_BSHD.shape
    keys, kv_heads = k_BKGD.shape[1:3]
    q_BSHD, k_BKGD, v_BKGD, dout_BSHD = _pad(q_BSHD, k_BKGD, v_BKGD, dout_BSHD)
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
        batch, kv_head, warpgroup = lax.axis_index("batch"), lax.axis_index("kv_head"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")
        length = length_ref[batch]
        first, last, whole_first, whole_last = (runs_ref[i, tile] for i in range(4))
        last = jnp.where(tile * k_tile < length, last, first)
        whole_last = jnp.where((tile + 1) * k_tile <= length, whole_last, whole_first)
        steps = group * (last - first)

        def place(step) -> tuple[jax.Array, jax.Array]:
            """(query head, block of queries) of a step."""
            return kv_head * group + lax.div(step, last - first), first + lax.rem(step, last - first)

        @pl.when(warpgroup == COMPUTING)
        def _copy():
            plgpu.set_max_registers(REGISTERS[COMPUTING][1], action="decrease")

            def fetch(step, slot):
                head, block = place(step)
                rows = pl.ds(block * q_block, q_block)
                for panel in range(panels):
                    source = (batch, rows, head, pl.ds(panel * ROWS, ROWS))
                    plgpu.copy_gmem_to_smem(q_ref.at[source], q_smem.at[slot, panel], full.at[slot])
                    plgpu.copy_gmem_to_smem(dout_ref.at[source], dout_smem.at[slot, panel], full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, rows], lse_smem.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, rows], delta_smem.at[slot], full.at[slot])

            @pl.loop(0, steps + stages)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                pl.when(step < steps)(lambda: fetch(step, slot))

        @pl.when(warpgroup < COMPUTING)
        def _compute():
            plgpu.set_max_registers(REGISTERS[COMPUTING][0], action="increase")
            k_start = tile * k_tile + warpgroup * ROWS
            for panel in range(panels):
                source = (batch, pl.ds(k_start, ROWS), kv_head, pl.ds(panel * ROWS, ROWS))
                plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[warpgroup, panel], kv_full.at[warpgroup])
                plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[warpgroup, panel], kv_full.at[warpgroup])
            # Each warpgroup also reads the other's keys, for dq.
            for other in range(COMPUTING):
                plgpu.barrier_wait(kv_full.at[other])

            def step_over_queries(step, carry):
                slot, ds_slot = lax.rem(step, jnp.int32(stages)), lax.rem(step, jnp.int32(2))
                head, block = place(step)
                plgpu.barrier_wait(full.at[slot])

                def products(scores_ref, dweights_ref):
                    for panel in range(panels):
                        plgpu.wgmma(scores_ref, k_smem.at[warpgroup, panel],
                                    plgpu.transpose_ref(q_smem.at[slot, panel], (1, 0)))
                    for panel in range(panels):
                        plgpu.wgmma(dweights_ref, v_smem.at[warpgroup, panel],
                                    plgpu.transpose_ref(dout_smem.at[slot, panel], (1, 0)))
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=panels)
                    is_whole = (block >= whole_first) & (block < whole_last)
                    scores = lax.cond(is_whole, lambda scores: scores, lambda scores: _hide(
                        scores, mask, block * q_block, k_start, keys, length, q_axis=1), scores)
                    lse = lax.broadcast_in_dim(_load_row(lse_smem.at[slot]), scores.shape, [1])
                    weights = jnp.exp2(scores * LOG2_E - lse)
                    return weights, dweights_ref[...]

                tile_of_scores = plgpu.ACC((ROWS, q_block), jnp.float32)
                weights, dweights = pl.run_scoped(products, tile_of_scores, tile_of_scores)

                def add(refs, _):
                    *dkv_refs, dq_block_ref = refs
                    for panel in range(panels):
                        plgpu.wgmma(dkv_refs[panels + panel], weights.astype(q_ref.dtype), dout_smem.at[slot, panel])
                    delta = lax.broadcast_in_dim(_load_row(delta_smem.at[slot]), weights.shape, [1])
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
                        plgpu.wgmma(dq_block_ref, plgpu.transpose_ref(ds_smem.at[ds_slot, other, dq_part], (1, 0)),
                                    k_smem.at[other, dq_panel])

                (*dkv, dq_block), _ = _accumulate(add, (*carry, _full((ROWS, ROWS), 0.0)))
                plgpu.barrier_arrive(free.at[slot])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                dq_smem.at[warpgroup][...] = dq_block
                plgpu.commit_smem()
                row, column = (warpgroup * ROWS, 0) if panels == 1 else (0, warpgroup * ROWS)
                plgpu.copy_smem_to_gmem(
                    dq_smem.at[warpgroup],
                    dq_ref.at[batch, pl.ds(block * q_block + row, ROWS), head, pl.ds(column, ROWS)],
                    reduction_op="add")
                return tuple(dkv)

            dkv = lax.fori_loop(0, steps, step_over_queries, 2 * panels * (_full((ROWS, ROWS), 0.0),))
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

    dq_BSHD = jax.new_ref(jnp.zeros((batch, queries + missing, heads, dim), jnp.float32))
    rows = [jnp.pad(row, ((0, 0), (0, 0), (0, missing))) for row in (lse_BHS * LOG2_E, delta_BHS)]
    out_type = 2 * (jax.ShapeDtypeStruct(k_BKGD.shape, k_BKGD.dtype),)
    launch = _launcher(entry, out_type, "attention_backward", COMPUTING, tile=tiles, kv_head=kv_heads, batch=batch)
    dk_BKGD, dv_BKGD = launch(
        q_BSHD, k_BKGD, v_BKGD, *rows, dout_BSHD, runs, _lengths(length_B, batch, keys), dq_BSHD)
    return dq_BSHD[...][:, :queries].astype(q_BSHD.dtype), dk_BKGD[:, :keys], dv_BKGD[:, :keys]


def _pad(*arrays_BSHD: jax.Array) -> list[jax.Array]:
    # Only to whole tiles of the swizzle: the copy engine reads zeros, and writes nothing, beyond the end.
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % SWIZZLED[0].tiling[0]), (0, 0), (0, 0))) for x in arrays_BSHD]


def _launcher(entry, out_type, name: str, computing: int, **grid: int):
    # Not plgpu.kernel, which takes no mutable array (dq).
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=computing + 1,
                      thread_name="warpgroup")
    return pl.kernel(entry, out_type, mesh=mesh, name=name,
                     compiler_params=plgpu.CompilerParams(approx_math=True))


def _accumulate(body, sums, others=()):
    """(sums, others) after body(references to sums, references to others) has added products to the sums."""
    return pl.run_state(lambda refs: body(*refs))((jax.tree.map(plgpu.ACC.init, sums), others))


def _load_row(ref) -> jax.Array:
    """A vector along the columns of a wgmma tile."""
    return plgpu.load(ref, (), layout=plgpu.Layout.WGMMA.reduce(0))


def _full(shape: tuple[int, ...], value: float) -> jax.Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _hide(scores, mask: Mask, q_start, k_start, keys: int, length, q_axis: int) -> jax.Array:
    """Scores of a tile that the mask cuts. q_axis: which of its axes runs over queries."""
    start = (q_start, k_start) if q_axis == 0 else (k_start, q_start)
    query, key = (start[axis] + plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
                  for axis in (q_axis, 1 - q_axis))
    return jnp.where(seen(mask, query, key, keys, jnp) & (key < length), scores, MASKED)


def _lengths(length_B, batch: int, keys: int) -> jax.Array:
    return jnp.full(batch, keys, jnp.int32) if length_B is None else length_B.astype(jnp.int32)
