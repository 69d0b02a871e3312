"""Memory over many videos: python -m tests.robustness.soak --videos=2000 --streams=200

One process makes videos and streams by the Python API, each of another prompt and seed, and writes them; the memory
that it holds must stay within 5 % of what it held after the first fifty.
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import starflow_jax as sf
from starflow_jax.data.digits.captions import COLOUR_NAMES, DIGIT_WORDS
from tests.conftest import memory
from tests.robustness.report import write_report

FRAMES, WARM, GROWTH = 17, 50, 0.05
WAYS = ("left", "right", "up", "down")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make many videos in one process, and watch its memory.")
    parser.add_argument("--videos", type=int, default=2_000)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--report", type=Path, default=Path("runs/robustness/soak.json"))
    asked = parser.parse_args()
    report = soak(asked.videos, asked.streams)
    write_report(asked.report, report)
    print(json.dumps({name: value for name, value in report.items() if name != "megabytes"}, indent=1))
    sys.exit(0 if report["growth"] <= GROWTH else 1)


def soak(videos: int, streams: int) -> dict[str, Any]:
    """The report. growth: of the most memory held after the first WARM, against what was held just then."""
    model, held, began = sf.load(), list[int](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, is_stream in enumerate(spread(videos, streams)):
            prompt = prompt_of(number)
            if is_stream:
                frames = sum(len(part) for part in model.stream(prompt, seed=number, frames=FRAMES))
                assert frames == FRAMES
            else:
                video = model.generate(prompt, seed=number, frames=FRAMES)
                video.save(Path(folder) / "video.mp4")
            give_back_freed()
            held.append(memory())
            if (number + 1) % 100 == 0:
                print(f"{number + 1}: {held[-1] / 2**20:.0f} MB", flush=True)
    gc.collect()
    base, most = held[WARM - 1], max(held[WARM:])
    return {"videos": videos, "streams": streams, "frames": FRAMES, "seconds": round(time.monotonic() - began),
            "megabytes_after_the_first_fifty": round(base / 2**20), "most_megabytes_later": round(most / 2**20),
            "growth": round(most / base - 1, 4), "megabytes": [round(value / 2**20) for value in held[::20]]}


def give_back_freed() -> None:
    """To the system: what glibc keeps of freed memory grows slowly with its holes, and is no leak."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def spread(videos: int, streams: int) -> list[bool]:
    """Whether each is a stream: they lie evenly among the videos."""
    total = videos + streams
    return [(number + 1) * streams // total > number * streams // total for number in range(total)]


def prompt_of(number: int) -> str:
    """Another one each time, over and over."""
    every = list(itertools.product(COLOUR_NAMES, DIGIT_WORDS, WAYS))
    colour, digit, way = every[number * 7 % len(every)]
    return f"a {colour} {digit} moves {way}"


if __name__ == "__main__":
    main()
