"""The denoiser a frame at a time, with a cache for each layer: what the whole-clip pass gives (DESIGN: losses).

Only the first layer looks ahead, so it is run on the frame and those ahead of it, the others on the frame alone. Past
frames' keys and values lie in a ring of window - 1 frames behind the text's: attention does not ask in which order.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.flow.starflow import STARFlow
from starflow_jax.kernels.mask import Full
from starflow_jax.nn.cache import rounded_slots
from starflow_jax.nn.transformer import FinalNorm, Layer


class DenoiserState(flax.struct.PyTreeNode):
    """What the layers know of the text and of the frames before the next."""

    k_LBPHD: jax.Array
    v_LBPHD: jax.Array
    frame: jax.Array  # int32: the next one's index in the window


@partial(jax.jit, static_argnames=("model", "frames"))
def score_next(
    model: STARFlow,
    params: Any,
    state: DenoiserState | None,
    noisy_BThwC: jax.Array,
    at: jax.Array,
    text_BTD: jax.Array | None,
    *,
    frames: int,
) -> tuple[jax.Array, DenoiserState]:
    """(s_phi of frame `at` of the noisy latents (B, 1, h, w, C), the state for the next).

    params: the denoiser's, layers stacked. state: None where a window begins. frames: the frame and those ahead of it
    that are there, at most 1 + denoiser_lookahead.
    """
    config, tokens = model.config, model.config.tokens_per_frame
    _, height, width = model.grid(noisy_BThwC.shape)
    dense = partial(_dense, params, jnp.dtype(config.dtype))
    ahead = model.tokens(lax.dynamic_slice_in_dim(noisy_BThwC, at, frames, axis=1))
    hidden = dense("proj_in", ahead.reshape(ahead.shape[0], -1, ahead.shape[-1]))
    text_length = 0 if text_BTD is None else text_BTD.shape[1]
    rope = model.rope((config.frames + frames, height, width), text_BTD)
    if state is None:
        prefix, rope = text_length, rope[:, :text_length + frames * tokens]
        hidden = hidden if text_BTD is None else jnp.concatenate([dense("proj_text", text_BTD), hidden], axis=1)
    else:
        prefix = 0
        rope = lax.dynamic_slice_in_dim(rope, text_length + state.frame * tokens, frames * tokens, axis=1)
    hidden, kv = _layers(model, params["transformer"]["layers"]["layer"], hidden, rope, state, text_length,
                         prefix + tokens)
    normed: Any = FinalNorm().apply({"params": params["transformer"]["final_norm"]}, hidden[:, prefix:])
    out = dense("proj_out", normed)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    return model.latents(out[:, None], height), _written(model, state, kv, text_length)


def _dense(params: Any, dtype: Any, name: str, x: jax.Array) -> jax.Array:
    layer = nn.Dense(params[name]["kernel"].shape[-1], dtype=dtype)
    return layer.apply({"params": params[name]}, x)  # type: ignore[return-value]


def _layers(model: STARFlow, layers: Any, hidden: jax.Array, rope: jax.Array, state: DenoiserState | None,
            text_length: int, kept: int) -> tuple[jax.Array, Any]:
    """The hidden states of the text, where it is there, and of one frame, and their keys and values (L, B, S, H, D)."""
    config = model.config
    layer = Layer(config.head_dim, jnp.dtype(config.dtype), Full(), None, config.sequence_parallel, parent=None)
    before = None if state is None else jnp.minimum(state.frame, config.denoiser_window - 1)

    def run(x: jax.Array, index: jax.Array | int, rope: jax.Array) -> tuple[jax.Array, Any]:
        params = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), layers)
        past, length = None, None
        if state is not None and before is not None:
            past = tuple(lax.dynamic_index_in_dim(part, index, keepdims=False)
                         for part in (state.k_LBPHD, state.v_LBPHD))
            length = text_length + before * config.tokens_per_frame
        return layer.apply({"params": params}, x, past, False, rope, length)

    hidden, first = run(hidden.astype(config.dtype), 0, rope)
    first = jax.tree.map(lambda part: part[None, :, :kept], first)
    hidden, rest = lax.scan(lambda x, index: run(x, index, rope[:, :kept]), hidden[:, :kept],
                            jnp.arange(1, config.denoiser_layers))
    return hidden, jax.tree.map(lambda one, others: jnp.concatenate([one, others]), first, rest)


def _written(model: STARFlow, state: DenoiserState | None, kv: Any, text_length: int) -> DenoiserState:
    """The state with a frame's keys and values, at first the text's too, in the oldest one's place."""
    ring, tokens = model.config.denoiser_window - 1, model.config.tokens_per_frame
    if state is None:
        slots = rounded_slots(text_length + ring * tokens)
        kept = [part[:, :, :slots] for part in kv]
        k, v = (jnp.pad(part, [(0, 0), (0, 0), (0, slots - part.shape[2]), (0, 0), (0, 0)]) for part in kept)
        return DenoiserState(k, v, jnp.int32(1))
    if not ring:
        return state.replace(frame=state.frame + 1)
    place = text_length + state.frame % ring * tokens
    k, v = (lax.dynamic_update_slice_in_dim(old, new, place, axis=2)
            for old, new in zip((state.k_LBPHD, state.v_LBPHD), kv))
    return DenoiserState(k, v, state.frame + 1)
