"""What a server does under load: how fast it is, and whether bad clients harm good ones.

    python -m tests.serving.load --sessions=8
    python -m tests.serving.load --clients=200 --seconds=180

It starts a server with the pretrained model on 127.0.0.1, or takes the one whose address it is given (raise its
serve.rate: all clients have one address). --sessions=N: frames per second of one session, of N one after the other and
of N together, as fast as their clients take them; the seconds to the first picture, and those from a change of prompt
to the first frame made under it, of viewers who play in real time. --clients=N: so many that come, vanish, stall and
send rubbish, evenly over the seconds, beside a viewer whose frames must be those that it gets alone, and beside others
who steer; and the memory that the server holds, beside what it held after a few viewers at once. It prints a table;
exit code 1 where a viewer was harmed, or memory gained.
"""

import argparse
import asyncio
import contextlib
import random
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from starflow_jax.io.progress import table
from starflow_jax.io.video import read_video
from tests.serving.clients import KINDS, Viewer, bad
from tests.serving.served import Server

Row = tuple[str, str]
FIRST_PICTURES = 10
EVERY = 1.5  # seconds between changes, about
TOGETHER = 4  # viewers at once, for whom each program of a few sessions runs
FLAT = 1.05  # most memory in the end, as a share of that before
ALIKE = 1.0  # most mean difference of a frame from the same one made alone, in steps of 256


async def speed(address: str, sessions: int, seconds: float, frames: int, fps: float) -> tuple[list[Row], bool]:
    """Rows, and whether a viewer was harmed."""
    first = [(await Viewer(address, 1, seed).watch()).first for seed in range(FIRST_PICTURES)]
    rows = [("first picture, warm", f"{of(first, 50)} median, {of(first, 100)} worst of {len(first)}")]
    one = await _rate(address, 1, frames)
    rows.append(("one session", f"{one:.1f} frames per second, {one / fps:.1f} times the playing rate"))
    if sessions > 1:
        after = sessions * frames / sum([frames / await _rate(address, 1, frames) for _ in range(sessions)])
        together = await _rate(address, sessions, frames)
        rows += [(f"{sessions} sessions, one after the other", f"{after:.1f} frames per second"),
                 (f"{sessions} sessions together", f"{together:.1f} frames per second, {together / after:.2f} times")]
    harmed = False
    for count in sorted({1, sessions}):
        viewers = await asyncio.gather(*(
            Viewer(address, frames_in(seconds, fps), seed, fps, EVERY).watch() for seed in range(count)))
        sent, shown = ([value for viewer in viewers for value in getattr(viewer, name)] for name in ("sent", "shown"))
        harmed |= not all(viewer.well for viewer in viewers)
        who = f"{count} viewer{'s' * (count > 1)}"
        rows += [(f"{who}: {len(sent)} changes, to the first frame sent",
                  f"{of(sent, 95)} (95 %), {of(sent, 50)} (median)"),
                 (f"{who}: to the first frame shown", f"{of(shown, 95)} (95 %), {of(shown, 50)} (median)"),
                 (f"{who}: waited for frames", _waits(viewers))]
    return rows, harmed


async def _rate(address: str, sessions: int, frames: int) -> float:
    """Frames per second of all sessions together."""
    begun = time.monotonic()
    viewers = await asyncio.gather(*(Viewer(address, frames, seed).watch() for seed in range(sessions)))
    if not all(viewer.well for viewer in viewers):
        raise SystemExit(f"a session ended: {[viewer.why for viewer in viewers]}")
    return sessions * frames / (time.monotonic() - begun)


async def crowd(address: str, clients: int, seconds: float, fps: float, process: int, gap: float
                ) -> tuple[list[Row], bool]:
    """Rows, and whether a viewer was harmed or memory gained. gap: the longest that one may wait for a frame."""
    frames = frames_in(seconds, fps)
    alone = await Viewer(address, frames).watch()
    await asyncio.gather(*(Viewer(address, frames_in(10, fps), seed, fps, EVERY).watch() for seed in range(TOGETHER)))
    held = [memory(process)]
    steady = asyncio.create_task(Viewer(address, frames, fps=fps).watch())
    end = time.monotonic() + seconds
    kinds = [kind for _, kind in zip(range(clients), list(KINDS) * clients)]
    random.shuffle(kinds)

    async def bad_ones() -> None:
        async with asyncio.TaskGroup() as tasks:
            for kind in kinds:
                tasks.create_task(bad(address, kind))
                await asyncio.sleep(seconds / clients)

    async def steered() -> list[Viewer]:
        seen: list[Viewer] = []
        while time.monotonic() < end:
            seen.append(await Viewer(address, 1 + 12 * 4, random.randrange(2**32), fps, EVERY).watch())
            await asyncio.sleep(0.0 if seen[-1].video else 0.5)  # all places were taken
        return [viewer for viewer in seen if viewer.video]

    async def look() -> None:
        await asyncio.sleep(seconds / 3)
        held.append(memory(process))

    others, *_ = await asyncio.gather(steered(), bad_ones(), look())
    viewer = await steady
    held.append(memory(process))
    same, worst = compare(bytes(viewer.video), bytes(alone.video))
    errors = _metric(address, "starflow_errors_total")
    gained = held[-1] > FLAT * held[0]
    harmed = gained or not alone.well or not viewer.well or worst > ALIKE or max(viewer.waits, default=0.0) > gap
    unwell = [other.why for other in others if not other.well]
    return [
        ("bad clients", ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS)),
        ("viewer beside them", f"{frames} frames, ended: {viewer.why}; {same:.1%} of them are those that it gets "
                               f"alone, the worst differs by {worst:.2f} of 255 on average"),
        ("it waited for frames", f"{_waits([viewer])}; the bound is {gap:g} s"),
        ("other viewers, who steer", f"{len(others)}, {len(unwell)} harmed {unwell or ''}"),
        ("they waited for frames", _waits(others)),
        ("server's memory", "{:.0f} MB before, {:.0f} after a third of the time, {:.0f} at the end".format(*held)),
        ("server's errors", f"{errors:.0f}")], bool(harmed or unwell or errors)


