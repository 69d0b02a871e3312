"""The page as its users have it: the pretrained model, served in a process of its own, played and steered in a browser.

What is asserted of stalls is that the player had nothing left to play, and that none comes where frames are made
several times as fast as they play: how fast that is, only the machine knows.
"""

import io
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starflow_jax.data.digits.captions import COLOUR_NAMES
from starflow_jax.data.digits.reader import default_reader
from starflow_jax.data.digits.scene import Motion, load_scans, render_clips, split_scan_ids
from starflow_jax.io.video import read_video
from tests.serving.served import Server
from tests.web.browser import MODEL_PIXELS, Page

pytestmark = pytest.mark.slow  # quick: tests/serving, without a browser
RED, BLUE = "a red seven moves left", "a blue three moves right"
FRAME = 0.125  # seconds


def colour(frames_THWC: np.ndarray) -> str:
    """That of a clip, by the reader that measures the model."""
    return COLOUR_NAMES[default_reader().read(frames_THWC[None])[1][0]]


def test_it_plays_while_it_is_made_and_follows_the_prompt(open_page: Callable[..., Page]) -> None:
    default_reader()  # which takes seconds, while frames would go by
    page = open_page()
    page.begin(RED)
    page.played(17)
    assert page.tab.evaluate("document.getElementById('video').currentTime") >= 15 * FRAME
    quality = page.quality()
    assert quality["decoded"] >= 16 and quality["dropped"] <= quality["decoded"] / 4, quality
    page.until_shown(lambda clip: colour(clip) == "red", last=max(page.frames()))
    page.tab.fill("#prompt", BLUE)
    page.tab.click("#send")
    page.until("document.getElementById('change').textContent.endsWith(' s')")
    page.until_shown(lambda clip: colour(clip) == "blue", last=max(page.frames()) + 48)
    stalls = page.tab.evaluate("seen.stalls")
    assert all(stall["held"] <= 1.5 * FRAME for stall in stalls), stalls  # with frames at hand it plays
    made, rate = float(page.text("rate_made")), 1 / FRAME
    assert made < 4 * rate or not [stall for stall in stalls if stall["at"] > 5 * FRAME], stalls
    assert float(page.text("rate_played")) <= 1.1 * rate
    page.tab.click("#stop")
    page.until("document.getElementById('state').textContent === 'Stopped.'")


def test_a_finite_video_ends_and_is_saved(open_page: Callable[..., Page], tmp_path: Path) -> None:
    """Every frame of it is decoded, and what is saved is what was played."""
    page = open_page()
    page.tab.uncheck("#endless")
    page.begin(BLUE, frames="17", seed="3")
    page.until("document.getElementById('state').textContent === 'The end.'")
    page.until("document.getElementById('video').ended")
    assert page.quality()["decoded"] == 17 and page.text("made") == page.text("played") == "17"
    saved, rate = read_video(page.save("save_video", tmp_path / "session.mp4"))
    assert len(saved) == 17 and rate == 1 / FRAME
    assert BLUE in page.save("save_record", tmp_path / "session.json").read_text()
    assert np.abs(shrunk(saved[-1]) - np.int32(page.pixels())).mean() < 6  # the last one still stands there


