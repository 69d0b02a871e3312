"""The Wan VAE's released tensors <-> our parameters: names and axis orders."""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from starflow_jax.codec.wan_vae import WanConfig, WanVAE
from starflow_jax.io.tensor_files import Array, check_shapes

STATISTICS = ("mean", "std")  # a file's tensors with the latents' channel statistics, beside the weights

# Ours -> the release's, one after the other; {resample} is the index after the stage's residuals.
NAMES = (
    (r"^quant/", "conv1/"),
    (r"^post_quant/", "conv2/"),
    (r"/stem/conv/", "/conv1/"),
    (r"^encoder/stages_(\d+)/", r"encoder/downsamples/\1/downsamples/"),
    (r"^decoder/stages_(\d+)/", r"decoder/upsamples/\1/upsamples/"),
    (r"/residuals_(\d+)/", r"/\1/"),
    (r"/resample/space/", "/{resample}/resample/1/"),
    (r"/resample/time/", "/{resample}/time_conv/"),
    (r"/middle/first/", "/middle/0/"),
    (r"/middle/attention/", "/middle/1/"),
    (r"/middle/last/", "/middle/2/"),
    (r"/norm_1/", "/residual/0/"),
    (r"/conv_1/conv/", "/residual/2/"),
    (r"/norm_2/", "/residual/3/"),
    (r"/conv_2/conv/", "/residual/6/"),
    (r"/head/norm/", "/head/0/"),
    (r"/head/conv/conv/", "/head/2/"),
    (r"/kernel$", "/weight"),
)


def released_name(ours: str, config: WanConfig) -> str:
    """The release's name of one of our parameters."""
    resample = config.num_res_blocks + (1 if ours.startswith("decoder") else 0)
    for pattern, replacement in NAMES:
        ours = re.sub(pattern, replacement, ours)
    return ours.replace("{resample}", str(resample)).replace("/", ".")


def widths_of(tensors: Mapping[str, Array]) -> dict[str, int]:
    """codec.encoder_width and codec.decoder_width of the tensors of a VAE; {} where they are none of it."""
    first, last = tensors.get("encoder.conv1.weight"), tensors.get("decoder.head.2.weight")
    if first is None or last is None or first.ndim != 5 or last.ndim != 5:
        return {}
    return {"encoder_width": first.shape[0], "decoder_width": last.shape[1]}


@functools.cache
def _our_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    frames = jax.ShapeDtypeStruct((1, 1 + config.time_stride, config.stride, config.stride, 3), jnp.float32)
    # The key too is made in shapes alone: planning asks on a mesh of devices that are not there.
    params = jax.eval_shape(lambda frames: WanVAE(config).init(jax.random.key(0), frames), frames)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def _released_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if ours.endswith("gamma"):
        return (*shape, 1, 1) if "/attention/" in ours else (*shape, 1, 1, 1)
    return (shape[-1], shape[-2], *shape[:-2]) if ours.endswith("kernel") else shape


def released_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the release's state dict by name."""
    return {released_name(ours, config): _released_shape(ours, shape) for ours, shape in _our_shapes(config).items()}


def abstract_params(config: WanConfig, dtype: Any) -> dict[str, Any]:
    """Shapes alone, to compile for a full-size model without its memory."""
    flat = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in _our_shapes(config).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


def check_released(tensors: Mapping[str, Array], config: WanConfig, source: str) -> None:
    """Raises UserError listing every tensor that is missing, unexpected or misshapen; STATISTICS may be there."""
    weights = {name: tensor for name, tensor in tensors.items() if name not in STATISTICS}
    check_shapes(source, weights, released_shapes(config))


def from_released(tensors: Mapping[str, Array], config: WanConfig, dtype: Any, source: str) -> dict[str, Any]:
    """Parameters for WanVAE(config), in `dtype`, one tensor after the other. Raises UserError as `check_released`."""
    check_released(tensors, config, source)
    flat = {}
    for ours, shape in _our_shapes(config).items():
        value = np.asarray(tensors[released_name(ours, config)])
        value = np.moveaxis(value, (0, 1), (-1, -2)) if ours.endswith("kernel") else value.reshape(shape)
        flat[ours] = jnp.asarray(value, dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def to_released(params: Mapping[str, Any], config: WanConfig) -> dict[str, np.ndarray]:
    """Tensors under the release's names: the inverse of `from_released`."""
    tensors = {}
    for ours, value in traverse_util.flatten_dict(params, sep="/").items():
        value = np.asarray(value)
        shape = _released_shape(ours, value.shape)
        value = np.moveaxis(value, (-1, -2), (0, 1)) if ours.endswith("kernel") else value
        tensors[released_name(ours, config)] = np.ascontiguousarray(value.reshape(shape))
    return tensors
