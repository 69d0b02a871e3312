"""Which examples a configuration reads, and what prepared latents and features depend on."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epy

from starflow_jax.config import Config
from starflow_jax.model.system import System

with epy.lazy_imports():  # TFDS and grain, which sampling needs not
    from starflow_jax.data import prepared
    from starflow_jax.data.digits import dataset as moving_digits


def data_source(config: Config, split: str) -> Sequence[dict[str, Any]]:
    """The examples of the built-in data set, made on first use, or prepared ones; recorded one latent frame longer
    than trained on."""
    data, stride = config.data, config.codec.time_stride
    if data.source == "prepared":
        return prepared.source(data.directory, split)
    settings = moving_digits.MovingDigitsConfig(
        size=data.size, digit_size=data.digit_size, frames=1 + config.model.frames * stride,
        train_clips=data.train_clips, validation_clips=data.validation_clips, test_clips=data.test_clips)
    return moving_digits.source(settings, split, data.directory or default_data_directory())


def training_source(system: System, split: str = "train") -> Sequence[dict[str, Any]]:
    """A split's examples as training takes them: with data.latents their prepared latents and, of a frozen text
    encoder, features."""
    config = system.config
    if not config.data.latents:
        return data_source(config, split)
    features_by = text_fingerprint(config) if config.text.encoder == "frozen" else None
    return prepared.source(config.data.directory, split, latents_by=codec_fingerprint(system), features_by=features_by)


def codec_fingerprint(system: System) -> dict[str, Any]:
    """What prepared latents depend on."""
    settings = {name: value for name, value in dataclasses.asdict(system.config.codec).items() if name != "weights"}
    return {**settings, "arrays": digest(system.codec)}


def text_fingerprint(config: Config) -> dict[str, Any]:
    """What prepared features of a text encoder depend on, but its weights; each is found by its whole prompt."""
    sizes = {name: value for name, value in dataclasses.asdict(config.text).items()
             if name not in ("fps", "aspect_ratio", "weights")}
    return {**sizes, "text_length": config.model.text_length}


def digest(arrays: Any) -> str:
    """A short hash of a tree of arrays."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        hashed.update(np.ascontiguousarray(leaf).tobytes())
    return hashed.hexdigest()[:16]


def default_data_directory() -> str:
    """A cache folder of the user's."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(cache, "starflow_jax", "data")


def fixed_captions(system: System, split: str, count: int) -> list[str]:
    """The first long captions of a split."""
    source = data_source(system.config, split)
    return [source[index]["caption_long"].decode() for index in range(min(count, len(source)))]
