"""One video or picture to clips of a fixed length, rate and size: decode, resample, cut, judge, encode.

A video is read once, front to back. Frames are taken at a fixed rate (or as they come), resized and cropped to
the bucket nearest in shape, and gathered into clips without overlap; a change of scene, or a gap in the
timestamps, begins a new clip. Clips are kept as H.264 of the bucket's size: reading one for training then
decodes just its own few frames; of the source file it would have to be decoded at full size, from the key frame
before it, in every epoch. Their colours are sampled as those of the source are (planes.py). Pictures are kept as JPEG.
"""

import collections
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import av
import numpy as np
from av.codec.context import Flags
from etils import epath
from PIL import Image, ImageOps

from starflow_jax.data.raw.items import Item, Rejected, Unusable
from starflow_jax.data.raw.job import Bucket, Job
from starflow_jax.data.raw.planes import Fitter, matrix_of, thumbnail, to_rgb
from starflow_jax.data.raw.poses import Moves, Poses
from starflow_jax.data.raw.shards import damaged
from starflow_jax.io.cameras import Cameras
from starflow_jax.io.pictures import NotAPicture, open_picture
from starflow_jax.io.video import Mp4Writer, NotAVideo, open_video

MAX_GAP = 0.5  # seconds without a frame: what follows is another shot
SLOWEST = 0.9  # a source of less than this share of the wanted rate would stutter
FASTEST = 240  # frames per second that are believed, where the source's own rate is kept
CUT_RATIO = 1.4  # times the largest change of the frames before: a cut, and not movement that grows faster
CUT_MEMORY = 8  # frames
JPEG_QUALITY = 95
# "veryfast" would take three times as long for the same error and two thirds of the bytes; without any search between
# pixels these would be a third more. x264's result depends on its number of threads.
X264 = {"preset": "ultrafast", "subq": "1", "threads": "1"}


@dataclasses.dataclass(frozen=True)
class Clip:
    """T frames as planes.py has them, or a picture, uint8 (1, H, W, 3), whose fps is 0; `start` is in seconds of the
    source."""

    frames: Sequence[av.VideoFrame] | np.ndarray
    bucket: Bucket
    fps: int
    start: float
    camera: Cameras | None = None  # of each frame

    @property
    def frames_THWC(self) -> np.ndarray:
        """uint8 RGB."""
        return self.frames if isinstance(self.frames, np.ndarray) else to_rgb(self.frames)


class _Damaged(Exception):
    """A packet that the container itself calls corrupt."""


def cut(item: Item, job: Job) -> Iterator[Clip | Rejected]:
    """The clips of an item in order, and what of it is left out. Never raises for what is in the file."""
    try:
        yield from [_picture(item, job)] if item.is_image else _video_clips(item, job)
    except (Unusable, NotAVideo, NotAPicture) as error:
        yield Rejected(item.key, str(error))
    except Exception as error:  # a damaged file can make a decoder fail in any way
        yield Rejected(item.key, f"unreadable: {getattr(error, 'strerror', '') or error or type(error).__name__}")


def nearest_bucket(buckets: tuple[Bucket, ...], height: float, width: float) -> Bucket:
    """The bucket whose shape is nearest, as a ratio; the first of equally near ones."""
    return min(buckets, key=lambda bucket: abs(math.log(bucket.width / bucket.height / (width / height))))


def _picture(item: Item, job: Job) -> Clip:
    with _file(item.media) as file:
        image = open_picture(file, job.settings.max_megapixels * 1_000_000)
    bucket = nearest_bucket(job.buckets, image.height, image.width)
    _check_size(bucket, image.height, image.width, job)
    frame = np.asarray(ImageOps.fit(image, (bucket.width, bucket.height), Image.Resampling.LANCZOS))
    if frame.mean() < job.settings.min_brightness:
        raise Unusable(f"too dark: brightness {frame.mean():.1f} of 255")
    return Clip(frame[None], bucket, 0, 0.0)


def _file(media: str | bytes) -> BinaryIO:
    return io.BytesIO(media) if isinstance(media, bytes) else epath.Path(media).open("rb")


def _check_size(bucket: Bucket, height: float, width: float, job: Job) -> None:
    upscale = max(bucket.height / height, bucket.width / width)
    if upscale > job.settings.max_upscale:
        raise Unusable(f"too small: {width:.0f}x{height:.0f} would be enlarged {upscale:.2f} times")


