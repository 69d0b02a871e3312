"""Small measures of videos, temporal flickering and PSNR; and intervals of means."""

import math
from collections.abc import Sequence

import numpy as np
from etils import epy

with epy.lazy_imports():
    from scipy import special


def temporal_flickering(frames_THWC: np.ndarray) -> float:
    """VBench's temporal flickering of a clip (T, H, W, C), values 0 to 255, or of clips (B, T, H, W, C).

    (255 − m) / 255, m the mean absolute difference of consecutive frames, averaged over clips: 1 is a
    still picture. Raises ValueError for fewer than two frames.
    """
    if frames_THWC.ndim not in (4, 5) or frames_THWC.shape[-4] < 2:
        raise ValueError(f"temporal flickering needs (…, T ≥ 2, H, W, C), not {frames_THWC.shape}")
    frames = frames_THWC.astype(np.float32)
    difference = np.abs(frames[..., 1:, :, :, :] - frames[..., :-1, :, :, :])
    return float((255 - difference.mean(dtype=np.float64)) / 255)


def psnr(reference: np.ndarray, made: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 frames of one shape: 10 log10(255^2 / mean squared error)."""
    return psnr_of(float(np.mean((reference.astype(np.float64) - made.astype(np.float64)) ** 2)))


def psnr_of(squared_error: float) -> float:
    """The same of a mean squared error."""
    return float(10 * np.log10(255**2 / squared_error)) if squared_error else math.inf


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half the width of Student's interval for it) of independent values, such as those of several seeds; half
    is NaN for fewer than two."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return mean, math.nan
    return mean, float(special.stdtrit(count - 1, (1 + level) / 2) * np.std(values, ddof=1) / math.sqrt(count))


def share_interval(share: float, count: int) -> tuple[float, float]:
    """(share, half the width of Wilson's 95 % interval for it) of so many independent yes or no."""
    z = 1.96
    spread = math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return share, z * spread / (1 + z**2 / count)
