"""The attention core in plain jax.numpy: the definition that every kernel must match.

Short sequences are one product (`attention`), on a CPU causal ones of 128 slots or more a few (`causal`); gradients by
autodiff are as fast as any there.
Long ones go block by block (`forward`, `backward`): memory grows with the length, not with its square.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from starflow_jax.kernels.int8 import Int8Slots, Slots
from starflow_jax.kernels.mask import PARTLY, Mask, seen, visible_blocks

TAKES_INT8, TAKES_STACKS = True, False  # keys and values as Int8Slots, as Stacked; forward alone
TAKES_LANES = True  # of vmap
MASKED = -1e30
Q_CHUNK, K_CHUNK = 256, 512

Past = tuple[Slots, Slots, jax.Array]


def attention(
    q_BSHD: jax.Array,
    k_BKGD: jax.Array,
    v_BKGD: jax.Array,
    mask: Mask | jax.Array | np.ndarray,
    past: Past | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the keys that the mask allows, all at once; softmax in float32 at least.

    mask: a Mask, or (S, K) of bool. past: (k_BPGD, v_BPGD, length) of earlier slots, of which all queries see
    the first `length` (int32, one for all samples or (B,)). int8 values enter the products as they are: their scales
    are applied to the scores and to the weights. H must be a multiple of G.
    Returns (B, S, H, D) in q's dtype.
    """
    queries, keys = q_BSHD.shape[1], k_BKGD.shape[1]
    mask_SK = mask
    if isinstance(mask, Mask):
        mask_SK = seen(mask, np.arange(queries)[:, None], np.arange(keys), keys)
    # Heads go in front of both products: a batched product of plain matrices is several times faster on
    # CPU than the same contraction over strided heads.
    q_BHSD = (q_BSHD * q_BSHD.shape[-1] ** -0.5).transpose(0, 2, 1, 3)
    scores = _scores(q_BHSD, k_BKGD, mask_SK)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    past_scores = None
    if past is not None:
        past_k_BPGD, past_v_BPGD, length = past
        in_past = jnp.arange(past_k_BPGD.shape[1]) < jnp.reshape(length, (-1, 1, 1, 1))
        past_scores = _scores(q_BHSD, past_k_BPGD, in_past)
        largest = jnp.maximum(largest, jnp.max(past_scores, axis=-1, keepdims=True))
    largest = lax.stop_gradient(largest)
    out, total = _weighted_sum(scores, largest, v_BKGD, q_BSHD.dtype)
    if past_scores is not None:
        past_out, past_total = _weighted_sum(past_scores, largest, past_v_BPGD, q_BSHD.dtype)
        out, total = out + past_out, total + past_total
    return (out / total).transpose(0, 2, 1, 3).astype(q_BSHD.dtype)


