"""Planes to RGB on the device, beside ffmpeg's scaler."""

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from starflow_jax.codec.colours import MATRICES, rgb_of_planes
from starflow_jax.data.raw import planes


@pytest.mark.parametrize("pixels,matrices", [("yuv420p", MATRICES), ("yuv422p", [1]), ("yuv444p", [5])])
def test_rgb_is_that_of_ffmpegs_scaler_bit_for_bit(pixels, matrices):
    """Of any values, of those beyond black and white too; the edges have filters of their own there."""
    random = np.random.default_rng(0)
    for matrix in matrices:
        frames = []
        for _ in range(2):
            frame = av.VideoFrame(64, 32, pixels)
            frame.colorspace, frame.color_range = matrix, ColorRange.MPEG
            for plane in frame.planes:
                plane.update(random.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
            frames.append(frame)
        held = planes.pixels_of(frames)
        assert held.matrix == matrix
        np.testing.assert_array_equal(rgb_of_planes(held.planes, held.matrix), planes.to_rgb(frames))
