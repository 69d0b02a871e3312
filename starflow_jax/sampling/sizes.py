"""The sizes that are sampled: frames of another size than in training; and the few numbers of videos and of frames that
programs are compiled for. Others are filled up to the next of these, so that one more of either compiles nothing anew.
"""

import dataclasses

from starflow_jax.config import Config, Model, changed
from starflow_jax.model.calibration import Calibration
from starflow_jax.model.system import System
from starflow_jax.text.prompt import frame_size


def at_asked_size(config: Config) -> Config:
    """The config with model.height and model.width set by sample.side and sample.aspect_ratio; without a side
    they are as trained. Positions keep their extent.

    Raises UserError where the size is too small, or does not divide into tokens.
    """
    model, stride, asked = config.model, config.codec.stride, config.sample
    if not asked.side:
        return config
    height, width = frame_size(asked.side // stride * stride, asked.aspect_ratio or config.text.aspect_ratio, stride)
    size = {"height": height // stride, "width": width // stride}
    if size == {"height": model.height, "width": model.width}:
        return config
    return changed(config, "model", {**size, "rope_extent": float(model.extent)})


def resized(system: System, config: Config) -> System:
    """The system with the settings of `at_asked_size`. Its calibration holds only for the training size."""
    same = (config.model.height, config.model.width) == (system.config.model.height, system.config.model.width)
    return dataclasses.replace(system, config=config, calibration=system.calibration if same else Calibration())


def videos_together(count: int, most: int) -> int:
    """How many videos are made together where `count` are asked for and at most `most` may be: the next power of two,
    so that fewer than half of them are made in vain."""
    return min(1 << max(count - 1, 0).bit_length(), most)


def frames_together(model: Model, frames: int) -> int:
    """How many latent frames shallow blocks, denoiser and likelihood are given for so many, or for a window of more:
    those of a window. A picture is one; global shallow blocks see all frames, so that these can't be filled up."""
    return min(frames, model.frames) if frames == 1 or not model.local_shallow else model.frames
