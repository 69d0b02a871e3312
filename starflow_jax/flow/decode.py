"""The inverse of the flow: noise -> latents, frame by frame (DESIGN: inversion, tasks).

`decode_frames` is the pure step (params, window state, noise of a frame or of several) -> (u, state), the same for
every frame; `generation.generate` drives it over a video of any length, `invert_shallow` finishes frames.
"""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.flow.control import Steering, control_of
from starflow_jax.flow.inversion import Inverse, Known, Report, Solver
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.sharding import constrain


class WindowState(flax.struct.PyTreeNode):
    """What the deep block knows of the current window."""

    known: Known
    previous_BSK: jax.Array  # the previous frame or, before the first, a guess: where the solver starts
    frame: jax.Array  # int32: index of the next frame within the window


@partial(jax.jit, static_argnames=("model", "window", "token_grid", "cache"))
def start_window(
    model: STARFlow,
    params: Any,
    known_BTSK: jax.Array,
    texts_GBTD: jax.Array | None,
    *,
    window: int,
    token_grid: tuple[int, int],
    guess_BSK: jax.Array | None = None,
    cache: str = "",
    steering: Steering | None = None,
    count: jax.Array | None = None,
) -> WindowState:
    """Fill the cache with the text and the T >= 0 known frames of u (TI2V, extension, restarts).

    texts: (branches, B, text_length, text_dim), branch 0 conditional; None: a model without text.
    guess: of the first frame, where none is known; 0 by default. cache: what keys and values are kept as, "int8" or
    the model's dtype. steering: of the known frames; None also where there are none. count: int32, how many of the
    frames, at least one, are known; what is behind them does not matter, so that one program serves any number.
    """
    batch, frames, tokens, channels = known_BTSK.shape
    text = None if texts_GBTD is None else texts_GBTD[0]
    slots = window * tokens + (0 if text is None else text.shape[1])
    rope = model.rope((max(frames, 1), *token_grid), text)

    def begin(flow: STARFlow) -> Known:
        return flow.deep.begin(slots, known_BTSK.reshape(batch, -1, channels), rope, texts_GBTD, cache or None,
                               control_of(steering))

    guess = jnp.zeros((batch, tokens, channels), known_BTSK.dtype) if guess_BSK is None else guess_BSK
    known = apply_flow(model, params, begin)
    if count is None:
        return _laid_out(WindowState(known, known_BTSK[:, -1] if frames else guess, jnp.int32(frames)))
    previous = lax.dynamic_index_in_dim(known_BTSK, count - 1, axis=1, keepdims=False)
    text_length = 0 if text is None else text.shape[1]
    known = known.replace(cache=known.cache.replace(length=text_length + count * tokens), last_B1C=previous[:, -1:])
    return _laid_out(WindowState(known, previous, count))


# The state is donated: its cache, most of what decoding holds, is written in place.
@partial(jax.jit, static_argnames=("model", "window", "token_grid", "branches"), donate_argnames="state")
def decode_frames(
    model: STARFlow,
    params: Any,
    state: WindowState,
    z_BGSK: jax.Array,
    guidance: jax.Array,
    start_BGSK: jax.Array | None = None,
    steering: Steering | None = None,
    *,
    solver: Solver,
    window: int,
    token_grid: tuple[int, int],
    branches: int,
) -> tuple[jax.Array, WindowState, Report]:
    """The next G frames of u = f_D^{-1}(z | earlier frames, text). branches: 2 with guidance, 1 without.

    start: where the solver starts; None: at the previous frame. steering: of these frames.
    """
    rope = _rope(model, state, z_BGSK.shape[1], window, token_grid)
    found = _inverse(model, params, state, z_BGSK, guidance, start_BGSK, steering, rope, solver, branches)
    u_BGSK = found.x_BSC.reshape(z_BGSK.shape)
    return (u_BGSK, _laid_out(WindowState(found.known, u_BGSK[:, -1], state.frame + z_BGSK.shape[1])), found.report)


def _rope(model: STARFlow, state: WindowState, frames: int, window: int, token_grid: tuple[int, int]) -> jax.Array:
    """Of the next frames' slots."""
    tokens = token_grid[0] * token_grid[1]
    positions = model.rope((window, *token_grid), None)
    return lax.dynamic_slice_in_dim(positions, state.frame * tokens, frames * tokens, axis=1)


