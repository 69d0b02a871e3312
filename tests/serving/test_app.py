"""The HTTP API and the WebSocket, in this process, over a small model."""

import base64
import dataclasses
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from PIL import Image

from starflow_jax.config import Serve, UserError
from starflow_jax.io.video import read_video, write_mp4
from starflow_jax.sampling.api import Model
from starflow_jax.serving.app import KINDS, PAGE, make_app
from starflow_jax.serving.asked import read_asked, read_json
from starflow_jax.serving.describe import openapi
from starflow_jax.serving.engine import Engine
from starflow_jax.serving.guard import Rate
from starflow_jax.serving.metrics import Metrics
from starflow_jax.serving.uploads import read_clip, read_picture
from tests.sampling.test_session import steerable, whole
from tests.small_model import CAPTIONS, CONFIG

testclient = pytest.importorskip("starlette.testclient")
STRIDE = CONFIG.codec.time_stride
HOST = "http://127.0.0.1:8000"
ORIGIN = {"origin": HOST}
SOCKET = "ws://127.0.0.1:8000/v1/session"


@pytest.fixture(scope="module")
def model(params) -> Model:
    """Its file name is that of a folder of the server, which nobody must see."""
    made = steerable(dataclasses.replace(CONFIG.model, frames=4), params)
    return dataclasses.replace(made, source="/srv/secret/workdir")


def served(model: Model, token: str = "", **settings: Any) -> Any:
    metrics = Metrics()
    engine = Engine(model, Serve(**settings), metrics)
    engine.start(warm=False)
    return testclient.TestClient(make_app(engine, Serve(**settings), metrics, token), base_url=HOST,
                                 raise_server_exceptions=False)


@pytest.fixture(scope="module")
def client(model: Model) -> Iterator[Any]:
    with served(model, sessions=2, upload_bytes=20_000, prompt_bytes=100, rate=100_000) as made:
        yield made


def frames_of(content: bytes, tmp_path: Path) -> np.ndarray:
    (tmp_path / "one.mp4").write_bytes(content)
    return read_video(tmp_path / "one.mp4")[0]


