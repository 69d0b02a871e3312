"""Processes forked from one that has imported everything: a start then costs no imports.

The one that forks must not start JAX's devices, nor any thread, which a fork would not survive.
"""

import contextlib
import os
import threading
import traceback
from collections.abc import Callable
from pathlib import Path


def import_everything() -> None:
    """What the modes import on their way."""
    import jax  # noqa: F401

    from starflow_jax.modes import convert, evaluate, prepare, sample, train  # noqa: F401

    assert threading.active_count() == 1, threading.enumerate()


def fork(function: Callable[[], int], log: Path) -> int:
    """The process, with a group of its own, that ends with the function's exit code; what it says goes to the log."""
    process = os.fork()
    if process:
        return process
    code = 70
    with contextlib.suppress(BaseException):
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        try:
            code = function()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
    os._exit(code)


def wait(process: int) -> int:
    """The exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_forked(function: Callable[[], int], log: Path) -> tuple[int, str]:
    """(exit code, what it said)."""
    code = wait(fork(function, log))
    return code, log.read_text(errors="replace")
