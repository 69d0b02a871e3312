"""Flash attention for Hopper GPUs in Pallas's Mosaic GPU dialect: wgmma, TMA copies, warp specialisation.

Some warpgroups compute, the last one only copies blocks into shared memory ahead of them. Softmax runs in
float32 and base 2. Blocks that the mask rules out are neither copied nor computed. Those that it cuts come first, in
a loop of their own, so that the one over whole blocks compares nothing and keeps all it has in registers.

Forward, here: a program has 64 queries per computing warpgroup and walks over the keys; the softmax of one block runs
beside the product of the last one's weights and values. Where that makes fewer programs than the GPU has
multiprocessors (decoding), the keys are split among several. Backward: hopper_backward.py.

Programs that run at the same time work on the same head: its keys, values and the sum of dq then stay in the L2
cache. (With 64 heads at once the sums take twice the time of all else, for they go to device memory and back.)
"""

import re
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
TAKES_INT8 = TAKES_STACKS = TAKES_LANES = False  # see kernels.reference
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
    if _capability() != "9.0":
        raise Unsupported(f"compute capability {_capability()}: made for 9.0")


def _capability() -> str:
    """Of the GPU that programs are for: that of the mesh in force, where its name says so (planning/topology.py), a
    Hopper's where it does not, or this machine's; "none" where there is neither."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    named = re.search(r"compute capability (\d+\.\d+)", device.device_kind) if device else None
    if named:
        return named[1]
    if jax.default_backend() == "gpu":
        return jax.local_devices()[0].compute_capability
    return "9.0" if device and device.platform == "gpu" else "none"


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
    sizes = _Sizes(mask, batch_size, keys, group, dim, computing, k_block, stages, tiles, parts)

    def entry(*refs):
        block = plgpu.SMEM((stages, k_block, dim), q_BSHD.dtype, transforms=SWIZZLED)
        pl.run_scoped(
            lambda *scratch: _program(sizes, _Shared(*scratch), *refs),
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


class _Sizes(NamedTuple):
    """What the program is compiled for."""

    mask: Mask
    batch: int
    keys: int
    group: int  # query heads of a key head
    dim: int
    computing: int  # warpgroups
    k_block: int
    stages: int  # blocks of keys, and of values, in shared memory
    tiles: int  # of queries
    parts: int  # that the keys are split into

    @property
    def q_tile(self) -> int:
        return self.computing * ROWS


class _Shared(NamedTuple):
    """Shared memory and the barriers that guard it."""

    qo: Any  # the queries, and in the end the output
    k: Any
    v: Any
    lse: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any


class _Part(NamedTuple):
    """A program's share of the walk over its tile's keys."""

    walk: Walk
    begin: jax.Array
    steps: jax.Array
    cut: jax.Array  # of the steps, the first ones
    k_blocks: int

    @classmethod
    def of(cls, sizes: _Sizes, walk: Walk, part) -> "_Part":
        per_part = lax.div(walk.steps + (sizes.parts - 1), jnp.int32(sizes.parts))
        begin = part * per_part
        # At least one step, which is hidden where there is nothing to see.
        steps = jnp.maximum(jnp.minimum(walk.steps - begin, per_part), 1)
        cut = jnp.clip(walk.cut - begin, 1, steps)  # a whole block may be treated as a cut one
        return cls(walk, begin, steps, cut, pl.cdiv(sizes.keys, sizes.k_block))

    def block(self, step) -> jax.Array:
        step += self.begin
        return jnp.where(step < self.walk.steps, self.walk.block(step), self.k_blocks)


def _program(sizes: _Sizes, shared: _Shared, q_ref, k_ref, v_ref, runs_ref, length_ref, out_ref, lse_ref) -> None:
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    tile = sizes.tiles - 1 - lax.axis_index("tile")  # under a causal mask the last ones take longest
    part_index = lax.axis_index("part")
    length = length_ref[batch]
    part = _Part.of(sizes, Walk.over_keys(runs_ref, tile, length, sizes.k_block, sizes.mask.prefix), part_index)

    @pl.when(warpgroup == sizes.computing)
    def _copy():
        kv_head = lax.div(head, jnp.int32(sizes.group))

        def fetch(step, slot):
            source = (batch, pl.ds(part.block(step) * sizes.k_block, sizes.k_block), kv_head)
            plgpu.copy_gmem_to_smem(k_ref.at[source], shared.k.at[slot], shared.k_full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[source], shared.v.at[slot], shared.v_full.at[slot])

        prefetch(fetch, part.steps, sizes.stages, (shared.k_free, shared.v_free), sizes.computing)

    @pl.when(warpgroup < sizes.computing)
    def _compute():
        take_registers(sizes.computing)
        q_start = tile * sizes.q_tile + warpgroup * ROWS
        qo, lse_row = shared.qo.at[warpgroup], shared.lse.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, pl.ds(q_start, ROWS), head], qo, shared.q_full.at[warpgroup])
        plgpu.barrier_wait(shared.q_full.at[warpgroup])
        out, largest, total = _Rows(sizes, shared, part, qo, q_start, length).attend()

        nothing = total == 0
        total = jnp.where(nothing, 1.0, total)
        scale = jnp.where(nothing, 0.0, 1 / total)
        qo[...] = (out * lax.broadcast_in_dim(scale, out.shape, [0])).astype(q_ref.dtype)
        lse_row[...] = jnp.where(nothing, MASKED, largest / LOG2_E + jnp.log(total))
        plgpu.commit_smem()
        target = part_index * sizes.batch + batch
        plgpu.copy_smem_to_gmem(qo, out_ref.at[target, pl.ds(q_start, ROWS), head])
        plgpu.copy_smem_to_gmem(lse_row, lse_ref.at[target, head, pl.ds(q_start, ROWS)])
        plgpu.wait_smem_to_gmem(0)


class _Rows(NamedTuple):
    """The ROWS queries of one computing warpgroup. Its carry between steps: the output so far, not divided yet and
    without the last step's values; that step's weights; and of each row the largest score and the sum of weights."""

    sizes: _Sizes
    shared: _Shared
    part: _Part
    queries: Any  # in shared memory
    q_start: jax.Array
    length: jax.Array

    def attend(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(weights times values, the largest score in base 2, the sum of weights)."""
        part = self.part
        nothing_yet = (filled((ROWS, self.sizes.dim), 0.0), filled((ROWS,), LOWEST), filled((ROWS,), 0.0))
        carry = lax.fori_loop(0, part.cut - 1, self._step_over_cut, nothing_yet)
        carry = lax.fori_loop(part.cut, part.steps, self._step_over_whole, self._start_cut(part.cut - 1, *carry))
        out, weights, largest, total = carry
        return self._add_values(part.steps - 1, out, weights), largest, total

    def _step_over_cut(self, step, carry):
        out, weights, *softmax = self._start_cut(step, *carry)
        return self._add_values(step, out, weights), *softmax

    def _start_cut(self, step, out, largest, total):
        """Softmax of a block that the mask may cut; its values are still to be added."""
        slot = self._slot(step)

        def product(scores_ref):
            plgpu.wgmma(scores_ref, self.queries, self.shared.k.at[slot].transpose((1, 0)))
            return scores_ref[...]

        plgpu.barrier_wait(self.shared.k_full.at[slot])
        scores = pl.run_scoped(product, plgpu.ACC((ROWS, self.sizes.k_block), jnp.float32))
        plgpu.barrier_arrive(self.shared.k_free.at[slot])
        k_start = self.part.block(step) * self.sizes.k_block
        scores = hide(scores, self.sizes.mask, self.q_start, k_start, self.sizes.keys, self.length, q_axis=0)
        weights, largest, total, shrink = self._soften(scores, largest, total)
        return out * lax.broadcast_in_dim(shrink, out.shape, [0]), weights, largest, total

    def _step_over_whole(self, step, carry):
        out, *softmax = carry
        shared, (slot, before) = self.shared, (self._slot(index) for index in (step, step - 1))
        plgpu.barrier_wait(shared.k_full.at[slot])
        plgpu.barrier_wait(shared.v_full.at[before])

        # This step's softmax runs beside the product with the last step's values.
        def overlap(products, softmax):
            scores_ref, out_ref = products
            weights_ref, largest_ref, total_ref, shrink_ref = softmax
            plgpu.wgmma(scores_ref, self.queries, shared.k.at[slot].transpose((1, 0)))
            plgpu.wgmma(out_ref, weights_ref[...], shared.v.at[before])
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(shared.k_free.at[slot])
            softened = self._soften(scores, largest_ref[...], total_ref[...])
            weights_ref[...], largest_ref[...], total_ref[...], shrink_ref[...] = softened

        (_, out), (weights, largest, total, shrink) = accumulate(
            overlap, (filled((ROWS, self.sizes.k_block), 0.0), out), (*softmax, filled((ROWS,), 0.0)))
        plgpu.barrier_arrive(shared.v_free.at[before])
        return out * lax.broadcast_in_dim(shrink, out.shape, [0]), weights, largest, total

    def _add_values(self, step, out, weights):
        slot = self._slot(step)
        plgpu.barrier_wait(self.shared.v_full.at[slot])
        (out,), _ = accumulate(lambda refs, _: plgpu.wgmma(refs[0], weights, self.shared.v.at[slot]), (out,))
        plgpu.barrier_arrive(self.shared.v_free.at[slot])
        return out

    def _soften(self, scores, largest, total):
        """(weights, the new largest score and sum of weights, what the old weights shrink by)."""
        new_largest = jnp.maximum(largest, scores.max(axis=1) * LOG2_E)
        weights = jnp.exp2(scores * LOG2_E - lax.broadcast_in_dim(new_largest, scores.shape, [0]))
        shrink = jnp.exp2(largest - new_largest)
        return weights.astype(self.queries.dtype), new_largest, total * shrink + weights.sum(axis=1), shrink

    def _slot(self, step) -> jax.Array:
        return lax.rem(step, jnp.int32(self.sizes.stages))


def _join(out_PBSHD: jax.Array, lse_PBHS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Softmax over all keys from the softmax over each part of them."""
    share_PBSH1 = jax.nn.softmax(lse_PBHS, axis=0).swapaxes(2, 3)[..., None]
    return (out_PBSHD * share_PBSH1).sum(0).astype(out_PBSHD.dtype), jax.nn.logsumexp(lse_PBHS, axis=0)