def alike(shown: np.ndarray, made: np.ndarray) -> bool:
    """Frames of a video file, enlarged, and those they were made of."""
    scale = shown.shape[1] // made.shape[1]
    centres = shown[:, scale // 2::scale, scale // 2::scale].astype(int)
    return bool(len(shown) == len(made) and np.abs(centres - made).mean() < 12)


def test_a_video_is_streamed_or_made_as_a_job(client: Any, model: Model, tmp_path: Path) -> None:
    asked = {"prompt": CAPTIONS[0], "seed": 3, "frames": 1 + 2 * STRIDE}
    made = whole(model.stream(CAPTIONS[0], seed=3, frames=9))
    streamed = client.post("/v1/videos", json=asked, headers={"accept": "video/mp4"})
    assert streamed.status_code == 200 and streamed.headers["content-type"] == "video/mp4"
    assert alike(frames_of(streamed.content, tmp_path), made)
    begun = client.post("/v1/videos", json=asked)
    assert begun.status_code == 202 and begun.headers["location"] == begun.json()["url"]
    job = until_over(client, begun.json()["url"])
    assert job["status"] == "done" and job["frames_made"] == 9 and job["seed"] == 3
    assert client.get(job["url"], headers={"accept": "video/mp4"}).content == streamed.content
    assert "secret" not in json.dumps(job) and job["record"]["prompt"] == CAPTIONS[0]
    (tmp_path / "one.json").write_text(json.dumps(job["record"]))
    np.testing.assert_array_equal(whole(model.replay(tmp_path / "one.json")), made)
    assert client.delete(job["url"]).status_code == 204
    assert client.get(job["url"]).status_code == client.delete(job["url"]).status_code == 404


def until_over(client: Any, url: str) -> dict[str, Any]:
    for _ in range(3000):
        job = client.get(url).json()
        if job["status"] in ("done", "failed"):
            return job
        time.sleep(0.02)
    raise AssertionError(job)


def test_a_video_begins_with_a_picture(client: Any, model: Model, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    asked = {"prompt": CAPTIONS[0], "frames": 5, "image": base64.b64encode(file.getvalue()).decode()}
    answer = client.post("/v1/videos", json=asked, headers={"accept": "video/mp4"})
    made = whole(model.stream(CAPTIONS[0], frames=5, image=picture))
    assert alike(frames_of(answer.content, tmp_path), made)
    asked["image"] = base64.b64encode(file.getvalue()[:60]).decode()
    damaged = client.post("/v1/videos", json=asked)
    assert damaged.status_code == 422 and "can't be read as a picture" in damaged.json()["error"]


def test_a_video_begins_with_the_end_of_a_video(client: Any, model: Model, tmp_path: Path) -> None:
    """As many latent frames as a window's context, or the largest power of two that there are."""
    frames = np.random.default_rng(0).integers(0, 256, (19, 8, 8, 3), np.uint8)
    for count, kept in ((19, 1 + 2 * STRIDE), (1 + STRIDE, 1 + STRIDE)):
        write_mp4(tmp_path / "given.mp4", frames[:count], model.config.text.fps or 8)
        given = read_video(tmp_path / "given.mp4")[0]
        asked = {"prompt": CAPTIONS[0], "video": base64.b64encode((tmp_path / "given.mp4").read_bytes()).decode()}
        answer = client.post("/v1/videos", json=asked, headers={"accept": "video/mp4"})
        made = frames_of(answer.content, tmp_path)
        extended = model.extend(given[-kept:], CAPTIONS[0], seed=0)
        assert len(made) == kept + 3 * STRIDE and alike(made, extended.frames)
    asked["frames"] = 1 + STRIDE
    full = client.post("/v1/videos", json=asked)
    assert full.status_code == 422 and "the 5 given frames fill it" in full.json()["error"]
    write_mp4(tmp_path / "given.mp4", frames[:STRIDE], model.config.text.fps or 8)
    content = (tmp_path / "given.mp4").read_bytes()
    for part, words in ((content, "needs 5 or more"), (content[:-100], "can't be read as a video")):
        short = client.post("/v1/videos", json={**asked, "video": base64.b64encode(part).decode()})
        assert short.status_code == 422 and words in short.json()["error"], short.text


def test_of_a_long_video_no_more_is_kept_than_is_wanted(tmp_path: Path) -> None:
    frames = np.repeat(np.arange(60, dtype=np.uint8)[:, None, None, None] * 4, 3, axis=3).repeat(16, 1).repeat(16, 2)
    write_mp4(tmp_path / "long.mp4", frames, 10)
    read, rate = read_clip((tmp_path / "long.mp4").read_bytes(), 8, 8, seconds=1.5)
    assert rate == 10 and read.shape == (16, 8, 8, 3)
    np.testing.assert_allclose(read[:, 4, 4, 0], frames[-16:, 4, 4, 0], atol=4)


def test_a_job_tells_its_videos_exact_likelihood(client: Any, model: Model) -> None:
    asked = {"prompt": CAPTIONS[0], "seed": 3, "surprise": True}
    job = until_over(client, client.post("/v1/videos", json=asked).json()["url"])
    video = model.generate(CAPTIONS[0], seed=3)
    latents = model.config.model
    dimensions = latents.frames * latents.height * latents.width * latents.channels
    np.testing.assert_allclose(job["bits_per_dimension"], -video.log_likelihood / dimensions / np.log(2), rtol=1e-3)
    plain = until_over(client, client.post("/v1/videos", json={**asked, "surprise": False}).json()["url"])
    assert "bits_per_dimension" not in plain
    streamed = client.post("/v1/videos", json=asked, headers={"accept": "video/mp4"})
    assert streamed.status_code == 422 and "surprise: is told of a job" in streamed.json()["error"]


def test_a_picture_that_takes_too_much_is_refused() -> None:
    file = io.BytesIO()
    Image.new("1", (7_000, 7_000)).save(file, "PNG")  # a few kilobytes, 49 million pixels
    with pytest.raises(UserError, match="40 million pixels"):
        read_picture(file.getvalue(), 8, 8)


@pytest.mark.filterwarnings("ignore:.*no training caption")
@pytest.mark.parametrize("body, status, words", [
    ("{", 422, "is no JSON"), ("[" * 9_000, 422, "is no JSON"), ("[]", 422, "must be a JSON object"),
    ("{}", 422, "prompt: is missing"), ({"prompt": 3}, 422, "must be a text"),
    ({"prompt": "x" * 101}, 422, "at most 100 bytes"), ('{"prompt": "\\ud800"}', 422, "must be a text"),
    ({"prompt": "x", "seed": -1}, 422, "seed: must be"), ({"prompt": "x", "seed": True}, 422, "seed: must be"),
    ({"prompt": "x", "frames": 7}, 422, "1 + a multiple of 4"), ({"prompt": "x", "frames": 1e9}, 422, "frames: must"),
    ({"prompt": "x", "guidance": "high"}, 422, "guidance: must"), ({"prompt": "x", "guidance": -1}, 422, "guidance"),
    ('{"prompt": "x", "guidance": NaN}', 422, "no JSON"), ({"prompt": "x", "camera": "/etc/passwd"}, 422, "camera"),
    ({"prompt": "x", "camera": "poses.json"}, 422, "camera: must be moves"),
    ({"prompt": "x", "camera": [[1, 2], [3]]}, 422, "camera"), ({"prompt": "x", "image": "?"}, 422, "base64"),
    ({"prompt": "x", "workdir": "/"}, 422, "'workdir': is nothing"),
    ({"prompt": "x", "surprise": "map"}, 422, "surprise: must be true or false"),
    ({"prompt": "x", "other_prompt": "y"}, 422, "nothing"), ({"prompt": "x", "video": 3}, 422, "video: must be"),
    ({"prompt": "x", "image": ""}, 422, "image: is empty"),
    ({"prompt": "x", "image": "AAAA", "video": "AAAA"}, 422, "both given"),
    ("x" * 20_001, 413, "larger than 20000 bytes")])
def test_what_cannot_be_is_one_line(client: Any, body: Any, status: int, words: str) -> None:
    answer = client.post("/v1/videos", content=body if isinstance(body, str) else json.dumps(body))
    assert answer.status_code == status and words in answer.json()["error"], answer.text
    assert "secret" not in answer.text and "\n" not in answer.json()["error"]


def test_a_session_is_steered_over_a_websocket(client: Any, model: Model, tmp_path: Path) -> None:
    with client.websocket_connect(SOCKET, headers=ORIGIN) as socket:
        socket.send_json({"prompt": CAPTIONS[0], "seed": 4, "surprise": "map"})
        told, file = [], b""
        while (message := receive(socket, told)) is None or message["type"] != "ended":
            if message is None:
                file += told.pop()
            elif message["type"] == "frames":
                if message["shown"] == 1:
                    socket.send_json({"prompt": CAPTIONS[1], "guidance": 0.5, "other_prompt": CAPTIONS[1]})
                    socket.send_json({"guidance": 1e12})
                    socket.send_json({"colour": "red"})
                    socket.send_text("rubbish")
                if message["shown"] < 1 + 8 * STRIDE:
                    socket.send_json({"played": message["shown"]})
                else:
                    socket.send_json({"pause": True, "record": True})
            elif message["type"] == "record":
                record = message["record"]
                break
        kinds = [one["type"] for one in told]
        assert kinds[0] == "begun" and {"video", "frames", "changed", "shown", "record"} <= set(kinds)
        assert kinds.count("refused") == 3  # beside the change that could be
        changed = next(one for one in told if one["type"] == "changed")
        assert "prompt" in changed["names"] and changed["frame"] % STRIDE == 1
        assert next(one for one in told if one["type"] == "shown")["frame"] == changed["frame"]
        assert next(one for one in told if one["type"] == "video")["codec"].startswith("avc1.64")
    assert "secret" not in json.dumps(told)
    (tmp_path / "one.json").write_text(json.dumps(record))
    again = whole(model.replay(tmp_path / "one.json"))
    shown = frames_of(file, tmp_path)  # the record may be of frames more, which were on their way
    assert alike(shown, again[:len(shown)]) and len(shown) >= 1 + 8 * STRIDE
    found = [one["surprise"] for one in told if one["type"] == "frames"]
    assert len(found) >= 9 and all(isinstance(surprise, float) for surprise in found) and np.ptp(found) > 0
    changed_at = 1 + (changed["frame"] - 1) // STRIDE
    of_frames = [one for one in told if one["type"] == "frames"]
    for index, one in enumerate(of_frames):
        assert np.shape(one["surprise_map"]) == model.system.token_grid
        np.testing.assert_allclose(np.mean(one["surprise_map"]), one["surprise"], atol=1e-4)
        if "other_surprise" in one:  # the prompt that the video is made from, once it has changed
            assert (abs(one["other_surprise"] - one["surprise"]) < 1e-5) == (index >= changed_at)
    assert sum("other_surprise" in one for one in of_frames) > len(of_frames) - 4
    settles(client, "starflow_sessions 0.0")  # its place is free


def receive(socket: Any, told: list[Any]) -> dict[str, Any] | None:
    """The next message; None for a piece of the video. Added to what was told."""
    message = socket.receive()
    assert message["type"] == "websocket.send", message
    piece = message.get("bytes")
    told.append(piece if piece is not None else json.loads(message["text"]))
    return None if piece is not None else told[-1]


def settles(client: Any, line: str) -> None:
    for _ in range(500):
        if line in client.get("/metrics").text:
            return
        time.sleep(0.02)
    raise AssertionError(client.get("/metrics").text)


def test_a_first_message_that_cannot_be_ends_the_websocket(client: Any) -> None:
    for first, words in (({"prompt": 3}, "must be a text"), ({"prompt": "x", "frames": 6}, "multiple")):
        with client.websocket_connect(SOCKET) as socket:
            socket.send_json(first)
            answer = socket.receive_json()
            assert answer["type"] == "ended" and answer["failed"] and words in answer["why"]
            assert socket.receive()["type"] == "websocket.close"


def test_a_client_that_leaves_in_mid_request_is_no_error(client: Any) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "scheme": "http",
             "headers": [(b"host", b"127.0.0.1:8000")], "client": ("127.0.0.1", 5)}
    anyio.run(client.app, scope, receive, send)
    assert not sent and "starflow_errors_total 0.0" in client.get("/metrics").text


def test_a_client_that_leaves_before_the_first_piece_gives_its_place_up(client: Any) -> None:
    body = json.dumps({"prompt": CAPTIONS[0], "frames": 1 + 400 * STRIDE}).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        raise OSError("the client is gone")

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}, "method": "POST", "path": "/v1/videos", "scheme": "http",
             "headers": [(b"host", b"127.0.0.1:8000"), (b"accept", b"video/mp4")], "query_string": b"",
             "client": ("127.0.0.1", 5)}
    client.portal.call(client.app, scope, receive, send)
    settles(client, "starflow_sessions 0.0")
    assert "starflow_errors_total 0.0" in client.get("/metrics").text


