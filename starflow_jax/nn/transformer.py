"""The pre-norm Transformer that every part of the method shares (DESIGN: transformer layer).

Parameters are stacked along a leading layer axis and the layers scanned: a 24-layer block compiles as one. Decoding on
a CPU can have them `unstacked` instead: XLA copies a layer's weights out of the stack each time it uses them, which for
few tokens takes longer than the products. `Transformer` alone iterates over layers: in training, in decoding with a
cache, and in a stream whose first layer looks ahead.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from starflow_jax.kernels.attention import ATTENTION_RESULTS
from starflow_jax.kernels.mask import Mask
from starflow_jax.nn.cache import KVCache
from starflow_jax.nn.dense import Dense, DenseGeneral
from starflow_jax.nn.gelu import gelu
from starflow_jax.nn.products import product
from starflow_jax.nn.rope import apply_rope
from starflow_jax.nn.sequence_parallel import by_tokens, sequence_parallel_attention
from starflow_jax.sharding import constrain, token_padding, tokens_sharded

KeyValue = tuple[jax.Array, jax.Array]
Params = dict[str, Any]
LAYER_INPUT = "layer_input"


class Control(NamedTuple):
    """What steers a stack from beside it. In each layer the product of R features of the control tokens and R of the
    hidden states is mapped to what the layer's input gets, and to what its queries, keys and values get; nothing where
    tokens are zero."""

    tokens_BSC: jax.Array
    layers: Any  # kernels "tokens" (L, C, R), "hidden" (L, D, R), "out" (L, R, D), "qkv" (L, R, 3, D); or L of each

    def added(self, x_BSD: jax.Array, of_layer: Params) -> tuple[jax.Array, jax.Array]:
        """What one layer's input (B, S, D) gets, and its queries, keys and values (B, S, 3, D)."""
        kernels = {name: part["kernel"].astype(x_BSD.dtype) for name, part in of_layer.items()}
        x = x_BSD.astype(jnp.promote_types(x_BSD.dtype, jnp.float32))
        normed_BSD = (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)).astype(x_BSD.dtype)
        steered_BSR = product(self.tokens_BSC.astype(x_BSD.dtype), kernels["tokens"])
        features_BSR = steered_BSR * (1 + product(normed_BSD, kernels["hidden"]))
        return product(features_BSR, kernels["out"]), product(features_BSR, kernels["qkv"])

    def padded(self, before: int, after: int) -> "Control":
        """The same of a sequence with so many more slots, which are not steered."""
        return self._replace(tokens_BSC=jnp.pad(self.tokens_BSC, ((0, 0), (before, after), (0, 0))))

    def tiled(self, branches: int) -> "Control":
        """The same of each guidance branch."""
        return self._replace(tokens_BSC=jnp.tile(self.tokens_BSC, (branches, 1, 1)))


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

    def _masks(self, is_first) -> tuple[tuple[Mask, ...], jax.Array | None]:
        """The masks that may apply, and the index of the one that does, where only the running program knows it."""
        if self.first_mask is None:
            return (self.mask,), None
        if isinstance(is_first, bool):
            return (self.first_mask if is_first else self.mask,), None
        return (self.mask, self.first_mask), is_first.astype(jnp.int32)

    @nn.compact
    def __call__(self, x_BSD, past, is_first, rope_2SE, count=None, steered_BS3D=None):
        """(x, this call's (k, v)). past: this layer's cached (k, v), and how many slots of them are filled; or None.

        is_first: a bool, or a traced one where all layers share one program. count: as `Transformer` takes it. steered:
        what queries, keys and values get (`Control`).
        """
        width = x_BSD.shape[-1]
        heads = width // self.head_dim
        qkv = DenseGeneral((3, width), dtype=self.dtype, name="qkv")(self._norm(x_BSD, "attention_norm"))
        if steered_BS3D is not None:
            qkv = qkv + steered_BS3D
        q, k, v = (qkv[..., i, :].reshape(*x_BSD.shape[:-1], heads, self.head_dim) for i in range(3))
        q, k = apply_rope(q, rope_2SE), apply_rope(k, rope_2SE)
        axes = ("tokens", "hidden") if by_tokens(self.sequence_parallel, past, count) else (None, "heads")
        q, k, v = (constrain(part, "batch", *axes, None) for part in (q, k, v))
        masks, which = self._masks(is_first)
        out = sequence_parallel_attention(self.sequence_parallel, q, k, v, masks, which, past, count)
        out = constrain(out.reshape(x_BSD.shape), "batch", "tokens", "hidden")
        x_BSD = _shard_tokens(x_BSD + Dense(width, dtype=self.dtype, name="proj")(out))
        hidden = Dense(4 * width, dtype=self.dtype, name="mlp_in")(self._norm(x_BSD, "mlp_norm"))
        hidden = gelu(constrain(hidden, "batch", "tokens", "hidden"))
        return _shard_tokens(x_BSD + Dense(width, dtype=self.dtype, name="mlp_out")(hidden)), (k, v)


