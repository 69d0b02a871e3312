"""The inverse of the flow: noise -> latents, frame by frame (DESIGN: inversion, tasks).

`decode_frames` is the pure step (params, window state, noise of a frame or of several) -> (u, state), the
same for every frame; `generate` drives it over a video of any length, `invert_shallow` finishes frames.
Sequential decoding is block Jacobi with blocks of one token, which one update solves exactly. Blocks may
be as long as a step's frames: several frames then converge together, in fewer passes than one by one.
A wavefront does not wait for blocks: a window of tokens moves on after each update, so that every token gets the
same few updates and the last of them sees final tokens in front of its stride.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from starflow_jax.flow import jacobi
from starflow_jax.flow.block import Affine, FlowBlock
from starflow_jax.flow.guidance import guide
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.nn.cache import KVCache
from starflow_jax.nn.transformer import is_unstacked

Predict = Callable[[jax.Array, jax.Array, KVCache], tuple[Affine, Any]]


@dataclasses.dataclass(frozen=True)
class Solver:
    """How tokens are solved for: block_size tokens at once until the residual is below tolerance."""

    block_size: int = 1
    tolerance: float = 1e-3  # 0: until nothing changes, at most block_size steps
    max_steps: int = 0  # 0: block_size, after which the result is exact
    frames: int = 1  # frames that a decoding step solves for; blocks do not reach beyond them
    updates: int = 0  # > 0: a wavefront, in which each token gets so many; tolerance then only says what converged

    @property
    def stride(self) -> int:
        """Tokens that a wavefront moves on by."""
        return -(-self.block_size // self.updates)


SEQUENTIAL = Solver(block_size=1)


class Report(flax.struct.PyTreeNode):
    """How each block of tokens ended, per sample: (blocks, B) each."""

    steps: jax.Array
    residual: jax.Array
    converged: jax.Array


class WindowState(flax.struct.PyTreeNode):
    """What the deep block knows of the current window."""

    cache: KVCache  # of both guidance branches: batch (branches * B)
    last_B1K: jax.Array  # the token before the next slot; SOS at first
    previous_BSK: jax.Array  # the previous frame or, before the first, a guess: where the solver starts
    frame: jax.Array  # int32: index of the next frame within the window


def solve_tokens(
    predict: Predict,
    z_BSK: jax.Array,
    start_BSK: jax.Array,
    last_B1K: jax.Array,
    cache: KVCache,
    rope_2SE: jax.Array,
    solver: Solver,
    branches: int = 1,
) -> tuple[jax.Array, KVCache, jax.Array, Report]:
    """Solve x = mu(x) + sigma(x) z for S tokens behind the cache, block after block or by a wavefront.

    predict: what each of N slots sees (B, N, K), their RoPE and the cache -> (Affine, keys and values).
    Returns the tokens, the cache with their slots written, the last token and the blocks' report.
    """
    if solver.updates:
        return _wavefront(predict, z_BSK, start_BSK, last_B1K, cache, rope_2SE, solver)
    size = min(solver.block_size, z_BSK.shape[1])

    def solve_block(carry: tuple[KVCache, jax.Array], block: tuple[jax.Array, jax.Array, jax.Array]):
        (cache, last_B1K), (z, start, rope) = carry, block

        def update(x: jax.Array) -> tuple[jax.Array, Any]:
            affine, kv = predict(jnp.concatenate([last_B1K, x[:, :-1]], axis=1), rope, cache)
            return affine.mu_BSC + affine.sigma_BSC * z, _split_branches(kv, branches)

        found = jacobi.solve(update, start, tolerance=solver.tolerance,
                             max_steps=min(solver.max_steps or size, z.shape[1]), aux_batch_axis=-4)
        cache = cache.append(_join_branches(found.aux))
        return (cache, found.x[:, -1:]), (found.x, Report(found.steps, found.residual, found.converged))

    whole = z_BSK.shape[1] // size * size
    blocks = (_to_blocks(z_BSK[:, :whole], size), _to_blocks(start_BSK[:, :whole], size),
              jnp.moveaxis(rope_2SE[:, :whole].reshape(2, -1, size, rope_2SE.shape[-1]), 1, 0))
    carry, (x, report) = lax.scan(solve_block, (cache, last_B1K), blocks)
    x_BSK = jnp.moveaxis(x, 0, 1).reshape(z_BSK.shape[0], whole, -1)
    if whole < z_BSK.shape[1]:
        rest = (z_BSK[:, whole:], start_BSK[:, whole:], rope_2SE[:, whole:])
        carry, (x_rest, report_rest) = solve_block(carry, rest)
        x_BSK = jnp.concatenate([x_BSK, x_rest], axis=1)
        report = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), report, report_rest)
    return x_BSK, carry[0], carry[1], report


def _wavefront(predict: Predict, z_BSK, start_BSK, last_B1K, cache: KVCache, rope_2SE, solver: Solver):
    """`solve_tokens` by windows of `updates` strides: the first stride of a window is at its last update, after which
    its keys and values are kept and the window moves on; the last stride is at its first. All samples go alike."""
    tokens, stride, updates = z_BSK.shape[1], solver.stride, solver.updates

    def update(carry, low: int | jax.Array, width: int, final: int):
        """One pass over `width` tokens, `final` of which it finishes; returns also those tokens' residual.

        What the pass before finished goes into the cache here, before anything reads it: afterwards, XLA would copy
        the whole cache at each pass."""
        x_BSK, cache, last_B1K, finished = carry
        cache = cache if finished is None else cache.append(finished)
        old, z, rope = (lax.dynamic_slice_in_dim(a, low, width, axis=1) for a in (x_BSK, z_BSK, rope_2SE))
        affine, kv = predict(jnp.concatenate([last_B1K, old[:, :-1]], axis=1), rope, cache)
        new = affine.mu_BSC + affine.sigma_BSC * z
        x_BSK = lax.dynamic_update_slice_in_dim(x_BSK, new, low, axis=1)
        if final:
            finished = jax.tree.map(lambda part: part[..., :final, :, :], kv)
            last_B1K = new[:, final - 1:final]
        return (x_BSK, cache, last_B1K, finished), jacobi.residual(new[:, :final], old[:, :final])

    carry: Any = (start_BSK, cache, last_B1K, None)
    residuals, whole = [], tokens // stride
    passes = list(range(-(-tokens // stride) + updates - 1))
    alike = [p for p in passes if updates - 1 <= p < whole]  # full windows
    for p in passes:
        low, high = max(0, p - updates + 1) * stride, min((p + 1) * stride, tokens)
        final = min(stride, high - low) if p >= updates - 1 else 0
        if p not in alike:
            carry, change = update(carry, low, high - low, final)
            residuals += [change[None]] * bool(final)
        elif p == alike[0]:
            carry, change = update(carry, low, high - low, final)
            lows = (jnp.asarray(alike[1:], jnp.int32) - updates + 1) * stride
            carry, rest = lax.scan(lambda carry, low: update(carry, low, updates * stride, stride), carry, lows)
            residuals += [change[None], rest]
    x_BSK, cache, last_B1K, finished = carry
    residual = jnp.concatenate(residuals)
    converged = (residual < solver.tolerance) | (stride == 1)  # one by one, all in front of a token is final
    report = Report(jnp.full(residual.shape, updates, jnp.int32), residual, converged)
    return x_BSK, cache.append(finished), last_B1K, report


def _to_blocks(x_BSK: jax.Array, size: int) -> jax.Array:
    return jnp.moveaxis(x_BSK.reshape(x_BSK.shape[0], -1, size, x_BSK.shape[-1]), 1, 0)


def _split_branches(kv, branches: int):
    """(..., branches*B, S, H, D) -> (..., branches, B, S, H, D), so that the solver finds the samples at axis -4."""
    return jax.tree.map(lambda a: a.reshape(*a.shape[:-4], branches, -1, *a.shape[-3:]), kv)


def _join_branches(kv):
    return jax.tree.map(lambda a: a.reshape(*a.shape[:-5], -1, *a.shape[-3:]), kv)


@partial(jax.jit, static_argnames=("model", "window", "token_grid"))
def start_window(
    model: STARFlow,
    params: Any,
    known_BTSK: jax.Array,
    texts_GBTD: jax.Array | None,
    *,
    window: int,
    token_grid: tuple[int, int],
    guess_BSK: jax.Array | None = None,
) -> WindowState:
    """Fill the cache with the text and the T >= 0 known frames of u (TI2V, extension, restarts).

    texts: (branches, B, text_length, text_dim), branch 0 conditional; None: a model without text.
    guess: of the first frame, where none is known; 0 by default.
    """
    batch, known, tokens, channels = known_BTSK.shape
    branches, text_length = (1, 0) if texts_GBTD is None else (texts_GBTD.shape[0], texts_GBTD.shape[2])
    text = None if texts_GBTD is None else texts_GBTD.reshape(-1, *texts_GBTD.shape[2:])
    block = partial(_apply_deep, model, params)
    config = model.config
    cache = KVCache.empty(config.deep_layers, branches * batch, text_length + window * tokens,
                          config.deep_width // config.head_dim, config.head_dim, jnp.dtype(config.dtype),
                          unstacked=is_unstacked(params["params"]["deep"]["transformer"]))
    last_B1K = block(FlowBlock.start, batch)
    if known:
        flat_BSK = known_BTSK.reshape(batch, -1, channels)
        rope = model.rope((known, *token_grid), text)
        _, kv = block(FlowBlock.prefill, jnp.tile(flat_BSK, (branches, 1, 1)), rope, text)
        cache, last_B1K = cache.append(kv), flat_BSK[:, -1:]
    elif text is not None:
        rope = model.rope((1, *token_grid), text)[:, :text_length]
        cache = cache.append(block(FlowBlock.prefill_text, text, rope))
    guess = jnp.zeros((batch, tokens, channels), known_BTSK.dtype) if guess_BSK is None else guess_BSK
    previous = known_BTSK[:, -1] if known else guess
    return WindowState(cache, last_B1K.astype(previous.dtype), previous, jnp.int32(known))


@partial(jax.jit, static_argnames=("model", "solver", "window", "token_grid", "branches"))
def decode_frames(
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
) -> tuple[jax.Array, WindowState, Report]:
    """The next G frames of u = f_D^{-1}(z | earlier frames, text). branches: 2 with guidance, 1 without.

    start: where the solver starts; None: at the previous frame.
    """
    batch, frames, tokens, channels = z_BGSK.shape
    positions = model.rope((window, *token_grid), None)
    rope = lax.dynamic_slice_in_dim(positions, state.frame * tokens, frames * tokens, axis=1)

    def predict(inputs_BNK: jax.Array, rope_2NE: jax.Array, cache: KVCache) -> tuple[Affine, Any]:
        inputs = jnp.tile(inputs_BNK, (branches, 1, 1))
        affine, kv = _apply_deep(model, params, FlowBlock.predict, inputs, rope_2NE, cache)
        if branches == 1:
            return affine, kv
        conditional, unconditional = (Affine(*part) for part in zip(*(jnp.split(a, 2) for a in affine)))
        return guide(conditional, unconditional, guidance), kv

    z = z_BGSK.reshape(batch, -1, channels)
    start = jnp.tile(state.previous_BSK, (1, frames, 1)) if start_BGSK is None else start_BGSK.reshape(z.shape)
    u, cache, last, report = solve_tokens(
        predict, z, start, state.last_B1K, state.cache, rope, solver, branches)
    u_BGSK = u.reshape(z_BGSK.shape)
    return u_BGSK, WindowState(cache, last, u_BGSK[:, -1], state.frame + frames), report


def _apply_deep(model: STARFlow, params: Any, method: Callable, *args):
    return model.apply(params, method=lambda m: method(m.deep, *args))


def generate(
    model: STARFlow,
    params: Any,
    noise_BTSK: jax.Array,
    texts: jax.Array | dict[int, jax.Array] | None,
    *,
    guidance: float = 0.0,
    solver: Solver = SEQUENTIAL,
    token_grid: tuple[int, int],
    known_BTSK: jax.Array | None = None,
    window: int | None = None,
    context: int | None = None,
    guess_BSK: jax.Array | None = None,
    start_BTSK: jax.Array | None = None,
) -> Iterator[tuple[jax.Array, Report]]:
    """Yield the frames of u that follow the known ones, (B, G, S, K) with their report, as they are done.

    noise: one frame of it per frame to make. texts: (branches, B, text_length, text_dim), conditional
    features and, with guidance, what they are guided away from; or a dict of them by the index of the made
    frame from which on they hold (0 must be there). Past `window` frames (default: all fit), or with
    another text, the last `context` frames are encoded again at positions from 0 and generation goes on.
    The solver starts at `start`, shaped as the noise, or each frame at the one before (the first at `guess`).
    Raises ValueError where the known frames or the context do not fit the window.
    """
    batch, total, tokens, channels = noise_BTSK.shape
    u_BTSK = jnp.zeros((batch, 0, tokens, channels), noise_BTSK.dtype) if known_BTSK is None else known_BTSK
    window = window or u_BTSK.shape[1] + total
    context = window * 3 // 4 if context is None else context
    if u_BTSK.shape[1] >= window and total:
        u_BTSK = u_BTSK[:, -max(context, 1):]
    if not 0 < context < window and u_BTSK.shape[1] + total > window:
        raise ValueError(f"context={context}: must be at least 1 and less than the window of {window} frames")
    text_of = texts if isinstance(texts, dict) else {0: texts}
    begin = partial(start_window, model, params, window=window, token_grid=token_grid)
    index, in_window, state = 0, 0, None
    while index < total:
        changed = index > 0 and index in text_of
        if index in text_of:
            text_GBTD = text_of[index]
        if state is None or changed or in_window == window:
            if state is not None:
                u_BTSK = u_BTSK[:, -(context if in_window == window else in_window):]
            state, in_window = begin(u_BTSK, text_GBTD, guess_BSK=guess_BSK), u_BTSK.shape[1]
        next_change = min((at for at in text_of if at > index), default=total)
        frames = min(solver.frames, window - in_window, next_change - index, total - index)
        now = slice(index, index + frames)
        made_BGSK, state, report = decode_frames(
            model, params, state, noise_BTSK[:, now], jnp.float32(guidance),
            None if start_BTSK is None else start_BTSK[:, now], solver=solver, window=window,
            token_grid=token_grid, branches=1 if text_GBTD is None else text_GBTD.shape[0])
        u_BTSK = jnp.concatenate([u_BTSK, made_BGSK], axis=1)[:, -window:]
        index, in_window = index + frames, in_window + frames
        yield made_BGSK, report


@partial(jax.jit, static_argnames=("model", "solver", "token_grid"))
def invert_shallow(
    model: STARFlow, params: Any, u_BTSK: jax.Array, *, solver: Solver, token_grid: tuple[int, int]
) -> tuple[jax.Array, tuple[Report, ...]]:
    """x = f_S^{-1}(u): latents (B, T, H, W, C), and each block's report from the deepest on."""
    config = model.config
    rope = model.shallow_rope((u_BTSK.shape[1], *token_grid))
    x_BTSK, reports = u_BTSK, []
    for index in reversed(range(len(config.shallow_layers))):
        z = model.to_block_order(index, x_BTSK)
        cache = KVCache.empty(config.shallow_layers[index], z.shape[0], z.shape[1],
                              config.shallow_width // config.head_dim, config.head_dim, jnp.dtype(config.dtype),
                              unstacked=is_unstacked(params["params"][f"shallow_{index}"]["transformer"]))
        cache = lax.optimization_barrier(cache)  # or XLA computes on the empty cache while it compiles

        def apply(method: Callable, *args, index: int = index):
            return model.apply(params, method=lambda m: method(m.shallow[index], *args))

        first = apply(FlowBlock.start, z.shape[0]).astype(z.dtype)
        x, _, _, report = solve_tokens(partial(apply, FlowBlock.predict), z, z, first, cache, rope, solver)
        x_BTSK = model.from_block_order(index, x, x_BTSK.shape)
        reports.append(report)
    return model.latents(x_BTSK, token_grid[0]), tuple(reports)
