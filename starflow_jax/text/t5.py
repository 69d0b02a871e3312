"""The T5 v1.1 encoder: token ids to text features.

Pre-norm layers without biases: RMS norm, attention without scaling, RMS norm, gated tanh-GELU. One
table of relative position biases serves all layers. Shape letters: B batch, S tokens (Q as queries,
K as keys), D model width, H heads, L layers.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from starflow_jax.config import UserError
from starflow_jax.io.tensor_files import Array, StoredArray
from starflow_jax.nn.dense import Dense


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder, under Hugging Face's names. Raises UserError on impossible ones."""

    vocab_size: int
    d_model: int
    d_kv: int  # width of one head
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), (int, float) if field.type is float else (int,)
            if type(value) not in kinds or not 0 < value < 2**31:
                raise UserError(f"T5 {field.name} is {value!r:.100}; it must be a positive number below 2^31"
                                + ("" if float in kinds else ", and a whole one"))
        if self.relative_attention_num_buckets % 4:
            raise UserError(
                f"T5 relative_attention_num_buckets is {self.relative_attention_num_buckets}; "
                "make it a multiple of 4 (two directions, near and far)"
            )
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise UserError(
                f"T5 relative_attention_max_distance is {self.relative_attention_max_distance}; make it more "
                "than a quarter of relative_attention_num_buckets"
            )


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each key's distance from each query, int32 [query, key].

    Half of the buckets are for keys behind the query, half for those ahead. Within each, half hold
    one distance apiece and the rest grow logarithmically up to max_distance.
    """
    offset_QK = np.arange(length)[None, :] - np.arange(length)[:, None]
    one_way = num_buckets // 2
    exact = one_way // 2
    distance_QK = np.abs(offset_QK)
    log_ratio_QK = np.log(np.maximum(distance_QK, exact).astype(np.float32) / exact)
    log_range = np.float32(math.log(max_distance / exact))
    far_QK = exact + (log_ratio_QK / log_range * (one_way - exact)).astype(np.int32)
    bucket_QK = np.where(distance_QK < exact, distance_QK, np.minimum(far_QK, one_way - 1))
    return (bucket_QK + one_way * (offset_QK > 0)).astype(np.int32)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, computed in float32."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        weight_D = self.param("weight", nn.initializers.ones, (x_BSD.shape[-1],), jnp.float32)
        x_BSD = x_BSD.astype(jnp.float32)
        mean_square_BS1 = jnp.mean(jnp.square(x_BSD), axis=-1, keepdims=True)
        return (x_BSD * jax.lax.rsqrt(mean_square_BS1 + self.epsilon) * weight_D).astype(self.dtype)


def _dense(features: int, stddev: float, dtype: jnp.dtype, name: str) -> Dense:
    initializer = nn.initializers.normal(stddev)
    return Dense(features, use_bias=False, kernel_init=initializer, dtype=dtype, name=name)


class Attention(nn.Module):
    """Self-attention with a position bias in place of a scale."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: jax.Array, bias_BHQK: jax.Array) -> jax.Array:
        c = self.config
        inner = c.num_heads * c.d_kv
        # The missing 1/sqrt(d_kv) of the scores is in q's initial spread.
        q_BSI = _dense(inner, (c.d_model * c.d_kv) ** -0.5, self.dtype, "q")(x_BSD)
        k_BSI = _dense(inner, c.d_model**-0.5, self.dtype, "k")(x_BSD)
        v_BSI = _dense(inner, c.d_model**-0.5, self.dtype, "v")(x_BSD)
        heads = (*x_BSD.shape[:2], c.num_heads, c.d_kv)
        q_BQHd, k_BKHd, v_BKHd = q_BSI.reshape(heads), k_BSI.reshape(heads), v_BSI.reshape(heads)
        scores_BHQK = jnp.einsum("bqhd,bkhd->bhqk", q_BQHd, k_BKHd, preferred_element_type=jnp.float32)
        weights_BHQK = nn.softmax(scores_BHQK + bias_BHQK, axis=-1).astype(self.dtype)
        out_BQHd = jnp.einsum("bhqk,bkhd->bqhd", weights_BHQK, v_BKHd)
        return _dense(c.d_model, inner**-0.5, self.dtype, "o")(out_BQHd.reshape(q_BSI.shape))


class FeedForward(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), the GELU by its tanh formula."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        c = self.config
        gate_BSF = _dense(c.d_ff, c.d_model**-0.5, self.dtype, "wi_0")(x_BSD)
        value_BSF = _dense(c.d_ff, c.d_model**-0.5, self.dtype, "wi_1")(x_BSD)
        hidden_BSF = nn.gelu(gate_BSF, approximate=True) * value_BSF
        return _dense(c.d_model, c.d_ff**-0.5, self.dtype, "wo")(hidden_BSF)


