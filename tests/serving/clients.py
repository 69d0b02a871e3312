"""Clients of a server, for tests/serving/load.py: viewers, who play what comes as the page does, and bad ones."""

import asyncio
import collections
import contextlib
import json
import random
import time
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

PROMPTS = ("a blue three moves right", "a red seven moves left", "a green two moves up")
KINDS = ("vanishes", "stalls", "rubbish", "silent", "half", "large", "picture", "job", "unread")
RUBBISH = ('{"played": 1e99}', "[" * 5000, '{"camera": [[1]]}', "?", '{"prompt": 3}', '{"played": 1000000000}',
           '{"pause": true}', '{"record": true}')


class Viewer:
    """A session whose frames are played one after the other, and what its viewer saw."""

    def __init__(self, address: str, frames: int, seed: int = 0, fps: float = 0.0, every: float = 0.0) -> None:
        """fps: at which it plays; 0: as fast as frames come. every: seconds between changes of the prompt, about; 0:
        it changes nothing."""
        self._address, self._fps, self._every = address, fps, every
        self._asked = {"prompt": PROMPTS[0], "seed": seed, "frames": frames}
        self.video = bytearray()  # an MP4
        self.first = 0.0  # seconds from its request to the first picture
        self.waits: list[float] = []  # seconds that a frame came too late
        self.sent: list[float] = []  # seconds from a change to the arrival of the first frame made under it
        self.shown: list[float] = []  # and until that frame was played
        self.place, self.why = 0, ""  # in the queue, the worst; why it ended
        self._there, self._played, self._came = 0, 0, asyncio.Event()
        self._when: dict[int, float] = {}  # frames came, by how many there were then
        self._changes: collections.deque[float] = collections.deque()  # when they were asked for
        self._to_show: dict[int, float] = {}  # the first frames of changes

    @property
    def well(self) -> bool:
        """Whether it saw all that it asked for."""
        return self.why == "end"

    async def watch(self) -> "Viewer":
        """Until the session ends."""
        begun = time.monotonic()
        try:
            async with connect(f"{self._address}/v1/session", max_size=None) as socket:
                await socket.send(json.dumps(self._asked))
                beside = [asyncio.create_task(task(socket)) for task in (self._play, self._change)]
                try:
                    async for message in socket:
                        if isinstance(message, bytes):
                            self.video += message
                        else:
                            self._hear(json.loads(message), begun)
                finally:
                    for task in beside:
                        task.cancel()
                    await asyncio.gather(*beside, return_exceptions=True)
        except (OSError, WebSocketException) as error:
            self.why = self.why or f"{type(error).__name__}: {error}"
        return self

    def _hear(self, told: dict[str, Any], begun: float) -> None:
        now = time.monotonic()
        if told["type"] == "frames":
            self.first = self.first or now - begun
            self._when |= dict.fromkeys(range(self._there + 1, told["shown"] + 1), now)
            self._there = told["shown"]
            self._came.set()
        elif told["type"] == "shown":
            while self._changes:
                asked_at = self._changes.popleft()
                self.sent.append(now - asked_at)
                self._to_show[told["frame"] + 1] = asked_at
        elif told["type"] == "queued":
            self.place = max(self.place, told["place"])
        elif told["type"] == "ended":
            self.why = told["why"]

    async def _play(self, socket: Any) -> None:
        due = 0.0
        while True:
            while self._played >= self._there:
                self._came.clear()
                await self._came.wait()
            self._played = self._played + 1 if self._fps else self._there
            now = time.monotonic()
            late = max(0.0, self._when[self._played] - due) if due else 0.0
            if self._fps and late:
                self.waits.append(late)
            await socket.send(json.dumps({"played": self._played}))
            for frame in [frame for frame in self._to_show if frame <= self._played]:
                self.shown.append(now - self._to_show.pop(frame))
            if self._fps:
                due = (now if late or not due else due) + 1 / self._fps
                await asyncio.sleep(due - time.monotonic())

    async def _change(self, socket: Any) -> None:
        turn = 0
        while self._every:
            await asyncio.sleep(self._every * random.uniform(0.5, 1.5))
            if self._there and not self._changes:
                turn += 1
                self._changes.append(time.monotonic())
                await socket.send(json.dumps({"prompt": PROMPTS[turn % len(PROMPTS)]}))


async def bad(address: str, kind: str) -> None:
    """A client that does one thing it should not, and is gone."""
    with contextlib.suppress(OSError, WebSocketException, TimeoutError):
        if kind in ("half", "job", "unread"):
            return await _request(address, kind)
        async with connect(f"{address}/v1/session", max_size=None) as socket:
            asked = {"prompt": random.choice(PROMPTS), "guidance": random.random() * 5}
            if kind == "picture":
                asked["image"] = "iVBORw0KGgoAAAANSUhEUgAA" + "A" * 100_000
            if kind != "silent":
                await socket.send(json.dumps(asked))
            if kind == "rubbish":
                for _ in range(50):
                    await socket.send(random.choice(RUBBISH))
            elif kind == "large":
                await socket.send("x" * 30_000_000)
            await asyncio.sleep(random.random() * (0.5 if kind == "vanishes" else 5))  # reads nothing


async def _request(address: str, kind: str) -> None:
    """half: of a body; job: which nobody asks after; unread: a video."""
    host, _, port = address.removeprefix("ws://").rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"prompt": random.choice(PROMPTS)}).encode()
    accept = "video/mp4" if kind == "unread" else "application/json"
    length = 1_000_000 if kind == "half" else len(body)
    head = f"POST /v1/videos HTTP/1.1\r\nhost: {host}\r\naccept: {accept}\r\ncontent-length: {length}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        await asyncio.sleep(random.random() * 3)
    finally:
        writer.close()
