"""Flash attention for TPUs in Pallas: bfloat16 products, softmax in float32, one pass over the keys.

Arrays are transposed to (B, H, D, S): a head of 64 channels would fill half of the 128 lanes, positions fill them all.
Scores are (keys, queries), so that the softmax over keys runs down the sublanes, which needs no exchange between
lanes, and what belongs to a query (its largest score, its log-sum-exp) is a row.

The grid walks over a list of visits, made from the mask: the pairs of a block of queries and a block of keys in
which something is seen. All others are neither fetched nor computed; only blocks that the mask cuts are compared
with it.

Forward: visits go query block by query block.
Backward: visits go key block by key block, and all five products are taken once: dk and dv are summed over a block's
visits, dq of the whole head in VMEM. Where that is too large, the queries are split into chunks, whose dk and dv
are added up afterwards.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from starflow_jax.kernels.int8 import Int8Slots
from starflow_jax.kernels.mask import HIDDEN, WHOLLY, Mask, seen, visible_blocks
from starflow_jax.kernels.reference import MASKED
from starflow_jax.kernels.stacked import Cached, Stacked, taken
from starflow_jax.kernels.unsupported import Unsupported

LANES, SUBLANES, INT8_SUBLANES = 128, 16, 32  # of a tile of bfloat16, and of int8
TAKES_INT8 = TAKES_STACKS = TAKES_LANES = True  # see kernels.reference
BLOCK = 1024  # queries and keys of a visit
# Keys whose scores are held at a time: few, so that registers hold them while the next ones are multiplied; in the
# backward kernel, whose products take longer than all else, as many as are overlapped well.
FORWARD_PART, BACKWARD_PART = 128, 512
LARGEST_HEAD = 256
DQ_BYTES = 24 * 2**20  # what a head's dq may take of the VMEM, whose 64 MiB on a TPU7x are the least of all
VMEM_BYTES = 52 * 2**20
Q, K, SEEN, EDGE = 0, 1, 2, 3  # rows of the list of visits
FIRST, LAST = 1, 2  # bits of EDGE
CACHED = "attention_forward_cached"  # the forward kernel's name where only the first `length` keys are there


def check(q_BSHD: jax.Array, k_BKGD: jax.Array) -> None:
    """Raises Unsupported, with the reason, where these kernels do not serve such arrays."""
    if q_BSHD.dtype not in (jnp.bfloat16, jnp.float32) or q_BSHD.dtype != k_BKGD.dtype:
        raise Unsupported(f"queries of {q_BSHD.dtype}, keys of {k_BKGD.dtype}: bfloat16 or float32, both the same")
    if q_BSHD.shape[-1] > LARGEST_HEAD:
        raise Unsupported(f"head_dim {q_BSHD.shape[-1]}: at most {LARGEST_HEAD}")


def forward(q_BSHD, k_BKGD, v_BKGD, *, mask: Mask, length_B, interpret: Any = False):
    """As reference.forward: (out (B, S, H, D), log-sum-exp (B, H, S) float32)."""
    call = _Call(q_BSHD, k_BKGD, mask, length_B, interpret)
    kernel: Callable = _forward_kernel
    scales: list[tuple[jax.Array, pl.BlockSpec]] = []
    k, v = call.stack(k_BKGD), call.stack(v_BKGD)
    if isinstance(k, Int8Slots):
        kernel = _int8_forward_kernel
        scales = [(call.scale_row(x.scale_BG1P), call.scale_spec) for x in (k, v)]
        k, v = k.q_BPGD, v.q_BPGD
    out_BHDS, lse_BH1S = call(
        kernel, "attention_forward" if length_B is None else CACHED, _visits(call.visible), 2,
        call.transposed((q_BSHD, call.q_spec), (k, call.k_spec), (v, call.k_spec)) + scales,
        [(call.q_shape, q_BSHD.dtype, call.q_spec), (call.row_shape, jnp.float32, call.row_spec)],
        [(call.dim, call.q_block), (1, call.q_block), (1, call.q_block)])
    return call.transpose_back(out_BHDS, call.queries), lse_BH1S[:, :, 0, : call.queries]


def backward(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, *, mask: Mask, length_B, interpret: Any = False):
    """As reference.backward: (dq, dk, dv)."""
    call = _Call(q_BSHD, k_BKGD, mask, length_B, interpret)
    q_blocks, k_blocks = call.visible.shape
    block_bytes = call.dim * call.q_block * (4 + 2 * q_BSHD.dtype.itemsize)  # a sum, and two buffers for the way out
    chunks = -(-q_blocks * block_bytes // DQ_BYTES)
    in_chunk = -(-q_blocks // chunks)
    by_key = [_visits(call.visible[start:start + in_chunk].T) + [[0], [start], [0], [0]]
              for start in range(0, q_blocks, in_chunk)]
    visits = np.concatenate(by_key, axis=1, dtype=np.int32)[[K, Q, SEEN, EDGE]]

    def chunk_of(visits_ref, i):
        return lax.div(visits_ref[Q, i], jnp.int32(in_chunk))

    dq_spec = pl.BlockSpec((None, None, in_chunk, call.dim, call.q_block),
                           lambda b, h, i, visits_ref, *_: (b, h, chunk_of(visits_ref, i), 0, 0))
    dk_spec = pl.BlockSpec((None, None, None, call.dim, call.k_block),
                           lambda b, h, i, visits_ref, *_: (b, h, chunk_of(visits_ref, i), 0, visits_ref[K, i]))
    per_head = call.q_shape[:2]
    dk = ((*per_head, len(by_key), call.dim, k_blocks * call.k_block),
          k_BKGD.dtype if len(by_key) == call.group == 1 else jnp.float32, dk_spec)
    dq_BHIDS, *dkv_BHCDK = call(
        functools.partial(_backward_kernel, in_chunk=in_chunk), "attention_backward", visits, 5,
        call.transposed((q_BSHD, call.q_spec), (call.stack(k_BKGD), call.k_spec), (call.stack(v_BKGD), call.k_spec),
                        (dout_BSHD, call.q_spec))
        + [(call.row(lse_BHS), call.row_spec), (call.row(delta_BHS), call.row_spec)],
        [((*per_head, len(by_key) * in_chunk, call.dim, call.q_block), q_BSHD.dtype, dq_spec), dk, dk],
        [(in_chunk, call.dim, call.q_block), *2 * [(call.dim, call.k_block)]])
    dq_BHDS = dq_BHIDS.transpose(0, 1, 3, 2, 4).reshape(*per_head, call.dim, -1)
    # The chunks and the query heads of a key head are added up.
    dkv_BGDK = [x.reshape(call.batch, -1, call.group * len(by_key), *x.shape[3:]).sum(2) for x in dkv_BHCDK]
    return (call.transpose_back(dq_BHDS, call.queries),
            *(call.transpose_back(x, call.keys).astype(k_BKGD.dtype) for x in dkv_BGDK))


def _int8_forward_kernel(visits_ref, length_ref, layer_ref, q_ref, k_ref, v_ref, k_scale_ref, v_scale_ref, *refs,
                         mask: Mask, keys: int):
    """`_forward_kernel` on int8 keys and values, each part of which is scaled back when it is used."""
    _forward_kernel(visits_ref, length_ref, layer_ref, q_ref, _Scaled(k_ref, k_scale_ref, q_ref.dtype),
                    _Scaled(v_ref, v_scale_ref, q_ref.dtype), *refs, mask=mask, keys=keys)


class _Scaled:
    """int8 channels (D, K) with a scale of each position (1, K), read as a reference to their products is."""

    def __init__(self, q_ref, scale_ref, dtype):
        self.q_ref, self.scale_ref, self.shape, self.dtype = q_ref, scale_ref, q_ref.shape, dtype

    def __getitem__(self, at) -> jax.Array:
        return (self.q_ref[at].astype(jnp.float32) * self.scale_ref[at]).astype(self.dtype)


def _forward_kernel(visits_ref, length_ref, layer_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, sum_ref, largest_ref,
                    total_ref, *, mask: Mask, keys: int):
    visit = _Visit(visits_ref, length_ref, q_ref.shape[-1], k_ref.shape[-1])

    @pl.when(visit.is_first)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        largest_ref[...] = jnp.full_like(largest_ref, MASKED)

    @visit.when_cut_or_whole
    def _(cut):
        def scores_of(part):
            scores_KQ = _dot(k_ref[:, part], q_ref[...], 0, 0)
            return visit.hide(scores_KQ, part, mask, keys) if cut else scores_KQ

        parts = visit.parts_of_keys(FORWARD_PART)
        largest, total, following_KQ = largest_ref[...], total_ref[...], scores_of(parts[0])
        for part, next_part in zip(parts, [*parts[1:], None]):
            # The product of the next part is issued first: it runs beside the softmax of this one.
            scores_KQ, following_KQ = following_KQ, None if next_part is None else scores_of(next_part)
            before, largest = largest, jnp.maximum(largest, scores_KQ.max(axis=0, keepdims=True))
            weights_KQ, shrink = jnp.exp(scores_KQ - largest), jnp.exp(before - largest)
            total = total * shrink + weights_KQ.sum(axis=0, keepdims=True)
            sum_ref[...] = sum_ref[...] * shrink + _dot(v_ref[:, part], weights_KQ.astype(v_ref.dtype), 1, 0)
        largest_ref[...], total_ref[...] = largest, total

    @pl.when(visit.is_last)
    def _():
        largest, total = largest_ref[...], total_ref[...]
        nothing = largest <= MASKED / 2  # a query that saw nothing has only masked scores, or none
        total = jnp.where(nothing, 1.0, total)
        out_ref[...] = (sum_ref[...] * jnp.where(nothing, 0.0, 1 / total)).astype(out_ref.dtype)
        lse_ref[...] = jnp.where(nothing, MASKED, largest + jnp.log(total))


def _backward_kernel(visits_ref, length_ref, layer_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, dq_ref,
                     dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref, *, mask: Mask, keys: int, in_chunk: int):
    visit = _Visit(visits_ref, length_ref, q_ref.shape[-1], k_ref.shape[-1])
    starts_chunk, ends_chunk = visit.at_edge_of(in_chunk)
    in_sum = lax.rem(visit.q_block, jnp.int32(in_chunk))

    @pl.when(starts_chunk)
    def _():
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    @pl.when(visit.is_first)
    def _():
        dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
        dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)

    @visit.when_cut_or_whole
    def _(cut):
        q, dout = q_ref[...], dout_ref[...]
        for part in visit.parts_of_keys(BACKWARD_PART):
            k = k_ref[:, part]
            scores_KQ = _dot(k, q, 0, 0)
            if cut:
                scores_KQ = visit.hide(scores_KQ, part, mask, keys)
            weights_KQ = jnp.exp(scores_KQ - lse_ref[...])
            if cut:  # the log-sum-exp of a query that saw nothing is as low as its scores
                weights_KQ = jnp.where(scores_KQ > MASKED / 2, weights_KQ, 0.0)
            dv_sum_ref[:, part] += _dot(dout, weights_KQ.astype(dout.dtype), 1, 1)
            dscores_KQ = (weights_KQ * (_dot(v_ref[:, part], dout, 0, 0) - delta_ref[...])).astype(q.dtype)
            dk_sum_ref[:, part] += _dot(q, dscores_KQ, 1, 1)
            dq_sum_ref[in_sum] += _dot(k, dscores_KQ, 1, 0)

    @pl.when(visit.is_last)
    def _():
        dk_ref[...] = dk_sum_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(ends_chunk)
    def _():
        dq_ref[...] = dq_sum_ref[...].astype(dq_ref.dtype)


def _visits(visible_RC: np.ndarray) -> np.ndarray:
    """(4, visits): row, column, what is seen, edge; row by row, at least one visit each."""
    wanted = visible_RC != HIDDEN
    wanted[:, 0] |= ~wanted.any(1)
    row, column = np.nonzero(wanted)
    turn = np.concatenate([[True], row[1:] != row[:-1], [True]])
    return np.stack([row, column, visible_RC[row, column], FIRST * turn[:-1] + LAST * turn[1:]]).astype(np.int32)


class _Visit:
    """Where a program of the grid is."""

    def __init__(self, visits_ref, length_ref, q_size: int, k_size: int):
        self.visits_ref, self.index = visits_ref, pl.program_id(2)
        self.q_block, self.k_block, sees, edge = (visits_ref[row, self.index] for row in range(4))
        self.q_size, self.k_size = q_size, k_size
        self.length = length_ref[pl.program_id(0)]
        self.is_first, self.is_last = (edge & FIRST) != 0, (edge & LAST) != 0
        self.runs = (sees != HIDDEN) & (self.k_block * k_size < self.length)
        self.is_whole = (sees == WHOLLY) & ((self.k_block + 1) * k_size <= self.length)

    def at_edge_of(self, in_chunk: int):
        """Whether this is the first and the last visit to its chunk of query blocks."""
        def chunk(index):
            return lax.div(self.visits_ref[Q, index], jnp.int32(in_chunk))

        last = pl.num_programs(2) - 1
        before, after = jnp.maximum(self.index - 1, 0), jnp.minimum(self.index + 1, last)
        here = chunk(self.index)
        return (self.index == 0) | (chunk(before) != here), (self.index == last) | (chunk(after) != here)

    def when_cut_or_whole(self, body) -> None:
        """Runs body(whether the mask cuts this block), compiled for either case, where something is seen."""
        for cut in (True, False):
            pl.when(self.runs & (self.is_whole != cut))(functools.partial(body, cut))

    def parts_of_keys(self, size: int) -> list[slice]:
        return [slice(start, min(start + size, self.k_size)) for start in range(0, self.k_size, size)]

    def hide(self, scores_KQ, part: slice, mask: Mask, keys: int):
        key = self.k_block * self.k_size + part.start + lax.broadcasted_iota(jnp.int32, scores_KQ.shape, 0)
        query_1Q = self.q_block * self.q_size + lax.broadcasted_iota(jnp.int32, (1, self.q_size), 1)
        return jnp.where(seen(mask, query_1Q, key, keys, jnp) & (key < self.length), scores_KQ, MASKED)


def _dot(a, b, a_axis: int, b_axis: int) -> jax.Array:
    """Product in float32, summed over those axes."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