def shrunk(frame_HWC: np.ndarray) -> np.ndarray:
    """A frame of a video file in the model's own pixels."""
    scale = frame_HWC.shape[0] // MODEL_PIXELS
    return frame_HWC[scale // 2::scale, scale // 2::scale].astype(np.int32)


def test_a_video_begins_with_an_uploaded_picture(open_page: Callable[..., Page]) -> None:
    scans = load_scans(split_scan_ids("test")[:1], 15)
    where = Motion(np.array([[4, 2]], np.float32), np.zeros((1, 2), np.float32)).positions(1)
    picture = render_clips(scans, np.array([COLOUR_NAMES.index("green")]), where, size=MODEL_PIXELS)[0, 0]
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    page = open_page()
    page.tab.uncheck("#endless")
    page.tab.set_input_files("#picture", {"name": "zero.png", "mimeType": "image/png", "buffer": file.getvalue()})
    page.begin("a green zero moves up", frames="5")
    page.until("document.getElementById('video').ended")
    page.tab.evaluate("""new Promise((done) => {
        const video = document.getElementById("video");
        video.addEventListener("seeked", () => setTimeout(done, 1000));  // by then it is drawn
        video.currentTime = 0;
    })""")
    shown = np.int32(page.pixels())
    other = np.roll(picture, MODEL_PIXELS // 2, 1)
    assert np.abs(shown - picture).mean() < 12 < np.abs(shown - other).mean()  # of codec and file


def test_errors_are_said_in_words(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.begin("x" * 2_001)
    page.until("document.getElementById('error').textContent.includes('at most 2000 bytes')")
    page.tab.set_input_files("#picture", {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.begin(RED)
    page.until("document.getElementById('error').textContent.includes(\"can't be read as a picture\")")
    page.tab.set_input_files("#picture", [])
    page.begin(RED)
    page.played(5)
    assert page.text("error") == ""
    page.tab.fill("#prompt", "x" * 2_001)
    page.tab.click("#send")
    page.until("document.getElementById('error').textContent.includes('at most 2000 bytes')")
    page.played(9)  # the session goes on


def test_it_survives_a_restart_of_the_server(open_page: Callable[..., Page], server: Server) -> None:
    page = open_page()
    page.begin(RED)
    page.played(5)
    server.stop(signal.SIGTERM)
    page.until("document.getElementById('state').textContent === 'Ended: the server stops.'")
    page.begin(RED)
    page.until("document.getElementById('state').textContent.includes('The connection to the server has ended')")
    assert page.errors and all("ERR_CONNECTION_REFUSED" in error for error in page.errors)
    page.errors.clear()
    server.start()
    page.begin(BLUE)
    page.played(9)


def test_the_keyboard_is_enough(open_page: Callable[..., Page]) -> None:
    """Tab reaches every control that is not disabled; Enter begins, Space pauses."""
    page = open_page()

    def tab_to(name: str) -> None:
        for _ in range(40):
            if page.tab.evaluate("document.activeElement.id") == name:
                return
            page.tab.keyboard.press("Tab")
        raise AssertionError(f"Tab never comes to {name}")

    tab_to("prompt")
    page.tab.keyboard.press("Control+A")
    page.tab.keyboard.type(RED)
    page.tab.keyboard.press("Enter")
    page.played(5)
    reached = set()
    for _ in range(40):
        page.tab.keyboard.press("Tab")
        reached.add(page.tab.evaluate("document.activeElement.id || document.activeElement.textContent"))
    controls = page.tab.locator("button:visible, input:visible, textarea:visible, select:visible")
    wanted = controls.evaluate_all("all => all.filter((one) => !one.disabled).map((one) => one.id || one.textContent)")
    assert {"start", "pause", "picture", "seed"} < set(wanted) <= reached
    tab_to("pause")
    page.tab.keyboard.press("Space")
    page.until("document.getElementById('video').paused")
    assert "Paused" in page.text("state") and page.tab.get_attribute("#pause", "aria-pressed") == "true"
    page.tab.keyboard.press("Space")
    page.until("!document.getElementById('video').paused")


def test_every_control_has_a_name(open_page: Callable[..., Page]) -> None:
    page = open_page()
    names = page.names_of_controls()
    assert {"Start", "Pause", RED} <= set(names["button"]) and "Seed" in names["spinbutton"]
    assert all(name.strip() for of_role in names.values() for name in of_role), names
    assert "What the video shows" in names["textbox"]
    said = page.tab.locator("body").aria_snapshot()
    assert "status" in said and "region \"Video\"" in said and "heading" in said, said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_it_fits_its_window(
        open_page: Callable[..., Page], tmp_path: Path, width: int, height: int, scheme: str) -> None:
    """Nothing reaches beyond it, what is pressed is large enough for a finger; screenshots, to be looked at."""
    page = open_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.tab.screenshot(path=tmp_path / "before.png", full_page=True)
    for name in ("video", "prompt", "start"):
        box = page.tab.locator(f"#{name}").bounding_box()
        assert box and box["y"] + box["height"] <= height, name  # without scrolling
    page.begin(RED)
    page.played(9)
    page.tab.screenshot(path=tmp_path / "plays.png", full_page=True)
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
    heights = "all => all.map((one) => one.getBoundingClientRect().height)"
    assert min(page.tab.locator("button:visible").evaluate_all(heights)) >= 40
