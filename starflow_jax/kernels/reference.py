"""The attention core in plain jax.numpy: the definition that every kernel has to meet."""

import jax
import jax.numpy as jnp

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
    q_BSHD = q_BSHD * q_BSHD.shape[-1] ** -0.5
    scores = _scores(q_BSHD, k_BKHD, mask_SK)
    if past is None:
        weights = jax.nn.softmax(scores, axis=-1).astype(v_BKHD.dtype)
        return jnp.einsum("bhsk,bkhd->bshd", weights, v_BKHD)
    past_k_BPHD, past_v_BPHD, length = past
    slots = past_k_BPHD.shape[1]
    past_scores = _scores(q_BSHD, past_k_BPHD, jnp.arange(slots)[None, :] < length)
    weights = jax.nn.softmax(jnp.concatenate([past_scores, scores], axis=-1), axis=-1).astype(v_BKHD.dtype)
    out = jnp.einsum("bhsk,bkhd->bshd", weights[..., :slots], past_v_BPHD)
    return out + jnp.einsum("bhsk,bkhd->bshd", weights[..., slots:], v_BKHD)


def _scores(q_BSHD: jax.Array, k_BKHD: jax.Array, mask_SK: jax.Array) -> jax.Array:
    accumulate = jnp.promote_types(q_BSHD.dtype, jnp.float32)
    scores = jnp.einsum("bshd,bkhd->bhsk", q_BSHD, k_BKHD, preferred_element_type=accumulate)
    return jnp.where(mask_SK, scores, MASKED)