def compare(video: bytes, alone: bytes) -> tuple[float, float]:
    """Share of frames that are the same, and the worst frame's mean difference; infinite where some are missing."""
    with tempfile.TemporaryDirectory() as folder:
        clips = []
        for name, content in (("one.mp4", video), ("other.mp4", alone)):
            (Path(folder) / name).write_bytes(content)
            clips.append(np.int16(read_video(Path(folder) / name)[0]) if content else np.zeros((0, 1, 1, 3), np.int16))
    if clips[0].shape != clips[1].shape or not len(clips[0]):
        return 0.0, float("inf")
    difference_T = np.abs(clips[0] - clips[1]).mean((1, 2, 3))
    return float((difference_T == 0).mean()), float(difference_T.max())


def frames_in(seconds: float, fps: float) -> int:
    """Whole latent frames of the pretrained model."""
    return 1 + int(seconds * fps) // 4 * 4


def of(values: Sequence[float], percent: float) -> str:
    """A percentile of seconds."""
    return f"{np.percentile(values, percent):.2f} s" if values else "-"


def _waits(viewers: Sequence[Viewer]) -> str:
    waits = [wait for viewer in viewers for wait in viewer.waits]
    return f"{len(waits)} times, {sum(waits):.2f} s in all, {max(waits, default=0.0):.2f} s at most"


def memory(process: int) -> float:
    """MB that a process holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines() if process else []
    return next((int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS")), 0.0)


def _metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address.replace('ws', 'http', 1)}/metrics") as answer:
        return next(float(line.split()[1]) for line in answer.read().decode().splitlines() if line.startswith(name))


async def run(address: str, process: int, asked: argparse.Namespace) -> tuple[list[Row], bool]:
    """All that was asked for."""
    address = address.replace("http", "ws", 1).rstrip("/")
    rows, harmed = [], False
    if asked.sessions:
        found = await speed(address, asked.sessions, min(asked.seconds, 600), asked.frames, asked.fps)
        rows, harmed = found[0], found[1]
    if asked.clients:
        found = await crowd(address, min(asked.clients, 1000), min(asked.seconds, 400), asked.fps, process, asked.gap)
        rows, harmed = rows + found[0], harmed or found[1]
    return rows, harmed


def main() -> None:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", nargs="?", default="", help="of a server that runs; by default one is started")
    parser.add_argument("--process", type=int, default=0, help="its number, on this machine")
    parser.add_argument("--sessions", type=int, default=0, help="sessions together; 0: speed is not measured")
    parser.add_argument("--clients", type=int, default=0, help="bad clients; 0: there are none")
    parser.add_argument("--seconds", type=float, default=60, help="that viewers watch")
    parser.add_argument("--together", default="auto", help="serve.together of a server that is started")
    parser.add_argument("--frames", type=int, default=97, help="of a session as fast as it can be")
    parser.add_argument("--fps", type=float, default=8, help="playing rate of the model")
    parser.add_argument("--gap", type=float, default=1.0, help="seconds that a viewer may wait for a frame at most")
    asked = parser.parse_args()
    if not asked.sessions and not asked.clients:
        parser.error("name --sessions or --clients")
    with contextlib.ExitStack() as stack:
        address, process = asked.address, asked.process
        if not address:
            workdir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(Server(workdir, sessions=max(4, asked.sessions), rate=100_000,
                                               together=asked.together))
            address, process = server.address, server.process
        rows, harmed = asyncio.run(run(address, process, asked))
    print(table(rows, ("figure", "measured")))
    sys.exit(harmed)


if __name__ == "__main__":
    main()
