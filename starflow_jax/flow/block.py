"""One autoregressive flow block: forward and inverse of the same network (DESIGN: the flow block).

Tokens come in the block's own order. Slot s sees [SOS, x_0 .. x_{s-1}] (behind the text, if any) and
predicts mean and scale of token s, so that

    forward  z = (x - mu) / sigma,  log-determinant -log sigma      all slots at once
    inverse  x = mu + sigma z,      log-determinant  log sigma      slot by slot, or by Jacobi (inversion.py)
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.flow import inversion
from starflow_jax.flow.affine import Affine
from starflow_jax.flow.guidance import guide
from starflow_jax.flow.inversion import Inverse, Known, Solver
from starflow_jax.kernels.mask import Causal
from starflow_jax.nn import rope
from starflow_jax.nn.cache import KVCache
from starflow_jax.nn.transformer import Control, KeyValue, Transformer, run_behind_prefix, with_prefix

SOFT_CLIP = 4.0
UNIT_SCALE = 0.54132485  # softplus(UNIT_SCALE) = 1: a block whose output is 0 changes nothing


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

    def forward(
        self, x_BSC: jax.Array, rope_2SE: jax.Array, text_BTD: jax.Array | None = None, control: Control | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens (B, S, C) -> (z, log-determinant), elementwise, both (B, S, C) float32.

        rope: of the text, then of the tokens; control: of the tokens. Slot s, which predicts token s, is steered by
        that token's.
        """
        affine, _ = self._run(x_BSC, rope_2SE, text_BTD, control, keep_kv=False)
        return affine.forward(x_BSC)

    def inverse(
        self, z_BSC: jax.Array, rope_2SE: jax.Array, known: Known, start_BSC: jax.Array, solver: Solver,
        guidance: jax.Array | None = None, control: Control | None = None,
    ) -> Inverse:
        """The next S slots' noise (B, S, C) -> their tokens and log-determinant, elementwise, and what is known then.

        rope: of those slots; known: the slots before them (`begin`); start: where the solver starts, (B, S, C);
        guidance: weight of the conditional branch over the unconditional one, both in the cache. None: one branch.
        control: of those slots, the same in both branches.
        """
        block, variables = self.unbind()  # a bound module can't be called in a loop of JAX's
        predict_next: Any = partial(block.apply, method=FlowBlock.predict)
        branches = 1 if guidance is None else 2

        def predict(inputs_BNC: jax.Array, slots: Any, cache: KVCache) -> tuple[Affine, KeyValue]:
            rope_2NE, tokens_BNC = slots
            steered = None if control is None else Control(tokens_BNC, control.layers).tiled(branches)
            inputs = jnp.tile(inputs_BNC, (branches, 1, 1))
            affine, kv = predict_next(variables, inputs, rope_2NE, cache, steered)
            if guidance is None:
                return affine, kv
            conditional, unconditional = (Affine(*part) for part in zip(*(jnp.split(a, 2) for a in affine)))
            return guide(conditional, unconditional, guidance), kv

        slots = rope_2SE, None if control is None else control.tokens_BSC
        return inversion.solve(predict, z_BSC, start_BSC, known, slots, solver, branches)

    def begin(
        self, slots: int, x_BSC: jax.Array, rope_2SE: jax.Array, text_GBTD: jax.Array | None = None,
        cache_dtype: Any = None, control: Control | None = None,
    ) -> Known:
        """What `inverse` takes to be known: the text of each guidance branch, and S >= 0 given tokens.

        slots: of the cache, text included; rope: of the text and then of the given tokens; cache_dtype: see
        KVCache.empty, the block's own by default; control: of the given tokens.
        """
        batch, given, channels = x_BSC.shape
        branches = 1 if text_GBTD is None else text_GBTD.shape[0]
        text = None if text_GBTD is None else text_GBTD.reshape(-1, *text_GBTD.shape[2:])
        cache = self.transformer.empty_cache(branches * batch, slots, self.width, cache_dtype)
        if given:
            steered = None if control is None else control.tiled(branches)
            _, kv = self._run(jnp.tile(x_BSC, (branches, 1, 1)), rope_2SE, text, steered, keep_kv=True)
            return Known(cache.append(kv), x_BSC[:, -1:])
        if text is not None:
            _, kv = self._predict(self.proj_text(text), rope_2SE[:, :text.shape[1]])
            cache = cache.append(kv)
        return Known(cache, jnp.broadcast_to(self.sos, (batch, 1, channels)).astype(x_BSC.dtype))

    def follow(self, x_BSC: jax.Array, rope_2SE: jax.Array, known: Known, branches: int = 1) -> Known:
        """What is known once the next S slots' tokens are given, whatever their noise."""
        inputs = jnp.concatenate([known.last_B1C, x_BSC[:, :-1]], axis=1)
        _, kv = self.predict(jnp.tile(inputs, (branches, 1, 1)), rope_2SE, known.cache)
        return Known(known.cache.append(kv), x_BSC[:, -1:])

    def predict(self, inputs_BNC: jax.Array, rope_2NE: jax.Array, cache: KVCache, control: Control | None = None
                ) -> tuple[Affine, KeyValue]:
        """The next N slots' predictions from what each slot sees; the cache is only read."""
        return self._predict(self.proj_in(inputs_BNC.astype(self.dtype)), rope_2NE, cache=cache, control=control)

    def _run(self, x_BSC: jax.Array, rope_2SE, text_BTD: jax.Array | None, control: Control | None, keep_kv: bool
             ) -> tuple[Affine, Any]:
        """Every slot's prediction from the tokens before it."""
        text = None if text_BTD is None else self.proj_text(text_BTD.astype(self.dtype))
        sos = jnp.broadcast_to(self.sos, (x_BSC.shape[0], 1, self.channels)).astype(x_BSC.dtype)
        inputs = jnp.concatenate([sos, x_BSC[:, :-1]], axis=1)
        hidden, prefix = with_prefix(text, self.proj_in(inputs.astype(self.dtype)))
        return self._predict(hidden, rope_2SE, prefix, keep_kv=keep_kv, control=control)

    def _predict(self, hidden_BSD: jax.Array, rope_2SE: jax.Array, prefix: int = 0, **options) -> tuple[Affine, Any]:
        return run_behind_prefix(self.transformer, self._affine, hidden_BSD, rope_2SE, Causal(), prefix, **options)

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
