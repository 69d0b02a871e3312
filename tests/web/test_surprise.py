"""What only a flow can tell, on the page: where a frame's surprise lies, what it is under another prompt, and which of
four seeds is the most likely. And beginnings from a video, whose surprise is told too."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.data.digits.captions import COLOUR_NAMES
from starflow_jax.data.digits.scene import Motion, load_scans, render_clips, split_scan_ids
from starflow_jax.io.video import write_mp4
from tests.web.browser import MODEL_PIXELS, Page

pytestmark = pytest.mark.slow  # quick: tests/serving/test_app.py, without a browser
RED, BLUE = "a red seven moves left", "a blue three moves right"
HEAT = """() => {
    const heat = document.getElementById("heat");
    if (heat.hidden) return null;
    const pixels = heat.getContext("2d").getImageData(0, 0, heat.width, heat.height).data;
    return [...Array(36).keys()].map((cell) => {
        const [x, y] = [cell % 6, Math.floor(cell / 6)].map((at) => Math.floor((at + 0.5) * heat.width / 6));
        return pixels[4 * (y * heat.width + x) + 3];
    });
}"""  # how opaque each of the 6 x 6 tokens is; null: none is shown


def test_heat_lies_over_the_video_and_another_prompt_is_less_likely(open_page: Callable[[], Page]) -> None:
    page = open_page()
    page.begin(RED, other=BLUE)
    page.until("document.getElementById('other_line').getAttribute('points').split(' ').length >= 3")
    assert page.tab.evaluate(HEAT) is None
    page.tab.check("#overlay")
    page.until("!document.getElementById('heat').hidden")
    page.tab.click("#pause")
    cells = page.tab.evaluate(HEAT)
    row, column = divmod(int(np.argmax(cells)), 6)
    words = " ".join((("upper", "middle", "lower")[row // 2], ("left", "centre", "right")[column // 2]))
    assert max(cells) > 0 and page.text("region") == words.replace("middle centre", "centre")
    assert page.tab.locator("#heat").bounding_box() == page.tab.locator("#video").bounding_box()
    own, other = (float(re.findall(r"-?\d+\.\d+", page.text(name))[0]) for name in ("surprise", "other_surprise"))
    assert own < other  # the prompt that the frames were made from explains them
    page.tab.uncheck("#overlay")
    page.until("document.getElementById('heat').hidden")
    page.tab.click("#pause")
    page.tab.fill("#other", "")
    page.tab.click("#compare")
    page.until("document.getElementById('other_surprise').textContent === ''")


def test_four_seeds_are_ranked_by_likelihood(open_page: Callable[[], Page]) -> None:
    page = open_page()
    page.tab.fill("#prompt", RED)
    page.tab.fill("#seed", "5")
    page.tab.click("#four")
    page.until("document.querySelectorAll('#four_list li').length === 4")
    told = re.findall(r"Seed (\d+): (-?\d+\.\d+)", page.text("four_list"))
    seeds, bits = [int(seed) for seed, _ in told], [float(number) for _, number in told]
    assert sorted(seeds) == [5, 6, 7, 8] and bits == sorted(bits) and bits[0] < bits[-1]
    page.tab.locator("#four_list").scroll_into_view_if_needed()  # what can't be seen does not play by itself
    page.until("[...document.querySelectorAll('#four_list video')].every((video) => video.currentTime > 0)")
    page.tab.click("#four_list li:nth-child(2) button")
    assert page.tab.input_value("#seed") == str(seeds[1])


def test_a_session_begins_with_the_end_of_a_video_and_is_saved_when_it_is_stopped(
        open_page: Callable[[], Page], tmp_path: Path) -> None:
    scans = load_scans(split_scan_ids("test")[:1], 15)
    moves = Motion(np.array([[4, 2]], np.float32), np.array([[0, 0.75]], np.float32)).positions(17)
    frames = render_clips(scans, np.array([COLOUR_NAMES.index("green")]), moves, size=MODEL_PIXELS)[0]
    write_mp4(tmp_path / "given.mp4", frames, 8)
    page = open_page()
    page.tab.set_input_files("#picture", tmp_path / "given.mp4")
    page.begin("a green zero moves right")
    page.played(3)
    shown = page.frames()
    context = frames[-9:]  # three latent frames
    first = min(shown)
    apart = [np.abs(np.int32(shown[first]) - frame).mean() for frame in context]
    assert apart[first] < 12 and apart[first] < apart[-1] / 2
    page.tab.click("#stop")
    page.until("document.getElementById('state').textContent === 'Stopped.'")
    saved = page.save("save_record", tmp_path / "session.json")
    assert len(json.loads(saved.read_text())["given"]) == 9
