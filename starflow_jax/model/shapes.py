"""Sizes and texts that follow from a configuration alone."""

from starflow_jax.codec import patch
from starflow_jax.config import Config
from starflow_jax.text.prompt import format_prompt


def pixel_frames(config: Config) -> int:
    """Frames of a training clip in pixels."""
    return 1 + (config.model.frames - 1) * config.codec.time_stride


def prompt_text(config: Config, caption: str, is_image: bool = False, fps: int = 0, aspect_ratio: str = "") -> str:
    """A caption with its metadata, as the text encoder is given it; fps and aspect ratio: as trained by default."""
    return format_prompt(caption, fps=0 if is_image else fps or config.text.fps,
                         aspect_ratio=aspect_ratio or config.text.aspect_ratio)


def patch_shape(config: Config) -> patch.PatchShape:
    return patch.PatchShape(config.codec.time_stride, config.codec.stride)