def _inverse(model: STARFlow, params: Any, state: WindowState, z_BGSK: jax.Array, guidance: jax.Array,
             start_BGSK: jax.Array | None, steering: Steering | None, rope: jax.Array, solver: Solver, branches: int
             ) -> Inverse:
    """Of the next frames' noise, as `decode_frames` takes it."""
    z = z_BGSK.reshape(z_BGSK.shape[0], -1, z_BGSK.shape[-1])
    start = _start(state, z_BGSK, start_BGSK).reshape(z.shape)

    def invert(flow: STARFlow) -> Inverse:
        return flow.deep.inverse(z, rope, state.known, start, solver, guidance if branches == 2 else None,
                                 control_of(steering))

    return apply_flow(model, params, invert)


def _start(state: WindowState, z_BGSK: jax.Array, start_BGSK: jax.Array | None) -> jax.Array:
    """Where the solver starts, shaped as the noise."""
    if start_BGSK is not None:
        return start_BGSK
    return jnp.tile(state.previous_BSK[:, None], (1, z_BGSK.shape[1], 1, 1))


@partial(jax.jit, static_argnames=("model", "window", "token_grid", "branches"))
def draft_frames(
    model: STARFlow,
    params: Any,
    state: WindowState,
    z_BGSK: jax.Array,
    guidance: jax.Array,
    start_BGSK: jax.Array | None = None,
    *,
    solver: Solver,
    window: int,
    token_grid: tuple[int, int],
    branches: int,
) -> tuple[jax.Array, Report]:
    """What `decode_frames` finds, without going on from there: the state stays. A sample whose draft is not finite gets
    the start that it would have without."""
    rope = _rope(model, state, z_BGSK.shape[1], window, token_grid)
    found = _inverse(model, params, state, z_BGSK, guidance, start_BGSK, None, rope, solver, branches)
    u_BGSK = found.x_BSC.reshape(z_BGSK.shape)
    finite_B = jnp.all(jnp.isfinite(found.x_BSC), axis=(1, 2))
    kept = jnp.where(finite_B[:, None, None, None], u_BGSK, _start(state, z_BGSK, start_BGSK))
    return constrain(kept, "batch", None, None, None), found.report


@partial(jax.jit, static_argnames=("model", "window", "token_grid", "branches"), donate_argnames="state")
def follow_frames(model: STARFlow, params: Any, state: WindowState, u_BGSK: jax.Array, *, window: int,
                  token_grid: tuple[int, int], branches: int) -> WindowState:
    """The state behind the next G frames of u, which another block found."""
    frames = u_BGSK.shape[1]
    rope = _rope(model, state, frames, window, token_grid)
    tokens_BSK = u_BGSK.reshape(u_BGSK.shape[0], -1, u_BGSK.shape[-1])

    def follow(flow: STARFlow) -> Known:
        return flow.deep.follow(tokens_BSK, rope, state.known, branches)

    return _laid_out(WindowState(apply_flow(model, params, follow), u_BGSK[:, -1], state.frame + frames))


def _laid_out(state: WindowState) -> WindowState:
    """Over the current mesh in one way wherever it comes from, so that the next step is the program of all others."""
    known = state.known.replace(last_B1C=constrain(state.known.last_B1C, "batch", None, None))
    return state.replace(known=known, previous_BSK=constrain(state.previous_BSK, "batch", None, None))


@partial(jax.jit, static_argnames=("model", "token_grid"))
def invert_shallow(
    model: STARFlow, params: Any, u_BTSK: jax.Array, *, solver: Solver, token_grid: tuple[int, int]
) -> tuple[jax.Array, tuple[Report, ...]]:
    """x = f_S^{-1}(u): latents (B, T, H, W, C), and each block's report from the deepest on."""
    rope = model.shallow_rope((u_BTSK.shape[1], *token_grid))
    x_BTSK, reports = u_BTSK, []
    for index in reversed(range(len(model.config.shallow_layers))):
        z = model.to_block_order(index, x_BTSK)

        def invert(flow: STARFlow, index: int = index, z: jax.Array = z) -> Inverse:
            known = flow.shallow[index].begin(z.shape[1], z[:, :0], rope)
            known = lax.optimization_barrier(known)  # or XLA computes on the empty cache while it compiles
            return flow.shallow[index].inverse(z, rope, known, z, solver)

        found = apply_flow(model, params, invert)
        x_BTSK = model.from_block_order(index, found.x_BSC, x_BTSK.shape)
        reports.append(found.report)
    return model.latents(x_BTSK, token_grid[0]), tuple(reports)
