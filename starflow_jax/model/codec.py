"""The codec of a config: the VAE that codec.weights names, or a patch codec fitted to training clips."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from starflow_jax.codec import kl_vae, patch, wan_weights
from starflow_jax.codec.interface import LatentCodec
from starflow_jax.codec.wan_stream import (
    channel_statistics,
    load_codec,
    read_statistics,
    statistics_beside,
    wan_config,
)
from starflow_jax.config import Config
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.io.checksums import checksums_of
from starflow_jax.io.tensor_files import check_finite, check_shapes
from starflow_jax.model.sources import data_source

FITTED_CLIPS = 1_000  # training clips that the patch codec is fitted to
FITTED_CODEC = "codec.safetensors"


def pixel_frames(config: Config) -> int:
    """Frames of a training clip in pixels."""
    return 1 + (config.model.frames - 1) * config.codec.time_stride


def frame_size(config: Config) -> tuple[int, int]:
    """Rows and columns of a frame in pixels."""
    return config.model.height * config.codec.stride, config.model.width * config.codec.stride


def patch_shape(config: Config) -> patch.PatchShape:
    """The pixels of a latent of the patch codec."""
    return patch.PatchShape(config.codec.time_stride, config.codec.stride)


def make_codec(config: Config) -> LatentCodec:
    """The VAE of codec.weights, or a patch codec fitted to training clips. Raises UserError for an unreadable file."""
    if config.codec.kind != "patch":
        return _load_vae(config)
    source = data_source(config, "train")
    frames = np.stack([source[i]["frames"][:pixel_frames(config)] for i in range(min(FITTED_CLIPS, len(source)))])
    return patch.fit(frames, patch_shape(config), config.model.channels)


def _load_vae(config: Config) -> LatentCodec:
    load = load_codec if config.codec.kind == "wan" else kl_vae.load_kl
    return load(config.codec, config.model.channels)


def sizes_of_codec(config: Config, tensors: Mapping[str, Any], source: Path) -> dict[str, int]:
    """The settings of `codec` that a VAE's tensors, or the config.json beside them, state; {} where they don't."""
    if config.codec.kind == "wan":
        return wan_weights.widths_of(tensors)
    said = kl_vae.read_settings(source) if config.codec.kind == "kl" else {}
    return {name: said[name] for name in ("norm_groups",) if name in said}


def released_codec(config: Config, tensors: Mapping[str, Any], source: Path, statistics: str) -> dict[str, Any]:
    """The tensors of a published VAE, checked, with its channel statistics: those of the JSON file `statistics`, or
    found beside it. Raises UserError for another VAE, and for statistics that are missing or can't be read."""
    settings, channels = config.codec, config.model.channels
    if settings.kind == "kl":
        said = kl_vae.read_settings(source)
        weights = kl_vae.with_present_names(tensors)
        sizes = kl_vae.config_of(weights, said.get("norm_groups", settings.norm_groups), str(source))
        kl_vae.check_released(weights, sizes, str(source))
        return weights | kl_vae.statistics_of(settings, channels, tensors, said.get("scaling", kl_vae.SCALING))
    wan_weights.check_released(tensors, wan_config(settings, channels), str(source))
    file = Path(statistics) if statistics else statistics_beside(source)
    given = read_statistics(file, channels) if file and (statistics or not settings.latent_mean) else {}
    return {**tensors, **channel_statistics(settings, channels, {**tensors, **given})}


def save_codec(codec: LatentCodec, folder: Path) -> None:
    """Write a fitted codec; a VAE's weights stay in the file that codec.weights names."""
    if isinstance(codec, patch.PatchCodec):
        arrays = {name: getattr(codec, name) for name in ("mean_P", "basis_PC", "scale")}
        with checksums_of(folder, [FITTED_CODEC]):
            export_arrays(folder / FITTED_CODEC, arrays)


def read_codec(config: Config, folder: Path) -> LatentCodec:
    """The VAE of codec.weights, or the fitted codec in a folder. Raises UserError where it is another model's."""
    if config.codec.kind != "patch":
        return _load_vae(config)
    shape = patch_shape(config)
    arrays = traverse_util.flatten_dict(import_arrays(folder / FITTED_CODEC), sep="/")
    pixels, channels = shape.pixels, config.model.channels
    check_shapes(str(folder / FITTED_CODEC), arrays, {"mean_P": (pixels,), "basis_PC": (pixels, channels), "scale": ()})
    check_finite(str(folder / FITTED_CODEC), arrays)
    mean_P, basis_PC, scale = (jnp.asarray(arrays[name]) for name in ("mean_P", "basis_PC", "scale"))
    return patch.PatchCodec(mean_P, basis_PC, scale, shape)


def codec_fingerprint(config: Config, codec: LatentCodec) -> dict[str, Any]:
    """What prepared latents depend on."""
    settings = {name: value for name, value in dataclasses.asdict(config.codec).items() if name != "weights"}
    return {**settings, "arrays": digest(codec)}


def digest(arrays: Any) -> str:
    """A short hash of a tree of arrays."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()[:16]
