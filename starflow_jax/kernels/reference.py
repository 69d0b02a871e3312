"""The attention core in plain jax.numpy: the definition that every kernel has to meet."""

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30


def attention(
    q_BSHD: jax.Array,
    k_BKHD: jax.Array,
    v_BKHD: jax.Array,
    mask_SK: jax.Array,
    past: tuple[jax.Array, jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the keys that `mask_SK` allows; softmax in float32 at least.

    past: (k_BPHD, v_BPHD, length) of earlier slots, of which all queries see the first `length`.
    Returns (B, S, H, D) in q's dtype.
    """
    # Heads go in front of both products: a batched product of plain matrices is several times faster on
    # CPU than the same contraction over strided heads.
    q_BHSD = (q_BSHD * q_BSHD.shape[-1] ** -0.5).transpose(0, 2, 1, 3)
    scores = _scores(q_BHSD, k_BKHD, mask_SK)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    past_scores = None
    if past is not None:
        past_k_BPHD, past_v_BPHD, length = past
        past_scores = _scores(q_BHSD, past_k_BPHD, jnp.arange(past_k_BPHD.shape[1])[None, :] < length)
        largest = jnp.maximum(largest, jnp.max(past_scores, axis=-1, keepdims=True))
    largest = lax.stop_gradient(largest)
    out, total = _weighted_sum(scores, largest, v_BKHD)
    if past_scores is not None:
        past_out, past_total = _weighted_sum(past_scores, largest, past_v_BPHD)
        out, total = out + past_out, total + past_total
    return (out / total).transpose(0, 2, 1, 3).astype(q_BSHD.dtype)


def _scores(q_BHSD: jax.Array, k_BKHD: jax.Array, mask_SK: jax.Array) -> jax.Array:
    scores = jnp.matmul(q_BHSD, k_BKHD.transpose(0, 2, 3, 1), preferred_element_type=_wide(q_BHSD.dtype))
    return jnp.where(mask_SK, scores, MASKED)


def _weighted_sum(scores_BHSK: jax.Array, largest: jax.Array, v_BKHD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(scores - largest) times the values, and its sum: the softmax before it is divided."""
    weights = jnp.exp(scores_BHSK - largest)
    out = jnp.matmul(weights.astype(v_BKHD.dtype), v_BKHD.transpose(0, 2, 1, 3),
                     preferred_element_type=weights.dtype)
    return out, jnp.sum(weights, axis=-1, keepdims=True)


def _wide(dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)
