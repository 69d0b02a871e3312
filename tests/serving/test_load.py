"""The load generator: what it says of good clients and of bad ones."""

import asyncio
import dataclasses

import numpy as np
import pytest

from starflow_jax.io.video import mp4_bytes
from tests.sampling.test_session import steerable
from tests.serving.clients import KINDS
from tests.serving.load import compare, crowd, frames_in, speed
from tests.serving.served import served_here
from tests.small_model import CONFIG


def test_frames_are_compared_one_by_one() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    other = frames.copy()
    other[4] = 255 - other[4]
    video = mp4_bytes(frames, 8)
    assert compare(video, video) == (1.0, 0.0)
    same, worst = compare(video, mp4_bytes(other, 8))
    assert same <= 0.8 and worst > 50
    assert compare(b"", video) == compare(mp4_bytes(frames[:4], 8), video) == (0.0, float("inf"))
    assert frames_in(2.0, 8) == 17


@pytest.mark.slow  # quick: tests/serving/test_app.py and test_engine.py, of each kind of client by itself
def test_viewers_are_measured_and_bad_clients_do_not_harm_them(params) -> None:
    model = steerable(dataclasses.replace(CONFIG.model, frames=4), params)
    with served_here(model, sessions=4, rate=100_000) as address:
        address = address.replace("http", "ws")
        rows, harmed = asyncio.run(speed(address, sessions=2, seconds=8, frames=17, fps=8))
        assert not harmed and len(rows) == 10 and all(" s" in text or "frames per" in text for _, text in rows)
        rows, harmed = asyncio.run(crowd(address, 2 * len(KINDS), seconds=4, fps=8, process=0, gap=float("inf")))
        assert not harmed, rows
        found = dict(rows)
        assert "33 frames, ended: end" in found["viewer beside them"] and found["server's errors"] == "0"
        assert all(f"2 {kind}" in found["bad clients"] for kind in KINDS)
