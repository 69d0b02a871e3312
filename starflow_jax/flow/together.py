"""Steps of several videos as one program, each video at its own frame of its own window.

The videos are lanes of one batch: windows differ in how much of their cache is known, in guidance and in cameras, and
each lane's solver stops by itself. Programs are for fixed numbers of lanes; lanes that nobody needs repeat the first
one, so that they end when it does.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from starflow_jax.flow.control import Steering
from starflow_jax.flow.decode import WindowState, decode_frames
from starflow_jax.flow.generation import Ask, Given, answer
from starflow_jax.flow.inversion import Report, Solver
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.sharding import to_devices


def answer_together(asks: Sequence[Ask], sizes: Sequence[int]) -> None:
    """Make steps of the deep block, as many together as the largest of `sizes` allows: a group gets the smallest size
    that holds it, 1 being `generation.answer`. Those that no program can make together (guided and not, with and
    without a camera, first frames whose blocks differ) are groups of their own."""
    for part in groups(asks, max(sizes)):
        _answer(part, min(size for size in sizes if size >= len(part)))


def groups(asks: Sequence[Ask], most: int) -> list[list[Ask]]:
    """Those that are made together, at most so many."""
    kinds: dict[Any, list[Ask]] = {}
    for ask in asks:
        kinds.setdefault(_kind(ask), []).append(ask)
    return [kind[first:first + most] for kind in kinds.values() for first in range(0, len(kind), most)]


def warm_up(ask: Ask, sizes: Sequence[int], compiled: set[Any]) -> None:
    """Make a step, and let its kind be compiled for every size unless it is among those that are."""
    given, kind = ask.given, _kind(ask)
    assert given is not None
    for size in sizes:
        if size > 1 and kind not in compiled:
            jax.block_until_ready(_run(ask, [_copied(given)], size))
    compiled.add(kind)
    answer(ask)


def _kind(ask: Ask) -> Any:
    """Equal for those that can be lanes of one program."""
    leaves, tree = jax.tree.flatten(ask.given)
    module = id(jax.tree.leaves(ask.given.steering[0])[0]) if ask.given and ask.given.steering else 0
    return (ask.model, id(jax.tree.leaves(ask.params)[0]), module, ask.solver, tuple(sorted(ask.how.items())), tree,
            tuple((leaf.shape, leaf.dtype) for leaf in leaves))


def _answer(asks: list[Ask], size: int) -> None:
    if size == 1:
        return answer(asks[0])
    for ask, part in zip(asks, _run(asks[0], [ask.take() for ask in asks], size)):
        ask.answer = part


def _run(first: Ask, lanes: list[Given], size: int) -> tuple[Any, ...]:
    """What `decode.decode_frames` returns of each lane, by the program of so many of them."""
    lanes = lanes + [_copied(lanes[0]) for _ in range(size - len(lanes))]
    params = to_devices(first.params, after=lanes)
    states, others, steerings = zip(*((lane.state, lane[1:-1], lane.steering) for lane in lanes))
    return _decode_lanes(first.model, params, states, others, steerings, first.solver, **first.how)


def _copied(lane: Given) -> Given:
    """With a state of its own, which may be given away."""
    return lane._replace(state=jax.tree.map(jnp.copy, lane.state))


# The states are put side by side, which copies them; the lanes' next ones take the place of those given away.
@partial(jax.jit, static_argnames=("model", "window", "token_grid", "branches"), donate_argnames="states")
def _decode_lanes(model: STARFlow, params: Any, states: tuple[WindowState, ...], others: tuple[Any, ...],
                  steerings: tuple[Steering | None, ...], solver: Solver, **how: Any
                  ) -> tuple[tuple[jax.Array, WindowState, Report], ...]:
    """`decode_frames` of each lane. others: its arguments between state and steering."""
    # Of a control module, as of the other parameters, there is one for all; lanes differ in their rays.
    module = steerings[0][0] if steerings[0] else None

    def one(state: WindowState, other: Any, rays: jax.Array | None) -> tuple[jax.Array, WindowState, Report]:
        steering = None if rays is None else (module, rays)
        return decode_frames(model, params, state, *other, steering, solver=solver, **how)

    rays = [steering[1] if steering else None for steering in steerings]
    made = jax.vmap(one)(*jax.tree.map(lambda *parts: jnp.stack(parts), *zip(states, others, rays)))
    return tuple(jax.tree.map(lambda part, lane=lane: part[lane], made) for lane in range(len(states)))
