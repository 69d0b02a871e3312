"""launch/space: what a Space reads of it fits the package; its videos play, follow and end, for several clients."""

import base64
import configparser
import dataclasses
import importlib.util
import io
import re
import time
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest
from PIL import Image

from starflow_jax.io.video import read_video
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.mesh import sampling_mesh
from tests.small_model import CAPTIONS, CONFIG, SETTINGS, small_system
from tests.small_run import ROOT

SPACE = ROOT / "launch/space"


def setup() -> configparser.ConfigParser:
    read = configparser.ConfigParser()
    read.read(ROOT / "setup.cfg")
    return read


def test_what_a_space_reads_fits_the_package() -> None:
    _, front, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    facts = {name: value.strip('"') for name, value in re.findall(r"^(\w+): (.+)$", front, re.M)}
    options = setup()["options"]
    assert facts["sdk"] == "gradio" and (SPACE / facts["app_file"]).is_file()
    assert facts["license"] == setup()["metadata"]["license"].lower() and len(facts["short_description"]) <= 60

    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    at_least, = re.findall(r"gradio>=([\d.]+)", setup()["options.extras_require"]["demo"])
    assert number(facts["sdk_version"]) >= number(at_least)
    assert number(facts["python_version"]) >= number(options["python_requires"].removeprefix(">="))
    needed = (SPACE / "requirements.txt").read_text()
    wheel, = re.findall(r"^starflow_jax\[demo\] @ https://\S+/(\S+\.whl)$", needed, re.M)
    assert wheel == f"starflow_jax-{setup()['metadata']['version']}-py3-none-any.whl"


@pytest.fixture(scope="module")
def app() -> ModuleType:
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    spec = importlib.util.spec_from_file_location("space_app", SPACE / "app.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(params: Any) -> Model:
    config = dataclasses.replace(CONFIG, sample=dataclasses.replace(SETTINGS, batch_size=1))
    mesh = sampling_mesh(config, 1, jax.local_devices()[:1])
    return Model(small_system(config), params, "small", "0123", mesh)


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(app: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(app, "time", made)
    return made


def client(name: str) -> Any:
    return SimpleNamespace(session_hash=name)


def shown(picture: str) -> int:
    """How many frames the picture has."""
    return Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/webp;base64,")))).n_frames


def test_a_video_plays_as_it_is_made_and_follows_the_prompt(app: ModuleType, model: Model, clock: Clock) -> None:
    """A part comes when the one before it has played, and at last all of it as a file."""
    player = app.Player(model)
    parts = player.play(CAPTIONS[0], 3, 1.5, 2, client("a"))
    picture, said, file = next(parts)
    assert (shown(picture), said, file) == (1, "1 of 17 frames", None)
    session = player._playing["a"]
    told = player.change(CAPTIONS[1], 1.25, client("a"))
    assert told == f"From frame {session.next_frame} on: {CAPTIONS[1]}"
    for index in range(4):
        picture, _, _ = next(parts)
        assert shown(picture) == 4 and clock.now == (1 + 4 * index) / player.fps
    _, said, file = next(parts)
    assert said == "17 frames: the end" and len(read_video(file)[0]) == 17
    assert list(session.record.changes.values()) == [{"prompt": CAPTIONS[1], "guidance": 1.25}]
    assert next(parts, None) is None and player._playing == {}


def test_a_client_harms_no_other(app: ModuleType, model: Model, clock: Clock) -> None:
    """Each sees what it sees alone, though another one steers, goes away in mid-video, or stops."""
    player = app.Player(model)

    def pictures(parts: Iterator[tuple]) -> list[str]:
        return [picture for picture, _, file in parts if file is None]

    alone = pictures(player.play(CAPTIONS[0], 3, 1.5, 2, client("a")))
    assert len(alone) == 5
    first, gone, stopped = (player.play(CAPTIONS[0], 3, 1.5, 2, client(name)) for name in "abc")
    seen = [next(first)[0]]
    next(gone), next(stopped)
    player.change(CAPTIONS[1], 3.0, client("b"))
    seen.append(next(first)[0])
    gone.close()
    player.stop(client("c"))
    *_, (_, said, file) = stopped
    assert said == "1 frames: the end" and file is not None
    assert seen + pictures(first) == alone and player._playing == {}


def test_what_cannot_be_is_said_in_words(app: ModuleType, model: Model, clock: Clock) -> None:
    player, long = app.Player(model), "x" * 2_001
    with pytest.raises(app.gr.Error, match="prompt: must be a text of at most 2000 bytes"):
        next(player.play(long, 0, 1.5, 2, client("a")))
    assert player._playing == {}
    assert player.change(CAPTIONS[0], 1.5, client("a")) == "Nothing plays; press Start."
    parts = player.play(CAPTIONS[0], None, 1.5, 2, client("a"))
    next(parts)
    with pytest.raises(app.gr.Error, match="prompt: must be a text of at most 2000 bytes"):
        player.change(long, 1.5, client("a"))
    assert next(parts)[1] == "5 of 17 frames"  # it goes on
    parts.close()


def test_the_page_has_a_queue_with_limits(app: ModuleType, model: Model) -> None:
    page = app.make_app(model)
    functions = {function.api_name: function for function in page.fns.values()}
    assert functions["play"].concurrency_limit == app.SESSIONS and page._queue.max_size == app.WAITING
    assert not functions["change"].queue and not functions["stop"].queue


@pytest.mark.slow
def test_clients_of_the_launched_app_see_their_videos(app: ModuleType, model: Model) -> None:
    """Over HTTP, three at once: two play, of which one is steered, and one waits until there is a place."""
    from gradio_client import Client

    page = app.make_app(model)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        clients = [Client(address, verbose=False) for _ in range(3)]
        jobs = [one.submit(CAPTIONS[0], seed, 1.5, 4, api_name="/play") for seed, one in enumerate(clients)]
        while not (playing := [job for job in jobs if job.outputs()]):
            time.sleep(0.1)
        steered = clients[jobs.index(playing[0])]
        assert steered.predict(CAPTIONS[1], 1.25, api_name="/change").endswith(CAPTIONS[1])
        for job in jobs:
            _, said, file = job.result(timeout=300)
            assert said == "33 frames: the end" and len(read_video(file)[0]) == 33
            assert len(job.outputs()) == 10 and job.outputs()[-2][1] == "33 of 33 frames"
        with pytest.raises(Exception, match="at most 2000 bytes"):
            clients[0].predict("x" * 2_001, 0, 1.5, 4, api_name="/play")
        assert steered.predict(CAPTIONS[1], 1.25, api_name="/change") == "Nothing plays; press Start."
    finally:
        page.close()
