"""How much memory and how many cores there are, and one line for what does not fit."""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from starflow_jax.config import UserError

GIB = 2**30
# Limits of the container: of cgroups' second version, and of their first.
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CPU_SHARE = "/sys/fs/cgroup/cpu.max"  # microseconds of CPU time in a period, and the period

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # mallopt's numbers of its settings
ARENAS = 2
ACCELERATORS = ("nvidiactl", "accel*", "vfio/*", "kfd")  # the devices of GPUs and TPUs in /dev


def share_arenas() -> None:
    """Have all threads take memory from a few of glibc's arenas. It would make some for each core, and what any of them
    has once held it keeps, so that a process of many threads grows for hours. Nothing happens without glibc, and where
    the environment says how many there are to be."""
    if not any(name in os.environ for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")):
        _set_allocator({M_ARENA_MAX: ARENAS})


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, rather than give it back, after which each page must be
    cleared anew: a step of training on a CPU takes the same gigabytes again and again, and a sixth of its time went
    there. To be called before JAX is imported, whose threads settle where they take memory. Nothing happens where there
    is an accelerator, without glibc, and where the environment says anything of its allocator."""
    if not _has_accelerator() and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        # One arena: of several, the first one alone can grow beyond 64 MB without mapping.
        _set_allocator({M_ARENA_MAX: 1, M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def _has_accelerator() -> bool:
    """One that JAX may use, as far as can be seen without it."""
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] != "cpu"
    return any(next(Path("/dev").glob(pattern), None) for pattern in ACCELERATORS)


def _set_allocator(values: dict[int, int]) -> None:
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for number, value in values.items():
            library.mallopt(number, value)


def cores() -> int:
    """Those that this process may use, whole ones, by its affinity and by its container's share of the machine (of
    cgroups' second version)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # not there, or "max"
        quota, period = map(int, Path(CPU_SHARE).read_text().split())
        count = min(count, max(1, quota // period))
    return count


def host_bytes() -> int:
    """Of the machine, or of the container that limits it, swap included."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            memory = min(memory, int(Path(limit).read_text()))
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        memory += next((1024 * int(line.split()[1]) for line in lines if line.startswith("SwapTotal:")), 0)
    return memory


def check_fits(what: str, needed: float, there: float, where: str, mend: str) -> None:
    """Raises UserError, with the figures, where more bytes are needed than there are."""
    if needed > there:
        raise UserError(f"{what}: at least {needed / GIB:,.1f} GiB of the {where}'s memory are needed, and there are "
                        f"{there / GIB:,.1f} GiB; {mend}")
