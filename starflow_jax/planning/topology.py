"""TPU pods that are not there: libtpu's description of a topology by its name."""

import importlib.util
import os
import re
from typing import Any

import jax

from starflow_jax.config import UserError


def gpu_memory(name: str) -> float:
    """GB of a GPU of a name such as gpu:80GB; 0 for another name."""
    found = re.fullmatch(r"gpu:(\d+)GB", name)
    return float(found[1]) if found else 0


def topology(name: str) -> list[Any]:
    """Devices to compile for, of a name such as v5p:4x4x4, or gpu:80GB, for which this machine's CPU stands in.

    Raises UserError where libtpu is missing or declines.
    """
    if gpu_memory(name):
        return jax.devices("cpu")[:1]
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
