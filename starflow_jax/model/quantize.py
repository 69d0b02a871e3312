"""int8 weights (sample.weights): the matrices of all Transformer layers, each output channel with a scale of its own.

They are nearly all of a model's bytes. What stays in its own dtype: norms and biases, the projections into and out of
the width, and the embedding of text.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from starflow_jax import sharding
from starflow_jax.model.parameters import Params
from starflow_jax.nn.quantized import Quantized, quantize

_quantize_stack = jax.jit(partial(quantize, axis=1))


def quantize_params(params: Params) -> Params:
    """Parameters, of stacked layers, with their matrices Quantized, one after the other; what is quantized already
    stays. With jax.eval_shape: the shapes of such parameters without their memory."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantize_param(sharding.parameter_name(path), leaf), params)


def quantize_param(name: str, param: Any) -> Any:
    """The parameter of that name ("flow/deep/...") as `quantize_params` gives it, sharded as it is."""
    if not sharding.is_layer_matrix(name):
        return param
    quantized: Quantized = _quantize_stack(param)
    if isinstance(quantized.q, jax.core.Tracer) or not isinstance(param.sharding, NamedSharding):
        return quantized
    mesh, spec = param.sharding.mesh, [*param.sharding.spec, *[None] * param.ndim][:param.ndim]
    placed: Any = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (spec, [spec[0], *spec[2:]])]
    return jax.device_put(quantized, Quantized(*placed))