@pytest.mark.filterwarnings("ignore:.*no training caption")
def test_places_are_limited(model: Model) -> None:
    with served(model, sessions=1, queue=1, videos=1) as client:
        with client.websocket_connect(SOCKET) as one, client.websocket_connect(SOCKET) as two:
            one.send_json({"prompt": CAPTIONS[0]})
            assert one.receive_json() == {"type": "begun"}
            two.send_json({"prompt": CAPTIONS[0]})
            assert two.receive_json() == {"type": "queued", "place": 1}
            assert client.post("/v1/videos", json={"prompt": "x"}).status_code == 503
            one.close()
            assert two.receive_json() == {"type": "begun"}
            job = client.post("/v1/videos", json={"prompt": "x", "frames": 1}).json()
            assert job["status"] == "queued"
            assert client.get(job["url"], headers={"accept": "video/mp4"}).status_code == 409
            assert client.post("/v1/videos", json={"prompt": "x", "frames": 1}).status_code == 503
        done = until_over(client, job["url"])
        newer = client.post("/v1/videos", json={"prompt": "x", "frames": 1}).json()  # takes the place of the older
        assert done["status"] == "done" and client.get(job["url"]).status_code == 404
        assert until_over(client, newer["url"])["status"] == "done"


def test_only_pages_of_this_server_and_clients_with_the_token_are_let_in(model: Model) -> None:
    with served(model, token="a-token-of-some-length", rate=2, origins="https://video.example.org") as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/", "/metrics", "/openapi.json", "/v1/model", "/page/page.js"):
            assert client.get(path).status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        bearer = {"authorization": "Bearer a-token-of-some-length"}
        assert client.get("/v1/model", headers=bearer).status_code == 200
        with pytest.raises(testclient.WebSocketDisconnect):
            client.websocket_connect(SOCKET).__enter__()
        entered = client.get("/?token=a-token-of-some-length", follow_redirects=False)
        assert entered.status_code == 303 and "HttpOnly" in entered.headers["set-cookie"]
        assert client.get("/").status_code == 200
        for origin, status in (("http://evil.example", 403), ("null", 403), ("https://video.example.org", 422),
                               (HOST, 422), (HOST, 429)):
            assert client.post("/v1/videos", content="{}", headers={"origin": origin}).status_code == status
    with served(model) as client:
        assert client.get("/", headers={"host": "evil.example:8000"}).status_code == 421
        assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200
        with pytest.raises(testclient.WebSocketDisconnect):
            client.websocket_connect(SOCKET, headers={"origin": "http://evil.example"}).__enter__()


