"""The denoiser a frame at a time, with a cache per layer: the same results as the whole-clip pass (DESIGN: losses).

Only the first layer looks ahead, so it is run on the frame and those ahead of it, the others on the frame alone. Past
frames' keys and values lie in a ring of window - 1 frames behind the text's: attention does not depend on their order.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.nn.cache import KVCache


class DenoiserState(flax.struct.PyTreeNode):
    """What the layers know of the text and of the frames before the next."""

    cache: KVCache
    frame: jax.Array  # int32: the next one's index in the window


@partial(jax.jit, static_argnames=("model", "frames"), donate_argnames="state")
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

    params: the denoiser's. state: None where a window begins. frames: the frame and those ahead of it that are there,
    at most 1 + denoiser_lookahead.
    """
    config, tokens = model.config, model.config.tokens_per_frame
    _, height, width = model.grid(noisy_BThwC.shape)
    x = model.tokens(lax.dynamic_slice_in_dim(noisy_BThwC, at, frames, axis=1))
    x_BSK = x.reshape(x.shape[0], -1, x.shape[-1])
    text_length = 0 if text_BTD is None else text_BTD.shape[1]
    rope = model.rope((config.frames + frames, height, width), text_BTD)
    if state is None:
        rope, fresh_text, cache = rope[:, :text_length + frames * tokens], text_BTD, None
    else:
        rope = lax.dynamic_slice_in_dim(rope, text_length + state.frame * tokens, frames * tokens, axis=1)
        fresh_text, cache = None, state.cache
    out, kv = apply_flow(model, {"params": {"denoiser": params}},
                         lambda flow: flow.denoiser.next_frame(x_BSK, tokens, rope, fresh_text, cache))
    return model.latents(out[:, None], height), _written(model, state, kv, text_length)


def _written(model: STARFlow, state: DenoiserState | None, kv: Any, text_length: int) -> DenoiserState:
    """The state with a frame's keys and values, at first the text's too, in place of the oldest one's."""
    ring, tokens = model.config.denoiser_window - 1, model.config.tokens_per_frame
    slots = text_length + ring * tokens
    if state is None:
        kept = jax.tree.map(lambda part: part[..., :slots, :, :], kv)
        return DenoiserState(KVCache.filled(kept, slots), jnp.int32(1))
    cache = state.cache.write(kv, text_length + state.frame % ring * tokens) if ring else state.cache
    return DenoiserState(cache, state.frame + 1)
