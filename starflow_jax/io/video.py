"""Video files in and out, by PyAV.

Frames are uint8 RGB everywhere, 0 to 255, axes in the name: T frames, H rows, W columns, C = 3 colours,
B clips. Files appear whole or not at all, each written under a temporary name and then renamed, except for
`growing_mp4`, which is there to be watched while it is written.
"""

import errno
import io
import os
import struct
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from starflow_jax.config import UserError
from starflow_jax.io.files import atomic_path
from starflow_jax.io.pictures import MAX_PIXELS, check_frames, enlarge

# x264's macroblock tree reads memory that it has not written: the same frames would give other bytes each time. And
# on a CPU without some instructions (SSSE3; all those of ARM) it would by itself choose other, faster algorithms.
X264_PARAMS = "mbtree=0:cpu-independent=1"
# Of a video that is encoded while it is made: each frame is a packet at once, and none waits for later ones. The cores
# are for making frames: with x264's default preset, 193 of the package's model's frames took three times the work
# (15.3 ms of CPU time for four, in place of 5.1) and were as large (581 and 567 KB) and as good (45.0 and 44.9 dB).
AS_MADE = {"crf": "16", "preset": "veryfast", "tune": "zerolatency", "threads": "1"}


def write_mp4(
    path: str | os.PathLike[str], frames_THWC: np.ndarray, fps: float, scale: int = 1
) -> None:
    """Writes frames (T, H, W, 3) uint8 as H.264 yuv420p, which every player and browser opens.

    `scale` enlarges each pixel to scale × scale. yuv420p wants even sizes: an odd last row or column is
    repeated once. Raises ValueError for another shape or dtype.
    """
    check_frames(frames_THWC)
    with atomic_path(path) as temporary:
        writer = Mp4Writer(temporary, fps, scale, {"movflags": "+faststart"}, {"crf": "16"})
        writer.write(frames_THWC)
        writer.close()


def mp4_bytes(frames_THWC: np.ndarray, fps: float, scale: int = 1) -> bytes:
    """The frames encoded as by `write_mp4`, but in fragments, which need no second pass over a file."""
    check_frames(frames_THWC)
    file = io.BytesIO()
    writer = Mp4Writer(file, fps, scale, {"movflags": "+frag_keyframe+empty_moov+default_base_moof"}, {"crf": "16"})
    writer.write(frames_THWC)
    writer.close()
    return file.getvalue()


