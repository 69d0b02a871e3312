"""--mode=serve: what is refused before anything is loaded; and the server as its users run it."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import starflow_jax as sf
from starflow_jax import modes
from starflow_jax.config import Serve
from starflow_jax.io.video import read_video
from starflow_jax.modes.serve import listen, read_token, serve
from starflow_jax.serving.engine import Engine
from tests.small_run import ROOT


@pytest.mark.parametrize("settings, words", [
    (dict(host="0.0.0.0"), "serve.host='0.0.0.0': is reached from other machines; name a file with a token"),
    (dict(host="video.example.org"), "name a file with a token"), (dict(host=" "), "must be an address"),
    (dict(port=70_000), "serve.port=70000"), (dict(origins="example.org"), "comma-separated origins"),
    (dict(host="::", token_file="none"), "serve.token_file=none: can't be read")])
def test_what_cannot_be_served_is_one_line(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(sf.UserError, match=words):
        modes.run("serve", sf.load_config("configs/t2v.py", serve=settings), tmp_path)


def test_no_hook_is_run_for_clients(tmp_path: Path) -> None:
    with pytest.raises(sf.UserError, match="sample.rewrite='cat': is not run for clients"):
        modes.run("serve", sf.load_config("configs/t2v.py", sample=dict(rewrite="cat")), tmp_path)


def test_a_token_is_secret_and_long(tmp_path: Path) -> None:
    assert read_token(Serve()) == ""
    file = tmp_path / "token"
    for text, mode, words in (("short", 0o600, "16 or more"), ("with a blank in the middle", 0o600, "16 or more"),
                              ("x" * 20, 0o644, "others may read it")):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(sf.UserError, match=words):
            read_token(Serve(token_file=str(file)))
    file.chmod(0o600)
    assert read_token(Serve(token_file=str(file))) == "x" * 20


def test_a_server_whose_engine_breaks_down_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of answering 503 for ever."""
    def fails(engine: Engine) -> None:
        raise MemoryError

    monkeypatch.setattr(Engine, "_warm_up", fails)
    config = sf.load_config("configs/t2v.py", serve=dict(port=0))
    with pytest.raises(sf.UserError, match="serve.sessions=4: the device's memory is too little to serve this model"):
        serve(config, Path("none"))


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(sf.UserError, match=f"serve.port={port}: can't be listened to at 127.0.0.1"):
            listen(Serve(port=port))
    with pytest.raises(sf.UserError, match="can't be listened to at 192.0.2.1"):
        listen(Serve(host="192.0.2.1", port=0, token_file="x"))
    listen(Serve(port=0)).close()


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    with pytest.raises(sf.UserError, match=r"needs uvicorn; pip install starflow_jax\[serve\]"):
        modes.run("serve", sf.load_config("configs/t2v.py"), tmp_path)


@pytest.mark.slow  # quick: tests/serving, in this process
def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    """With a session under way, which is ended, and told so."""
    from websockets.sync.client import connect

    command = [sys.executable, "-m", "starflow_jax.main", f"--config={ROOT}/configs/t2v.py", "--mode=serve",
               "--config.serve.port=0", "--config.serve.sessions=1", f"--workdir={tmp_path}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if "serving on" in line).split()[2].rstrip("/;")
            wait_until_ready(address)
            asked = urllib.request.Request(f"{address}/v1/videos", headers={"accept": "video/mp4"}, data=json.dumps(
                {"prompt": "a blue three moves right", "frames": 17}).encode())
            with urllib.request.urlopen(asked) as answer:
                (tmp_path / "three.mp4").write_bytes(answer.read())
            assert len(read_video(tmp_path / "three.mp4")[0]) == 17
            with connect(address.replace("http", "ws") + "/v1/session") as session:
                session.send(json.dumps({"prompt": "a red seven moves left"}))
                while json.loads(first_text(session))["type"] != "frames":
                    pass
                server.send_signal(signal.SIGTERM)
                last = [json.loads(message) for message in session if isinstance(message, str)][-1]
            assert last["type"] == "ended" and last["why"] == "stopped"
            assert server.wait(10) == -signal.SIGTERM
        finally:
            server.kill()


def first_text(session: Any) -> str:
    return next(message for message in session if isinstance(message, str))


def wait_until_ready(address: str) -> None:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"{address}/healthz"):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("it never was ready")