class Layer(nn.Module):
    """One encoder layer; returns (carry, no per-layer output) as nn.scan wants it."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BSD: jax.Array, bias_BHQK: jax.Array) -> tuple[jax.Array, None]:
        epsilon = self.config.layer_norm_epsilon
        normed_BSD = RMSNorm(epsilon, self.dtype, name="attention_norm")(x_BSD)
        x_BSD += Attention(self.config, self.dtype, name="attention")(normed_BSD, bias_BHQK)
        normed_BSD = RMSNorm(epsilon, self.dtype, name="feed_forward_norm")(x_BSD)
        x_BSD += FeedForward(self.config, self.dtype, name="feed_forward")(normed_BSD)
        return x_BSD, None


class T5Encoder(nn.Module):
    """Token ids to features whose rms is 1 at the start; parameters are float32."""

    config: T5Config
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids_BS: jax.Array, mask_BS: jax.Array | None = None) -> jax.Array:
        """Encodes int32 ids [B, S] to features [B, S, D] in `dtype`.

        No token attends to keys where mask_BS (default ids != 0) is false. Padding rows are
        computed like any other: mask_padding zeroes them.
        """
        c = self.config
        mask_BS = ids_BS != 0 if mask_BS is None else mask_BS.astype(bool)
        spread = nn.initializers.normal(1.0)
        x_BSD = nn.Embed(c.vocab_size, c.d_model, dtype=self.dtype, embedding_init=spread, name="embed")(ids_BS)

        buckets, heads = c.relative_attention_num_buckets, c.num_heads
        spread = nn.initializers.normal(c.d_model**-0.5)
        table_NH = self.param("position_bias", spread, (buckets, heads), jnp.float32)
        bucket_QK = relative_buckets(ids_BS.shape[1], buckets, c.relative_attention_max_distance)
        bias_HQK = jnp.moveaxis(table_NH[bucket_QK], -1, 0)
        # A finite number, so that a text with no token at all gives an average and not a NaN.
        bias_BHQK = jnp.where(mask_BS[:, None, None, :], bias_HQK, jnp.finfo(jnp.float32).min)

        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        x_BSD, _ = layers(c, self.dtype, name="layers")(x_BSD, bias_BHQK)
        return RMSNorm(c.layer_norm_epsilon, self.dtype, name="final_norm")(x_BSD)


def mask_padding(features_BSD: jax.Array, ids_BS: jax.Array) -> jax.Array:
    """Zeroes the features of padding (id 0), which is how the flow takes text."""
    return jnp.where((ids_BS != 0)[:, :, None], features_BSD, 0)


def load_t5(tensors: Mapping[str, Array], config: T5Config) -> dict[str, Any]:
    """Encoder parameters, float32, from a Hugging Face T5 v1.1 state dict: the tree for
    `T5Encoder(config).apply({"params": tree}, ids)`. Raises UserError as `stack_t5`."""
    found = stack_t5(tensors, config)
    return traverse_util.unflatten_dict({name: np.asarray(array) for name, array in found.items()}, sep="/")


def stack_t5(tensors: Mapping[str, Array], config: T5Config) -> dict[str, StoredArray]:
    """{"layers/attention/q/kernel": array} of the same parameters, each read on first use.

    Other tensors (a decoder's) are ignored. Raises UserError for a tensor that is missing or has another shape than
    the config's.
    """
    c, inner = config, config.num_heads * config.d_kv
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    attention, feed_forward = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    one = partial(_stored, tensors)

    def layers(name: str, *shape: int) -> StoredArray:
        return _stacked([one(f"encoder.block.{i}.{name}.weight", *shape) for i in range(c.num_layers)])

    return {
        "embed/embedding": one("shared.weight", c.vocab_size, c.d_model),
        "position_bias": one(bias, c.relative_attention_num_buckets, c.num_heads),
        "layers/attention_norm/weight": layers("layer.0.layer_norm", c.d_model),
        **{f"layers/attention/{name}/kernel": layers(f"{attention}.{name}", inner, c.d_model) for name in "qkv"},
        "layers/attention/o/kernel": layers(f"{attention}.o", c.d_model, inner),
        "layers/feed_forward_norm/weight": layers("layer.1.layer_norm", c.d_model),
        **{f"layers/feed_forward/{name}/kernel": layers(f"{feed_forward}.{name}", c.d_ff, c.d_model)
           for name in ("wi_0", "wi_1")},
        "layers/feed_forward/wo/kernel": layers(f"{feed_forward}.wo", c.d_model, c.d_ff),
        "final_norm/weight": one("encoder.final_layer_norm.weight", c.d_model),
    }


def _stored(tensors: Mapping[str, Array], name: str, *shape: int) -> StoredArray:
    if name not in tensors:
        raise UserError(f"T5 weights have no tensor {name}; give an encoder of T5 v1.1 (flan-t5)")
    if tuple(tensors[name].shape) != shape:
        raise UserError(f"T5 tensor {name} has shape {tensors[name].shape}, the config needs {shape}")
    return StoredArray(shape, np.float32, lambda: np.asarray(tensors[name], np.float32))


def _stacked(layers: list[StoredArray]) -> StoredArray:
    """One parameter of all layers; PyTorch keeps a matrix as [out, in], Flax as [in, out]."""
    shape = (len(layers), *layers[0].shape[::-1])

    def read() -> np.ndarray:
        stacked = np.empty(shape, np.float32)
        for index, layer in enumerate(layers):
            stacked[index] = np.asarray(layer).T
        return stacked

    return StoredArray(shape, np.float32, read)