def _shard_tokens(x_BSD: jax.Array) -> jax.Array:
    return constrain(x_BSD, "batch", "tokens", None)


class Transformer(nn.Module):
    """A stack of layers and the final norm."""

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
        kept: int | None = None,
        control: Control | None = None,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """(B, S, D) in, ((B, S, D) float32 normed, (k, v) each (L, B, S, H, D) or None) out; of unstacked parameters
        k and v are tuples of L arrays.

        first_mask: the first layer's own mask (the denoiser's look-ahead).
        kept: how many of the S slots, from the first on, later layers get; the others are seen by the first layer
        alone. None: all.
        control: of the same slots; not together with `kept`.
        count: how many of the S slots there are, an int32; the others are padding, which nobody sees. None: all.
        """
        layer = Layer(self.head_dim, self.dtype, mask, first_mask, self.sequence_parallel, parent=None)
        x_BSD, kv = _shard_tokens(x_BSD.astype(self.dtype)), None
        if self.is_initializing():
            fresh = nn.scan(_FreshLayer, variable_axes={"params": 0}, split_rngs={"params": True},
                            in_axes=nn.broadcast, length=self.layers)
            x_BSD, _ = fresh(layer, name="layers")(x_BSD, rope_2SE)
        else:
            x_BSD, kv = self._run_layers(layer, x_BSD, rope_2SE, cache, keep_kv, kept, control, count)
        return FinalNorm(name="final_norm")(x_BSD), kv

    def empty_cache(self, batch: int, slots: int, width: int, dtype: Any = None) -> KVCache:
        """A cache with room for `slots`, stacked or unstacked as the parameters are. dtype: the layers' own by default.
        """
        return KVCache.empty(self.layers, batch, slots, width // self.head_dim, self.head_dim, dtype or self.dtype,
                             unstacked=_is_unstacked(self.variables["params"]))

    def _run_layers(self, layer: Layer, x_BSD: jax.Array, rope_2SE: jax.Array, cache: KVCache | None, keep_kv: bool,
                    kept: int | None, control: Control | None, count: jax.Array | None) -> tuple[jax.Array, Any]:
        """One layer after the other: of a stack by a loop, unstacked ones each with code of its own."""
        params = self.variables["params"]["layers"]["layer"]
        steers = None if control is None else control.layers

        def run(x_BSD, params, index, is_first, steer=None):
            x_BSD, steered_BS3D = checkpoint_name(x_BSD, LAYER_INPUT), None
            if control is not None and steer is not None:
                added_BSD, steered_BS3D = control.added(x_BSD, steer)
                x_BSD = x_BSD + added_BSD
            past = None if cache is None else (*cache.of_layer(index), cache.length)
            x_BSD, kv = layer.apply({"params": params}, x_BSD, past, is_first, rope_2SE[:, :x_BSD.shape[1]], count,
                                    steered_BS3D)
            return x_BSD, kv if keep_kv else None

        if _is_unstacked(self.variables["params"]):
            made = []
            for index, of_layer in enumerate(params):
                x_BSD, kv = run(x_BSD[:, :kept] if index else x_BSD, of_layer, index, index == 0,
                                _at(index, steers))
                made.append(jax.tree.map(lambda part: part[:, :kept], kv))
            return x_BSD, tuple(zip(*made)) if keep_kv else None
        if kept is not None:
            return _first_apart(run, x_BSD, params, self.layers, kept)
        if self.remat != "none":
            run = jax.checkpoint(run, prevent_cse=False, policy=_saved(self.remat))
        which = jnp.arange(self.layers)
        return lax.scan(lambda x, of_layer: run(x, *of_layer), x_BSD, (params, which, which == 0, steers),
                        unroll=self.layers if self.unroll else 1)


