"""What the process does with its memory."""

import subprocess
import sys

import pytest

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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_threads_share_a_few_arenas() -> None:
    arenas = [int(subprocess.run([sys.executable, "-c", ARENAS_OF_16_THREADS, how], capture_output=True, text=True,
                                 check=True).stdout) for how in ("", "shared")]
    assert arenas[0] > arenas[1] and arenas[1] <= 2
