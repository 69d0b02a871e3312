"""The causal denoiser s_phi: removes the training noise from samples (DESIGN: flow-score matching, Eq. 7)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from starflow_jax.kernels.mask import FrameWindow
from starflow_jax.nn.transformer import Transformer
from starflow_jax.sharding import constrain, token_padding, tokens_sharded


class Denoiser(nn.Module):
    """Noisy tokens (and text) -> s(x~), with frames attending to a window and `lookahead` frames ahead.

    first_layer_only: the look-ahead is the first layer's alone, so that output n depends on frames <= n +
    lookahead; otherwise every layer has it and it adds up over the layers (the released weights).
    """

    channels: int
    width: int
    layers: int
    head_dim: int
    window: int
    lookahead: int
    first_layer_only: bool
    dtype: Any = jnp.float32
    remat: str = "none"
    sequence_parallel: str = "ulysses"
    unroll: bool = False
    text: bool = True

    @nn.compact
    def __call__(
        self, x_BSC: jax.Array, frames: int, rope_2SE: jax.Array, text_BTD: jax.Array | None = None
    ) -> jax.Array:
        """(B, frames*h*w, C) in raster order -> the same shape, float32. rope covers the text, then the tokens."""
        hidden, prefix = nn.Dense(self.width, dtype=self.dtype, name="proj_in")(x_BSC), 0
        if self.text and text_BTD is not None:
            text = nn.Dense(self.width, dtype=self.dtype, name="proj_text")(text_BTD)
            hidden, prefix = jnp.concatenate([text, hidden], axis=1), text.shape[1]
        slots, hidden = hidden.shape[1], constrain(hidden, "batch", None, None)
        behind = ((0, 0), (0, token_padding(slots)), (0, 0))
        hidden, rope_2SE = jnp.pad(hidden, behind), jnp.pad(rope_2SE, behind)
        ahead = FrameWindow(prefix, x_BSC.shape[1] // frames, self.window, self.lookahead, frames)
        causal = dataclasses.replace(ahead, lookahead=0)
        mask, first_mask = (causal, ahead) if self.first_layer_only else (ahead, None)
        stack = Transformer(self.layers, self.head_dim, self.dtype, self.remat, self.sequence_parallel, self.unroll,
                            name="transformer")
        hidden, _ = stack(hidden, mask, rope_2SE, first_mask=first_mask, keep_kv=False)
        if not tokens_sharded():
            hidden, slots, prefix = hidden[:, prefix:], slots - prefix, 0
        out = nn.Dense(self.channels, dtype=self.dtype, name="proj_out", kernel_init=nn.initializers.zeros)(
            hidden.astype(self.dtype)
        )
        out = constrain(out[:, prefix:slots], "batch", None, None)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))
