"""How fast the attention core is beside cuDNN's, in turns within one run: training shapes and decoding."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from starflow_jax.io.progress import table
from starflow_jax.io.timing import median_seconds
from starflow_jax.kernels.attention import attention
from starflow_jax.kernels.mask import Causal, Full

ROUNDS = 7
Attend = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """One sample. Without a cache: causal attention, forward and backward. With `cached` slots: a block of queries
    that sees them and itself wholly, forward only."""

    name: str
    slots: int
    heads: int
    head_dim: int
    cached: int = 0
    calls: int = 1  # in a row, so that starting them does not count

    @property
    def forward_flops(self) -> int:
        """Two products of 2 * head_dim operations per head and pair of a query and a key that it sees."""
        pairs = self.slots * (self.cached + self.slots) if self.cached else self.slots * (self.slots + 1) // 2
        return 4 * self.head_dim * self.heads * pairs


# The 7B model at 480p: 256 text tokens and 21 frames of 30 x 53.
SLOTS, HEADS = 256 + 21 * 1590, 64
CASES = (
    Case("training", SLOTS, HEADS, 64),
    Case("training", SLOTS, HEADS, 128),
    Case("decoding", 64, HEADS, 64, cached=33_584, calls=20),
    Case("decoding", 64, HEADS, 128, cached=33_584, calls=20),
    Case("decoding", 1590, HEADS, 64, cached=32_058, calls=5),
)


def against_cudnn() -> list[dict[str, Any]]:
    """Times this package's attention and cuDNN's on the GPU at hand, in bfloat16, and prints a table."""
    attends: dict[str, Attend] = {"starflow_jax": own_attention}
    if _has_cudnn():
        attends = {"cuDNN": partial(library_attention, implementation="cudnn")} | attends
    else:
        print("cuDNN's attention does not run here: nothing to compare with")
    rows = [row for case in CASES for row in compare(case, attends)]
    print(table([["" if cell is None else cell for cell in row.values()] for row in rows], list(rows[0])) + "\n")
    return rows


def _has_cudnn() -> bool:
    x = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.block_until_ready(library_attention(x, x, x, 0, "cudnn"))
    except (RuntimeError, ValueError, NotImplementedError):  # no cuDNN, too old a one, or too old a GPU
        return False
    return True


def own_attention(q_BSHD: jax.Array, k_BPHD: jax.Array, v_BPHD: jax.Array, cached: int,
                  implementation: str | None = None) -> jax.Array:
    """The first `cached` of the keys are a cache, read where it lies; the rest are the queries' own."""
    if not cached:
        return attention(q_BSHD, k_BPHD, v_BPHD, Causal(), None, implementation)
    past = (k_BPHD, v_BPHD, jnp.int32(cached))
    return attention(q_BSHD, k_BPHD[:, cached:], v_BPHD[:, cached:], Full(), past, implementation)


def library_attention(q_BSHD: jax.Array, k_BPHD: jax.Array, v_BPHD: jax.Array, cached: int,
                      implementation: Literal["cudnn", "xla"]) -> jax.Array:
    return jax.nn.dot_product_attention(q_BSHD, k_BPHD, v_BPHD, is_causal=not cached, implementation=implementation)


def compare(case: Case, attends: dict[str, Attend], dtype: Any = jnp.bfloat16, rounds: int = ROUNDS
            ) -> list[dict[str, Any]]:
    """A row for each: median milliseconds forward and, without a cache, forward with backward; how many times as fast
    as the first one; the largest relative difference (Frobenius) of output and gradients from the first one's."""
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (case.slots, case.cached + case.slots, case.cached + case.slots, case.slots)
    q, k, v, dout = (jax.random.normal(key, (1, length, case.heads, case.head_dim), dtype)
                     for key, length in zip(keys, lengths))
    runs: dict[str, Callable[[], Any]] = {}
    differences: dict[str, float] = {}
    first: list[jax.Array] = []
    for name, attend in attends.items():
        forward = partial(attend, cached=case.cached)
        programs = {f"{name} forward": partial(jax.jit(forward), q, k, v)}
        if not case.cached:
            programs[f"{name} both"] = partial(jax.jit(partial(_with_gradients, forward)), dout, q, k, v)
        made = jax.tree.leaves([run() for run in programs.values()])
        first = first or made
        differences[name] = max(float(_difference(ours, theirs)) for ours, theirs in zip(made, first))
        runs |= {label: partial(_repeat, run, case.calls) for label, run in programs.items()}
    seconds = median_seconds(f"{case.name}, head_dim {case.head_dim}", runs, rounds)
    milliseconds = {label: 1e3 * value / case.calls for label, value in seconds.items()}
    rows = []
    base = next(iter(attends))
    for name in attends:
        forward_ms, both_ms = milliseconds[f"{name} forward"], milliseconds.get(f"{name} both")
        rows.append({
            "case": case.name, "queries": case.slots, "cached": case.cached, "head_dim": case.head_dim,
            "attention": name, "forward_ms": forward_ms,
            "forward_speed": milliseconds[f"{base} forward"] / forward_ms,
            "forward_tflops_per_second": case.forward_flops / forward_ms / 1e9,
            "forward_and_backward_ms": both_ms,
            "forward_and_backward_speed": both_ms and milliseconds[f"{base} both"] / both_ms,
            "difference": differences[name]})
    return rows


def _with_gradients(function: Attend, dout, *inputs) -> tuple[jax.Array, ...]:
    out, pull_back = jax.vjp(function, *inputs)
    return out, *pull_back(dout)


def _repeat(run: Callable[[], Any], calls: int) -> None:
    jax.block_until_ready([run() for _ in range(calls)])


@jax.jit
def _difference(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    return jnp.linalg.norm((ours - theirs).ravel()) / jnp.linalg.norm(theirs.ravel())
