"""A result that is not finite is an error, never a video."""

from collections.abc import Sequence

import numpy as np

from starflow_jax.codec.interface import Decoded
from starflow_jax.config import UserError
from starflow_jax.sharding import fetch


def check_finite(finite: bool | np.bool_, what: str) -> None:
    """Raises UserError, which begins with `what`, where a video's pixels were not finite before they were rounded."""
    if not finite:
        raise UserError(f"{what}: what the denoiser or the codec made is not finite; their weights are damaged "
                        "(convert or copy them again), or need model.dtype=float32 and codec.dtype=float32")


def finite_frames(decoded: Decoded, names: Sequence[str]) -> np.ndarray:
    """The frames of all B videos, uint8 (B, T, H, W, 3). Raises UserError where one of the first, which are called
    `names`, is not finite; those behind them only fill the batch up."""
    frames_BTHWC = fetch(decoded.frames_BTHWC)
    for finite, name in zip(fetch(decoded.finite_B), names):
        check_finite(finite, name)
    return frames_BTHWC


def names_of(captions: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """What an error calls each of some videos."""
    return [f"{caption!r}, seed {seed}" for caption, seed in zip(captions, seeds)]