def test_a_rate_is_kept_of_few_clients_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rate, "MOST_CLIENTS", 3)
    rate = Rate(1)
    assert rate.allows("a") and not rate.allows("a") and all(rate.allows(name) for name in "bcd")
    assert len(rate._when) == 3 and rate.allows("a")


def test_answers_say_what_browsers_may_do_and_what_the_server_is(client: Any) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "script-src 'self'" in page.headers[
        "content-security-policy"]
    assert client.get("/nowhere").json() == {"error": "Not Found"}
    assert client.get("/nowhere").headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/../app.py").status_code == client.get("/page/app.py").status_code == 404
    facts = client.get("/v1/model").json()
    assert facts["time_stride"] == STRIDE and facts["steerable"] and "secret" not in json.dumps(facts)
    assert "starflow_queue 0.0" in client.get("/metrics").text and client.get("/healthz").json() == {"status": "ok"}


def test_the_description_names_what_there_is(client: Any) -> None:
    """Each path and method, and every field that is read, is in OpenAPI's description."""
    described = client.get("/openapi.json").json()
    assert described == json.loads(json.dumps(openapi(Serve(upload_bytes=20_000, prompt_bytes=100))))
    paths = {route.path: route.methods for route in client.app.routes if getattr(route, "methods", None)}
    found = {(path, method.lower()) for path, methods in paths.items() for method in methods - {"HEAD"}
             if path != "/openapi.json" and not path.startswith("/page") and path != "/"}
    named = {(path, method) for path, of in described["paths"].items() for method in of if method != "parameters"}
    assert named == found
    asked = described["components"]["schemas"]["Asked"]["properties"]
    values = {"prompt": "x", "seed": 1, "frames": 5, "guidance": 1.0, "camera": "pan_left", "image": "AAAA",
              "video": None, "surprise": True}
    assert set(asked) == set(values)
    assert read_asked({**values, "surprise": "map"}, Serve(), steered=True).maps
    assert read_asked(values, Serve()).settings == {"seed": 1, "guidance": 1.0, "camera": "pan_left", "surprise": True}
    floats = read_asked({"prompt": "x", "seed": 1.0, "frames": 5.0}, Serve())  # whole numbers, to JSON
    assert (floats.settings, floats.frames) == ({"seed": 1}, 5) and isinstance(floats.settings["seed"], int)
    for name in asked:
        with pytest.raises(UserError, match=name):
            read_asked({**values, name: {}}, Serve())
    with pytest.raises(UserError, match="is no JSON"):
        read_json('{"prompt": Infinity}')


def test_the_page_needs_nothing_from_elsewhere() -> None:
    texts = {name: (PAGE / name).read_text(encoding="utf-8") for name in KINDS}
    assert sorted(texts) == sorted(path.name for path in PAGE.iterdir())
    for name, text in texts.items():
        assert not re.findall(r"""(?:src|href|url|import)\W{1,3}(?:https?:)?//""", text), name
        assert "<script>" not in text and "onclick=" not in text and "style=" not in text  # the policy forbids them
    for name in ("page.js", "style.css"):
        assert f'"page/{name}"' in texts["index.html"]
    imported = {name for text in texts.values() for name in re.findall(r'^import .* from "\./(.*)";$', text, re.M)}
    assert imported == {name for name in KINDS if name.endswith(".js")} - {"page.js"}
    wanted = {name for text in texts.values() for name in re.findall(r'\$\("(\w+)"\)', text)}
    assert wanted <= set(re.findall(r' id="(\w+)"', texts["index.html"]))  # what the scripts look for is there
