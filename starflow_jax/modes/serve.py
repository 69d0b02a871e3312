"""--mode=serve: a page and an HTTP API where videos are made and steered, until SIGTERM or Ctrl-C."""

import asyncio
import importlib.util
import os
import socket
import stat
import time
import warnings
from pathlib import Path

from starflow_jax.config import Config, Serve, UserError, changed
from starflow_jax.io.memory import share_arenas
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.mesh import on_mesh, sampling_mesh

GOODBYE = 3  # seconds that answers have to end in, once the engine has ended their sessions; then as many to be cut off
SHORTEST_TOKEN = 16


def serve(config: Config, workdir: Path) -> None:
    """Serve the workdir's model, or the one in the package. Raises UserError for what can't be."""
    if missing := [name for name in ("prometheus_client", "starlette", "uvicorn", "websockets")
                   if importlib.util.find_spec(name) is None]:
        raise UserError(f"--mode=serve needs {', '.join(missing)}; pip install starflow_jax[serve]")
    settings = config.serve
    settings.check_safe()
    config.sample.require("rewrite", not config.sample.rewrite, "is not run for clients: all sessions would wait for "
                          "each one's prompt, and its errors are not for them; leave it out")
    token = read_token(settings)
    listening = listen(settings)
    share_arenas()
    try:
        _run(load_served(config, workdir), settings, token, listening)
    finally:
        listening.close()


def read_token(settings: Serve) -> str:
    """What serve.token_file holds; "" where there is none. Raises UserError for a file that can't be read or that
    others can, and for a token that could be guessed."""
    if not settings.token_file:
        return ""
    try:
        token = Path(settings.token_file).read_text(encoding="ascii").strip()
        mode = os.stat(settings.token_file).st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serve.token_file={settings.token_file}: can't be read ({error}); name a file with a token of "
                        f"{SHORTEST_TOKEN} or more letters and digits") from error
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        raise UserError(f"serve.token_file={settings.token_file}: others may read it; chmod 600 it")
    if len(token) < SHORTEST_TOKEN or not all(letter.isalnum() or letter in "-_" for letter in token):
        raise UserError(f"serve.token_file={settings.token_file}: must hold {SHORTEST_TOKEN} or more letters, digits "
                        "and -_, nothing else; python -c 'import secrets; print(secrets.token_urlsafe())' makes one")
    return token


def listen(settings: Serve) -> socket.socket:
    """Taken before the model is loaded. Raises UserError where that address can't be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise UserError(f"serve.port={settings.port}: can't be listened to at {settings.host} "
                        f"({error.strerror or error}); name another serve.host or serve.port") from error
    return listening


def load_served(config: Config, workdir: Path) -> Model:
    """The model that is served. Raises UserError as `load_model` does."""
    from starflow_jax.model.store import load_model

    config = changed(config, "sample", {"stream": True})
    mesh = sampling_mesh(config, videos=1)
    with on_mesh(mesh):
        loaded = load_model(config, workdir)
    print(f"model: {loaded.source}", flush=True)
    return Model(loaded.system, loaded.params, loaded.source, loaded.weights, mesh)


def _run(model: Model, settings: Serve, token: str, listening: socket.socket) -> None:
    import uvicorn

    from starflow_jax.serving.app import make_app
    from starflow_jax.serving.engine import Engine
    from starflow_jax.serving.metrics import Metrics

    class Stopping(uvicorn.Server):
        """Ends the sessions as soon as it is asked to end, so that their clients are told before it cuts them off."""

        def handle_exit(self, sig: int, frame: object) -> None:
            engine.begin_to_stop()
            super().handle_exit(sig, frame)  # type: ignore[arg-type]

        def end(self) -> None:
            """Nothing can be served without the engine."""
            self.should_exit = True

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            until = time.monotonic() + GOODBYE
            while self.server_state.tasks and time.monotonic() < until:
                await asyncio.sleep(0.05)
            await super().shutdown(sockets)

    warnings.filterwarnings("ignore", message=".*no training caption has", category=UserWarning)
    metrics = Metrics()
    engine = Engine(model, settings, metrics, ended=lambda: server.end())
    server = Stopping(uvicorn.Config(
        make_app(engine, settings, metrics, token), log_level="warning", access_log=False, server_header=False,
        limit_concurrency=settings.sessions + settings.queue + settings.videos + 64, backlog=128, timeout_keep_alive=5,
        timeout_graceful_shutdown=GOODBYE, ws="websockets-sansio", ws_max_size=settings.upload_bytes, ws_max_queue=4,
        ws_per_message_deflate=False, proxy_headers=False))
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port}/{'?token=...' if token else ''}; /healthz says when "
          "all is compiled; Ctrl-C ends it", flush=True)
    engine.start()
    server.run([listening])
    engine.check()
