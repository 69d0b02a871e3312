"""Compiled programs, kept on disk for the next process that needs the same ones."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


def cache_folder() -> Path:
    """The folder of this user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starflow_jax"


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Without JAX's cache on disk: a program for devices that are not here can be written there, but not be read."""
    kept = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)


def keep_compiled_programs() -> None:
    """Turn on JAX's cache on disk: in JAX_COMPILATION_CACHE_DIR where that is set, else in the user's cache folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    # Small programs too: a run has dozens of them, and reading one takes a tenth of the time that compiling it takes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def count_programs() -> Callable[[], int]:
    """How many programs this process has compiled, or read from the disk, since now."""
    found: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    return lambda: len(found)
