"""A server in this process for the tests of this folder."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from starflow_jax.config import Serve
from starflow_jax.modes.serve import listen
from starflow_jax.sampling.api import Model
from starflow_jax.serving.app import make_app
from starflow_jax.serving.engine import Engine
from starflow_jax.serving.metrics import Metrics
from tests.modes.test_serve import wait_until_ready


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
