"""What all tests share: fast compilation, one cache of compiled programs, and --usage, which shows what they cost."""

import atexit
import collections
import ctypes
import gc
import os
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

# All of this is set before JAX is imported, and inherited by pytest-xdist's workers and by the programs that tests run.
# The tests' models are tiny: they spend their time in XLA's compiler, not in what it compiles. Parts of a program for
# several cores cost more in all.
FAST_COMPILATION = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
                    "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
DEVICES = "--xla_force_host_platform_device_count=4"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILATION, DEVICES]).strip()
if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="starflow_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Above this a process drops its compiled programs when a module of tests ends; they are still in the cache. A module
# adds up to 1.4 GB.
MOST_MEMORY = 1.5 * 2**30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(Path(__file__).parent / "golden"),
                     help="folder of golden cases (tests/golden/README.md)")
    parser.addoption("--usage", action="store_true", help="print CPU seconds and memory of each module of tests")


# With pytest-xdist these start first, or a worker would end with a long one while the other has nothing left.
LONGEST = ("test_sharding.py", "modes/test_train.py", "modes/test_processes.py", "docs/test_pages.py",
           "test_golden.py", "flow/test_decode.py", "modes/test_released.py", "sampling/test_api.py",
           "kernels/test_attention.py", "codec/test_wan_stream.py", "training/test_step.py",
           "sampling/test_generate.py", "flow/test_block.py", "sampling/test_calibration.py", "flow/test_starflow.py",
           "planning/test_plan.py", "modes/test_recipes.py", "model/test_store.py", "codec/test_kl_vae.py")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # by the number of tests in a module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))  # stable


def pytest_collection_finish() -> None:
    """What is imported stays: the garbage collector needn't look at it again, nor as often as tracing makes it."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def memory() -> int:
    """Bytes of physical memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    yield
    if memory() > MOST_MEMORY:
        import jax

        jax.clear_caches()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what is free stays with the process


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """unsynced(folder): the files and folders in it that were changed since this process last synced them, by name."""
    fsync, synced = os.fsync, dict[int, int]()

    def remember(opened: int) -> None:
        found = os.fstat(opened)
        synced[found.st_ino] = found.st_mtime_ns
        fsync(opened)

    monkeypatch.setattr(os, "fsync", remember)

    def changed(folder: Path) -> list[str]:
        found = [folder, *folder.rglob("*")]
        return [str(path.relative_to(folder)) for path in found
                if synced.get(path.stat().st_ino) != path.stat().st_mtime_ns]

    return changed


@pytest.fixture(scope="session")
def system() -> Any:
    """The System of tests/small_model.py."""
    from tests.small_model import small_system

    return small_system()


@pytest.fixture(scope="session")
def params() -> Any:
    """Random parameters of the small model."""
    from tests.helpers import random_params
    from tests.small_model import CONFIG

    return random_params(CONFIG, scale=0.3)


def cpu_seconds() -> float:
    """CPU time of this process and of the programs it has waited for."""
    return sum(used.ru_utime + used.ru_stime for used in map(
        resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """The report of a test's end carries the CPU time since the last test's end, fixtures included."""
    result = yield
    now = cpu_seconds()
    item.user_properties.append(("cpu", now - item.session.stash.get(CPU_BEFORE, 0.0)))
    item.user_properties.append(("memory", memory()))
    item.session.stash[CPU_BEFORE] = now
    return result


CPU_BEFORE = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("usage"):
        return
    cpu: dict[str, float] = collections.defaultdict(float)
    held: dict[str, int] = collections.defaultdict(int)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "teardown":
            found, name = dict(report.user_properties), report.nodeid.split("::")[0]
            cpu[name] += found["cpu"]
            held[name] = max(held[name], found["memory"])
    terminalreporter.section("CPU seconds and GB held at the end of a test")
    for name in sorted(cpu, key=lambda name: -cpu[name]):
        terminalreporter.write_line(f"{cpu[name]:7.1f} s {held[name] / 2**30:5.2f} GB  {name}")
    terminalreporter.write_line(f"{sum(cpu.values()):7.1f} s in all")
