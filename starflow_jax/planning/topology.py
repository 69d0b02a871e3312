"""Devices that are not there, by name: pods as libtpu describes them, and GPUs as XLA for CUDA takes them."""

import importlib.util
import os
import re
from typing import Any

import jax

from starflow_jax.config import UserError

# Of the two kinds of GPU that are planned for: one per compute capability, by its sizes in NVIDIA's tuning guides. What
# XLA decides by them: tiles of its kernels, hardly memory.
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads} fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_of_core}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: {cores} clock_rate_ghz: 1.7
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} device_memory_size: {memory} device_address_bits: 64
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "GPU of compute capability {major}.{minor}"
"""
HOPPER = dict(major=9, minor=0, cores=132, threads=2048, shared=232448, shared_of_core=233472, cache=50 * 2**20,
              bandwidth=3_350_000_000_000)
AMPERE = dict(major=8, minor=6, cores=80, threads=1536, shared=101376, shared_of_core=102400, cache=6 * 2**20,
              bandwidth=600_000_000_000)
HOPPERS_MEMORY = 80  # GB, from which on a GPU is taken for a Hopper


def gpu_memory(name: str) -> float:
    """GB of a GPU of a name such as gpu:80GB; 0 for another name."""
    found = re.fullmatch(r"gpu:(\d+)GB", name)
    return float(found[1]) if found else 0


def topology(name: str) -> list[Any]:
    """Devices to compile for, of a name such as v5p:4x4x4 or gpu:80GB. Without the plug-in for CUDA, this machine's CPU
    stands in for a GPU.

    Raises UserError where libtpu is missing or declines.
    """
    if gpu_memory(name):
        return gpu(gpu_memory(name)) if cuda_is_installed() else jax.devices("cpu")[:1]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling takes no chip, so that several processes may do it at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    kind, _, shape = name.partition(":")
    if not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(f"plan.topology={name!r}: must be a kind and a shape, such as v5p:4x4x4 or v6e:16x16, or "
                        "a GPU's memory, such as gpu:80GB")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = [1, 1, 1]  # else libtpu takes a host to have four
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # whatever the plug-in raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if importlib.util.find_spec("libtpu") is None:
            raise UserError('plan compiles with libtpu, which is not installed: pip install "jax[tpu]"') from error
        raise UserError(f"plan.topology={name!r}: {reason[:300]}") from error


def cuda_is_installed() -> bool:
    """Whether XLA's compiler for CUDA is (the extra `gpu`), which needs no GPU."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def gpu(gigabytes: float) -> list[Any]:
    """A GPU with so much memory: a Hopper where it has as much as one, else one of compute capability 8.6."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # which would ask for a GPU
    from jax.experimental import topologies

    sizes = HOPPER if gigabytes >= HOPPERS_MEMORY else AMPERE
    config = GPU.format(**sizes, memory=int(gigabytes * 1e9))
    return list(topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1",
                                             target_config=config).devices)
