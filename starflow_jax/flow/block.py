"""One autoregressive flow block: forward and inverse of the same network (DESIGN: the flow block).

Tokens come in the block's own order. Slot s sees [SOS, x_0 .. x_{s-1}] (behind the text, if any) and
predicts mean and scale of token s, so that

    forward  z = (x - mu) / sigma,  log-determinant -log sigma      all slots at once
    inverse  x = mu + sigma z                                       slot by slot, or by Jacobi (decode.py)
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.kernels.mask import Causal
from starflow_jax.nn import rope
from starflow_jax.nn.cache import KVCache
from starflow_jax.nn.transformer import KeyValue, Transformer
from starflow_jax.sharding import constrain, token_padding, tokens_sharded

SOFT_CLIP = 4.0
UNIT_SCALE = 0.54132485  # softplus(UNIT_SCALE) = 1: a block whose output is 0 changes nothing


class Affine(NamedTuple):
    """Mean and scale of each token element, float32 at least."""

    mu_BSC: jax.Array
    sigma_BSC: jax.Array


class FlowBlock(nn.Module):
    """The network of one block and its affine map."""

    channels: int  # C * p**2, of a token
    width: int
    layers: int
    head_dim: int
    dtype: Any = jnp.float32
    remat: str = "none"
    sequence_parallel: str = "ulysses"
    unroll: bool = False
    text: bool = False  # takes a text prefix: the deep block

    def setup(self) -> None:
        self.sos = self.param("sos", nn.initializers.normal(1.0), (1, 1, self.channels))
        self.proj_in = nn.Dense(self.width, dtype=self.dtype)
        if self.text:
            self.proj_text = nn.Dense(self.width, dtype=self.dtype)
        self.transformer = Transformer(self.layers, self.head_dim, self.dtype, self.remat, self.sequence_parallel,
                                       self.unroll)
        self.proj_out = nn.Dense(2 * self.channels, dtype=self.dtype, kernel_init=nn.initializers.zeros)

    def __call__(
        self, x_BSC: jax.Array, rope_2SE: jax.Array, text_BTD: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Forward: tokens (B, S, C) -> (z, log-determinant), elementwise, both (B, S, C) float32."""
        affine, _ = self._run(self.shift(x_BSC), rope_2SE, text_BTD, keep_kv=False)
        return (x_BSC - affine.mu_BSC) / affine.sigma_BSC, -jnp.log(affine.sigma_BSC)

    def shift(self, x_BSC: jax.Array) -> jax.Array:
        """The network's input at each slot: SOS, then every token but the last."""
        sos = jnp.broadcast_to(self.sos, (x_BSC.shape[0], 1, self.channels)).astype(x_BSC.dtype)
        return jnp.concatenate([sos, x_BSC[:, :-1]], axis=1)

    def start(self, batch: int) -> jax.Array:
        """(B, 1, C): what slot 0 sees."""
        return jnp.broadcast_to(self.sos, (batch, 1, self.channels))

    def prefill(
        self, known_BSC: jax.Array, rope_2SE: jax.Array, text_BTD: jax.Array | None
    ) -> tuple[Affine, KeyValue]:
        """Keys and values of the text and of the slots of the known tokens, and those slots' predictions."""
        return self._run(self.shift(known_BSC), rope_2SE, text_BTD, keep_kv=True)

    def prefill_text(self, text_BTD: jax.Array, rope_2TE: jax.Array) -> KeyValue:
        """Keys and values of the text alone, each (L, B, T, H, D)."""
        return self._transform(self.proj_text(text_BTD), rope_2TE)[1]

    def predict(self, inputs_BNC: jax.Array, rope_2NE: jax.Array, cache: KVCache) -> tuple[Affine, KeyValue]:
        """The next N slots' predictions from what each slot sees; the cache is only read."""
        return self._transform(self.proj_in(inputs_BNC.astype(self.dtype)), rope_2NE, cache)

    def _run(self, inputs_BSC, rope_2SE, text_BTD, keep_kv: bool) -> tuple[Affine, Any]:
        hidden, prefix = self.proj_in(inputs_BSC.astype(self.dtype)), 0
        if text_BTD is not None:
            text = self.proj_text(text_BTD.astype(self.dtype))
            hidden, prefix = jnp.concatenate([text, hidden], axis=1), text.shape[1]
        return self._transform(hidden, rope_2SE, keep_kv=keep_kv, prefix=prefix)

    def _transform(self, hidden_BSD: jax.Array, rope_2SE: jax.Array, cache: KVCache | None = None,
                   keep_kv: bool = True, prefix: int = 0) -> tuple[Affine, Any]:
        """The Transformer and what it predicts at each slot behind the prefix; with padding behind the last one
        while that runs."""
        slots = whole = hidden_BSD.shape[1]
        hidden_BSD = constrain(hidden_BSD, "batch", None, None)
        behind = (0, token_padding(slots))
        hidden, kv = self.transformer(jnp.pad(hidden_BSD, ((0, 0), behind, (0, 0))), Causal(),
                                      jnp.pad(rope_2SE, ((0, 0), behind, (0, 0))), cache, keep_kv=keep_kv)
        if not tokens_sharded():
            hidden, slots, prefix = hidden[:, prefix:], slots - prefix, 0
        affine = Affine(*(constrain(part[:, prefix:slots], "batch", None, None) for part in self._affine(hidden)))
        return affine, jax.tree.map(lambda part: part[..., :whole, :, :], kv)

    def _affine(self, hidden_BSD: jax.Array) -> Affine:
        out = self.proj_out(hidden_BSD.astype(self.dtype))
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        a, mu = jnp.split(SOFT_CLIP * jnp.tanh(out / SOFT_CLIP), 2, axis=-1)
        return Affine(mu, jax.nn.softplus(a + UNIT_SCALE))


def block_rope(grid: tuple[int, int, int], extent: float, text_length: int, head_dim: int) -> jax.Array:
    """(2, text_length + T*h*w, head_dim/2): RoPE of the text prefix and then of the slots of a T x h x w grid."""
    positions = rope.grid_positions(*grid, extent)
    if text_length:
        positions = np.concatenate([rope.text_positions(text_length, extent), positions])
    return rope.rope_table(positions, head_dim)
