"""The causal denoiser s_phi: removes the training noise from samples (DESIGN: flow-score matching, Eq. 7)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from starflow_jax.kernels.mask import FrameWindow, Full
from starflow_jax.nn.cache import KVCache
from starflow_jax.nn.transformer import KeyValue, Transformer, run_behind_prefix, with_prefix


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

    def setup(self) -> None:
        self.proj_in = nn.Dense(self.width, dtype=self.dtype)
        if self.text:
            self.proj_text = nn.Dense(self.width, dtype=self.dtype)
        self.transformer = Transformer(self.layers, self.head_dim, self.dtype, self.remat, self.sequence_parallel,
                                       self.unroll)
        self.proj_out = nn.Dense(self.channels, dtype=self.dtype, kernel_init=nn.initializers.zeros)

    def __call__(
        self, x_BSC: jax.Array, frames: int, rope_2SE: jax.Array, text_BTD: jax.Array | None = None,
        count: jax.Array | None = None,
    ) -> jax.Array:
        """(B, frames*h*w, C) in raster order -> the same shape, float32. rope covers the text, then the tokens.

        count: how many of the frames there are, an int32; what is behind them, and what comes out there, does not
        matter. None: all.
        """
        hidden, prefix = self._behind_text(x_BSC, text_BTD)
        ahead = FrameWindow(prefix, x_BSC.shape[1] // frames, self.window, self.lookahead, frames)
        causal = dataclasses.replace(ahead, lookahead=0)
        slots = None if count is None else prefix + count * ahead.tokens
        mask, first_mask = (causal, ahead) if self.first_layer_only else (ahead, None)
        out, _ = run_behind_prefix(self.transformer, self._project, hidden, rope_2SE, mask, prefix,
                                   first_mask=first_mask, keep_kv=False, count=slots)
        return out

    def next_frame(
        self, x_BSC: jax.Array, tokens: int, rope_2SE: jax.Array, text_BTD: jax.Array | None, cache: KVCache | None
    ) -> tuple[jax.Array, KeyValue]:
        """s of the first `tokens` of x, float32; the others belong to the frames that the first layer looks ahead to.

        Everything in the cache is seen: the text and the frames of the window. text: given while the cache lacks it.
        Also returns the keys and values, (L, B, ..., H, D) each, of the text, where given, and of those tokens.
        """
        hidden, prefix = self._behind_text(x_BSC, text_BTD)
        hidden, kv = self.transformer(hidden, Full(), rope_2SE, cache, kept=prefix + tokens)
        return self._project(hidden[:, prefix:]), kv

    def _behind_text(self, x_BSC: jax.Array, text_BTD: jax.Array | None) -> tuple[jax.Array, int]:
        text = self.proj_text(text_BTD) if self.text and text_BTD is not None else None
        return with_prefix(text, self.proj_in(x_BSC))

    def _project(self, hidden_BSD: jax.Array) -> jax.Array:
        out = self.proj_out(hidden_BSD.astype(self.dtype))
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))