def _video_clips(item: Item, job: Job) -> Iterator[Clip | Rejected]:
    local = isinstance(item.media, str) and "://" not in item.media
    source = str(item.media) if local else _file(item.media)
    with open_video(source, job.settings.max_megapixels * 1_000_000) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # there is a process per core
        stream.codec_context.flags |= Flags.bitexact  # older formats, such as MPEG-4: the same on every CPU
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not rate:
            raise Unusable("frame rate unknown")
        if rate < SLOWEST * job.settings.fps:
            raise Unusable(f"frame rate {rate:.4g} is below {job.settings.fps}")
        if not (job.settings.fps or 1 <= round(rate) <= FASTEST):
            raise Unusable(f"frame rate {rate:.4g} is not from 1 to {FASTEST}")
        cutter = _Cutter(item, job, job.settings.fps or round(rate), float(stream.sample_aspect_ratio or 1),
                         _poses(item, container, stream, rate))
        decoded = _decode(container, stream, item.start, item.end)
        try:
            for time, frame in _resample(decoded, job.settings.fps, rate):
                yield from cutter.add(time, frame)
                if job.settings.clips_per_video and cutter.made >= job.settings.clips_per_video:
                    return
        except (av.FFmpegError, _Damaged) as error:
            # The clips before the damage are good.
            yield Rejected(item.key, f"damaged: {getattr(error, 'strerror', '') or error}", round(cutter.time, 3))
            return
        if not cutter.clips:
            raise Unusable("no frames" if not cutter.frames else
                            f"too short: {cutter.frames} frames at {job.settings.fps or round(rate)} fps, "
                            f"a clip has {job.frames}")


def _poses(item: Item, container: av.container.InputContainer, stream: av.VideoStream, rate: float
           ) -> Poses | Moves | None:
    if item.camera is None:
        return None
    time_base = float(stream.time_base or 0)
    duration = stream.duration * time_base if stream.duration else (container.duration or 0) / 1e6
    begin = (stream.start_time or 0) * time_base
    if isinstance(item.camera, str):
        return Moves(item.camera, rate, begin + item.start)
    return Poses(item.camera, rate, begin, duration)


def _decode(container: av.container.InputContainer, stream: av.VideoStream, start: float, end: float
            ) -> Iterator[tuple[float, av.VideoFrame]]:
    """(seconds from the first frame of the file, frame) of the stretch."""
    time_base = float(stream.time_base or 0)
    origin = (stream.start_time or 0) * time_base
    if start > 0:
        container.seek(round((start + origin) / time_base), stream=stream)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _Damaged("a packet is corrupt or cut short")
        for frame in packet.decode():
            if frame.time is None:
                raise _Damaged("a frame without a time")
            time = frame.time - origin
            if time >= end:
                return
            if time >= start - 1e-3:
                yield time, frame


def _resample(decoded: Iterator[tuple[float, av.VideoFrame]], fps: int, rate: float
              ) -> Iterator[tuple[float, av.VideoFrame | None]]:
    """At every 1/fps the frame that is shown then; None at a gap. fps=0: all frames."""
    held: av.VideoFrame | None = None
    held_time, begin, count = 0.0, 0.0, 0
    # After the last frame None: what is held is shown for one frame's time, as it is before a gap.
    for time, frame in itertools.chain(decoded, [(math.inf, None)]):
        gap = time - held_time > MAX_GAP
        until = held_time + 1 / rate if gap else time
        while fps and held is not None and begin + count / fps < until - 1e-6:
            yield begin + count / fps, held
            count += 1
        if gap and held is not None and frame is not None:
            yield held_time, None
        if held is None or gap:
            begin, count = time, 0
        held, held_time = frame, time
        if not fps and frame is not None:
            yield time, frame


