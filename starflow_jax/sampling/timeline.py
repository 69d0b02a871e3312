"""When each stage of a stream worked on which frame, how its solver ended, and a picture of it."""

import dataclasses
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image, ImageDraw

from starflow_jax.flow.inversion import Report
from starflow_jax.io.files import atomic_path


@dataclasses.dataclass(frozen=True)
class Event:
    """When a stage's work on one latent frame was dispatched (`asked`) and done, in seconds from the stream's start."""

    stage: str  # "deep", or "rest": shallow stack, denoiser, codec
    frame: int
    asked: float
    done: float


class Timeline:
    """Waits, in threads of its own, for what was dispatched, and records when it was done. The threads end when it is
    closed, or when nobody has it any more."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.events: list[Event] = []
        self.asked: dict[str, int] = {}  # results dispatched so far, by stage
        self.deep_reports: list[Report] = []  # of each step of the deep block
        self.shallow_reports: list[Sequence[Report]] = []  # of the shallow blocks, for each of those
        self.finite: list[jax.Array] = []  # (B,) bool, of each part that was handed out: whether a video's pixels are
        self._queues: dict[str, queue.SimpleQueue] = {}
        self._threads: list[threading.Thread] = []
        self._ends = weakref.finalize(self, _end, self._queues)

    def watch(self, stage: str, frame: int, result: Any) -> None:
        """Record when the arrays of `result`, just dispatched, are ready."""
        if stage not in self._queues:
            waiting = self._queues[stage] = queue.SimpleQueue()
            # Not a method: a thread that holds the timeline would keep it for ever.
            self._threads.append(threading.Thread(target=_wait, args=(stage, waiting, self._began, self.events),
                                                  name=f"timeline {stage}", daemon=True))
            self._threads[-1].start()
        self.asked[stage] = self.asked.get(stage, 0) + 1
        self._queues[stage].put((frame, time.perf_counter() - self._began, result))

    def close(self) -> list[Event]:
        """All events, once the last is done. May be called again."""
        self._ends()
        for thread in self._threads:
            thread.join()
        self._threads = []
        return sorted(self.events, key=lambda event: event.done)


def _wait(stage: str, waiting: queue.SimpleQueue, began: float, events: list[Event]) -> None:
    while (item := waiting.get()) is not None:
        frame, asked, result = item
        jax.block_until_ready(result)
        del item  # or it is held until the next one comes
        events.append(Event(stage, frame, asked, time.perf_counter() - began))
        del result


def _end(queues: dict[str, queue.SimpleQueue]) -> None:
    for waiting in queues.values():
        waiting.put(None)


def draw_timeline(path: Path, events: list[Event], width: int = 900) -> None:
    """A PNG: one row per stage, one bar per latent frame, from when its work could begin to when it was done."""
    end = max((event.done for event in events), default=1.0) or 1.0
    image = Image.new("RGB", (width, 34 * 2 + 24), "white")
    draw, left = ImageDraw.Draw(image), 50
    scale = (width - left - 10) / end
    for row, stage in enumerate(("deep", "rest")):
        draw.text((4, row * 34 + 10), stage, fill="black")
        free = 0.0
        for event in (event for event in events if event.stage == stage):
            begin, free = max(event.asked, free), event.done
            x0, x1 = left + begin * scale, left + event.done * scale
            box = (x0, row * 34 + 4, max(x1, x0 + 1), row * 34 + 30)
            draw.rectangle(box, fill=("#4C78A8", "#F58518")[event.frame % 2])
            draw.text((box[0] + 2, row * 34 + 10), str(event.frame), fill="white")
    draw.text((left, 72), f"0 to {end:.2f} s; bars are latent frames", fill="black")
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")
