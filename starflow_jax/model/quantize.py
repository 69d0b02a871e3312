"""int8 and int4 weights (sample.weights): the matrices of all Transformer layers, each output channel with a scale of
its own; of int4 each group of a channel's inputs.

They are nearly all of a model's bytes. What stays in its own dtype: norms and biases, the projections into and out of
the width, and the embedding of text.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from starflow_jax import sharding
from starflow_jax.model.parameters import Params
from starflow_jax.nn.quantized import Quantized, quantize, quantize_in_groups

# Of stacked layers; int4, which tries several scales in float32, layer by layer.
_QUANTIZED = {"int8": jax.jit(partial(quantize, axis=1)), "int4": jax.jit(partial(jax.lax.map, quantize_in_groups))}
BYTES = {"int8": 1.0, "int4": 0.5}  # of a value, scales left out


def quantize_params(params: Params, weights: str = "int8") -> Params:
    """Parameters, of stacked layers, with their matrices Quantized as sample.weights says, one after the other; what is
    quantized already stays. With jax.eval_shape: the shapes of such parameters without their memory."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize_param(sharding.parameter_name(path), leaf, weights), params)


def quantize_param(name: str, param: Any, weights: str = "int8") -> Any:
    """The parameter of that name ("flow/deep/...") as `quantize_params` gives it, sharded as it is."""
    if not sharding.is_layer_matrix(name):
        return param
    quantized: Quantized = _QUANTIZED[weights](param)
    if isinstance(quantized.q, jax.core.Tracer) or not isinstance(param.sharding, NamedSharding):
        return quantized
    mesh, spec = param.sharding.mesh, [*param.sharding.spec, *[None] * param.ndim][:param.ndim]
    groups = [None] * (quantized.scale.ndim - param.ndim + 1)
    placed: Any = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, [spec[0], *groups, *spec[2:]])]
    return jax.device_put(quantized, Quantized(*placed))
