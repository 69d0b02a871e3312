"""A session's events in an event loop, and its frames as pieces of an MP4."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import anyio.to_thread
import numpy as np

from starflow_jax.io.fragments import Fragments
from starflow_jax.sampling.files import file_rate, shown_scale
from starflow_jax.serving.live import Ended, Event, Live


async def events_of(live: Live) -> AsyncIterator[Event]:
    """Each as it happens, up to `Ended`. What is not asked for is not taken, and then no more frames are made."""
    loop, there = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(there.set)

    live.listen(notify)
    while True:
        await there.wait()
        there.clear()
        for event in live.take():
            yield event
            if isinstance(event, Ended):
                return


class Encoder:
    """Frames of a session as pieces of an MP4, encoded beside the event loop."""

    def __init__(self, live: Live, height: int) -> None:
        """height: of a frame, in pixels."""
        self._fragments = Fragments(file_rate(live.session.config), shown_scale(height))

    @property
    def codec(self) -> str:
        """Known with the first piece."""
        return self._fragments.codec

    async def piece(self, frames_THWC: np.ndarray) -> bytes:
        """The next one."""
        return await anyio.to_thread.run_sync(self._fragments.piece, frames_THWC)

    def close(self) -> None:
        """Let go of the encoder."""
        self._fragments.close()