class Mp4Writer:
    """An H.264 MP4 that frames are written to as they come; `container` and `codec` are ffmpeg's options.

    pixels, colorspace: ffmpeg's format of what is written, and by which matrix RGB becomes that.
    """

    def __init__(self, path: str | os.PathLike[str] | BinaryIO, fps: float, scale: int, container: dict[str, str],
                 codec: dict[str, str], pixels: str = "yuv420p", colorspace: int = Colorspace.ITU709) -> None:
        self._scale, self._codec, self._pixels, self._colorspace = scale, codec, pixels, colorspace
        self._rate = Fraction(fps).limit_denominator(60060)
        file = os.fspath(path) if isinstance(path, str | os.PathLike) else path
        self._path, self._last_box = file, b"mfra" if "frag" in container.get("movflags", "") else b""
        self._container = av.open(file, "w", format="mp4", options=container)
        self._stream: av.VideoStream | None = None
        self._written = 0

    def write(self, frames_THWC: np.ndarray) -> None:
        """Append frames (T, H, W, 3) uint8, all of one size."""
        check_frames(frames_THWC)
        height, width = (self._scale * size for size in frames_THWC.shape[1:3])
        for index in range(len(frames_THWC)):  # one by one: enlarged, a whole video may be a hundred times as large
            frame_HWC, = enlarge(frames_THWC[index:index + 1], self._scale)
            frame_HWC = np.pad(frame_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            self.add(frame.reformat(
                format=self._pixels, dst_colorspace=self._colorspace, dst_color_range=ColorRange.MPEG))

    def add(self, frame: av.VideoFrame) -> None:
        """Append a frame of the format and by the matrix that are written, all of one even size."""
        if self._stream is None:
            self._stream = self._open_stream(frame.height, frame.width)
        frame.pts, frame.time_base = self._written, 1 / self._rate  # whenever it was shown in its source
        self._written += 1
        self._take(self._stream.encode(frame))

    def close(self) -> None:
        """Raises OSError where not all of it could be written."""
        if self._stream is not None:
            self._take(self._stream.encode(None))
        self._end()

    def _end(self) -> None:
        self._container.close()
        # ffmpeg does not say so if its last write fails.
        if self._stream is not None and isinstance(self._path, str) and not _is_whole(self._path, self._last_box):
            raise OSError(errno.EIO, "not all of it could be written", self._path)

    def _take(self, packets: Sequence[av.Packet]) -> None:
        self._container.mux(packets)

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width, stream.pix_fmt = height, width, self._pixels
        stream.options = {"x264-params": X264_PARAMS, **self._codec}
        # Tagged, by default as BT.709: untagged files are shown as BT.601 or BT.709 as the player likes.
        context = stream.codec_context
        context.colorspace = self._colorspace
        if self._colorspace == Colorspace.ITU709:
            context.color_primaries = ColorPrimaries.BT709
            context.color_trc = ColorTrc.BT709
        context.color_range = ColorRange.MPEG
        return stream


def _is_whole(path: str, last: bytes) -> bool:
    """Whether an MP4's boxes fill it to its end. last: the type of the last one, b"" for any."""
    kind, at, size = b"", 0, os.path.getsize(path)
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            header = file.read(16)
            if len(header) < 8:
                return False
            length, kind = int.from_bytes(header[:4]), header[4:8]
            at += int.from_bytes(header[8:]) if length == 1 else length or size - at
    return at == size > 0 and last in (b"", kind)


def growing_mp4(path: str | os.PathLike[str], fps: float, scale: int = 1) -> Mp4Writer:
    """An MP4 that plays while it grows: every frame is a fragment of its own, on disk as soon as it is written."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Mp4Writer(path, fps, scale, {"movflags": "+frag_every_frame+empty_moov+default_base_moof",
                                        "flush_packets": "1"}, AS_MADE)


class Recording(Mp4Writer):
    """Frames that are encoded as they come, onto the disk but in no file with a name: a killed process leaves nothing
    behind. `save` writes an MP4 of those so far, as often as one likes."""

    _PACKET = struct.Struct("<q?Q")  # its time, whether a video may begin with it, its size

    def __init__(self, fps: float, scale: int = 1) -> None:
        super().__init__(io.BytesIO(), fps, scale, {}, AS_MADE)
        self._fps, self._file = fps, tempfile.TemporaryFile()
        self._size = 0, 0  # height, width
        # PyAV's container and stream hold each other: an encoder that nobody closes lives until Python looks for such.
        self._end_encoder = weakref.finalize(self, self._container.close)

    def _take(self, packets: Sequence[av.Packet]) -> None:
        for packet in packets:
            content = bytes(packet)
            self._file.write(self._PACKET.pack(packet.pts, packet.is_keyframe, len(content)) + content)

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        self._size = height, width
        return super()._open_stream(height, width)

    def finish(self) -> None:
        """Let go of the encoder: there will be no more frames. Those so far can still be saved."""
        self._end_encoder()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frames so far; at least one."""
        assert self._stream is not None
        with atomic_path(path) as temporary:
            writer = Mp4Writer(temporary, self._fps, self._scale, {"movflags": "+faststart"}, AS_MADE)
            stream = writer._open_stream(*self._size)
            stream.codec_context.open()
            for time, begins, content in self._packets():
                packet = av.Packet(content)
                packet.pts = packet.dts = time
                packet.time_base, packet.is_keyframe, packet.stream = 1 / self._rate, begins, stream
                writer._container.mux(packet)
            writer._stream = stream
            writer._end()

    def _packets(self) -> Iterator[tuple[int, bool, bytes]]:
        self._file.seek(0)
        try:
            while header := self._file.read(self._PACKET.size):
                time, begins, size = self._PACKET.unpack(header)
                yield time, begins, self._file.read(size)
        finally:
            self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Forget the frames."""
        self.finish()
        self._file.close()


# The kinds of files that hold the video themselves. What is left out are above all playlists (ffconcat, m3u8, DASH),
# with which ffmpeg opens whatever file or address they name.
_DEMUXERS = ("mov", "matroska", "avi", "mpeg", "mpegts", "mpegvideo", "m4v", "h264", "hevc", "obu", "ivf", "flv", "asf",
             "gif", "apng", "ogg", "mxf", "nut", "dv", "mjpeg", "yuv4mpegpipe")


def open_video(file: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> av.container.InputContainer:
    """A video to read by PyAV: from this file alone, and only where its frames are not too large.

    Raises NotAVideo for playlists, for kinds of files that are not read, without a video track, and for larger frames;
    and what PyAV raises.
    """
    try:
        # "file:": a name may look like an address. ffmpeg is faster at a path than at what Python has opened.
        container = av.open(f"file:{os.fspath(file)}" if isinstance(file, str | os.PathLike) else file, "r",
                            options={"format_whitelist": ",".join(_DEMUXERS), "protocol_whitelist": "file"},
                            metadata_errors="replace")  # tags in another encoding harm nothing
    except av.ArgumentError as error:
        raise NotAVideo("not a video file of a known kind; playlists are not followed") from error
    try:
        if not container.streams.video:
            raise NotAVideo("no video track")
        context = container.streams.video[0].codec_context
        if context.width * context.height > max_pixels:
            raise NotAVideo(f"too large: frames of {context.width}x{context.height}, more than {max_pixels / 1e6:g} "
                            "million pixels")
        context.options = {"max_pixels": str(max_pixels)}  # frames may grow later on
    except NotAVideo:
        container.close()
        raise
    return container


class NotAVideo(Exception):
    """Why a file is not read as a video."""


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Reads a whole video: frames (T, H, W, 3) uint8 and its frames per second.

    Raises UserError where the file is missing, damaged, or holds no video frames, or more than fit into memory.
    """
    if not Path(path).is_file():
        raise UserError(f"video not found: {path}; check the path")
    try:
        with open_video(path) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            frames: list[np.ndarray] = []
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise UserError(f"video {path} is damaged or cut short; copy or encode it again")
                frames += [to_rgb(frame) for frame in packet.decode()]
                if frames:
                    _check_memory(f"video {path}", len(frames) * frames[0].nbytes)
    except UserError:
        raise
    except NotAVideo as error:
        raise UserError(f"cannot read video {path}: {error}; give a file with a video track, such as an MP4") from error
    except Exception as error:  # a damaged file can make a decoder fail in any way
        why = getattr(error, "strerror", "") or str(error) or type(error).__name__
        raise UserError(f"cannot read video {path} ({why}); copy or encode it again") from error
    if not frames or not rate:
        raise UserError(f"no video frames in {path}; copy or encode it again")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise UserError(f"the frames of {path} change size; encode it again at one size")
    return np.stack(frames), float(rate)


def at_rate(frames_THWC: np.ndarray, fps: float, wanted: float) -> np.ndarray:
    """Frames (T, ...) of a video of `fps` as one of `wanted` frames per second has them: repeated or left out.

    Raises UserError where they don't fit into memory.
    """
    if fps == wanted:  # where the quotient below may round down
        return frames_THWC
    count = max(1, round(len(frames_THWC) * wanted / fps))
    _check_memory(f"a video of {fps:.3g} frames per second at {wanted:g}", count * frames_THWC[0].nbytes)
    return frames_THWC[np.minimum(np.arange(count) * fps / wanted, len(frames_THWC) - 1).astype(int)]


def _check_memory(what: str, size: int) -> None:
    """Raises UserError where frames of so many bytes, which are copied twice, take more than this machine has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 3 * size > memory:
        raise UserError(f"{what}: its frames take {size / 1e9:.1f} GB or more, over a third of this machine's "
                        f"{memory / 1e9:.1f} GB; give a shorter or smaller one")


def to_rgb(frame: av.VideoFrame, threads: int = 0) -> np.ndarray:
    """Decoded frame -> (H, W, 3) uint8. threads: 0 for as many as there are cores."""
    tag_colours(frame)
    return frame.to_ndarray(format="rgb24", threads=threads)


def tag_colours(frame: av.VideoFrame) -> None:
    """Takes an untagged frame to be BT.709 from 720 rows on, else BT.601, as players do."""
    unspecified = 2  # AVCOL_SPC_UNSPECIFIED
    if frame.colorspace == unspecified and frame.height >= 720:
        frame.colorspace = Colorspace.ITU709
