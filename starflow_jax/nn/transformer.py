"""The pre-norm Transformer that every part of the method shares (DESIGN: transformer layer).

Layers are scanned: parameters are stacked along a leading layer axis and a 24-layer block compiles as one. Decoding on
a CPU can have them `unstacked` instead: XLA copies a layer's weights out of the stack each time it uses them, which for
few tokens takes longer than the products.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from starflow_jax.kernels.attention import ATTENTION_RESULTS
from starflow_jax.kernels.mask import Mask
from starflow_jax.nn.cache import KVCache
from starflow_jax.nn.rope import apply_rope
from starflow_jax.nn.sequence_parallel import by_tokens, sequence_parallel_attention
from starflow_jax.sharding import constrain

KeyValue = tuple[jax.Array, jax.Array]
LAYER_INPUT = "layer_input"


class FinalNorm(nn.Module):
    """RMSNorm with weight (1 + w), eps 1e-6, in float32."""

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        weight = self.param("weight", nn.initializers.zeros, (x_BSD.shape[-1],))
        x = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + weight)


class Layer(nn.Module):
    """LayerNorm, causal or windowed attention with RoPE, residual; LayerNorm, GELU MLP, residual.

    `first_mask`, where given, is the mask of the stack's first layer.
    """

    head_dim: int
    dtype: Any
    mask: Mask
    first_mask: Mask | None
    sequence_parallel: str  # of config.SEQUENCE_PARALLEL

    def _norm(self, x_BSD: jax.Array, name: str) -> jax.Array:
        dtype = jnp.promote_types(self.dtype, jnp.float32)
        return nn.LayerNorm(epsilon=1e-5, dtype=dtype, name=name)(x_BSD).astype(self.dtype)

    @nn.compact
    def __call__(self, x_BSD, past, is_first, rope_2SE, past_length):
        """past: this layer's cached (k, v) or None. Returns (x, this call's (k, v)), the scan's carry and output."""
        width = x_BSD.shape[-1]
        heads = width // self.head_dim
        qkv = nn.DenseGeneral((3, width), dtype=self.dtype, name="qkv")(self._norm(x_BSD, "attention_norm"))
        q, k, v = (qkv[..., i, :].reshape(*x_BSD.shape[:-1], heads, self.head_dim) for i in range(3))
        q, k = apply_rope(q, rope_2SE), apply_rope(k, rope_2SE)
        axes = ("tokens", "hidden") if by_tokens(self.sequence_parallel, past) else (None, "heads")
        q, k, v = (constrain(part, "batch", *axes, None) for part in (q, k, v))
        seen = None if past is None else (*past, past_length)
        if self.first_mask is None:
            out = sequence_parallel_attention(self.sequence_parallel, q, k, v, (self.mask,), None, seen)
        else:
            masks = (self.mask, self.first_mask)
            out = sequence_parallel_attention(self.sequence_parallel, q, k, v, masks, is_first.astype(jnp.int32), seen)
        out = constrain(out.reshape(x_BSD.shape), "batch", "tokens", "hidden")
        x_BSD = _tokens(x_BSD + nn.Dense(width, dtype=self.dtype, name="proj")(out))
        hidden = nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(self._norm(x_BSD, "mlp_norm"))
        hidden = nn.gelu(constrain(hidden, "batch", "tokens", "hidden"), approximate=False)
        return _tokens(x_BSD + nn.Dense(width, dtype=self.dtype, name="mlp_out")(hidden)), (k, v)


def _tokens(x_BSD: jax.Array) -> jax.Array:
    return constrain(x_BSD, "batch", "tokens", None)


