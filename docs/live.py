"""Takes pictures of the page of --mode=serve while a script steers it in Chromium: python -m docs.live

It serves the model in the package, asks for a video, pushes the camera, changes the prompt, and writes a moving picture
of it, and the page on a desktop and on a phone. Needs the extras serve and test-web.
"""

import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from docs.figures import PICTURES
from tests.serving.served import Server
from tests.web.browser import Page, chromium

DESKTOP, PHONE = {"width": 1000, "height": 720}, {"width": 390, "height": 844}
SHOWN = 640  # pixels of the moving picture's width
EVERY, COLOURS = 250, 64  # milliseconds from one of its pictures to the next; of its palette
FIRST, SECOND = "a blue three moves right", "a red seven moves left"


def steer(page: Page) -> Iterator[None]:
    """What the script does, from picture to picture."""
    page.begin(FIRST, seed="0")
    page.played(9)
    yield from [None] * 4
    page.tab.focus("#screen")
    page.tab.keyboard.down("ArrowUp")
    yield from [None] * 10
    page.tab.keyboard.up("ArrowUp")
    page.tab.fill("#prompt", SECOND)
    page.tab.click("#send")
    yield from [None] * 14
    page.tab.click("[data-move=zoom_in]")
    yield from [None] * 8


def taken(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(page.tab.screenshot())).convert("RGB")


def main() -> None:
    with tempfile.TemporaryDirectory() as nothing, chromium() as browser, Server(Path(nothing), rate=100_000) as server:
        page, pictures = Page(browser, server.address, viewport=DESKTOP), []
        due = time.monotonic()
        for _ in steer(page):
            pictures.append(taken(page))
            due = max(due + EVERY / 1000, time.monotonic())
            page.tab.wait_for_timeout(max(0.0, 1000 * (due - time.monotonic())))
        pictures[-1].save(PICTURES / "page.png", optimize=True)
        size = (SHOWN, round(SHOWN * DESKTOP["height"] / DESKTOP["width"]))
        small = [picture.resize(size, Image.Resampling.LANCZOS).quantize(COLOURS) for picture in pictures]
        small[0].save(PICTURES / "steered.gif", save_all=True, append_images=small[1:], duration=EVERY, loop=0)
        page.close()
        phone = Page(browser, server.address, viewport=PHONE, color_scheme="dark")
        phone.begin(FIRST, seed="0")
        phone.played(17)
        phone.tab.evaluate("scrollTo(0, 0)")
        taken(phone).save(PICTURES / "page_phone.png", optimize=True)
        phone.close()
    print(f"{PICTURES}: page.png, page_phone.png, steered.gif")


if __name__ == "__main__":
    main()