class _Call:
    """Shapes, block specifications and padding that both kernels share."""

    def __init__(self, q_BSHD, k_BKGD: Cached, mask: Mask, length_B, interpret: Any):
        self.mask = mask
        self.batch, self.queries, self.heads, self.head_dim = q_BSHD.shape
        self.keys, self.group, self.interpret = k_BKGD.shape[1], self.heads // k_BKGD.shape[2], interpret
        self.q_block, self.k_block = (min(BLOCK, -(-n // LANES) * LANES) for n in (self.queries, self.keys))
        self.visible = visible_blocks(mask, self.queries, self.keys, self.q_block, self.k_block)
        self.length_B = jnp.full(self.batch, self.keys, jnp.int32) if length_B is None else length_B
        kept = k_BKGD.stack_LBPGD if isinstance(k_BKGD, Stacked) else k_BKGD
        sublanes = INT8_SUBLANES if isinstance(kept, Int8Slots) else SUBLANES
        self.dim = -(-self.head_dim // sublanes) * sublanes
        # A stack that needs padding would be copied whole at every layer.
        self.fits = not self.keys % self.k_block and self.dim == self.head_dim
        in_place = isinstance(k_BKGD, Stacked) and self.fits
        self.layer_1 = jnp.reshape(k_BKGD.layer, 1) if in_place else jnp.zeros(1, jnp.int32)  # type: ignore[union-attr]
        self.q_shape = (self.batch, self.heads, self.dim, len(self.visible) * self.q_block)
        self.row_shape = (self.batch, self.heads, 1, self.q_shape[-1])
        self.q_spec = pl.BlockSpec((None, None, self.dim, self.q_block), self._q_index)
        self.row_spec = pl.BlockSpec((None, None, 1, self.q_block), self._q_index)
        self.k_spec = pl.BlockSpec((None, None, None, self.dim, self.k_block), self._k_index)
        self.scale_spec = pl.BlockSpec((None, None, None, 1, self.k_block), self._k_index)

    def _q_index(self, b, h, i, visits_ref, length_ref, layer_ref):
        return b, h, 0, visits_ref[Q, i]

    def _k_index(self, b, h, i, visits_ref, length_ref, layer_ref):
        # Blocks beyond the sample's length become its last one, which is not fetched again.
        last = lax.div(jnp.maximum(length_ref[b] - 1, 0), jnp.int32(self.k_block))
        return layer_ref[0], b, lax.div(h, jnp.int32(self.group)), 0, jnp.minimum(visits_ref[K, i], last)

    def stack(self, keys: Cached) -> Any:
        """(L, B, K, G, D), of which layer_1 says the layer: what is no stack, or does not fit, as a stack of one."""
        if isinstance(keys, Stacked) and self.fits:
            return keys.stack_LBPGD
        return jax.tree.map(lambda array: array[None], taken(keys))

    def __call__(self, kernel, name: str, visits: np.ndarray, products: int, inputs, outputs, scratch):
        """inputs: (array, specification); outputs: (shape, dtype, specification); scratch: shapes of float32."""
        heads, (turns_of_q, turns_of_k) = self.batch * self.heads, 1 + (np.diff(visits[[Q, K]]) != 0).sum(1)
        scores = heads * visits.shape[1] * self.q_block * self.k_block
        of_keys = (self.k_spec, self.scale_spec)
        fetched = sum((turns_of_k * self.k_block if any(spec is one for one in of_keys) else turns_of_q * self.q_block)
                      * heads * array.shape[-2] * array.dtype.itemsize for array, spec in inputs)
        written = sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in outputs)
        return pl.pallas_call(
            functools.partial(kernel, mask=self.mask, keys=self.keys), name=name, interpret=self.interpret,
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3, grid=(self.batch, self.heads, visits.shape[1]),
                in_specs=[spec for _, spec in inputs], out_specs=[spec for *_, spec in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch]),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES),
            cost_estimate=pl.CostEstimate(flops=2 * products * self.dim * scores, transcendentals=scores,
                                          bytes_accessed=int(fetched) + written),
        )(visits, self.length_B, self.layer_1, *(array for array, _ in inputs))

    def transposed(self, *arrays_and_specs: tuple[jax.Array, pl.BlockSpec]) -> list[tuple[jax.Array, pl.BlockSpec]]:
        """(..., S, H, D) to (..., H, D, S), with zeros up to whole blocks of positions and whole tiles of channels."""
        def transpose(x_SHD: jax.Array, block: int) -> jax.Array:
            pad = (*[(0, 0)] * (x_SHD.ndim - 3), (0, -x_SHD.shape[-3] % block), (0, 0), (0, self.dim - self.head_dim))
            return jnp.moveaxis(jnp.pad(x_SHD, pad), -3, -1)

        return [(transpose(x, self.k_block if spec is self.k_spec else self.q_block), spec)
                for x, spec in arrays_and_specs]

    def transpose_back(self, x_BHDS: jax.Array, length: int) -> jax.Array:
        return x_BHDS.transpose(0, 3, 1, 2)[:, :length, :, : self.head_dim]

    def scale_row(self, scale_LBG1P: jax.Array) -> jax.Array:
        return jnp.pad(scale_LBG1P, (*[(0, 0)] * 4, (0, -scale_LBG1P.shape[-1] % self.k_block)))

    def row(self, x_BHS: jax.Array) -> jax.Array:
        return jnp.pad(x_BHS, ((0, 0), (0, 0), (0, -x_BHS.shape[2] % self.q_block)))[:, :, None]
