"""Flash attention in Pallas's Triton dialect: GPUs before Hopper, float32, and any head_dim.

Plainer and slower than pallas_gpu.py: a program has a block of queries (or, for dk and dv, of keys), walks over
the blocks of the other side that the mask leaves, and compares every one with the mask.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from starflow_jax.kernels.mask import Mask, block_runs, seen, visible_blocks
from starflow_jax.kernels.reference import MASKED
from starflow_jax.kernels.unsupported import Unsupported

BLOCK = 64
TAKES_INT8, TAKES_STACKS, TAKES_LANES = False, False, True  # see kernels.reference
LARGEST_HEAD = 128


def check(q_BSHD: jax.Array, k_BKGD: jax.Array) -> None:
    """Raises Unsupported, with the reason, where these kernels do not serve such arrays."""
    if q_BSHD.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32) or q_BSHD.dtype != k_BKGD.dtype:
        raise Unsupported(f"queries of {q_BSHD.dtype}, keys of {k_BKGD.dtype}")
    if q_BSHD.shape[-1] > LARGEST_HEAD:
        raise Unsupported(f"head_dim {q_BSHD.shape[-1]}: at most {LARGEST_HEAD}")


def forward(q_BSHD, k_BKGD, v_BKGD, *, mask: Mask, length_B, interpret: bool = False):
    """As reference.forward: (out (B, S, H, D), log-sum-exp (B, H, S) float32)."""
    call = _Call(q_BSHD, k_BKGD, mask, length_B, interpret)
    kernel = functools.partial(_forward_kernel, mask=mask, keys=call.keys, in_front=call.in_front)
    queries, dim = q_BSHD.shape[1], q_BSHD.shape[-1]
    out, lse_BHS = call(
        kernel, "attention_forward", call.query_blocks, call.runs_by_query,
        [(q_BSHD, "query"), (k_BKGD, "all keys"), (v_BKGD, "all keys")],
        [(call.q_shape, q_BSHD.dtype, "query"), (call.row_shape, jnp.float32, "query row")])
    return out[:, :queries, :, :dim], lse_BHS[..., :queries]


def backward(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, *, mask: Mask, length_B, interpret: bool = False):
    """As reference.backward: (dq, dk, dv)."""
    call = _Call(q_BSHD, k_BKGD, mask, length_B, interpret)
    queries, keys, dim = q_BSHD.shape[1], k_BKGD.shape[1], q_BSHD.shape[-1]
    dq, = call(
        functools.partial(_dq_kernel, mask=mask, keys=keys, in_front=call.in_front),
        "attention_dq", call.query_blocks, call.runs_by_query,
        [(q_BSHD, "query"), (k_BKGD, "all keys"), (v_BKGD, "all keys"), (dout_BSHD, "query"),
         (lse_BHS, "query row"), (delta_BHS, "query row")],
        [(call.q_shape, q_BSHD.dtype, "query")])
    # One program per query head; heads that share a key are added up afterwards.
    dkv_shape = (call.q_shape[0], call.key_blocks * BLOCK, *call.q_shape[2:])
    dtype = k_BKGD.dtype if call.group == 1 else jnp.float32
    dk, dv = call(
        functools.partial(_dkv_kernel, mask=mask, keys=keys),
        "attention_dkv", call.key_blocks, call.runs_by_key,
        [(q_BSHD, "all queries"), (k_BKGD, "key"), (v_BKGD, "key"), (dout_BSHD, "all queries"),
         (lse_BHS, "all query rows"), (delta_BHS, "all query rows")],
        2 * [(dkv_shape, dtype, "key per head")])
    dk, dv = (x[:, :keys, :, :dim].reshape(*k_BKGD.shape[:3], call.group, dim).sum(3).astype(k_BKGD.dtype)
              for x in (dk, dv))
    return dq[:, :queries, :, :dim], dk, dv


def _forward_kernel(q_ref, k_ref, v_ref, runs_ref, length_ref, out_ref, lse_ref, *, mask, keys, in_front):
    block, length = pl.program_id(0), length_ref[0]
    q = q_ref[...]
    first, steps = _walk(runs_ref, block, in_front)

    def step_over_keys(step, carry):
        out, largest, total = carry
        k_block = jnp.where(step < in_front, step, step + (first - in_front))
        at = pl.ds(k_block * BLOCK, BLOCK)
        scores = _hide(_dot(q, k_ref[at, :].T), mask, block, k_block, keys, length)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        shrink = jnp.exp(largest - new_largest)
        weights = jnp.exp(scores - new_largest[:, None])
        out = out * shrink[:, None] + _dot(weights.astype(q.dtype), v_ref[at, :])
        return out, new_largest, total * shrink + jnp.sum(weights, axis=1)

    start = (jnp.zeros(q.shape, jnp.float32), jnp.full((BLOCK,), MASKED, jnp.float32),
             jnp.zeros((BLOCK,), jnp.float32))
    out, largest, total = lax.fori_loop(0, steps, step_over_keys, start)
    nothing = (largest <= MASKED / 2) | (total == 0)  # a query that saw nothing has only masked scores
    total = jnp.where(nothing, 1.0, total)
    out_ref[...] = (out * jnp.where(nothing, 0.0, 1 / total)[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(nothing, MASKED, largest + jnp.log(total))


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, runs_ref, length_ref, dq_ref, *,
               mask, keys, in_front):
    block, length = pl.program_id(0), length_ref[0]
    q, dout, lse, delta = q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...]
    first, steps = _walk(runs_ref, block, in_front)

    def step_over_keys(step, dq):
        k_block = jnp.where(step < in_front, step, step + (first - in_front))
        at = pl.ds(k_block * BLOCK, BLOCK)
        k = k_ref[at, :]
        scores = _hide(_dot(q, k.T), mask, block, k_block, keys, length)
        dscores = _weights(scores, lse) * (_dot(dout, v_ref[at, :].T) - delta[:, None])
        return dq + _dot(dscores.astype(q.dtype), k)

    dq = lax.fori_loop(0, steps, step_over_keys, jnp.zeros(q.shape, jnp.float32))
    dq_ref[...] = dq.astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, runs_ref, length_ref, dk_ref, dv_ref, *,
                mask, keys):
    block, length = pl.program_id(0), length_ref[0]
    k, v = k_ref[...], v_ref[...]
    first, steps = _walk(runs_ref, block, 0)

    def step_over_queries(step, carry):
        dk, dv = carry
        q_block = step + first
        at = pl.ds(q_block * BLOCK, BLOCK)
        q, dout = q_ref[at, :], dout_ref[at, :]
        weights = _weights(_hide(_dot(q, k.T), mask, q_block, block, keys, length), lse_ref[at])
        dscores = weights * (_dot(dout, v.T) - delta_ref[at][:, None])
        return dk + _dot(dscores.astype(q.dtype).T, q), dv + _dot(weights.astype(q.dtype).T, dout)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk, dv = lax.fori_loop(0, steps, step_over_queries, (zeros, zeros))
    dk_ref[...], dv_ref[...] = dk.astype(dk_ref.dtype), dv.astype(dv_ref.dtype)


def _walk(runs_ref, block, in_front: int):
    """(first block behind those in front, number of steps)."""
    first, last = runs_ref[0, block], runs_ref[1, block]
    return first, in_front + last - first


def _hide(scores, mask: Mask, q_block, k_block, keys: int, length) -> jax.Array:
    query = q_block * BLOCK + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    key = k_block * BLOCK + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(seen(mask, query, key, keys, jnp) & (key < length), scores, MASKED)


def _weights(scores, lse) -> jax.Array:
    """Softmax from scores and log-sum-exp; zeros for a query that saw nothing, whose lse is as low as its scores."""
    return jnp.where(scores > MASKED / 2, jnp.exp(scores - lse[:, None]), 0.0)


def _dot(a, b) -> jax.Array:
    return plgpu.dot(a, b, precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


class _Call:
    """Shapes, block specifications and padding that the three kernels share."""

    def __init__(self, q_BSHD, k_BKGD, mask: Mask, length_B, interpret: bool):
        self.batch, queries, self.heads, dim = q_BSHD.shape
        self.keys, self.group, self.interpret = k_BKGD.shape[1], self.heads // k_BKGD.shape[2], interpret
        visible = visible_blocks(mask, queries, self.keys, BLOCK, BLOCK)
        self.query_blocks, self.key_blocks = visible.shape
        self.in_front = -(-mask.prefix // BLOCK)
        self.runs_by_query, self.runs_by_key = block_runs(visible, self.in_front), block_runs(visible.T)
        self.length_B = jnp.full(self.batch, self.keys, jnp.int32) if length_B is None else length_B
        self.dim = max(16, pl.next_power_of_2(dim))
        self.q_shape = (self.batch, self.query_blocks * BLOCK, self.heads, self.dim)
        self.row_shape = (self.batch, self.heads, self.query_blocks * BLOCK)

    def __call__(self, kernel, name: str, blocks: int, runs, inputs, outputs):
        arrays = [(self._pad(array), self._spec(kind)) for array, kind in inputs]
        arrays += [(runs, pl.BlockSpec(runs.shape, lambda i, h, b: (0, 0))),
                   (self.length_B, pl.BlockSpec((1,), lambda i, h, b: (b,)))]
        return pl.pallas_call(
            kernel, name=name, grid=(blocks, self.heads, self.batch), interpret=self.interpret,
            in_specs=[spec for _, spec in arrays], out_specs=[self._spec(kind) for *_, kind in outputs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        )(*(array for array, _ in arrays))

    def _pad(self, x: jax.Array) -> jax.Array:
        if x.ndim == 3:
            return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % BLOCK)))
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, self.dim - x.shape[3])))

    def _spec(self, kind: str) -> pl.BlockSpec:
        whole_q, whole_k, group = self.query_blocks * BLOCK, self.key_blocks * BLOCK, self.group
        return {
            "query": pl.BlockSpec((None, BLOCK, None, self.dim), lambda i, h, b: (b, i, h, 0)),
            "key": pl.BlockSpec((None, BLOCK, None, self.dim), lambda i, h, b: (b, i, h // group, 0)),
            "key per head": pl.BlockSpec((None, BLOCK, None, self.dim), lambda i, h, b: (b, i, h, 0)),
            "all queries": pl.BlockSpec((None, whole_q, None, self.dim), lambda i, h, b: (b, 0, h, 0)),
            "all keys": pl.BlockSpec((None, whole_k, None, self.dim), lambda i, h, b: (b, 0, h // group, 0)),
            "query row": pl.BlockSpec((None, None, BLOCK), lambda i, h, b: (b, h, i)),
            "all query rows": pl.BlockSpec((None, None, whole_q), lambda i, h, b: (b, h, 0)),
        }[kind]
