"""What matters most of the page in Firefox: it plays, without a stall, what is asked for, and is steered by keys."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starflow_jax.data.digits.reader import default_reader
from starflow_jax.io.video import read_video
from tests.web.firefox import Browser, firefox
from tests.web.test_page import BLUE, RED, colour, shrunk

pytestmark = pytest.mark.slow  # quick: tests/serving, without a browser

@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with firefox() as opened:
        yield opened


def test_it_plays_while_it_is_made_and_follows_prompt_and_keys(
    open_page: Any, browser: Browser, tmp_path: Path
) -> None:
    default_reader()  # which takes seconds, while frames would go by
    page = open_page()
    page.begin(RED, seed="0")
    page.played(17)
    quality = page.quality()
    assert quality["decoded"] >= 16 and quality["dropped"] <= quality["decoded"] / 4, quality
    page.until_shown(lambda clip: colour(clip) == "red", last=max(page.frames()) + 16)
    page.tab.fill("#prompt", BLUE)
    page.tab.click("#send")
    page.until("document.getElementById('change').textContent.endsWith(' s')")
    page.until_shown(lambda clip: colour(clip) == "blue", last=max(page.frames()) + 48)
    page.tab.screenshot(tmp_path / "plays.png")  # to be looked at
    page.tab.focus("#screen")
    for press in (page.tab.keyboard.down, page.tab.keyboard.up):
        press("ArrowRight")
        page.played(int(page.text("played")) + 16)
    page.tab.click("#pause")
    page.until("document.getElementById('video').paused")
    page.tab.click("#pause")
    page.until("!document.getElementById('video').paused")
    page.tab.click("#stop")
    page.until("document.getElementById('state').textContent === 'Stopped.'")
    page.tab.click("#save_record")
    changes = json.loads(browser.saved("session.json"))["changes"]
    assert [(change.get("prompt"), change.get("camera")) for change in changes] == [
        (BLUE, None), (None, "pan_right"), (None, "still")]


def test_a_finite_video_ends_and_is_saved_and_errors_are_said_in_words(
    open_page: Any, browser: Browser, tmp_path: Path
) -> None:
    page = open_page()
    page.begin("x" * 2_001)
    page.until("document.getElementById('error').textContent.includes('at most 2000 bytes')")
    page.tab.click("#endless")
    page.begin(BLUE, frames="17", seed="3")
    page.until("document.getElementById('state').textContent === 'The end.'")
    page.until("document.getElementById('video').ended")
    assert page.quality()["decoded"] == 17 and page.text("made") == page.text("played") == "17"
    page.tab.click("#save_video")
    file = tmp_path / "session.mp4"
    file.write_bytes(browser.saved(file.name))
    frames = read_video(file)[0]
    assert len(frames) == 17
    assert np.abs(shrunk(frames[-1]) - np.int32(page.pixels())).mean() < 6  # the last one still stands there
