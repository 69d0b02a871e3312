"""The camera by keys, buttons and dragging: over a small random model that follows one, and over the package's, whose
picture moves as it should."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starflow_jax.data.digits.camera_reader import read_cameras
from starflow_jax.data.digits.captions import DIRECTIONS
from starflow_jax.io.video import read_video
from starflow_jax.model.codec import frame_size
from tests.sampling.test_session import steerable
from tests.serving.served import served_here
from tests.small_model import CAPTIONS, CONFIG
from tests.web.browser import MODEL_PIXELS, Page

pytestmark = pytest.mark.slow  # quick: tests/serving/test_engine.py, without a browser
SEEN = 49  # frames that are compared


@pytest.fixture(scope="module")
def address(browser: Any, params: Any) -> Iterator[str]:
    with served_here(steerable(dataclasses.replace(CONFIG.model, frames=4), params), sessions=1) as made:
        yield made


def opened(browser: Any, address: str) -> Page:
    page = Page(browser, address, frame_size(CONFIG)[0])
    page.begin(CAPTIONS[0], seed="5")
    page.tab.focus("#screen")
    return page


def cameras(page: Page, file: Path) -> dict[int, Any]:
    """Those of a session, which ends, by the frame from which on they hold."""
    page.tab.click("#stop")
    page.until("document.getElementById('state').textContent === 'Stopped.'")
    changes = json.loads(page.save("save_record", file).read_text())["changes"]
    return {change["frame"]: change["camera"] for change in changes if "camera" in change}


def test_keys_move_the_picture(browser: Any, address: str, tmp_path: Path) -> None:
    """Up to where the key holds the video is that without one; behind it is another, for each key."""
    shown, asked = {}, {}
    for key in ("", "ArrowRight", "ArrowUp"):
        page = opened(browser, address)
        if key:
            page.tab.keyboard.down(key)
        page.played(SEEN)
        shown[key], asked[key] = page.frames(), cameras(page, tmp_path / "session.json")
        page.close()
    assert not asked[""]
    for key, move in (("ArrowRight", "pan_right"), ("ArrowUp", "tilt_up")):
        (first, camera), = asked[key].items()
        assert move in json.dumps(camera) and first < SEEN - 8
        assert difference(shown[key], shown[""], range(first - 4)) < 1 < difference(
            shown[key], shown[""], range(first, SEEN)), key
    both = range(max(*asked["ArrowUp"], *asked["ArrowRight"]), SEEN)
    assert difference(shown["ArrowRight"], shown["ArrowUp"], both) > 1


@pytest.mark.parametrize("key, across, down", [("ArrowRight", 1, 0), ("ArrowLeft", -1, 0), ("ArrowUp", 0, -1),
                                               ("ArrowDown", 0, 1)])
def test_the_packages_model_is_seen_from_where_the_key_leads(
    open_page: Callable[..., Page], tmp_path: Path, key: str, across: int, down: int
) -> None:
    """By the reader of the evaluation, in sides of the picture, of the frames after the key went down."""
    page = open_page()
    page.begin("a blue three moves right", seed="0")
    page.played(5)
    page.tab.focus("#screen")
    page.tab.keyboard.down(key)
    page.played(37)
    first, = cameras(page, tmp_path / "session.json")
    frames = read_video(page.save("save_video", tmp_path / "session.mp4"))[0]
    scale = frames.shape[1] // MODEL_PIXELS
    clip = frames[first:first + 13, scale // 2::scale, scale // 2::scale]
    path = read_cameras(clip[None], np.array([list(DIRECTIONS).index("right")])).path
    asked = 12 * 0.025  # docs/pages/data.md: what a move slides in a frame's time
    for moved, to in ((path.x_BT[0, -1], across), (path.y_BT[0, -1], down)):
        assert moved == pytest.approx(to * asked, abs=asked / 2)


def difference(shown: dict[int, np.ndarray], other: dict[int, np.ndarray], places: range) -> float:
    """The mean one of the frames that both have shown."""
    both = [place for place in places if place in shown and place in other]
    assert both
    return float(np.mean([np.abs(np.int32(shown[place]) - other[place]).mean() for place in both]))


def test_buttons_and_dragging_move_the_camera(browser: Any, address: str, tmp_path: Path) -> None:
    """A picture that is dragged to the right is seen from farther left; what is let go stands still."""
    page = opened(browser, address)
    page.played(5)
    page.tab.click("[data-move=zoom_in]")
    page.played(21)
    box = page.tab.locator("#screen").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.tab.mouse.move(x, y)
    page.tab.mouse.down()
    page.tab.mouse.move(x + 100, y + 5, steps=5)
    page.played(37)
    page.tab.mouse.up()
    page.played(49)
    moves = list(cameras(page, tmp_path / "session.json").values())
    assert moves == ["zoom_in", "pan_left", "still"]
    page.close()