class _Cutter:
    """Gathers frames into clips; a change of scene begins a new one."""

    def __init__(self, item: Item, job: Job, fps: int, pixel_aspect: float, poses: Poses | Moves | None
                 ) -> None:
        self._item, self._job, self._fps, self._pixel_aspect, self._poses = item, job, fps, pixel_aspect, poses
        self.time, self.frames, self.clips, self.made = 0.0, 0, 0, 0  # clips: judged; made: of these, good
        self._size: tuple[int, int] | None = None
        self._bucket: Bucket | None = None
        self._fitter: Fitter | None = None
        self._begin_shot()

    def _begin_shot(self) -> None:
        self._seen: np.ndarray | None = None  # thumbnail of the last frame
        self._usual: collections.deque[float] = collections.deque(maxlen=CUT_MEMORY)  # the last changes of the shot
        self._begin_clip()

    def _begin_clip(self) -> None:
        self._pictures: list[av.VideoFrame] = []
        self._changes: list[float] = []  # from frame to frame of the clip under way
        self._brightness: list[float] = []
        self._times: list[float] = []
        self._own_times: list[float] = []  # of the frames that are shown then, in the container's time

    def add(self, time: float, frame: av.VideoFrame | None) -> Iterator[Clip | Rejected]:
        """Take the next frame, or a gap (None)."""
        self.time = time
        if frame is None:
            yield from self._break(time)
            return
        self.frames += 1
        picture = self._fit(frame)
        seen = thumbnail(picture)
        if self._seen is not None:
            change = float(np.abs(seen - self._seen).mean())
            if self._is_cut(change):
                yield from self._break(time)
            else:
                self._usual.append(change)
                if self._pictures:
                    self._changes.append(change)
        self._times.append(time)
        self._own_times.append(frame.time or 0.0)
        self._seen = seen
        self._pictures.append(picture)
        self._brightness.append(float(seen.mean()))
        if len(self._pictures) == self._job.frames:
            yield self._finish()

    def _break(self, time: float) -> Iterator[Rejected]:
        if self._pictures:
            self.clips += 1
            yield Rejected(self._item.key, f"cut inside: {len(self._pictures)} frames of {self._job.frames}",
                           round(self._times[0], 3), round(time, 3))
        self._begin_shot()

    def _is_cut(self, change: float) -> bool:
        """Much change, and much more than in the frames before: fast movement is no cut. A shot's first change
        has nothing to be held against, and is none."""
        return 0 < self._job.settings.cut_threshold < change and change > CUT_RATIO * max(self._usual, default=math.inf)

    def _finish(self) -> Clip | Rejected:
        assert self._bucket is not None
        pictures, changes, times = self._pictures, self._changes, self._times
        own_times = self._own_times
        brightness = sum(self._brightness) / len(self._brightness)
        self._begin_clip()
        self.clips += 1
        motion = sum(changes) / max(len(changes), 1)
        reason = ""
        if brightness < self._job.settings.min_brightness:
            reason = f"too dark: brightness {brightness:.1f} of 255"
        elif changes and motion < self._job.settings.min_motion:
            reason = f"too static: {motion:.3f} of 255 change from frame to frame"
        camera = None
        if self._poses is not None and not reason:
            try:
                camera = self._poses.of_clip(own_times, *self._shown, self._bucket)
            except Unusable as error:
                reason = str(error)
        if reason:
            return Rejected(self._item.key, reason, round(times[0], 3), round(self.time, 3))
        self.made += 1
        return Clip(pictures, self._bucket, self._fps, times[0], camera)

    def _fit(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Of the bucket's size, into which the first frame puts all."""
        if self._size is None:
            self._size = (frame.width, frame.height)
            height, width = float(frame.height), frame.width * self._pixel_aspect
            if frame.rotation % 180 == 90:
                height, width = width, height
            self._shown = height, width
            self._bucket = nearest_bucket(self._job.buckets, height, width)
            _check_size(self._bucket, height, width, self._job)
            self._fitter = Fitter(self._bucket.height, self._bucket.width, self._pixel_aspect)
        if (frame.width, frame.height) != self._size:
            raise Unusable("frames change size")
        assert self._fitter is not None
        return self._fitter(frame)


def encode(clip: Clip, crf: int) -> bytes:
    """The clip as a file: MP4 of H.264, or JPEG of a picture. The same bytes for the same clip."""
    file = io.BytesIO()
    if isinstance(clip.frames, np.ndarray):
        Image.fromarray(clip.frames[0]).save(file, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
        return file.getvalue()
    first = clip.frames[0]
    writer = Mp4Writer(file, clip.fps, 1, {"fflags": "+bitexact"}, {"crf": str(crf), **X264}, first.format.name,
                       matrix_of(first))
    for frame in clip.frames:
        writer.add(frame)
    writer.close()
    return file.getvalue()


def decode(media: bytes) -> np.ndarray:
    """What `encode` kept: uint8 (T, H, W, 3). Raises UserError for damaged bytes."""
    try:
        return _decoded(media)
    except Exception as error:  # a damaged file can make a decoder fail in any way
        raise damaged("a prepared clip", error) from error


def _decoded(media: bytes) -> np.ndarray:
    if media.startswith(b"\xff\xd8"):
        with Image.open(io.BytesIO(media)) as image:
            return np.asarray(image.convert("RGB"))[None]
    with open_video(io.BytesIO(media)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1  # there are several readers
        return to_rgb(container.decode(stream))
