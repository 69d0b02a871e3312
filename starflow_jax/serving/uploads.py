"""Pictures and videos from clients, decoded in a process of their own, with little memory and time:

    python -m starflow_jax.serving.uploads picture HEIGHT WIDTH FIT < file > pixels
    python -m starflow_jax.serving.uploads video HEIGHT WIDTH SECONDS < file > rate and pixels
"""

import collections
import math
import os
import resource
import struct
import subprocess
import sys
from io import BytesIO

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io import pictures
from starflow_jax.io.video import open_video, to_rgb

SECONDS, MEMORY, MOST_PIXELS = 10, 2 * 2**30, 40_000_000
MOST_BYTES = 2**29  # of a video's frames at the model's size
FITS = ("resize_crop", "resize_then_crop")  # of io/pictures.py
RATE = struct.Struct("<d")  # frames per second
NO_PICTURE = "image: can't be read as a picture; send an undamaged PNG or JPEG of at most 40 million pixels"
NO_VIDEO = (f"video: can't be read as a video within {SECONDS} seconds; send an undamaged MP4, a short one, with "
            "frames of at most 40 million pixels")


def read_picture(content: bytes, height: int, width: int, fit: str = "resize_crop") -> np.ndarray:
    """The picture as (height, width, 3) uint8. Raises UserError for what is none, or takes too much."""
    pixels = _decoded(content, NO_PICTURE, "picture", str(height), str(width), fit)
    if len(pixels) != height * width * 3:
        raise UserError(NO_PICTURE)
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def read_clip(content: bytes, height: int, width: int, seconds: float) -> tuple[np.ndarray, float]:
    """The last seconds of a video, as (T, height, width, 3) uint8 and its frames per second. Raises UserError for what
    is none, or takes too much."""
    decoded = _decoded(content, NO_VIDEO, "video", str(height), str(width), str(seconds))
    pixels = decoded[RATE.size:]
    if not pixels or len(pixels) % (height * width * 3):
        raise UserError(NO_VIDEO)
    rate, = RATE.unpack(decoded[:RATE.size])
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3), rate


def _decoded(content: bytes, refusal: str, *arguments: str) -> bytes:
    """What the process writes. Raises UserError, the refusal, where it fails."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1",
                   "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run([sys.executable, "-m", __name__, *arguments], input=content, capture_output=True,
                               env=environment, timeout=2 * SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(refusal) from error
    if ended.returncode:
        raise UserError(refusal)
    return ended.stdout


def main(kind: str, height: int, width: int, how: str) -> None:
    """In the process of its own. how: a picture's fit, or of how many seconds a video's frames are wanted."""
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_FSIZE, 0),
                        (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(limit, (most, most))
    file, out = BytesIO(sys.stdin.buffer.read()), sys.stdout.buffer
    if kind == "picture":
        picture = pictures.open_picture(file, MOST_PIXELS)
        fitted = getattr(pictures, FITS[FITS.index(how)])(np.asarray(picture)[None], height, width)
        out.write(fitted.tobytes())
    else:
        _write_video(file, height, width, float(how))


def _write_video(file: BytesIO, height: int, width: int, seconds: float) -> None:
    """Its rate, and those of its last frames that are wanted, each at its size as soon as it is decoded."""
    with open_video(file, MOST_PIXELS) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not rate > 0:
            raise ValueError("no frame rate")
        most = min(math.ceil(seconds * rate) + 1, MOST_BYTES // (3 * height * width))
        fitted: collections.deque[bytes] = collections.deque(maxlen=most)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise ValueError("damaged, or cut short")
            for frame in packet.decode():
                fitted.append(pictures.resize_crop(to_rgb(frame, threads=1)[None], height, width).tobytes())
    sys.stdout.buffer.write(RATE.pack(rate) + b"".join(fitted))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
