"""Planes to RGB on the device, beside ffmpeg's scaler."""

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange

from starflow_jax.codec.colours import MATRICES, rgb_of_planes
from starflow_jax.data.raw import planes


def random_frames(pixels, matrix, height=32, width=64):
    """Of any values, of those beyond black and white too; colours lie where those of clips do."""
    random, graph, frames = np.random.default_rng(matrix), av.filter.Graph(), []
    source = f"video_size={width}x{height}:pix_fmt={pixels}:time_base=1/1000:colorspace={matrix}:range=1"
    graph.link_nodes(graph.add("buffer", source), graph.add("setparams", "chroma_location=left"),
                     graph.add("buffersink")).configure()
    for index in range(2):
        frame = av.VideoFrame(width, height, pixels)
        frame.colorspace, frame.color_range, frame.pts = matrix, ColorRange.MPEG, index
        for plane in frame.planes:
            plane.update(random.integers(0, 256, plane.buffer_size, np.uint8).tobytes())
        graph.push(frame)
        frames.append(graph.pull())
    return frames


@pytest.mark.parametrize("pixels,matrices", [("yuv420p", MATRICES), ("yuv422p", [1]), ("yuv444p", [5])])
def test_rgb_is_that_of_ffmpegs_scaler_bit_for_bit(pixels, matrices):
    """At the edges too, which have filters of their own."""
    for matrix in matrices:
        frames = random_frames(pixels, matrix)
        held = planes.pixels_of(frames)
        assert held.matrix == matrix
        np.testing.assert_array_equal(rgb_of_planes(held.planes, held.matrix), planes.to_rgb(frames))


def test_to_rgb_is_what_ffmpeg_gives_by_the_direct_way():
    """As "rgb24", for which ffmpeg has no vector instructions."""
    for pixels in ("yuv420p", "yuv422p", "yuv444p"):
        frames = random_frames(pixels, 1)
        direct = [frame.to_ndarray(format="rgb24", interpolation=planes.TO_RGB, threads=1) for frame in frames]
        np.testing.assert_array_equal(planes.to_rgb(frames), direct)
