"""Servers for tests: in this process over any model, and in one of their own as users run them."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starflow_jax.config import Serve
from starflow_jax.modes.serve import listen
from starflow_jax.sampling.api import Model
from starflow_jax.serving.app import make_app
from starflow_jax.serving.engine import Engine
from starflow_jax.serving.metrics import Metrics
from tests.modes.test_serve import wait_until_ready
from tests.small_run import ROOT


@contextlib.contextmanager
def served_here(model: Model, **settings: Any) -> Iterator[str]:
    """The address of a server in this process. Asserts in the end that it made no error."""
    import uvicorn

    chosen, metrics = Serve(port=0, **settings), Metrics()
    engine = Engine(model, chosen, metrics)
    engine.start(warm=False)
    server = uvicorn.Server(uvicorn.Config(make_app(engine, chosen, metrics), log_level="warning", access_log=False,
                                           ws="websockets-sansio", timeout_graceful_shutdown=3))
    with contextlib.closing(listen(chosen)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],), name="server")
        thread.start()
        try:
            address = "http://{}:{}".format(*listening.getsockname())
            wait_until_ready(address)
            yield address
        finally:
            server.should_exit = True
            thread.join()
    assert "starflow_errors_total 0.0" in metrics.text().decode()


class Server:
    """`--mode=serve` with the pretrained model, in a process of its own. A context manager that ends it."""

    def __init__(self, workdir: Path, **settings: Any) -> None:
        """workdir: without a model, so that the pretrained one is served."""
        self.address, self._workdir, self._settings = "", workdir, {"port": 0, **settings}
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)

    @property
    def process(self) -> int:
        """Its number; 0: it does not run."""
        return self._process.pid if self._process else 0

    def start(self) -> None:
        """Until it is ready; a second time at the same address."""
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # those of tests
        command = [sys.executable, "-m", "starflow_jax.main", f"--config={ROOT}/configs/t2v.py", "--mode=serve",
                   f"--workdir={self._workdir}",
                   *(f"--config.serve.{name}={value}" for name, value in self._settings.items())]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                         env={**environment, "JAX_PLATFORMS": "cpu"})
        assert self._process.stdout is not None
        line = next((line for line in self._process.stdout if "serving on" in line), "")
        assert line, "the server did not start"
        self.address = line.split()[2].rstrip("/;")
        self._settings["port"] = int(self.address.rpartition(":")[2])
        wait_until_ready(self.address)

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Until it has ended."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.communicate()
            self._process = None
