"""Given videos and pictures, as the model takes them."""

import numpy as np
from numpy.typing import ArrayLike

from starflow_jax.config import Config, UserError
from starflow_jax.io.pictures import read_image, resize_crop, resize_then_crop
from starflow_jax.io.video import at_rate, read_video
from starflow_jax.model.codec import frame_size


def read_given(config: Config, path: str, *, fps: int = 0, keep: str = "start") -> tuple[np.ndarray, int]:
    """A video file as `fit_video` gives it. Raises UserError for a file that can't be read or is too short."""
    frames_THWC, own_fps = read_video(path)
    return fit_video(config, frames_THWC, own_fps, fps=fps, keep=keep, name=path)


def fit_video(config: Config, frames_THWC: np.ndarray, own_fps: float, *, fps: int = 0, keep: str = "start",
              name: str = "the given video") -> tuple[np.ndarray, int]:
    """Frames at the model's size and frame rate, (T, H, W, 3) uint8, and how many were left out.

    own_fps: their rate; 0: not known, and they are taken to be at the model's. fps: another rate than the model's.
    T is 1 + a multiple of the codec's time stride, from the "start" of the video or, for one that is extended, up to
    its "end". Raises UserError for more than one frame but fewer than the second latent frame needs.
    """
    wanted, stride = fps or config.text.fps or own_fps, config.codec.time_stride
    if own_fps:
        frames_THWC, name = at_rate(frames_THWC, own_fps, wanted), f"{name} at {wanted:g} frames per second"
    count = len(frames_THWC)
    if 1 < count <= stride:
        raise UserError(f"{name}: {count} frames; the model needs {1 + stride} or more")
    kept = 1 + (count - 1) // stride * stride
    part = slice(kept) if keep == "start" else slice(count - kept, None)
    return resize_crop(frames_THWC[part], *frame_size(config)), count - kept


def fit_picture(config: Config, picture_HWC: ArrayLike) -> np.ndarray:
    """A uint8 picture as one frame of the model's size, (1, H, W, 3) uint8."""
    fit = resize_then_crop if config.sample.as_released else resize_crop
    return fit(np.asarray(picture_HWC)[None], *frame_size(config))


def latents_of(known_THWC: np.ndarray | None, time_stride: int) -> int:
    """How many latent frames given frames are."""
    return 0 if known_THWC is None else 1 + (len(known_THWC) - 1) // time_stride


def given_frames(config: Config) -> np.ndarray | None:
    """(T, H, W, 3) uint8 of sample.image, or of the end of sample.video; None without either.

    Raises UserError where both are given, and for a file that can't be read or is too short.
    """
    settings = config.sample
    if settings.image and settings.video:
        raise UserError("sample.image and sample.video are both given; leave one out")
    if settings.image:
        return fit_picture(config, read_image(settings.image))
    if settings.video:
        return read_given(config, settings.video, fps=settings.fps, keep="end")[0]
    return None
