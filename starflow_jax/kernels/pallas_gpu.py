"""Flash attention for Hopper GPUs in Pallas's Mosaic GPU dialect: wgmma, TMA copies, warp specialisation.

Some warpgroups compute, the last one only copies blocks into shared memory ahead of them. Softmax runs in
float32 and base 2. Blocks that the mask rules out are neither copied nor computed. Those that it cuts come first, in
a loop of their own, so that the one over whole blocks compares nothing and keeps all it has in registers.

Forward: a program has 64 queries per computing warpgroup and walks over the keys; the softmax of one block runs
beside the product of the last one's weights and values. Where that makes fewer programs than the GPU has
multiprocessors (decoding), the keys are split among several.
Backward: a program has 128 keys and walks over the queries. All five products are taken once; dq, to which
every program contributes, is summed in float32 by the copy engine's add (so its last bits depend on the order of
the programs).

Programs that run at the same time work on the same head: its keys, values and the sum of dq then stay in the L2
cache. (With 64 heads at once the sums take twice the time of all else, for they go to device memory and back.)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from starflow_jax.kernels.hopper import (
    LOG2_E,
    ROWS,
    SWIZZLED,
    TUNED,
    Blocks,
    Walk,
    accumulate,
    filled,
    hide,
    launcher,
    lengths,
    pad,
    prefetch,
    take_registers,
)
from starflow_jax.kernels.hopper_backward import backward
from starflow_jax.kernels.mask import Mask, block_runs, visible_blocks
from starflow_jax.kernels.reference import MASKED
from starflow_jax.kernels.unsupported import Unsupported

__all__ = ["backward", "check", "forward"]

MULTIPROCESSORS = 132
# A row's largest score to begin with: above all that are hidden, so that their weights are 0 also as long as a query
# has seen nothing else.
LOWEST = MASKED / 2


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
    batch_size, queries, heads, dim = q_BSHD.shape
    keys, group = k_BKGD.shape[1], heads // k_BKGD.shape[2]
    q_BSHD, k_BKGD, v_BKGD = pad(q_BSHD, k_BKGD, v_BKGD)
    computing, k_block, stages = min(blocks.forward_computing, pl.cdiv(queries, ROWS)), *blocks[1:3]
    q_tile, k_blocks = computing * ROWS, pl.cdiv(keys, k_block)
    in_front = pl.cdiv(mask.prefix, k_block)  # blocks with prefix in them, which all queries see
    runs = block_runs(visible_blocks(mask, queries, keys, q_tile, k_block), in_front)
    tiles = runs.shape[1]
    # A part of fewer than four steps would not be worth its own start and end.
    parts = max(1, min(MULTIPROCESSORS // (tiles * heads * batch_size), k_blocks // 4))

    def kernel(q_ref, k_ref, v_ref, runs_ref, length_ref, out_ref, lse_ref, *, scratch):
        qo_smem, k_smem, v_smem, lse_smem, q_full, k_full, v_full, k_free, v_free = scratch
        batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
        tile = tiles - 1 - lax.axis_index("tile")  # under a causal mask the last ones take longest
        part = lax.axis_index("part")
        length = length_ref[batch]
        walk = Walk.over_keys(runs_ref, tile, length, k_block, mask.prefix)
        per_part = lax.div(walk.steps + (parts - 1), jnp.int32(parts))
        begin = part * per_part
        # At least one step, which is hidden where there is nothing to see.
        steps = jnp.maximum(jnp.minimum(walk.steps - begin, per_part), 1)
        cut = jnp.clip(walk.cut - begin, 1, steps)  # a whole block may be treated as a cut one

        def block_of(step):
            step += begin
            return jnp.where(step < walk.steps, walk.block(step), k_blocks)

        @pl.when(warpgroup == computing)
        def _copy():
            kv_head = lax.div(head, jnp.int32(group))

            def fetch(step, slot):
                source = (batch, pl.ds(block_of(step) * k_block, k_block), kv_head)
                plgpu.copy_gmem_to_smem(k_ref.at[source], k_smem.at[slot], k_full.at[slot])
                plgpu.copy_gmem_to_smem(v_ref.at[source], v_smem.at[slot], v_full.at[slot])

            prefetch(fetch, steps, stages, (k_free, v_free), computing)

        @pl.when(warpgroup < computing)
        def _compute():
            take_registers(computing)
            q_start = tile * q_tile + warpgroup * ROWS
            qo, lse_row = qo_smem.at[warpgroup], lse_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(q_start, ROWS), head], qo, q_full.at[warpgroup])
            plgpu.barrier_wait(q_full.at[warpgroup])

            def soften(scores, largest, total):
                """(weights, the new largest score and total of weights, what the old weights shrink by)."""
                new_largest = jnp.maximum(largest, scores.max(axis=1) * LOG2_E)
                weights = jnp.exp2(scores * LOG2_E - lax.broadcast_in_dim(new_largest, scores.shape, [0]))
                shrink = jnp.exp2(largest - new_largest)
                return weights.astype(q_ref.dtype), new_largest, total * shrink + weights.sum(axis=1), shrink

            def start_cut(step, out, largest, total):
                """Softmax of a block that the mask may cut; its values are still to be added."""
                slot = lax.rem(step, jnp.int32(stages))

                def product(scores_ref):
                    plgpu.wgmma(scores_ref, qo, k_smem.at[slot].transpose((1, 0)))
                    return scores_ref[...]

                plgpu.barrier_wait(k_full.at[slot])
                scores = pl.run_scoped(product, plgpu.ACC((ROWS, k_block), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                scores = hide(scores, mask, q_start, block_of(step) * k_block, keys, length, q_axis=0)
                weights, largest, total, shrink = soften(scores, largest, total)
                return out * lax.broadcast_in_dim(shrink, out.shape, [0]), weights, largest, total

            def add_values(step, out, weights):
                slot = lax.rem(step, jnp.int32(stages))
                plgpu.barrier_wait(v_full.at[slot])
                (out,), _ = accumulate(lambda refs, _: plgpu.wgmma(refs[0], weights, v_smem.at[slot]), (out,))
                plgpu.barrier_arrive(v_free.at[slot])
                return out

            def step_over_cut(step, carry):
                out, weights, *softmax = start_cut(step, *carry)
                return add_values(step, out, weights), *softmax

            def step_over_whole(step, carry):
                out, *softmax = carry
                slot, before = (lax.rem(x, jnp.int32(stages)) for x in (step, step - 1))
                plgpu.barrier_wait(k_full.at[slot])
                plgpu.barrier_wait(v_full.at[before])

                # This step's softmax runs beside the product with the last step's values.
                def overlap(products, softmax):
                    scores_ref, out_ref = products
                    weights_ref, largest_ref, total_ref, shrink_ref = softmax
                    plgpu.wgmma(scores_ref, qo, k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(out_ref, weights_ref[...], v_smem.at[before])
                    scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
                    plgpu.barrier_arrive(k_free.at[slot])
                    softened = soften(scores, largest_ref[...], total_ref[...])
                    weights_ref[...], largest_ref[...], total_ref[...], shrink_ref[...] = softened

                (_, out), (weights, largest, total, shrink) = accumulate(
                    overlap, (filled((ROWS, k_block), 0.0), out), (*softmax, filled((ROWS,), 0.0)))
                plgpu.barrier_arrive(v_free.at[before])
                return out * lax.broadcast_in_dim(shrink, out.shape, [0]), weights, largest, total

            nothing_yet = (filled((ROWS, dim), 0.0), filled((ROWS,), LOWEST), filled((ROWS,), 0.0))
            carry = lax.fori_loop(0, cut - 1, step_over_cut, nothing_yet)
            carry = lax.fori_loop(cut, steps, step_over_whole, start_cut(cut - 1, *carry))
            out, weights, largest, total = carry
            out = add_values(steps - 1, out, weights)

            nothing = total == 0
            total = jnp.where(nothing, 1.0, total)
            scale = jnp.where(nothing, 0.0, 1 / total)
            qo[...] = (out * lax.broadcast_in_dim(scale, out.shape, [0])).astype(q_ref.dtype)
            lse_row[...] = jnp.where(nothing, MASKED, largest / LOG2_E + jnp.log(total))
            plgpu.commit_smem()
            target = part * batch_size + batch
            plgpu.copy_smem_to_gmem(qo, out_ref.at[target, pl.ds(q_start, ROWS), head])
            plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[target, head, pl.ds(q_start, ROWS)])
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

    out_type = (jax.ShapeDtypeStruct((parts * batch_size, *q_BSHD.shape[1:]), q_BSHD.dtype),
                jax.ShapeDtypeStruct((parts * batch_size, heads, tiles * q_tile), jnp.float32))
    grid = {"batch": batch_size, "head": heads, "part": parts, "tile": tiles}
    launch = launcher(entry, out_type, "attention_forward", computing, **grid)
    out, lse_BHS = launch(q_BSHD, k_BKGD, v_BKGD, runs, lengths(length_B, batch_size, keys))
    out, lse_BHS = out[:, :queries], lse_BHS[..., :queries]
    if parts == 1:
        return out, lse_BHS
    return _join(*(x.reshape(parts, batch_size, *x.shape[1:]) for x in (out, lse_BHS)))


def _join(out_PBSHD: jax.Array, lse_PBHS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over all keys from the softmax over each part of them."""
    share_PBSH1 = jax.nn.softmax(lse_PBHS, axis=0).swapaxes(2, 3)[..., None]
    return (out_PBSHD * share_PBSH1).sum(0).astype(out_PBSHD.dtype), jax.nn.logsumexp(lse_PBHS, axis=0)
