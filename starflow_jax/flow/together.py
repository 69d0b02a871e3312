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
    for size in sizes:
        if size > 1 and kind not in compiled:
            jax.block_until_ready(_decode_lanes(ask.model, ask.params, (given,) * size, ask.solver, **ask.how))
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
    first = asks[0]
    lanes = [ask.take() for ask in asks]
    lanes += [lanes[0]] * (size - len(lanes))
    params = to_devices(first.params, after=lanes)
    made = _decode_lanes(first.model, params, tuple(lanes), first.solver, **first.how)
    for ask, part in zip(asks, made):
        ask.answer = part


# The states are not donated: they are put side by side first, which copies them.
@partial(jax.jit, static_argnames=("model", "window", "token_grid", "branches"))
def _decode_lanes(model: STARFlow, params: Any, lanes: tuple[Given, ...], solver: Solver, **how: Any
                  ) -> tuple[tuple[jax.Array, WindowState, Report], ...]:
    """`decode_frames` of each."""
    # Of a control module, as of the other parameters, there is one for all; lanes differ in their rays.
    module = lanes[0].steering[0] if lanes[0].steering else None

    def one(lane: Given, rays: jax.Array | None) -> tuple[jax.Array, WindowState, Report]:
        steering = None if rays is None else (module, rays)
        return decode_frames(model, params, *lane._replace(steering=steering), solver=solver, **how)

    differing = [(lane._replace(steering=None), lane.steering[1] if lane.steering else None) for lane in lanes]
    made = jax.vmap(one)(*jax.tree.map(lambda *parts: jnp.stack(parts), *differing))
    return tuple(jax.tree.map(lambda part, lane=lane: part[lane], made) for lane in range(len(lanes)))
