"""Firefox for the tests of the page, over WebDriver BiDi, which it speaks by itself: Playwright drives only a build of
its own, or versions newer than Debian's. A `Tab` has those of the methods of Playwright's page that `Page` needs, under
their names; keys and clicks are those of the browser's input, not events made by a script."""

import base64
import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PATIENCE = 300.0  # seconds that no test ever waits for
KEYS = {"ArrowRight": "\ue014"}


@contextlib.contextmanager
def firefox() -> Iterator["Browser"]:
    """Skips the test where there is none."""
    client = pytest.importorskip("websockets.sync.client", reason="needs the extra serve")
    path = shutil.which("firefox-esr") or shutil.which("firefox")
    if path is None:
        pytest.skip("needs the browser firefox")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        downloads, profile, said = (Path(folder) / name for name in ("downloads", "profile", "said"))
        downloads.mkdir(), profile.mkdir()
        settings = {"browser.download.folderList": 2, "browser.download.dir": str(downloads)}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in settings.items()]
        (profile / "user.js").write_text("\n".join(lines))
        with said.open("wb") as output:
            process = subprocess.Popen(
                [path, "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port=0", "about:blank"],
                stdout=output, stderr=output)
        try:
            with client.connect(f"{_address(process, said)}/session", max_size=None) as socket:
                yield Browser(socket, downloads)
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen, said: Path) -> str:
    """Of the browser's remote end, once it listens."""
    until = time.monotonic() + PATIENCE
    while not (found := re.search(r"BiDi listening on (ws://\S+)", said.read_text(errors="replace"))):
        assert process.poll() is None and time.monotonic() < until, said.read_text(errors="replace")
        time.sleep(0.1)
    return found[1]


class Browser:
    """A session with a browser."""

    def __init__(self, socket: Any, downloads: Path) -> None:
        self._socket, self._numbers, self._downloads = socket, itertools.count(1), downloads
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.ask("session.new", capabilities={})
        self.ask("session.subscribe", events=["log.entryAdded"])

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command. Raises AssertionError where the browser refuses it."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message["type"] == "event":
                for listener in self.listeners:
                    listener(message["params"])
            elif message["id"] == number:
                assert message["type"] == "success", message
                return message["result"]

    def saved(self, name: str) -> bytes:
        """What the download of that name holds, once all of it is there; it is taken away."""
        file, until = self._downloads / name, time.monotonic() + PATIENCE
        while not file.exists() or not file.stat().st_size or file.with_name(f"{name}.part").exists():
            assert time.monotonic() < until, list(self._downloads.iterdir())
            time.sleep(0.1)
        content = file.read_bytes()
        file.unlink()
        return content

    def new_page(self) -> "Tab":
        return Tab(self)


class Tab:
    """One tab."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._context = browser.ask("browsingContext.create", type="tab")["context"]
        self.keyboard, self._scripts = Keyboard(self._act), list[str]()

    def set_default_timeout(self, milliseconds: float) -> None:
        """Every wait ends after PATIENCE."""

    def on(self, event: str, listener: Callable[[Any], Any]) -> None:
        """event: "console", of messages with type and text; or "pageerror", of what was thrown and not caught."""

        def hear(entry: dict[str, Any]) -> None:
            if entry.get("source", {}).get("context") != self._context:
                return
            if event == "console" and entry["type"] == "console":
                listener(SimpleNamespace(type=entry["level"], text=entry["text"]))
            elif event == "pageerror" and entry["type"] == "javascript" and entry["level"] == "error":
                listener(entry["text"])

        self._browser.listeners.append(hear)

    def add_init_script(self, script: str) -> None:
        """To run once a page is there: in Firefox 140, one that is there before it now and then causes the error
        "Permission denied to access property". Violations of the Content-Security-Policy while the page loads are not
        seen that way."""
        self._scripts.append(script)

    def goto(self, address: str) -> None:
        self._browser.ask("browsingContext.navigate", context=self._context, url=address, wait="complete")
        for script in self._scripts:
            self.evaluate(f"() => {{ {script} }}")

    def close(self) -> None:
        self._browser.ask("browsingContext.close", context=self._context)

    def evaluate(self, expression: str) -> Any:
        """Of an expression's value, or of what a function returns."""
        source = f"(async () => {{ const it = ({expression}); " \
                 "return JSON.stringify(await (typeof it === 'function' ? it() : it)) ?? null; })()"
        found = self._browser.ask("script.evaluate", expression=source, awaitPromise=True,
                                  target={"context": self._context})
        assert found["type"] == "success", found["exceptionDetails"]["text"]
        return json.loads(found["result"].get("value", "null"))

    def wait_for_function(self, function: str, polling: float) -> None:
        """polling: in milliseconds."""
        until = time.monotonic() + PATIENCE
        while not self.evaluate(f"Boolean(({function})())"):
            assert time.monotonic() < until, function
            time.sleep(polling / 1000)

    def wait_for_timeout(self, milliseconds: float) -> None:
        time.sleep(milliseconds / 1000)

    def locator(self, selector: str) -> Any:
        return SimpleNamespace(inner_text=lambda: self.evaluate(f"{_found(selector)}.innerText"))

    def screenshot(self, path: Path) -> None:
        content = self._browser.ask("browsingContext.captureScreenshot", context=self._context)["data"]
        path.write_bytes(base64.b64decode(content))

    def focus(self, selector: str) -> None:
        self.evaluate(f"void {_found(selector)}.focus()")

    def fill(self, selector: str, text: str) -> None:
        """Typed in place of what is there."""
        self.evaluate(f"(() => {{ const it = {_found(selector)}; it.focus(); it.select(); }})()")
        self.keyboard.type(text)

    def click(self, selector: str) -> None:
        x, y = self.evaluate(f"""(() => {{
            const it = {_found(selector)};
            it.scrollIntoView({{ block: "center", behavior: "instant" }});
            const box = it.getBoundingClientRect();
            return [Math.round(box.x + box.width / 2), Math.round(box.y + box.height / 2)];
        }})()""")
        steps = [{"type": "pointerMove", "x": x, "y": y}, {"type": "pointerDown", "button": 0},
                 {"type": "pointerUp", "button": 0}]
        self._act({"type": "pointer", "id": "mouse", "actions": steps})

    def _act(self, actions: dict[str, Any]) -> None:
        self._browser.ask("input.performActions", context=self._context, actions=[actions])


class Keyboard:
    """Keys by their names, as Playwright calls them."""

    def __init__(self, act: Callable[[dict[str, Any]], None]) -> None:
        self._act = act

    def down(self, key: str) -> None:
        self._keys([("keyDown", key)])

    def up(self, key: str) -> None:
        self._keys([("keyUp", key)])

    def type(self, text: str) -> None:
        self._keys([(way, letter) for letter in text for way in ("keyDown", "keyUp")])

    def _keys(self, steps: list[tuple[str, str]]) -> None:
        self._act({"type": "key", "id": "keyboard",
                   "actions": [{"type": way, "value": KEYS.get(key, key)} for way, key in steps]})


def _found(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"
