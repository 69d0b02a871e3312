"""The Wan VAE's released tensors <-> our parameters: names, axis orders, safetensors files."""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from starflow_jax.codec.wan_vae import WanConfig, WanVAE
from starflow_jax.config import UserError

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


@functools.cache
def _our_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    frames = jax.ShapeDtypeStruct((1, 1 + config.time_stride, config.stride, config.stride, 3), jnp.float32)
    params = jax.eval_shape(WanVAE(config).init, jax.random.key(0), frames)["params"]
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


def from_released(tensors: Iterable[tuple[str, np.ndarray]], config: WanConfig, dtype: Any,
                  source: str = "these weights") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(parameters in `dtype`, the STATISTICS among the tensors); one tensor after the other is read.

    Raises UserError listing every missing, unexpected or misshapen tensor.
    """
    expected = {released_name(ours, config): (ours, shape) for ours, shape in _our_shapes(config).items()}
    flat: dict[str, Any] = {}
    statistics: dict[str, np.ndarray] = {}
    unexpected, misshapen, left = [], [], dict(expected)
    for name, value in tensors:
        if name in STATISTICS:
            statistics[name] = np.asarray(value, np.float32)
            continue
        if name not in expected:
            unexpected.append(name)
            continue
        ours, shape = left.pop(name)
        if value.shape != _released_shape(ours, shape):
            misshapen.append(f"{name} {value.shape} instead of {_released_shape(ours, shape)}")
            continue
        if ours.endswith("kernel"):
            value = np.moveaxis(value, (0, 1), (-1, -2))
        flat[ours] = jnp.asarray(value.reshape(shape), dtype)
    wrong = [f"{what}: {', '.join(names)}" for what, names in
             (("missing", sorted(left)), ("unexpected", sorted(unexpected)), ("misshapen", misshapen)) if names]
    if wrong:
        raise UserError(f"{source} are not of this Wan VAE (widths {config.dim} and {config.dec_dim}, {config.z_dim} "
                        f"channels); {'; '.join(wrong)}")
    return traverse_util.unflatten_dict(flat, sep="/"), statistics


def to_released(params: Mapping[str, Any], config: WanConfig) -> dict[str, np.ndarray]:
    """The inverse of `from_released`."""
    tensors = {}
    for ours, value in traverse_util.flatten_dict(params, sep="/").items():
        value = np.asarray(value)
        shape = _released_shape(ours, value.shape)
        value = np.moveaxis(value, (-1, -2), (0, 1)) if ours.endswith("kernel") else value
        tensors[released_name(ours, config)] = np.ascontiguousarray(value.reshape(shape))
    return tensors


def load_safetensors(path: Path, config: WanConfig, dtype: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`from_released` of a file. Raises UserError where it is missing, damaged or of another model, too."""
    try:
        with safe_open(str(path), framework="numpy") as file:
            return from_released(((name, file.get_tensor(name)) for name in file.keys()), config, dtype, str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: can't be read as safetensors ({error}); a PyTorch file has to be converted "
                        "first (README: the Wan2.2 VAE)") from error
