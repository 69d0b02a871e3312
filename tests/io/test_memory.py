"""What the process does with its memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from starflow_jax.io import memory
from starflow_jax.io.memory import cores, keep_freed_memory, share_arenas

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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", ARENAS_OF_16_THREADS, how], capture_output=True, text=True, check=True,
                          env={**kept, **environment})
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_threads_share_a_few_arenas_or_as_many_as_the_environment_says() -> None:
    assert arenas("") > 3 and arenas("shared") <= 2
    assert arenas("shared", MALLOC_ARENA_MAX="3") == 3
    assert arenas("shared", MALLOC_TRIM_THRESHOLD_="131072") <= 2


FAULTS_OF_TAKING_IT_AGAIN = """
import ctypes, resource, sys
from starflow_jax.io.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def take():
    memory = ctypes.c_void_p(libc.malloc(100_000_000))
    ctypes.memset(memory, 1, 100_000_000)
    libc.free(memory)

take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_freed_memory_is_kept_on_a_cpu_alone() -> None:
    def faults(how: str, platforms: str) -> int:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        done = subprocess.run([sys.executable, "-c", FAULTS_OF_TAKING_IT_AGAIN, how], capture_output=True, text=True,
                              check=True, env={**kept, "JAX_PLATFORMS": platforms})
        return int(done.stdout)

    assert faults("kept", "cpu") < 100 < min(faults("", "cpu"), faults("kept", "tpu"))


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: None) -> None:
        raise TypeError(name)

    monkeypatch.setattr("ctypes.CDLL", none)
    monkeypatch.setattr(sys, "platform", "win32")
    share_arenas()
    keep_freed_memory()


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
