"""A flow with random weights, as benchmarks time it: what it is applied to, a training step, and a guided video."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Model, Solver, Train
from starflow_jax.flow import decode, generation
from starflow_jax.flow.first_guess import NoiseGuess, fit_noise
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.nn.transformer import unstacked
from starflow_jax.sampling.calibration import deep_passes
from starflow_jax.sampling.solver import TOLERANCE, deep_solver, shallow_solver
from starflow_jax.training.losses import gradients_from_features
from starflow_jax.training.state import create_state
from starflow_jax.training.step import apply_gradients

CLIPS = 2
BENCHMARK_MODEL = Model(
    channels=16, frames=8, height=8, width=8, shallow_layers=(1, 1, 1, 1, 1), shallow_width=256, deep_layers=8,
    deep_width=512, text_length=16, text_dim=64, denoiser_layers=8, unroll_layers=True)


class RandomFlow:
    """x (B, T, H, W, C) and text (B, text_length, text_dim) of so many clips; params: of the flow's parts, as Linen
    names them."""

    def __init__(self, model: Model, clips: int = CLIPS) -> None:
        self.model, self.flow = model, STARFlow(model)
        keys = jax.random.split(jax.random.key(0), 4)
        self.x = jax.random.normal(keys[0], (clips, model.frames, model.height, model.width, model.channels))
        self.text = jax.random.normal(keys[1], (clips, model.text_length, model.text_dim))
        self.params = random_weights(jax.jit(self.flow.init)(keys[2], self.x, self.text)["params"], keys[3])

    def next_step(self, settings: Train) -> Callable[[], dict[str, jax.Array]]:
        """A step of training on these clips with each call: its losses, once it is done."""
        flow = {name: part for name, part in self.params.items() if name != "denoiser"}
        begin = jax.jit(lambda params: create_state(params, settings))
        held = [begin({"denoiser": self.params["denoiser"], "flow": flow})]

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any) -> tuple[Any, dict[str, jax.Array]]:
            grads, losses = gradients_from_features(self.flow, state.params, self.x, lambda _: self.text)
            return apply_gradients(state, grads, settings)[0], losses

        def run() -> dict[str, jax.Array]:
            held[0], losses = step(held[0])
            jax.block_until_ready(held[0])
            return losses

        return run


class RandomVideo:
    """One guided video of a flow: both stacks inverted, without the denoiser."""

    def __init__(self, of: RandomFlow, guidance: float) -> None:
        model = of.model
        self._flow, self._layers, self._guidance = of.flow, jax.jit(unstacked)({"params": of.params}), guidance
        self.tokens, self._grid = model.tokens_per_frame, (model.height, model.width)
        keys = jax.random.split(jax.random.key(1), 3)
        self.z_BTSK, self._other_BTSK = (
            jax.random.normal(key, (1, model.frames, self.tokens, model.token_channels)) for key in keys[:2])
        self.texts_GBTD = jax.random.normal(keys[2], (2, 1, model.text_length, model.text_dim))

    def decoded(self, solver: Solver, start_BTSK: jax.Array | None = None) -> tuple[np.ndarray, float]:
        """(latents, passes of the deep block), solved from a start for each frame; None: from the frame before."""
        u_BTSK, passes = self._deep(self.z_BTSK, solver, start_BTSK)
        x, _ = decode.invert_shallow(self._flow, self._layers, u_BTSK, solver=shallow_solver(solver),
                                     token_grid=self._grid)
        return np.asarray(x), passes

    def fitted(self) -> NoiseGuess:
        """A linear guess from the noise, fitted on another video's."""
        solver = Solver("jacobi", self.tokens, 1, tolerance=TOLERANCE)
        made, _ = self._deep(self._other_BTSK, solver, self._other_BTSK)
        return fit_noise(np.asarray(self._other_BTSK), np.asarray(made))

    def _deep(self, z_BTSK: jax.Array, solver: Solver, start_BTSK: jax.Array | None) -> tuple[jax.Array, float]:
        made, reports = zip(*generation.generate(
            self._flow, self._layers, z_BTSK, self.texts_GBTD, guidance=self._guidance, solver=deep_solver(solver),
            token_grid=self._grid, start_BTSK=start_BTSK))
        return jnp.concatenate(made, axis=1), sum(deep_passes(report, deep_solver(solver)) for report in reports)


def random_weights(params: Any, key: jax.Array) -> Any:
    """Matrices N(0, 0.9^2 / fan-in), output projections 0.35^2 / fan-in, SOS N(0, 1); the rest as initialised."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))

    def weight(path: Any, leaf: jax.Array, key: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "sos" in name:
            return jax.random.normal(key, leaf.shape)
        if "kernel" not in name:
            return leaf
        scale = 0.35 if "proj_out" in name else 0.9
        fan_in = leaf.shape[-3 if "qkv" in name else -2]
        return scale * fan_in**-0.5 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_unflatten(tree, [weight(path, leaf, k) for (path, leaf), k in zip(leaves, keys)])
