"""Speed, as ratios within one run: data, attention, decoding, a training step in forward passes and matrix rate."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from starflow_jax.config import Config, Model
from starflow_jax.flow.likelihood import nll_mean
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.io.timing import median_seconds
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.planning import program_cost
from starflow_jax.training.losses import gradients_from_features
from starflow_jax.training.state import create_state
from starflow_jax.training.step import apply_gradients

ROUNDS = 7
CLIPS = 2
BENCHMARK_MODEL = Model(
    channels=16, frames=8, height=8, width=8, shallow_layers=(1, 1, 1, 1, 1), shallow_width=256, deep_layers=8,
    deep_width=512, text_length=16, text_dim=64, denoiser_layers=8, unroll_layers=True)


def train_step_ratio(config: Config) -> dict[str, Any]:
    """Forward pass (flow and denoiser), whole training step (both losses, both optimizers) and bare matrix
    products, timed in turns so that a busy machine slows all alike."""
    model = config.model
    flow = STARFlow(model)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (CLIPS, model.frames, model.height, model.width, model.channels))
    text = jax.random.normal(keys[1], (CLIPS, model.text_length, model.text_dim))
    weights = dict(jax.jit(flow.init)(keys[2], x, text)["params"])
    params: Params = {"denoiser": weights.pop("denoiser"), "flow": weights}
    state = jax.jit(lambda p: create_state(p, config.train))(params)

    def forward(params: Params) -> tuple[jax.Array, jax.Array]:
        out = apply_flow(flow, flow_variables(params), STARFlow.forward, x, text)
        score = apply_flow(flow, flow_variables(params), STARFlow.score, x, text)
        return nll_mean(out).loss, jnp.mean(score**2)

    def step(state):
        grads, losses = gradients_from_features(flow, state.params, x, lambda _: text)
        return apply_gradients(state, grads, config.train)[0], losses

    passing = jax.jit(forward).lower(params).compile()
    flops = program_cost.count(passing).flops
    side = 2048
    matrix = jax.random.normal(keys[0], (side, side))
    seconds = median_seconds("benchmark", {
        "forward": _repeat(passing, params),
        "step": _carry(jax.jit(step, donate_argnums=0), state),
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


def _carry(step: Callable, state: Any) -> Callable[[], None]:
    held = [state]

    def run() -> None:
        held[0], losses = step(held[0])
        jax.block_until_ready((held[0], losses))

    return run
