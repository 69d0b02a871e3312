"""Frames as video files keep them, a plane of brightness and two of colour: resized, looked at and encoded as these,
and made RGB only where a model sees them.

A frame is an av.VideoFrame of 8 bits and a video's range, black at 16 and white at 235; its colours are sampled as
those of its source are, in most videos half as often as its brightness each way (4:2:0).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image

from starflow_jax.io.video import tag_colours

BLACK, WHITE = 16, 235
THUMBNAIL = 36  # rows, about, of the pictures that darkness, movement and cuts are judged by
# Without accurate rounding, greys that are made ten times smaller get a tint; without bitexact, some sizes come out
# different on CPUs of other kinds.
SCALER = "bicubic+accurate_rnd+bitexact"
# The same to RGB, with colours between the samples interpolated rather than repeated: 5 to 15 dB.
TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT | Interpolation.FULL_CHR_H_INT
MATRICES = (1, 4, 5, 6, 7, 9)  # the tags of how RGB became these colours; without one of these it was by BT.601
TURNS: dict[int, tuple[str, ...]] = {0: (), 1: ("transpose=cclock",), 2: ("hflip", "vflip"), 3: ("transpose=clock",)}


def sampled_as(source: av.VideoFormat) -> str:
    """The format of 8 bits whose colours are sampled as those of a source."""
    columns, rows = source.chroma_width(16) < 16, source.chroma_height(16) < 16
    return "yuv420p" if columns and rows else "yuv422p" if columns else "yuv444p"


class Fitter:
    """Fits the frames of a video into one size: upright, resized to cover it, the middle. One scaler for all of them.

    pixel_aspect: width by height of the source's pixels as shown.
    """

    def __init__(self, height: int, width: int, pixel_aspect: float = 1.0) -> None:
        self._height, self._width, self._pixel_aspect = height, width, pixel_aspect
        self._graph: av.filter.Graph | None = None
        self._of: tuple[object, ...] = ()  # what the graph was made for
        self._last: tuple[av.VideoFrame, av.VideoFrame] | None = None

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        if self._last is not None and self._last[0] is frame:  # shown for longer than a frame's time
            return self._last[1]
        tag_colours(frame)
        of = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, frame.rotation)
        if self._graph is None or of != self._of:
            self._graph, self._of = self._graph_of(frame), of
        self._graph.push(frame)
        fitted = self._graph.pull()
        assert isinstance(fitted, av.VideoFrame)
        self._last = frame, fitted
        return fitted

    def _graph_of(self, frame: av.VideoFrame) -> av.filter.Graph:
        turns = round(frame.rotation / 90) % 4  # counterclockwise
        height, width = (self._width, self._height) if turns % 2 else (self._height, self._width)
        scale = max(height / frame.height, width / (frame.width * self._pixel_aspect))
        # Cut out before it is resized, at whole samples of colour.
        rows = min(max(2 * round(height / scale / 2), 2), frame.height)
        columns = min(max(2 * round(width / scale / self._pixel_aspect / 2), 2), frame.width)
        top, left = 2 * ((frame.height - rows) // 4), 2 * ((frame.width - columns) // 4)
        # Tagged as it is: what has no tag would be made BT.601.
        source = {"video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name, "time_base": "1/1000",
                  "colorspace": frame.colorspace, "range": frame.color_range}
        # Colours lie where H.264 has them if nothing else is said: at the left of the pixels that share them.
        scaled = f"scale={width}:{height}:flags={SCALER}:out_range=limited:out_chroma_loc=left"
        scaled += ":out_color_matrix=bt601" * frame.format.is_rgb
        graph = av.filter.Graph()
        graph.threads = 1
        filters = ("buffer=" + ":".join(f"{name}={value}" for name, value in source.items()),
                   *([f"crop={columns}:{rows}:{left}:{top}"] if (rows, columns) != (frame.height, frame.width) else []),
                   scaled, f"format={sampled_as(frame.format)}", *TURNS[turns],
                   "buffersink")
        graph.link_nodes(*(graph.add(*one.split("=", 1)) for one in filters)).configure()
        return graph


def plane(frame: av.VideoFrame, index: int) -> np.ndarray:
    """uint8 (H, W): one of a frame's planes, a view of it."""
    held: Any = frame.planes[index]
    return np.frombuffer(held, np.uint8).reshape(-1, held.line_size)[:held.height, :held.width]


def thumbnail(frame: av.VideoFrame) -> np.ndarray:
    """float32, 0 to 255: means of square blocks of brightness, so that neither a sensor's noise nor fine detail looks
    like movement."""
    small = Image.fromarray(plane(frame, 0)).reduce(max(1, frame.height // THUMBNAIL))
    return (np.asarray(small, np.float32) - BLACK) * (255 / (WHITE - BLACK))


def to_rgb(frames: Iterable[av.VideoFrame]) -> np.ndarray:
    """uint8 (T, H, W, 3)."""
    reformatter = VideoReformatter()
    # By way of planes: the same values as "rgb24" in a third of the time, as ffmpeg has vector instructions for these.
    return np.stack([reformatter.reformat(frame, format="gbrp", interpolation=TO_RGB, threads=1).to_ndarray()
                     for frame in frames])


class Pixels(NamedTuple):
    """A clip as it is sent to a codec (codec/colours.py): uint8 (T, H, W) each, brightness and two of colour, these of
    the sides that they are sampled with, and the matrix that makes them RGB. Of a picture RGB, (1, H, W, 3), alone."""

    planes: tuple[np.ndarray, ...]
    matrix: int = 0


Frames = Sequence[av.VideoFrame] | np.ndarray  # of a clip; or a picture, uint8 (1, H, W, 3)
Allocate = Callable[[tuple[int, ...]], np.ndarray]  # shape -> uint8 array
allocate_here: Allocate = partial(np.empty, dtype=np.uint8)


def pixels_of(frames: Frames, allocate: Allocate = allocate_here) -> Pixels:
    """The pixels of a clip's frames, or of a picture, in arrays that `allocate` gives."""
    if isinstance(frames, np.ndarray):
        held = allocate(frames.shape)
        held[:] = frames
        return Pixels((held,))
    planes = tuple(allocate((len(frames), one.height, one.width)) for one in frames[0].planes)
    for place, frame in enumerate(frames):
        for index, kept in enumerate(planes):
            kept[place] = plane(frame, index)
    return Pixels(planes, matrix_of(frames[0]))


def matrix_of(frame: av.VideoFrame) -> int:
    """The number that H.264 has for the matrix by which RGB became a frame's colours."""
    return int(frame.colorspace if frame.colorspace in MATRICES else Colorspace.ITU601)
