"""Speed, as ratios within one run: data, attention, decoding, a training step in forward passes and matrix rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from starflow_jax.benchmarks.random_flow import RandomFlow
from starflow_jax.config import Config
from starflow_jax.flow.likelihood import nll_mean
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.io.timing import median_seconds
from starflow_jax.model.parameters import Params
from starflow_jax.planning import program_cost

ROUNDS = 7


def train_step_ratio(config: Config) -> dict[str, Any]:
    """Forward pass (flow and denoiser), whole training step (both losses, both optimizers) and bare matrix
    products, timed in turns so that a busy machine slows all alike."""
    of = RandomFlow(config.model)
    params: Params = {"params": of.params}

    def forward(params: Params) -> tuple[jax.Array, jax.Array]:
        out = apply_flow(of.flow, params, STARFlow.forward, of.x, of.text)
        score = apply_flow(of.flow, params, STARFlow.score, of.x, of.text)
        return nll_mean(out).loss, jnp.mean(score**2)

    passing = jax.jit(forward).lower(params).compile()
    flops = program_cost.count(passing).flops
    side = 2048
    matrix = jax.random.normal(jax.random.key(0), (side, side))
    seconds = median_seconds("benchmark", {
        "forward": _repeat(passing, params),
        "step": of.next_step(config.train),
        "matrix": _repeat(jax.jit(lambda a: a @ a), matrix),
    }, ROUNDS)
    rate = 2 * side**3 / seconds["matrix"]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "forward_seconds": seconds["forward"],
        "step_seconds": seconds["step"],
        "step_in_forward_passes": seconds["step"] / seconds["forward"],
        "forward_gflop": flops / 1e9,
        "matrix_gflops": rate / 1e9,
        "matrix_seconds": flops / rate,
        "forward_matrix_fraction": flops / rate / seconds["forward"],
        "rounds": ROUNDS,
    }


def _repeat(function: Callable, *args: Any) -> Callable[[], None]:
    return lambda: jax.block_until_ready(function(*args))
