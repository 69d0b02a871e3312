"""Compiled programs, kept on disk for the next process that needs the same ones."""

import os
from pathlib import Path

import jax


def cache_folder() -> Path:
    """The folder of this user's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "starflow_jax"


def keep_compiled_programs() -> None:
    """Turn on JAX's cache on disk: in JAX_COMPILATION_CACHE_DIR where that is set, else in the user's cache folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    # Small programs too: a run has dozens of them, and reading one takes a tenth of the time that compiling it takes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
