"""Video and picture files in and out: PyAV for MP4, Pillow for images.

Frames are uint8 RGB everywhere, 0 to 255, axes in the name: T frames, H rows, W columns, C = 3 colours,
B clips. Files appear whole or not at all, each written under a temporary name and then renamed; but for
`growing_mp4`, which is there to be watched while it is written.
"""

import contextlib
import os
import textwrap
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageDraw, ImageFont, ImageOps

from starflow_jax.config import UserError

FONT_SIZE = 13  # pixels; legible at 100% on a screen
MARGIN = 4  # pixels between the cells of a sheet


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which becomes `path` if the block ends without an exception.

    Makes the folder where it is missing. The name's ending is kept, since writers choose a format by it.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


def write_mp4(
    path: str | os.PathLike[str], frames_THWC: np.ndarray, fps: float, scale: int = 1
) -> None:
    """Writes frames (T, H, W, 3) uint8 as H.264 yuv420p, which every player and browser opens.

    `scale` enlarges each pixel to scale × scale. yuv420p wants even sizes: an odd last row or column is
    repeated once. Raises ValueError for another shape or dtype.
    """
    _check_frames(frames_THWC)
    with atomic_path(path) as temporary:
        writer = Mp4Writer(temporary, fps, scale, {"movflags": "+faststart"}, {"crf": "16"})
        writer.write(frames_THWC)
        writer.close()


class Mp4Writer:
    """An H.264 MP4 that frames are written to as they come; settings are ffmpeg's."""

    def __init__(self, path: str | os.PathLike[str] | BinaryIO, fps: float, scale: int, container: dict[str, str],
                 codec: dict[str, str], pixels: str = "yuv420p") -> None:
        self._scale, self._codec, self._pixels = scale, codec, pixels
        self._rate = Fraction(fps).limit_denominator(60060)
        file = os.fspath(path) if isinstance(path, str | os.PathLike) else path
        self._container = av.open(file, "w", format="mp4", options=container)
        self._stream: av.VideoStream | None = None

    def write(self, frames_THWC: np.ndarray) -> None:
        """Append frames (T, H, W, 3) uint8, all of one size."""
        _check_frames(frames_THWC)
        frames_THWC = _enlarge(frames_THWC, self._scale)
        _, height, width, _ = frames_THWC.shape
        frames_THWC = np.pad(frames_THWC, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._open_stream(*frames_THWC.shape[1:3])
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            frame = frame.reformat(
                format=self._pixels, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))
        self._container.close()

    def _open_stream(self, height: int, width: int) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self._rate)
        stream.height, stream.width, stream.pix_fmt = height, width, self._pixels
        stream.options = {**self._codec}
        # Tagged and converted as BT.709: untagged files are shown as BT.601 or BT.709 as the player likes.
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.color_range = ColorRange.MPEG
        return stream


def growing_mp4(path: str | os.PathLike[str], fps: float, scale: int = 1) -> Mp4Writer:
    """An MP4 that plays while it grows: every frame is a fragment of its own, on disk as soon as it is written."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return Mp4Writer(path, fps, scale, {"movflags": "+frag_every_frame+empty_moov+default_base_moof",
                                        "flush_packets": "1"}, {"crf": "16", "tune": "zerolatency"})


def read_video(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """Reads a whole video: frames (T, H, W, 3) uint8 and its frames per second.

    Raises UserError where the file is missing, damaged, or holds no video frames.
    """
    if not Path(path).is_file():
        raise UserError(f"video not found: {path}; check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"no video in {path}; give a file with a video track, such as an MP4")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = stream.average_rate or stream.guessed_rate
            frames = []
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise UserError(f"video {path} is damaged or cut short; copy or encode it again")
                frames += [to_rgb(frame) for frame in packet.decode()]
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"cannot read video {path} ({getattr(error, 'strerror', error)}); copy or encode it again"
        ) from error
    if not frames or not rate:
        raise UserError(f"no video frames in {path}; copy or encode it again")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise UserError(f"the frames of {path} change size; encode it again at one size")
    return np.stack(frames), float(rate)


def at_rate(frames_THWC: np.ndarray, fps: float, wanted: float) -> np.ndarray:
    """Frames (T, ...) of a video of `fps` as one of `wanted` frames per second has them: repeated or left out."""
    count = max(1, round(len(frames_THWC) * wanted / fps))
    return frames_THWC[np.minimum(np.arange(count) * fps / wanted, len(frames_THWC) - 1).astype(int)]


def to_rgb(frame: av.VideoFrame, threads: int = 0) -> np.ndarray:
    """Decoded frame -> (H, W, 3) uint8. threads: 0 for as many as there are cores."""
    tag_colours(frame)
    return frame.to_ndarray(format="rgb24", threads=threads)


def tag_colours(frame: av.VideoFrame) -> None:
    """Takes an untagged frame to be BT.709 from 720 rows on, else BT.601, as players do."""
    unspecified = 2  # AVCOL_SPC_UNSPECIFIED
    if frame.colorspace == unspecified and frame.height >= 720:
        frame.colorspace = Colorspace.ITU709


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a picture as (H, W, 3) uint8, turned upright. Raises UserError if missing or damaged."""
    if not Path(path).is_file():
        raise UserError(f"image not found: {path}; check the path")
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read image {path} ({error}); give an undamaged PNG or JPEG") from error


