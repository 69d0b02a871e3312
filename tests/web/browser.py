"""The page in a browser: what it shows, and whatever goes wrong in it."""

import base64
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PATIENCE = 300_000.0  # milliseconds that no test ever waits for
MODEL_PIXELS = 24  # of a frame's side, as the pretrained model makes it

# Runs in the page, where that can be before its own script: stalls with the seconds of video that the player still had,
# each frame that was shown in the model's own pixels, and violations of the Content-Security-Policy.
WATCH = """
window.seen = { stalls: [], frames: [], violations: [] };
addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.violatedDirective));
const watch = () => {
  const video = document.getElementById("video");
  if (!video) return;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = %d;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  window.pixels = () => {
    context.drawImage(video, 0, 0, canvas.width, canvas.height);
    return btoa(String.fromCharCode(...context.getImageData(0, 0, canvas.width, canvas.height).data));
  };
  video.addEventListener("waiting", () => {
    const held = video.buffered;
    seen.stalls.push({ at: video.currentTime, held: held.length ? held.end(held.length - 1) - video.currentTime : 0 });
  });
  const look = (now, frame) => {
    seen.frames = [...seen.frames.slice(-59), { time: frame.mediaTime, pixels: pixels() }];
    video.requestVideoFrameCallback(look);
  };
  video.requestVideoFrameCallback(look);
};
if (document.readyState === "loading") addEventListener("DOMContentLoaded", watch);
else watch();
"""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser. Skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra test-web")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("needs the browser chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


class Page:
    """One tab with the server's page in it."""

    def __init__(self, browser: Any, address: str, pixels: int = MODEL_PIXELS, **settings: Any) -> None:
        """settings: of Playwright's new_page, such as viewport and color_scheme."""
        self.errors: list[str] = []
        self.tab = browser.new_page(**settings)
        self.tab.set_default_timeout(PATIENCE)
        self.tab.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.add_init_script(WATCH % pixels)
        self._pixels = pixels
        self.tab.goto(address)
        self.until("document.getElementById('model').textContent.includes('frames per second')")

    def close(self) -> None:
        """Asserts that nothing went wrong in it."""
        wrong = [*self.errors, *self.tab.evaluate("seen.violations")]
        self.tab.close()
        assert not wrong, wrong

    def until(self, condition: str) -> None:
        """Until an expression of JavaScript holds."""
        self.tab.wait_for_function(f"() => {condition}", polling=100)

    def text(self, name: str) -> str:
        """Of the element of that id."""
        return self.tab.locator(f"#{name}").inner_text()

    def begin(self, prompt: str, **fields: str) -> None:
        """Say what to make, and press Start. fields: by their ids."""
        for name, value in {"prompt": prompt, **fields}.items():
            self.tab.fill(f"#{name}", value)
        self.tab.evaluate("void Object.assign(seen, { stalls: [], frames: [] })")
        self.tab.click("#start")

    def played(self, frames: int) -> None:
        """Until so many have begun to play."""
        self.until(f"Number(document.getElementById('played').textContent) >= {frames}")

    def pixels(self) -> np.ndarray:
        """(H, W, 3) uint8: what the video shows now, in the model's own pixels."""
        return self._decoded(self.tab.evaluate("pixels()"))

    def frames(self) -> dict[int, np.ndarray]:
        """What was shown lately, by its place in the video, (H, W, 3) uint8 each."""
        rate = self.tab.evaluate("fetch('v1/model').then((answer) => answer.json())")["fps"]
        shown = self.tab.evaluate("seen.frames")
        return {round(one["time"] * rate): self._decoded(one["pixels"]) for one in shown}

    def until_shown(self, is_it: Callable[[np.ndarray], bool], last: int, count: int = 8) -> None:
        """Until the last frames that were shown, (T, H, W, 3), so many, are what is waited for. Fails where frames
        beyond the place `last` were shown, and are not."""
        while True:
            frames = self.frames()
            newest = [frames[place] for place in sorted(frames)[-count:]]
            if len(newest) == count and is_it(np.stack(newest)):
                return
            assert max(frames, default=0) <= last, "it never was shown"
            self.tab.wait_for_timeout(250)

    def save(self, button: str, file: Path) -> Path:
        """The file that a button saves, which must have its name."""
        with self.tab.expect_download() as download:
            self.tab.click(f"#{button}")
        assert download.value.suggested_filename == file.name
        download.value.save_as(file)
        return file

    def _decoded(self, pixels: str) -> np.ndarray:
        held = np.frombuffer(base64.b64decode(pixels), np.uint8)
        return held.reshape(self._pixels, self._pixels, 4)[..., :3]

    def names_of_controls(self) -> dict[str, list[str]]:
        """The accessible names of what can be worked with, by role, as a screen reader is told them."""
        tree = self.tab.context.new_cdp_session(self.tab).send("Accessibility.getFullAXTree")["nodes"]
        roles = ("button", "textbox", "spinbutton", "checkbox", "combobox", "slider", "radio", "link", "switch")
        found: dict[str, list[str]] = {}
        for node in tree:
            role = node.get("role", {}).get("value", "")
            if not node["ignored"] and role in roles:
                found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
        return found

    def quality(self) -> dict[str, int]:
        """How many frames the player decoded and dropped."""
        return json.loads(self.tab.evaluate("""() => {
            const found = document.getElementById("video").getVideoPlaybackQuality();
            return JSON.stringify({ decoded: found.totalVideoFrames, dropped: found.droppedVideoFrames });
        }"""))
