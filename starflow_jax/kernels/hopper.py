"""What the Hopper kernels share: sizes, the order in which blocks are visited, prefetching, small steps on tiles."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from starflow_jax.kernels.mask import Full, Mask, seen
from starflow_jax.kernels.reference import MASKED

ROWS = 64  # of a wgmma instruction, and so of a warpgroup's tile; also the width of a 128 byte swizzle
# By how many compute: the most each of those and of the copying one may have of an SM's 65,536. One alone, and the
# one that copies for it, have as many as there can be from the start.
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


TUNED = {64: Blocks(3, 128, 3, 128, 2), 128: Blocks(3, 64, 3, 64, 2)}


class Walk(NamedTuple):
    """The blocks that a tile visits: first those that the mask or the sample's length cuts, then the whole ones.

    Cut are the blocks front_whole .. front - 1 (which end the prefix), first .. whole_first - 1 and whole_last ..
    last - 1; whole are 0 .. front_whole - 1 and whole_first .. whole_last - 1.
    """

    front_whole: jax.Array | int
    front: int
    first: jax.Array
    last: jax.Array
    whole_first: jax.Array
    whole_last: jax.Array

    @classmethod
    def over_keys(cls, runs_ref, tile, length, k_block: int, prefix: int) -> "Walk":
        """Of a tile of queries; behind a sample's length nothing is visited."""
        first, last, whole_first, whole_last = (runs_ref[i, tile] for i in range(4))
        last = jnp.maximum(first, jnp.minimum(last, lax.div(length + (k_block - 1), jnp.int32(k_block))))
        whole_first = jnp.minimum(whole_first, last)
        whole_last = jnp.maximum(whole_first, jnp.minimum(whole_last, lax.div(length, jnp.int32(k_block))))
        front_whole = jnp.minimum(prefix // k_block, lax.div(length, jnp.int32(k_block))) if prefix else 0
        return cls(front_whole, pl.cdiv(prefix, k_block), first, last, whole_first, whole_last)

    @classmethod
    def over_queries(cls, runs_ref, tile, length, k_tile: int) -> "Walk":
        """Of a tile of keys; one that reaches behind the sample's length is cut throughout, or visits nothing."""
        first, last, whole_first, whole_last = (runs_ref[i, tile] for i in range(4))
        last = jnp.where(tile * k_tile < length, last, first)
        is_inside = (tile + 1) * k_tile <= length
        whole_first = jnp.where(is_inside, whole_first, first)
        return cls(0, 0, first, last, whole_first, jnp.where(is_inside, whole_last, first))

    @property
    def steps(self) -> jax.Array:
        return self.front + self.last - self.first

    @property
    def cut(self) -> jax.Array:
        return self.steps - self.front_whole - (self.whole_last - self.whole_first)

    def block(self, step) -> jax.Array:
        """The block of a step, 0 .. steps - 1."""
        return jnp.where(step < self.cut, self.cut_block(step), self.whole_block(step - self.cut))

    def cut_block(self, index) -> jax.Array:
        in_prefix = self.front - self.front_whole
        before_whole = in_prefix + self.whole_first - self.first
        in_band = jnp.where(index < before_whole, self.first - in_prefix, self.whole_last - before_whole)
        return index + jnp.where(index < in_prefix, self.front_whole, in_band)

    def whole_block(self, index) -> jax.Array:
        if not self.front:
            return index + self.whole_first
        return index + jnp.where(index < self.front_whole, 0, self.whole_first - self.front_whole)


def prefetch(fetch, steps, stages: int, free_barriers, computing: int) -> None:
    """All that the copying warpgroup does: fetch(step, slot) as soon as the slot is free."""
    if computing in REGISTERS:
        plgpu.set_max_registers(REGISTERS[computing][1], action="decrease")

    @pl.loop(0, steps + stages)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _():
            for free in free_barriers:
                plgpu.barrier_wait(free.at[slot])

        pl.when(step < steps)(lambda: fetch(step, slot))


def take_registers(computing: int) -> None:
    """What a computing warpgroup begins with: the registers that the copying one gave up."""
    if computing in REGISTERS:
        plgpu.set_max_registers(REGISTERS[computing][0], action="increase")


def pad(*arrays_BSHD: jax.Array) -> list[jax.Array]:
    """Zeros behind each sequence, to whole tiles of the swizzle and no more: beyond the end the copy engine reads zeros
    and writes nothing."""
    return [jnp.pad(x, ((0, 0), (0, -x.shape[1] % SWIZZLED[0].tiling[0]), (0, 0), (0, 0))) for x in arrays_BSHD]


def launcher(entry, out_type, name: str, computing: int, **grid: int):
    """The function that runs `entry` over the grid, in `computing` + 1 warpgroups a program."""
    # Not plgpu.kernel, which takes no mutable array (dq).
    mesh = plgpu.Mesh(grid=tuple(grid.values()), grid_names=tuple(grid), num_threads=computing + 1,
                      thread_name="warpgroup")
    return pl.kernel(entry, out_type, mesh=mesh, name=name,
                     compiler_params=plgpu.CompilerParams(approx_math=True))


def accumulate(body, sums, others=()):
    """(sums, others) after body(references to sums, references to others) has added products to the sums."""
    return pl.run_state(lambda refs: body(*refs))((jax.tree.map(plgpu.ACC.init, sums), others))


def load_row(ref) -> jax.Array:
    """A vector along the columns of a wgmma tile."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(0))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """float32 in registers, as wgmma accumulates: a tile, or a number for each of its rows."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def hide(scores, mask: Mask, q_start, k_start, keys: int, length, q_axis: int) -> jax.Array:
    """Scores of a tile that the mask cuts. q_axis: which of its axes runs over queries."""
    start = (q_start, k_start) if q_axis == 0 else (k_start, q_start)
    query, key = (start[axis] + plgpu.broadcasted_iota(jnp.int32, scores.shape, axis, layout=plgpu.Layout.WGMMA)
                  for axis in (q_axis, 1 - q_axis))
    limit = length
    if isinstance(mask, Full):
        # As true of every query. Were it the same for all rows, ptxas would run out of registers.
        limit = jnp.minimum(length, query + length)
    return jnp.where(seen(mask, query, key, keys, jnp) & (key < limit), scores, MASKED)


def lengths(length_B, batch: int, keys: int) -> jax.Array:
    """How many keys of each sample count, int32; length_B=None: all."""
    return jnp.full(batch, keys, jnp.int32) if length_B is None else length_B.astype(jnp.int32)