class Transformer(nn.Module):
    """A scanned stack of layers and the final norm.

    `first_mask`, where given, is the first layer's own mask (the denoiser's look-ahead).
    """

    layers: int
    head_dim: int
    dtype: Any = jnp.float32
    remat: str = "none"
    sequence_parallel: str = "ulysses"
    unroll: bool = False

    @nn.compact
    def __call__(
        self,
        x_BSD: jax.Array,
        mask: Mask,
        rope_2SE: jax.Array,
        cache: KVCache | None = None,
        first_mask: Mask | None = None,
        keep_kv: bool = True,
    ) -> tuple[jax.Array, Any]:
        """(B, S, D) in, ((B, S, D) float32 normed, (k, v) each (L, B, S, H, D) or None) out; of unstacked parameters
        k and v are tuples of L arrays."""
        if not self.is_initializing() and is_unstacked(self.variables["params"]):
            x_BSD, kv = self._one_by_one(x_BSD, mask, rope_2SE, cache, first_mask, keep_kv)
            return FinalNorm(name="final_norm")(x_BSD), kv
        layer = _BodyLayer if self.remat == "none" else nn.remat(
            _BodyLayer, prevent_cse=False, policy=_kept(self.remat))
        stack = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=self.layers,
            unroll=self.layers if self.unroll else 1,
        )(self.head_dim, self.dtype, mask, first_mask, self.sequence_parallel, keep_kv, name="layers")
        is_first = jnp.arange(self.layers) == 0
        past = None if cache is None else (cache.k_LBPHD, cache.v_LBPHD)
        past_length = jnp.int32(0) if cache is None else cache.length
        x_BSD, kv = stack(_tokens(x_BSD.astype(self.dtype)), past, is_first, rope_2SE, past_length)
        return FinalNorm(name="final_norm")(x_BSD), kv

    def _one_by_one(self, x_BSD, mask, rope_2SE, cache, first_mask, keep_kv):
        """The layers as the scan runs them, of parameters that are not stacked."""
        x_BSD, kv = x_BSD.astype(self.dtype), []
        for index, params in enumerate(self.variables["params"]["layers"]["layer"]):
            past = None if cache is None else (cache.k_LBPHD[index], cache.v_LBPHD[index])
            first = first_mask if index == 0 and first_mask is not None else mask
            layer = Layer(self.head_dim, self.dtype, first, None, self.sequence_parallel, parent=None)
            x_BSD, made = layer.apply({"params": params}, x_BSD, past, False, rope_2SE,
                                      None if cache is None else cache.length)
            kv.append(made)
        return x_BSD, tuple(zip(*kv)) if keep_kv else None


def is_unstacked(params: Any) -> bool:
    """Of a Transformer's parameters."""
    return isinstance(params["layers"]["layer"], tuple)


def unstacked(params: Any) -> Any:
    """Parameters with every stack of layers, {"layers": {"layer": arrays of L layers}}, as a tuple of L layers."""
    if not isinstance(params, Mapping):
        return params
    if set(params) == {"layer"} and isinstance(params["layer"], Mapping):
        leaves, tree = jax.tree.flatten(params["layer"])
        return {"layer": tuple(jax.tree.unflatten(tree, layer) for layer in zip(*leaves))}
    return {name: unstacked(value) for name, value in params.items()}


def _kept(remat: str):
    """What a layer's backward pass finds beside the layer's input, as jax.checkpoint's policy (config.REMAT)."""
    policies = jax.checkpoint_policies
    if remat == "attention":
        return policies.save_only_these_names(*ATTENTION_RESULTS)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT, *ATTENTION_RESULTS],
            offload_src="device", offload_dst="pinned_host")
    return None


class _BodyLayer(nn.Module):
    """A layer as the scan's body: drops keys and values that nobody asked for."""

    head_dim: int
    dtype: Any
    mask: Mask
    first_mask: Mask | None
    sequence_parallel: str
    keep_kv: bool

    @nn.compact
    def __call__(self, x_BSD, past, is_first, rope_2SE, past_length):
        x_BSD = checkpoint_name(x_BSD, LAYER_INPUT)
        layer = Layer(self.head_dim, self.dtype, self.mask, self.first_mask, self.sequence_parallel, name="layer")
        x_BSD, kv = layer(x_BSD, past, is_first, rope_2SE, past_length)
        return x_BSD, kv if self.keep_kv else None
