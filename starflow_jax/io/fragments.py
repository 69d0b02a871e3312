"""A video in pieces that play as they come, for Media Source Extensions (ISO/IEC 14496-12, movie fragments).

ffmpeg's own muxer keeps each frame until it knows the next one; here a piece holds all that was written.
"""

import re
import struct
from collections.abc import Sequence

import av
import numpy as np

from starflow_jax.io.video import AS_MADE, Mp4Writer

_START_CODE = re.compile(rb"\x00\x00\x00?\x01")  # between H.264's units, and nowhere within them
_DEFAULT_BASE_IS_MOOF = 0x020000
_OFFSET, _DURATION, _SIZE, _FLAGS = 0x1, 0x100, 0x200, 0x400  # what a run says of itself, and of each frame
_KEY_FRAME, _OTHER_FRAME = 0x02000000, 0x01010000


class Fragments(Mp4Writer):
    """Frames as pieces of an MP4: all of them one after the other are a file. No frame waits for later ones."""

    def __init__(self, fps: float, scale: int = 1) -> None:
        self._sink = _Sink()
        super().__init__(self._sink, fps, scale,  # type: ignore[arg-type]
                         {"movflags": "+empty_moov+default_base_moof"}, AS_MADE)
        self.codec = ""  # as browsers call it, such as avc1.64000D; known with the first piece
        self._packets: list[av.Packet] = []
        self._pieces, self._time = 0, 0

    def piece(self, frames_THWC: np.ndarray) -> bytes:
        """The piece of these frames (T, H, W, 3), uint8; the first one begins with the file's head."""
        begins = self._stream is None
        self.write(frames_THWC)
        packets, self._packets = self._packets, []
        return (self._head() if begins else b"") + self._fragment(packets)

    def close(self) -> None:
        self._container.close()

    def _take(self, packets: Sequence[av.Packet]) -> None:
        self._packets += packets

    def _head(self) -> bytes:
        self._container.start_encoding()
        head = self._sink.take()
        at = head.index(b"avcC") + 5  # behind the version: profile, constraints and level
        self.codec = f"avc1.{head[at:at + 3].hex().upper()}"
        return head

    def _fragment(self, packets: Sequence[av.Packet]) -> bytes:
        assert self._stream is not None and self._stream.time_base is not None
        duration = round(1 / self._rate / self._stream.time_base)
        self._pieces += 1
        frames = [_with_lengths(bytes(packet)) for packet in packets]
        entries = b"".join(
            struct.pack(">III", duration, len(frame), _KEY_FRAME if packet.is_keyframe else _OTHER_FRAME)
            for packet, frame in zip(packets, frames))
        track = _box(b"tfhd", struct.pack(">II", _DEFAULT_BASE_IS_MOOF, 1)) + _box(
            b"tfdt", struct.pack(">IQ", 1 << 24, self._time))
        self._time += duration * len(frames)

        def moof(offset: int) -> bytes:
            run = struct.pack(">III", _OFFSET | _DURATION | _SIZE | _FLAGS, len(frames), offset) + entries
            return _box(b"moof", _box(b"mfhd", struct.pack(">II", 0, self._pieces))
                        + _box(b"traf", track + _box(b"trun", run)))

        return moof(len(moof(0)) + 8) + _box(b"mdat", b"".join(frames))


def _with_lengths(packet: bytes) -> bytes:
    """A frame with each unit's length before it, as MP4 has them, in place of start codes."""
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in _START_CODE.split(packet) if unit)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


class _Sink:
    """A file that can only be written to, and whose content is taken away."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
