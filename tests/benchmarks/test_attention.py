"""The comparison of attention kernels, tiny: what it computes is equal, what it counts and measures is right."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.benchmarks.attention import CASES, Case, compare, library_attention, own_attention
from starflow_jax.kernels import attention as core

LIBRARY = partial(library_attention, implementation="xla")


@pytest.mark.parametrize("case", [Case("training", 70, 2, 16), Case("decoding", 5, 2, 16, cached=40, calls=3)])
def test_both_compute_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SHORT", 0)  # through the kernel's interface, as on a GPU
    own = partial(own_attention, implementation="reference")
    base, ours = compare(case, {"library": LIBRARY, "ours": own}, jnp.float32, rounds=1)
    assert base["difference"] == 0 and 0 < ours["difference"] < 1e-6
    assert base["forward_speed"] == 1 and ours["forward_speed"] == base["forward_ms"] / ours["forward_ms"]
    assert (ours["forward_and_backward_ms"] is None) == (case.cached > 0)
    assert json.loads(json.dumps(ours)) == ours


def test_a_wrong_kernel_is_seen() -> None:
    def without_scale(q, k, v, cached):
        return LIBRARY(q * q.shape[-1] ** 0.5, k, v, cached)

    _, row = compare(Case("training", 30, 1, 16), {"library": LIBRARY, "wrong": without_scale}, jnp.float32, rounds=1)
    assert row["difference"] > 0.1


def test_operations_are_those_of_both_products() -> None:
    for case in (Case("training", 48, 2, 16), Case("decoding", 5, 2, 16, cached=40)):
        q = jnp.zeros((case.slots, case.head_dim))
        k = jnp.zeros((case.cached + case.slots, case.head_dim))
        compiled = jax.jit(lambda q, k: (q @ k.T) @ k).lower(q, k).compile()
        whole = case.heads * compiled.cost_analysis()["flops"]
        seen = 1.0 if case.cached else np.tri(case.slots).mean()
        assert case.forward_flops == pytest.approx(seen * whole, rel=1e-3)


def test_caches_are_read_where_they_lie() -> None:
    """The GPU kernels copy a cache whose slots are no multiple of 8."""
    assert all((case.cached + case.slots) % 8 == 0 for case in CASES if case.cached)
