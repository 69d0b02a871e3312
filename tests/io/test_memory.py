"""What the process does with its memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from starflow_jax.io import memory
from starflow_jax.io.memory import cores, share_arenas

ARENAS_OF_16_THREADS = """
import ctypes, os, sys, tempfile, threading
from starflow_jax.io.memory import share_arenas

if sys.argv[1] == "shared":
    share_arenas()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
together = threading.Barrier(16)

def take():
    together.wait()
    libc.malloc(100_000)
    together.wait()

threads = [threading.Thread(target=take) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
path = os.path.join(tempfile.mkdtemp(), "malloc")
file = ctypes.c_void_p(libc.fopen(path.encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
print(open(path).read().count("<heap nr="))
"""


def arenas(how: str, **environment: str) -> int:
    """Of a process."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run([sys.executable, "-c", ARENAS_OF_16_THREADS, how], capture_output=True, text=True, check=True,
                          env={**kept, **environment})
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_threads_share_a_few_arenas_or_as_many_as_the_environment_says() -> None:
    assert arenas("") > 3 and arenas("shared") <= 2
    assert arenas("shared", MALLOC_ARENA_MAX="3") == 3


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: None) -> None:
        raise TypeError(name)

    monkeypatch.setattr("ctypes.CDLL", none)
    monkeypatch.setattr(sys, "platform", "win32")
    share_arenas()


@pytest.mark.parametrize("share, count", [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1),
                                          ("6400000 100000", 8), (None, 8)])
def test_a_containers_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: str | None, count: int
) -> None:
    if share:
        (tmp_path / "cpu.max").write_text(share)
    monkeypatch.setattr(memory, "CPU_SHARE", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert cores() == count