def _at(index: int, stack: Any) -> Any:
    """One layer of a stack, or of a tuple of layers; None of none."""
    return stack[index] if isinstance(stack, tuple) else jax.tree.map(lambda leaf: leaf[index], stack)


def _first_apart(run: Callable, x_BSD: jax.Array, params: Any, layers: int, kept: int) -> tuple[jax.Array, Any]:
    """The first layer on all slots, then a loop of the others on `kept` of them; keys and values of those.

    The loop takes each layer from the whole stack: a stack without its first layer would be a copy.
    """
    def of_layer(index):
        return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), params), index

    x_BSD, first = run(x_BSD, *of_layer(0), True)
    x_BSD, rest = lax.scan(lambda x, index: run(x, *of_layer(index), False), x_BSD[:, :kept], jnp.arange(1, layers))
    return x_BSD, jax.tree.map(lambda one, others: jnp.concatenate([one[None, :, :kept], others]), first, rest)


class _FreshLayer(nn.Module):
    """The body of the scan that makes a stack's parameters, each layer's from a key of its own."""

    layer: Layer

    def __call__(self, x_BSD: jax.Array, rope_2SE: jax.Array) -> tuple[jax.Array, None]:
        return self.layer(x_BSD, None, False, rope_2SE)[0], None


def run_behind_prefix(
    transformer: Transformer,
    head: Callable[[jax.Array], Any],
    hidden_BSD: jax.Array,
    rope_2SE: jax.Array,
    mask: Mask,
    prefix: int = 0,
    control: Control | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """What the head makes of each slot behind the prefix, and the keys and values of all slots.

    control: of the last slots, as many as it has tokens. options: of the Transformer. While it runs, padding lets the
    sequence divide over a mesh that shards tokens; such a sequence is cut only after the head, whose outputs are small.
    """
    slots = whole = hidden_BSD.shape[1]
    hidden_BSD = constrain(hidden_BSD, "batch", None, None)
    behind = ((0, 0), (0, token_padding(slots)), (0, 0))
    if control is not None:
        control = control.padded(slots - control.tokens_BSC.shape[1], token_padding(slots))
    hidden, kv = transformer(jnp.pad(hidden_BSD, behind), mask, jnp.pad(rope_2SE, behind), control=control, **options)
    if not tokens_sharded():
        hidden, slots, prefix = hidden[:, prefix:], slots - prefix, 0
    out = jax.tree.map(lambda part: constrain(part[:, prefix:slots], "batch", None, None), head(hidden))
    return out, jax.tree.map(lambda part: part[..., :whole, :, :], kv)


def with_prefix(prefix_BTD: jax.Array | None, hidden_BSD: jax.Array) -> tuple[jax.Array, int]:
    """The sequence behind its prefix, if it has one, and the prefix's length."""
    if prefix_BTD is None:
        return hidden_BSD, 0
    return jnp.concatenate([prefix_BTD, hidden_BSD], axis=1), prefix_BTD.shape[1]


def _is_unstacked(params: Any) -> bool:
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


def _saved(remat: str):
    """What a layer's backward pass finds beside the layer's input, as jax.checkpoint's policy (config.REMAT)."""
    policies = jax.checkpoint_policies
    if remat == "attention":
        return policies.save_only_these_names(*ATTENTION_RESULTS)
    if remat == "offload":
        return policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT, *ATTENTION_RESULTS],
            offload_src="device", offload_dst="pinned_host")
    return None
