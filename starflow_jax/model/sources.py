"""The examples that a config reads."""

from collections.abc import Iterator, Sequence
from typing import Any

from etils import epy

from starflow_jax.config import Config
from starflow_jax.io.compiled import cache_folder

with epy.lazy_imports():  # TFDS and grain, which sampling does not need
    from starflow_jax.data import prepared
    from starflow_jax.data.digits import dataset as moving_digits
    from starflow_jax.data.digits import scene


def data_source(config: Config, split: str) -> Sequence[dict[str, Any]]:
    """The examples of the built-in data set, made on first use, or prepared ones. Clips are one latent frame longer
    than those trained on. Raises UserError where there is no such data."""
    data = config.data
    if data.source == "prepared":
        return prepared.source(data.directory, split)
    return moving_digits.source(_digits(config), split, data.directory or default_data_directory())


def long_clips(config: Config, split: str, count: int, frames: int) -> Iterator[dict[str, Any]]:
    """Clips of `frames` pixel frames: digits that wrap are made that long, other clips are as long as they are."""
    if config.data.source == "digits" and (config.data.wraps or config.data.camera):
        yield from moving_digits.long_clips(_digits(config), split, count, frames)
        return
    source = data_source(config, split)
    yield from (source[index] for index in range(min(count, len(source))))


def _digits(config: Config) -> "scene.MovingDigitsConfig":
    data = config.data
    return scene.MovingDigitsConfig(
        size=data.size, digit_size=data.digit_size, frames=1 + config.model.frames * config.codec.time_stride,
        train_clips=data.train_clips, validation_clips=data.validation_clips, test_clips=data.test_clips,
        wraps=data.wraps, camera=data.camera)


def default_data_directory() -> str:
    """The built-in data set's folder in the user's cache."""
    return str(cache_folder() / "data")


def fixed_captions(config: Config, split: str, count: int) -> list[str]:
    """The first long captions of a split."""
    source = data_source(config, split)
    return [source[index]["caption_long"].decode() for index in range(min(count, len(source)))]
