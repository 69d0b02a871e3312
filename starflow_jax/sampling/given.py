"""Given videos and pictures, as the model takes them."""

import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.io.pictures import read_image, resize_crop
from starflow_jax.io.video import at_rate, read_video
from starflow_jax.model.codec import frame_size


def read_given(config: Config, path: str, *, fps: int = 0, keep: str = "start") -> tuple[np.ndarray, int]:
    """A video file at the model's size and frame rate, (T, H, W, 3) uint8, and how many frames were left out.

    fps: another rate than the model's. T is 1 + a multiple of the codec's time stride, from the "start" of the video
    or, for what is to be extended, up to its "end". Raises UserError for a file that can't be read, or of more than
    one frame and fewer than a second latent frame takes.
    """
    frames_THWC, own = read_video(path)
    wanted = fps or config.text.fps or own
    return whole_latents(config, at_rate(frames_THWC, own, wanted), keep, f"{path} at {wanted:g} frames per second")


def whole_latents(config: Config, frames_THWC: np.ndarray, keep: str, name: str) -> tuple[np.ndarray, int]:
    """Frames of any size and number, cut to what whole latent frames hold; see `read_given`."""
    count, stride = len(frames_THWC), config.codec.time_stride
    if 1 < count <= stride:
        raise UserError(f"{name}: {count} frames; the model needs {1 + stride} or more")
    kept = 1 + (count - 1) // stride * stride
    part = slice(kept) if keep == "start" else slice(count - kept, None)
    return resize_crop(frames_THWC[part], *frame_size(config)), count - kept


def given_frames(config: Config) -> np.ndarray | None:
    """(T, H, W, 3) uint8 of sample.image, or of the end of sample.video; None without either."""
    settings = config.sample
    if settings.image and settings.video:
        raise UserError("sample.image and sample.video are both given; leave one out")
    if settings.image:
        return resize_crop(read_image(settings.image)[None], *frame_size(config))
    if settings.video:
        return read_given(config, settings.video, fps=settings.fps, keep="end")[0]
    return None
