import os
from importlib.metadata import version
from pathlib import Path

import pytest

# The tests' models are tiny: they spend their time in XLA's compiler, not in what it compiles. Set before
# JAX is imported, and inherited by the runs that tests start.
FAST_COMPILATION = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if version("jaxlib").startswith("0.10."):  # XLA ends the process at a flag that it does not know
    FAST_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
DEVICES = "--xla_force_host_platform_device_count=4"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST_COMPILATION, DEVICES]).strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", default=str(Path(__file__).parent / "golden"),
                     help="folder of golden cases (tests/golden/README.md)")