def causal(q_BSHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array) -> jax.Array:
    """`attention` of as many queries as keys under the mask Causal: some queries after the other, each with the keys up
    to the last of them, so that few of the pairs that the mask hides are computed."""
    slots = q_BSHD.shape[1]
    rows = -(-slots // (2 + slots // 160))  # what was fastest from 128 to 1,024 slots on a CPU
    outs_BRHD = []
    for begin in range(0, slots, rows):
        end = min(begin + rows, slots)
        sees = np.arange(begin, end)[:, None] >= np.arange(end)
        outs_BRHD.append(attention(q_BSHD[:, begin:end], k_BSGD[:, :end], v_BSGD[:, :end], sees))
    return jnp.concatenate(outs_BRHD, axis=1)


def forward_at_once(q_BSHD, k_BKGD, v_BKGD, mask_SK) -> tuple[jax.Array, jax.Array]:
    """As `forward`, of short sequences: one product. mask_SK: bool."""
    scores = _scores(q_BSHD.transpose(0, 2, 1, 3), k_BKGD, mask_SK)
    lse_BHS = jax.nn.logsumexp(scores, axis=-1)
    out, _ = _weighted_sum(jnp.where(mask_SK, scores, 2 * MASKED), lse_BHS[..., None], v_BKGD, v_BKGD.dtype)
    return out.transpose(0, 2, 1, 3).astype(q_BSHD.dtype), jnp.where(mask_SK.any(-1), lse_BHS, MASKED)


def backward_at_once(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, mask_SK) -> tuple[jax.Array, ...]:
    """As `backward`, of short sequences."""
    q_BHSD, dout_BHSD = (x.transpose(0, 2, 1, 3) for x in (q_BSHD, dout_BSHD))
    k_BHKD, v_BHKD = (jnp.repeat(x, q_BSHD.shape[2] // x.shape[2], axis=2).transpose(0, 2, 1, 3)
                      for x in (k_BKGD, v_BKGD))
    weights = jnp.where(mask_SK, jnp.exp(_scores(q_BHSD, k_BKGD, mask_SK) - lse_BHS[..., None]), 0)
    dscores = weights * (_product(dout_BHSD, v_BHKD.mT) - delta_BHS[..., None])
    weights, dscores = weights.astype(dout_BSHD.dtype), dscores.astype(q_BSHD.dtype)
    dkv = [x.transpose(0, 2, 1, 3).reshape(*k_BKGD.shape[:3], -1, k_BKGD.shape[3]).sum(3).astype(k_BKGD.dtype)
           for x in (_product(dscores.mT, q_BHSD), _product(weights.mT, dout_BHSD))]
    return _product(dscores, k_BHKD).transpose(0, 2, 1, 3).astype(q_BSHD.dtype), *dkv


def forward(q_BSHD, k_BKGD, v_BKGD, mask: Mask, length_B):
    """As `attention` without its scale, block by block: (out (B, S, H, D), log-sum-exp (B, H, S) float32 at least).

    k, v: arrays or Int8Slots. length_B: how many keys of each sample count, or None for all. A query that sees none
    gets out 0 and MASKED.
    """
    blocks, q_NBHSD = _Blocks(q_BSHD, k_BKGD, v_BKGD, mask, length_B), _chunks(q_BSHD, Q_CHUNK)

    def q_chunk(_, xs):
        q_BHSD, q_index, visible_K = xs

        def k_chunk(whole, carry, index):
            out, largest, total = carry
            k_BHKD, v_BHKD = blocks.take(index)
            only_allowed = blocks.only_allowed(whole, q_index, index)
            scores = only_allowed(_product(q_BHSD, k_BHKD.mT), MASKED)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = only_allowed(jnp.exp(scores - new_largest[..., None]), 0)
            shrink = jnp.exp(largest - new_largest)
            out = out * shrink[..., None] + _product(weights.astype(v_BHKD.dtype), v_BHKD)
            return out, new_largest, total * shrink + jnp.sum(weights, axis=-1)

        rows = jnp.zeros(q_BHSD.shape[:-1], _wide(q_BSHD.dtype))
        start = (jnp.zeros(q_BHSD.shape, rows.dtype), rows + MASKED, rows)
        out, largest, total = _scan_visible(k_chunk, start, visible_K, blocks.most)
        safe = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, largest + jnp.log(safe), MASKED)
        return None, ((out / safe[..., None]).astype(q_BSHD.dtype), lse)

    _, (out_NBHSD, lse_NBHS) = lax.scan(q_chunk, None, (q_NBHSD, *blocks.rows))
    lse_BHS = jnp.moveaxis(lse_NBHS, 0, 2).reshape(*lse_NBHS.shape[1:3], -1)[..., : q_BSHD.shape[1]]
    return _join(out_NBHSD, q_BSHD.shape[1]), lse_BHS


def backward(q_BSHD, k_BKGD, v_BKGD, lse_BHS, delta_BHS, dout_BSHD, mask: Mask, length_B):
    """Gradients (dq, dk, dv) of `forward`. delta: sum over D of out * dout, less the gradient of lse."""
    blocks = _Blocks(q_BSHD, k_BKGD, v_BKGD, mask, length_B)
    rows = [_row_chunks(x, Q_CHUNK) for x in (lse_BHS, delta_BHS)]
    groups = (k_BKGD.shape[2], -1)

    def q_chunk(dkv, xs):
        q_BHSD, dout_BHSD, lse, delta, q_index, visible_K = xs

        def k_chunk(whole, carry, index):
            dq, dk_NBGKD, dv_NBGKD = carry
            k_BHKD, v_BHKD = blocks.take(index)
            scores = _product(q_BHSD, k_BHKD.mT)
            weights = blocks.only_allowed(whole, q_index, index)(jnp.exp(scores - lse[..., None]), 0)
            dscores = weights * (_product(dout_BHSD, v_BHKD.mT) - delta[..., None])
            dscores, weights = dscores.astype(k_BHKD.dtype), weights.astype(k_BHKD.dtype)
            dk, dv = _product(dscores.mT, q_BHSD), _product(weights.mT, dout_BHSD)
            dk, dv = (jnp.sum(x.reshape(x.shape[0], *groups, *x.shape[2:]), axis=2) for x in (dk, dv))
            return dq + _product(dscores, k_BHKD), dk_NBGKD.at[index].add(dk), dv_NBGKD.at[index].add(dv)

        dq = jnp.zeros(q_BHSD.shape, _wide(q_BSHD.dtype))
        dq, *dkv = _scan_visible(k_chunk, (dq, *dkv), visible_K, blocks.most)
        return tuple(dkv), dq.astype(q_BSHD.dtype)

    zeros = jnp.zeros(blocks.k_NBGKD.shape, _wide(k_BKGD.dtype))
    xs = (_chunks(q_BSHD, Q_CHUNK), _chunks(dout_BSHD, Q_CHUNK), *rows, *blocks.rows)
    (dk, dv), dq = lax.scan(q_chunk, (zeros, zeros), xs)
    keys = k_BKGD.shape[1]
    return _join(dq, q_BSHD.shape[1]), *(_join(x, keys).astype(k_BKGD.dtype) for x in (dk, dv))


class _Blocks:
    """Keys and values in chunks, and what the mask allows in each pair of chunks."""

    def __init__(self, q_BSHD, k_BKGD, v_BKGD, mask: Mask, length_B):
        queries, self.keys, self.group = q_BSHD.shape[1], k_BKGD.shape[1], q_BSHD.shape[2] // k_BKGD.shape[2]
        self.mask, self.dtype = mask, q_BSHD.dtype
        self.k_NBGKD, self.v_NBGKD = (
            Int8Slots(_chunks(x.q_BPGD, K_CHUNK), _row_chunks(x.scale_BG1P[..., 0, :], K_CHUNK))
            if isinstance(x, Int8Slots) else _chunks(x, K_CHUNK) for x in (k_BKGD, v_BKGD))
        visible = visible_blocks(mask, queries, self.keys, Q_CHUNK, K_CHUNK)
        if length_B is not None:
            visible = np.minimum(visible, PARTLY)
        self.rows, self.most = (jnp.arange(len(visible)), jnp.asarray(visible)), int(visible.max())
        self.length_B111 = self.keys if length_B is None else length_B[:, None, None, None]

    def take(self, index):
        """Chunk `index` of keys and values, (B, H, K, D) each."""
        return (jnp.repeat(self._chunk(x, index), self.group, axis=1) for x in (self.k_NBGKD, self.v_NBGKD))

    def only_allowed(self, whole: bool, q_index, index):
        """(values (B, H, S, K), else) -> values that the mask allows of this pair of chunks. Where it is seen wholly,
        as most of a long causal sequence is, none is looked at, which took a CPU a quarter of the time."""
        if whole:
            return lambda values, _: values
        query, key = q_index * Q_CHUNK + jnp.arange(Q_CHUNK)[:, None], index * K_CHUNK + jnp.arange(K_CHUNK)
        allowed = seen(self.mask, query, key, self.keys, jnp) & (key < self.length_B111)
        return partial(jnp.where, allowed)

    def _chunk(self, x_NBGKD: Slots, index) -> jax.Array:
        if isinstance(x_NBGKD, Int8Slots):  # only this chunk is ever scaled back
            return (x_NBGKD.q_BPGD[index] * x_NBGKD.scale_BG1P[index][..., None]).astype(self.dtype)
        return x_NBGKD[index]


def _scan_visible(step, carry, visible_K: jax.Array, most: int):
    """The carry after step(whether it is seen wholly, carry, index) of every chunk that is seen.

    visible_K: HIDDEN, PARTLY or WHOLLY, and at most `most`; what no chunk needs is not compiled.
    """
    ways = (lambda carry, _: carry, partial(step, False), partial(step, True))[: most + 1]

    def visit(carry, xs):
        index, visible = xs
        return lax.switch(visible, ways, carry, index), None

    return lax.scan(visit, carry, (jnp.arange(len(visible_K)), visible_K))[0]


def _chunks(x_BSHD: jax.Array, size: int) -> jax.Array:
    """(chunks, B, H, size, D), zeros at the end."""
    batch, _, heads, dim = x_BSHD.shape
    return _pad(x_BSHD, 1, size).reshape(batch, -1, size, heads, dim).transpose(1, 0, 3, 2, 4)


def _row_chunks(x_BHS: jax.Array, size: int) -> jax.Array:
    """(chunks, B, H, size), zeros at the end."""
    return jnp.moveaxis(_pad(x_BHS, 2, size).reshape(*x_BHS.shape[:2], -1, size), 2, 0)


def _join(x_NBHSD: jax.Array, length: int) -> jax.Array:
    """(B, length, H, D): `_chunks` undone."""
    x = x_NBHSD.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _scores(q_BHSD: jax.Array, k_BKGD: Slots, mask) -> jax.Array:
    k_BKHD, scale_BH1K = _per_query_head(k_BKGD, q_BHSD.shape[1], q_BHSD.dtype)
    # Keys are not turned any further: a CPU would write out all of them turned, at every token.
    scores = jnp.einsum("bhsd,bhkd->bhsk", q_BHSD, k_BKHD.transpose(0, 2, 1, 3),
                        preferred_element_type=_wide(q_BHSD.dtype))
    return jnp.where(mask, scores if scale_BH1K is None else scores * scale_BH1K, MASKED)


def _weighted_sum(scores_BHSK: jax.Array, largest: jax.Array, v_BKGD: Slots, dtype) -> tuple[jax.Array, jax.Array]:
    """exp(scores - largest) times the values, and its sum: the softmax before it is divided. dtype: of the product."""
    weights = jnp.exp(scores_BHSK - largest)
    v_BKHD, scale_BH1K = _per_query_head(v_BKGD, scores_BHSK.shape[1], dtype)
    scaled = weights if scale_BH1K is None else weights * scale_BH1K
    return _product(scaled.astype(v_BKHD.dtype), v_BKHD.transpose(0, 2, 1, 3)), weights.sum(-1, keepdims=True)


def _per_query_head(x_BKGD: Slots, heads: int, dtype) -> tuple[jax.Array, jax.Array | None]:
    """Keys or values (B, K, H, D), and what they must still be multiplied by: None or (B, H, 1, K)."""
    group = heads // x_BKGD.shape[2]
    if isinstance(x_BKGD, Int8Slots):
        scale_BH1K = jnp.repeat(x_BKGD.scale_BG1P, group, axis=1)
        return jnp.repeat(x_BKGD.q_BPGD.astype(dtype), group, axis=2), scale_BH1K
    return jnp.repeat(x_BKGD, group, axis=2), None


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=_wide(a.dtype))


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
