"""Clients that come, steer, vanish, stall and send rubbish, against a server that runs:

    python -m tests.serving.load http://127.0.0.1:8000 --clients=200 --seconds=180 --process=PID

Good sessions, one after the other, go on all the while. It prints how many of them were harmed, their frames per
second, how long changes took, and the memory that the server (PID, on this machine) held after a third of the time and
at the end; exit code 1 where a good session was harmed. Raise serve.rate: all clients have one address.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

PROMPTS = ("a blue three moves right", "a red seven moves left", "a green two moves up")
KINDS = ("vanishes", "stalls", "rubbish", "half", "large", "silent")

RUBBISH = ('{"played": 1e99}', "[" * 5000, '{"camera": [[1]]}', "?", '{"prompt": 3}', '{"played": 1000000000}',
           '{"pause": true}', '{"record": true}')


class Figures:
    """What good sessions saw."""

    def __init__(self) -> None:
        self.sessions = self.harmed = self.frames = self.bad = 0
        self.seconds = 0.0
        self.changes: list[float] = []


async def good(address: str, figures: Figures, frames: int, seed: int) -> None:
    """A session that plays as fast as it can and changes its prompt."""
    begun = None
    try:
        async with connect(f"{address}/v1/session", max_size=None) as socket:
            await socket.send(json.dumps({"prompt": PROMPTS[0], "seed": seed}))
            async for message in socket:
                told = json.loads(message) if isinstance(message, str) else {"type": "piece"}
                if told["type"] == "begun":
                    begun = time.monotonic()
                elif told["type"] == "shown":
                    figures.changes.append(told["seconds"])
                elif told["type"] == "frames":
                    figures.frames += 4 if told["shown"] > 1 else 1
                    answer: dict[str, Any] = {"played": told["shown"]}
                    if told["shown"] % 16 == 1:
                        answer["prompt"] = random.choice(PROMPTS)
                    await socket.send(json.dumps(answer))
                    if told["shown"] >= frames:
                        figures.seconds += time.monotonic() - (begun or 0.0)
                        figures.sessions += 1
                        return
                elif told["type"] == "ended":
                    full = "every place" in told["why"]  # the others have them all; nobody was harmed
                    figures.harmed += not full
                    await asyncio.sleep(0.2 if full else 0)
                    return
        figures.harmed += 1
    except (OSError, WebSocketException):
        figures.harmed += begun is not None


async def bad(address: str, figures: Figures) -> None:
    """A client that does one thing it should not."""
    host, _, port = address.removeprefix("ws://").rpartition(":")
    kind = random.choice(KINDS)
    figures.bad += 1
    with contextlib.suppress(OSError, WebSocketException, TimeoutError):
        if kind == "half":
            _, writer = await asyncio.open_connection(host, int(port))
            head = b"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000000\r\n\r\n"
            writer.write(head + bytes(1000))
            await asyncio.sleep(random.random() * 3)
            return writer.close()
        async with connect(f"{address}/v1/session", max_size=None) as socket:
            if kind != "silent":
                await socket.send(json.dumps({"prompt": random.choice(PROMPTS), "guidance": random.random() * 5}))
            if kind == "rubbish":
                for _ in range(50):
                    await socket.send(random.choice(RUBBISH))
            elif kind == "large":
                await socket.send("x" * 30_000_000)
            await asyncio.sleep(random.random() * (0.5 if kind == "vanishes" else 5))  # reads nothing


def memory(process: int) -> float:
    """MB that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines() if process else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS")), 0.0)


async def run(address: str, clients: int, seconds: float, frames: int, process: int) -> int:
    """The exit code."""
    figures, end = Figures(), time.monotonic() + seconds
    early = 0.0

    async def again(one: Any) -> None:
        while time.monotonic() < end:
            await one()

    async def look() -> None:
        nonlocal early
        await asyncio.sleep(seconds / 3)
        early = memory(process)

    at_once = min(20, clients)

    async def bad_ones() -> None:  # `clients` of them, evenly over the time
        for _ in range(clients // at_once):
            await asyncio.gather(*(bad(address, figures) for _ in range(at_once)))
            await asyncio.sleep(max(0.0, seconds * at_once / clients - 2.5))

    await asyncio.gather(again(lambda: good(address, figures, frames, random.randrange(2**32))), bad_ones(), look())
    changes = sorted(figures.changes) or [0.0]
    print(f"{figures.sessions} good sessions of {frames} frames, {figures.harmed} harmed, beside {figures.bad} bad "
          f"clients; {figures.sessions * frames / (figures.seconds or 1):.1f} frames per second of a session; changes "
          f"{changes[len(changes) // 2]:.2f} s (median), {changes[int(len(changes) * 0.95)]:.2f} s (95th percentile); "
          f"{early:.0f} MB after a third of the time, {memory(process):.0f} MB at the end")
    return int(figures.harmed > 0 or not figures.sessions)


def main() -> None:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--process", type=int, default=0)
    asked = parser.parse_args()
    address = asked.address.replace("http://", "ws://").rstrip("/")
    sys.exit(asyncio.run(run(address, min(asked.clients, 1000), min(asked.seconds, 600), asked.frames, asked.process)))


if __name__ == "__main__":
    main()