def resize_crop(frames_THWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased resize to cover height × width, centre crop: (T, H, W, 3) -> (T, height, width, 3) uint8."""
    _check_frames(frames_THWC)
    _, rows, columns, _ = frames_THWC.shape
    scale = max(height / rows, width / columns)
    left, top = (columns - width / scale) / 2, (rows - height / scale) / 2
    # Rounding may carry the box a hair outside the picture, which Pillow refuses.
    box = (max(left, 0), max(top, 0), min(columns - left, columns), min(rows - top, rows))
    resized = [
        Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box)
        for frame in frames_THWC
    ]
    return np.stack([np.asarray(image) for image in resized])


def contact_sheet(
    path: str | os.PathLike[str],
    clips_BTHWC: np.ndarray,
    captions: Sequence[str],
    columns: int = 16,
    scale: int = 1,
) -> None:
    """Writes a PNG, one row per clip: its caption, and under it `columns` frames evenly spread in time.

    clips (B, T, H, W, 3) uint8, B captions. `scale` enlarges each pixel to scale × scale.
    """
    frame_count = clips_BTHWC.shape[1]
    shown = np.linspace(0, frame_count - 1, min(columns, frame_count)).round().astype(int)
    rows = []
    for clip_THWC, caption in zip(clips_BTHWC, captions, strict=True):
        _check_frames(clip_THWC)
        padded = _pad_cells(_enlarge(clip_THWC[shown], scale))
        strip_HWC = np.concatenate(list(padded), axis=1)
        rows.append(np.concatenate([_caption_picture(caption, strip_HWC.shape[1]), strip_HWC], axis=0))
    with atomic_path(path) as temporary:
        Image.fromarray(np.concatenate(rows, axis=0)).save(temporary, format="PNG", optimize=True)


def write_gif(
    path: str | os.PathLike[str],
    clips_BTHWC: np.ndarray,
    captions: Sequence[str],
    fps: float,
    columns: int = 4,
    scale: int = 1,
) -> None:
    """Writes clips (B, T, H, W, 3) uint8 as one endlessly moving grid, `columns` clips wide, captions above.

    One palette of 128 colours without dithering keeps the file small. It is chosen from the distinct colours,
    or the black and white that most pixels have would take all of it. GIF counts time in 1/100 s.
    """
    cells = [_pad_cells(_enlarge(clip_THWC, scale)) for clip_THWC in clips_BTHWC]
    titles = [_caption_picture(caption, cells[0].shape[2]) for caption in captions]
    title_height = max(title.shape[0] for title in titles)
    for index, (title, cell_THWC) in enumerate(zip(titles, cells, strict=True)):
        title = np.pad(title, ((title_height - title.shape[0], 0), (0, 0), (0, 0)), constant_values=255)
        title_THWC = np.broadcast_to(title, (len(cell_THWC), *title.shape))
        cells[index] = np.concatenate([title_THWC, cell_THWC], axis=1)
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=2) for i in range(0, len(cells), columns)]
    grid_THWC = np.concatenate(rows, axis=1)
    distinct_N3 = np.unique(grid_THWC.reshape(-1, 3), axis=0)
    palette = Image.fromarray(distinct_N3[None]).quantize(128, kmeans=3)
    pictures = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in grid_THWC
    ]
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], loop=0,
            duration=round(100 / fps) * 10, optimize=True,
        )  # fmt: skip


def _check_frames(frames_THWC: np.ndarray) -> None:
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3:
        raise ValueError(
            f"frames must be uint8 of shape (T, H, W, 3), not {frames_THWC.dtype} {frames_THWC.shape}"
        )
    if 0 in frames_THWC.shape:
        raise ValueError(f"frames are empty: shape {frames_THWC.shape}")


def _enlarge(frames_THWC: np.ndarray, scale: int) -> np.ndarray:
    return frames_THWC.repeat(scale, axis=1).repeat(scale, axis=2)


def _pad_cells(frames_THWC: np.ndarray) -> np.ndarray:
    """A white margin at the right of and below each frame."""
    return np.pad(frames_THWC, ((0, 0), (0, MARGIN), (0, MARGIN), (0, 0)), constant_values=255)


def _caption_picture(caption: str, width: int) -> np.ndarray:
    """The caption in black on white, wrapped to `width` pixels: (H, width, 3) uint8."""
    font = ImageFont.load_default(FONT_SIZE)
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    fits = len(caption)
    lines = [caption]
    while fits > 1 and any(draw.textlength(line, font) > width - MARGIN for line in lines):
        fits -= 1
        lines = textwrap.wrap(caption, fits)
    line_height = FONT_SIZE + 3
    picture = Image.new("RGB", (width, line_height * len(lines)), "white")
    for index, line in enumerate(lines):
        ImageDraw.Draw(picture).text((1, index * line_height), line, fill="black", font=font)
    return np.asarray(picture)
