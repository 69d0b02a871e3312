"""SIGTERM and Ctrl-C as a request to stop, on which all processes agree."""

import os
import signal
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow_jax import sharding
from starflow_jax.io.command_line import INTERRUPTED


class StopOnTerm:
    """Turns SIGTERM and Ctrl-C into a request to stop, so that the step under way ends and is saved. A second Ctrl-C
    leaves at once.

    It is enough to send it to one of several processes: all stop at the same step, which they must save together.
    This handler replaces the one that jax.distributed.initialize installs.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._asked, self.interrupted = False, False
        self._answers: deque[jax.Array] = deque(maxlen=2)
        self._by_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._anyone = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._interrupt)

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def _interrupt(self, *_: Any) -> None:
        if self.interrupted:
            os._exit(INTERRUPTED)
        self._asked = self.interrupted = True

    def agreed(self) -> bool:
        """Whether to stop now, the same on all processes; each must call it before each step.

        From the second call on, the answer is that of the call before, so that no process waits for the step under way.
        """
        if jax.process_count() == 1:
            return self._asked
        requests = jax.make_array_from_callback(
            (self._by_device.mesh.size,), self._by_device, lambda _: np.array([self._asked], np.int32))
        self._answers.append(self._anyone(requests))
        return bool(self._answers[0])
