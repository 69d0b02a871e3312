"""Devices that are not there, for several plans at once."""

import subprocess
import sys

import pytest

HOLDS = """
from starflow_jax.planning.topology import topology
print(len(topology("v5e:2x2")), flush=True)
input()
"""


@pytest.mark.slow
def test_two_plans_may_be_made_at_once() -> None:
    """libtpu is loaded by the second process while the first one still has it."""
    pytest.importorskip("libtpu")
    plans = [subprocess.Popen([sys.executable, "-c", HOLDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
             for _ in range(2)]
    try:
        for plan in plans:
            assert plan.stdout is not None and plan.stdout.readline().strip() == "4"
        assert [plan.poll() for plan in plans] == [None, None]
    finally:
        for plan in plans:
            plan.communicate("\n", timeout=60)
    assert [plan.returncode for plan in plans] == [0, 0]
