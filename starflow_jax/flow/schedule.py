"""In which steps a video is decoded: where its window begins anew, and how many frames a step makes."""

import dataclasses
from collections.abc import Collection, Iterator

from starflow_jax.flow.inversion import Solver


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of the solver."""

    index: int  # of its first frame among those to make
    frames: int
    solver: Solver
    text: int  # which of the texts holds: the frame from which on it does
    later: bool  # the window was encoded again, or does not begin with the video's first frame
    encode: int | None  # frames before it with which a window begins; None: the window goes on


def schedule(
    total: int, known: int, solver: Solver, *, window: int, context: int, changes: Collection[int] = ()
) -> Iterator[Step]:
    """The steps that make `total` frames behind `known` ones.

    Past `window` frames, and at those from which on another text holds (`changes`; 0 may be among them), the last
    `context` frames, or those that a window has so far, are encoded again. Raises ValueError where the context does not
    fit the window.
    """
    if not 0 < context < window and known + total > window:
        raise ValueError(f"context={context}: must be at least 1 and less than the window of {window} frames")
    index, later = 0, known >= window
    in_window = max(context, 1) if later else known
    encode: int | None = in_window
    while index < total:
        if index and (in_window == window or index in changes):
            in_window = context if in_window == window else in_window
            encode, later = in_window, True
        solver_now = solver if in_window else solver.of_first_frame
        next_change = min((at for at in changes if at > index), default=total)
        frames = min(solver_now.frames, window - in_window, next_change - index, total - index)
        text = max((at for at in changes if at <= index), default=0)
        yield Step(index, frames, solver_now, text, later, encode)
        index, in_window, encode = index + frames, in_window + frames, None
