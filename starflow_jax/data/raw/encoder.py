"""Latents made of clips as these are cut, for data sets that keep no media.

The codec is in the process that has the accelerator; those that cut clips call it there (`served`). What is encoded at
once is of one part of the input and of one bucket, so that latents depend neither on how many processes there are nor
on where a run was killed.
"""

import contextlib
import dataclasses
import functools
import math
import mmap
import multiprocessing.connection
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import reduction
from typing import Any

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.data.raw import shards
from starflow_jax.data.raw.planes import Frames, Pixels, pixels_of

MOST_WAITING = 2  # batches of clips that a process holds, over all buckets
_AT_ONCE = 2  # one is put onto the device while another is encoded
_ALIGNED = 64  # bytes

Example = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A codec as those that cut clips see it.

    encode: frames of at most batch_size clips -> latents, float16 (B, N, h, w, C). made_by: JSON that names the codec.
    """

    encode: Callable[[Sequence[Frames]], np.ndarray]
    batch_size: int
    made_by: Any


class LatentWriter:
    """Encodes a part's clips, bucket by bucket, and writes their latents in the order in which the clips came."""

    def __init__(self, encoder: Encoder, writers: Mapping[str, shards.RecordWriter]) -> None:
        """writers: by BUCKET.SPLIT."""
        self._encoder, self._writers = encoder, writers
        self._waiting: dict[str, list[tuple[str, Example, Frames]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of each bucket's latents

    def add(self, bucket: str, split: str, example: Example, frames: Frames) -> None:
        """example: the captions and fps."""
        waiting = self._waiting.setdefault(bucket, [])
        waiting.append((split, example, frames))
        if len(waiting) == self._encoder.batch_size:
            self._encode(bucket)
        elif sum(map(len, self._waiting.values())) == MOST_WAITING * self._encoder.batch_size:
            self._encode(max(self._waiting, key=lambda name: len(self._waiting[name])))

    def finish(self) -> None:
        """Encode those that wait for others."""
        for bucket in list(self._waiting):
            self._encode(bucket)

    def _encode(self, bucket: str) -> None:
        waiting = self._waiting.pop(bucket)
        latents = self._encoder.encode([frames for _, _, frames in waiting])
        self.shapes[bucket] = latents.shape[1:]
        features = shards.latent_features(latents.shape[1:])
        for (split, example, _), row in zip(waiting, latents, strict=True):
            self._writers[f"{bucket}.{split}"].write(shards.serialize(features, {**example, "latents": row}))


@contextlib.contextmanager
def served(encode: Callable[[list[Pixels]], np.ndarray]) -> Iterator[Callable[[Sequence[Frames]], np.ndarray]]:
    """`encode` as a callable that can be sent to other processes of this machine; it runs in this one, in threads."""
    key, ended, slots = os.urandom(32), threading.Event(), threading.BoundedSemaphore(_AT_ONCE)
    address = f"\0starflow_jax-{os.getpid()}-{os.urandom(8).hex()}"  # no file, which a kill would leave behind
    listener = multiprocessing.connection.Listener(address, backlog=128, authkey=key)

    def accept() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError, EOFError, multiprocessing.AuthenticationError):  # who called was killed
                threading.Thread(target=_answer, args=(listener.accept(), encode, slots), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield functools.partial(_call, address, key)
    finally:
        ended.set()
        with socket.socket(socket.AF_UNIX) as waking:  # accept() may wait for another call, or have ended already
            waking.connect(address)
        thread.join()
        listener.close()
        _caller.cache_clear()  # the line of this process, whose thread ends with it


def _answer(connection: multiprocessing.connection.Connection, encode: Callable[[list[Pixels]], np.ndarray],
            slots: threading.BoundedSemaphore) -> None:
    """Encode what one process sends, until it ends."""
    memory: _Shared | None = None
    with connection, contextlib.suppress(OSError, EOFError):
        while connection.poll(None):
            with slots:
                size, layout = connection.recv()
                if memory is None or memory.size != size:
                    memory = _Shared(reduction.recv_handle(connection), size)
                try:
                    answer: Any = encode(memory.pixels(layout))
                except (UserError, ArithmeticError, MemoryError) as error:
                    answer = error
                except Exception as error:  # those of JAX can't be sent
                    answer = RuntimeError(f"{type(error).__name__}: {error}")
            connection.send(answer)


def _call(address: str, key: bytes, clips: Sequence[Frames]) -> np.ndarray:
    return _caller(address, key)(clips)


@functools.cache
def _caller(address: str, key: bytes) -> "_Caller":
    """That of this process, as long as it lives."""
    return _Caller(multiprocessing.connection.Client(address, authkey=key))


class _Caller:
    """Puts pixels where the other process sees them, in memory that is used again and again: to get it anew for every
    batch would take longer than to fill it."""

    def __init__(self, connection: multiprocessing.connection.Connection) -> None:
        self._connection = connection
        self._memory: _Shared | None = None

    def __call__(self, clips: Sequence[Frames]) -> np.ndarray:
        """Raises what `encode` raised."""
        size = sum(3 * len(frames) * math.prod(_sides(frames)) + 3 * _ALIGNED for frames in clips)
        grown = self._memory is None or self._memory.size < size
        if self._memory is None or grown:
            self._memory = _Shared(os.memfd_create("clips"), size)
        layout = self._memory.fill(clips)
        self._connection.send((self._memory.size, layout))
        if grown:
            reduction.send_handle(self._connection, self._memory.descriptor, os.getpid())  # the last is for Windows
        answer = self._connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer


def _sides(frames: Frames) -> tuple[int, int]:
    return frames.shape[1:3] if isinstance(frames, np.ndarray) else (frames[0].height, frames[0].width)


Layout = list[tuple[int, list[tuple[int, ...]]]]  # of each clip its matrix and its planes' shapes


class _Shared:
    """Memory that two processes see, of which both allocate the same arrays in the same order."""

    def __init__(self, descriptor: int, size: int) -> None:
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self.descriptor, self.size, self._used = descriptor, size, 0
        self._memory = mmap.mmap(descriptor, size)
        weakref.finalize(self, os.close, descriptor)

    def fill(self, clips: Sequence[Frames]) -> Layout:
        self._used = 0
        pixels = [pixels_of(frames, self._allocate) for frames in clips]
        return [(one.matrix, [plane.shape for plane in one.planes]) for one in pixels]

    def pixels(self, layout: Layout) -> list[Pixels]:
        """What the other process put there, until it puts in more."""
        self._used = 0
        return [Pixels(tuple(map(self._allocate, shapes)), matrix) for matrix, shapes in layout]

    def _allocate(self, shape: Sequence[int]) -> np.ndarray:
        array = np.frombuffer(self._memory, np.uint8, math.prod(shape), self._used).reshape(shape)
        self._used += -(-array.nbytes // _ALIGNED) * _ALIGNED
        return array
