"""A video of any length, step by step of the deep block (DESIGN: inversion, tasks).

`steps` asks for each step and leaves making it to whoever drives it, so that steps of several videos can be one program
(flow/together.py); `generate` makes each as it comes.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from starflow_jax.flow import decode
from starflow_jax.flow.control import Steering
from starflow_jax.flow.decode import WindowState
from starflow_jax.flow.inversion import SEQUENTIAL, Report, Solver
from starflow_jax.flow.schedule import Step as Planned
from starflow_jax.flow.schedule import schedule
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.sharding import to_devices


@dataclasses.dataclass(frozen=True)
class Draft:
    """A smaller deep block, beside the same shallow ones, whose solution of each step is where the solver starts. It
    sees the frames that were decided upon, not those that it drafted, so that it does not go astray in a long video."""

    model: STARFlow
    params: Any  # {"params": {"deep": its own}}
    tolerance: float


class _Drafting:
    """A draft from step to step, with a window of its own."""

    def __init__(self, draft: Draft, window: int, token_grid: tuple[int, int], cache: str) -> None:
        self._draft, self._cache = draft, cache
        self._how: dict[str, Any] = dict(window=window, token_grid=token_grid)
        self._state: Any = None

    def begin(self, kept_BTSK: jax.Array, text_GBTD: jax.Array | None, guess_BSK: jax.Array | None, count: int | None
              ) -> None:
        """As `decode.start_window`."""
        self._state, self._branches = None, _branches(text_GBTD)  # the cache is free before the next one is made
        self._state = decode.start_window(
            self._draft.model, self._draft.params, kept_BTSK, text_GBTD, guess_BSK=guess_BSK, cache=self._cache,
            count=None if count is None else jnp.int32(count), **self._how)

    def frames(self, z_BGSK: jax.Array, guidance: jax.Array, start_BGSK: jax.Array | None, solver: Solver
               ) -> tuple[jax.Array, Report]:
        """As `decode.draft_frames`."""
        return decode.draft_frames(self._draft.model, self._draft.params, self._state, z_BGSK, guidance, start_BGSK,
                                   solver=dataclasses.replace(solver, tolerance=self._draft.tolerance),
                                   branches=self._branches, **self._how)

    def follow(self, made_BGSK: jax.Array) -> None:
        """Go on behind the frames that were made in place of those drafted."""
        self._state = decode.follow_frames(self._draft.model, self._draft.params, self._state, made_BGSK,
                                           branches=self._branches, **self._how)


# (last frames of u, how many of them to encode, how many were made) -> those, as they are encoded
Refresh = Callable[[jax.Array, int, int], jax.Array]


@dataclasses.dataclass(frozen=True)
class Later:
    """What is different in a window that was encoded again, or does not begin with the video's first frame."""

    text_GBTD: jax.Array | None = None  # in place of the first text; None: the same
    refresh: Refresh | None = None


ByFrame = Callable[[int, int], jax.Array]  # (first frame to make, how many) -> (B, frames, S, K)
Made = tuple[jax.Array, Report]  # frames of u (B, G, S, K), and how the solver ended


class Given(NamedTuple):
    """What differs from step to step, and from video to video: arguments of `decode.decode_frames`."""

    state: WindowState
    z_BGSK: jax.Array
    guidance: jax.Array
    start_BGSK: jax.Array | None
    steering: Steering | None


@dataclasses.dataclass(eq=False)
class Ask:
    """A step of the deep block that is to be made: `decode.decode_frames` of these arguments."""

    model: STARFlow
    params: Any
    given: Given | None
    solver: Solver
    how: dict[str, Any]  # window, token_grid and branches
    answer: tuple[jax.Array, WindowState, Report] | None = None

    def take(self) -> Given:
        """What is given, which this lets go of: the state is a window's cache, and none is held twice."""
        given, self.given = self.given, None
        assert given is not None
        return given

    def taken_answer(self) -> tuple[jax.Array, WindowState, Report]:
        """The answer, which this lets go of."""
        answer, self.answer = self.answer, None
        assert answer is not None, "a step that nobody made"
        return answer


def answer(ask: Ask) -> None:
    """Make a step by itself."""
    given = ask.take()
    params = to_devices(ask.params, after=(given.state, given.z_BGSK))
    ask.answer = decode.decode_frames(ask.model, params, *given, solver=ask.solver, **ask.how)


Step = TypeVar("Step")


def answered(steps: Iterator[Ask | Step]) -> Iterator[Step]:
    """The others of some steps, with each that is asked for made by itself."""
    for step in steps:
        if isinstance(step, Ask):
            answer(step)
        else:
            yield step


def generate(*args: Any, **kwargs: Any) -> Iterator[Made]:
    """`steps`, each made as it is asked for: yields the frames of u with their report as they are finished."""
    return answered(steps(*args, **kwargs))


def steps(
    model: STARFlow, params: Any, noise_BTSK: jax.Array | ByFrame, texts: jax.Array | Mapping[int, jax.Array] | None, *,
    guidance: float | Callable[[bool], float] = 0.0, solver: Solver = SEQUENTIAL, token_grid: tuple[int, int],
    known_BTSK: jax.Array | None = None, window: int | None = None, context: int | None = None, later: Later = Later(),
    guess_BSK: jax.Array | None = None, start_BTSK: jax.Array | ByFrame | None = None, cache: str = "",
    steer: Callable[[int, int, int], Steering | None] | None = None, total: int | None = None,
    draft: Draft | None = None,
) -> Iterator[Ask | Made]:
    """Yield each step of the deep block, which must have its answer before the next is asked for; and then the frames
    of u that it made, which follow the known ones, (B, G, S, K), with their report.

    noise: one frame of it per frame to make, an array or what gives them; then total says how many there are, and the
    window is given. texts: (branches, B, text_length, text_dim), conditional features and, with guidance, what they are
    guided away from; or a mapping of them by the index of the made frame from which on they hold (0 must be there).
    Past `window` frames (default: all fit), or with another text, the last `context` frames are encoded again at
    positions from 0 and generation continues, as `later` says. guidance: the weight, or what gives it, told whether
    `later` is. The solver starts at `start`, as the noise, or each frame at the one before (the first at `guess`);
    with a draft, which is not steered, that one's does, and the solver starts where it ended.
    cache: see `decode.start_window`. steer: (first frame of a window, of some of its frames, their number) -> their
    steering; frames are counted from the video's first one, given or made; what it gives of frames behind them does not
    matter.

    The mapping, and what is called, are looked at when a step begins: what they say of frames that are not begun may
    still change. Parameters in the hosts' memory (`sharding.to_host`) are on the devices for a step only.
    Raises ValueError where the known frames or the context do not fit the window.
    """
    noise_of, start_of = _by_frame(noise_BTSK), None if start_BTSK is None else _by_frame(start_BTSK)
    total = noise_BTSK.shape[1] if total is None and not callable(noise_BTSK) else total
    given, begin = 0 if known_BTSK is None else known_BTSK.shape[1], 0
    assert total is not None
    window = window or given + total
    context = window * 3 // 4 if context is None else context
    text_of: Mapping[int, Any] = texts if isinstance(texts, Mapping) else {0: texts}
    drafts = _Drafting(draft, window, token_grid, cache) if draft else None
    state: Any = None
    u_BWSK: Any = None  # the window's last frames; before the video's first one 0
    for step in schedule(total, given, solver, window=window, context=context, changes=text_of):
        z_BGSK = noise_of(step.index, step.frames)
        if u_BWSK is None:
            known_BTSK = z_BGSK[:, :0] if known_BTSK is None else known_BTSK
            u_BWSK = _last_frames(known_BTSK, window)
        if step.encode is not None:
            state = None  # its cache is free before the next one is made
            begin = given + step.index - step.encode
            moved_on = step.later and not step.text and later.text_GBTD is not None
            text_GBTD = later.text_GBTD if moved_on else text_of[step.text]
            kept_BTSK, count = _kept(u_BWSK, step, later.refresh, given, window, context)
            state = decode.start_window(
                model, to_devices(params, after=kept_BTSK), kept_BTSK, text_GBTD, window=window, token_grid=token_grid,
                guess_BSK=guess_BSK, cache=cache, count=None if count is None else jnp.int32(count),
                steering=steer(begin, begin, kept_BTSK.shape[1]) if steer and step.encode else None)
            if drafts:
                drafts.begin(kept_BTSK, text_GBTD, guess_BSK, count)
        weight = jnp.float32(guidance(step.later) if callable(guidance) else guidance)
        start_BGSK = None if start_of is None else start_of(step.index, step.frames)
        drafted = None
        if drafts:
            start_BGSK, drafted = drafts.frames(z_BGSK, weight, start_BGSK, step.solver)
        ask = Ask(model, params, Given(state, z_BGSK, weight, start_BGSK,
                                       steer(begin, given + step.index, step.frames) if steer else None),
                  step.solver, dict(window=window, token_grid=token_grid, branches=_branches(text_GBTD)))
        yield ask
        made_BGSK, state, report = ask.taken_answer()
        if drafts and step.index + step.frames < total:
            drafts.follow(made_BGSK)
        u_BWSK = _followed(u_BWSK, made_BGSK)
        yield made_BGSK, report.replace(draft=drafted)


def _kept(u_BWSK: jax.Array, step: Planned, refresh: Refresh | None, given: int, window: int, context: int
          ) -> tuple[jax.Array, int | None]:
    """(the frames that a window begins with, how many of them count; None where all do).

    Windows that move on have one number of frames; with another text any number are encoded again.
    """
    assert step.encode is not None
    count = step.encode if step.index and step.encode != context else None
    if step.index and refresh is not None:
        seen_BTSK = u_BWSK[:, max(window - given - step.index, 0):]
        kept_BTSK = refresh(seen_BTSK, step.encode, step.index)
        return kept_BTSK if count is None else _padded(kept_BTSK, window), count
    return u_BWSK[:, window - step.encode:] if count is None else _in_front(u_BWSK, count), count


def _branches(text_GBTD: jax.Array | None) -> int:
    """Of guidance."""
    return 1 if text_GBTD is None else text_GBTD.shape[0]


def _by_frame(given_BT: jax.Array | ByFrame) -> ByFrame:
    return given_BT if callable(given_BT) else lambda first, count: given_BT[:, first:first + count]


def _last_frames(known_BTSK: jax.Array, window: int) -> jax.Array:
    """(B, window, S, K): the last of them, behind zeros where there are fewer."""
    last = known_BTSK[:, max(known_BTSK.shape[1] - window, 0):]
    return jnp.pad(last, ((0, 0), (window - last.shape[1], 0), (0, 0), (0, 0)))


def _padded(known_BTSK: jax.Array, window: int) -> jax.Array:
    return jnp.pad(known_BTSK, ((0, 0), (0, window - known_BTSK.shape[1]), (0, 0), (0, 0)))


@jax.jit
def _in_front(u_BWSK: jax.Array, count: int | jax.Array) -> jax.Array:
    """The last `count` frames in front; what is behind them does not matter."""
    return jnp.roll(u_BWSK, count, axis=1)


@jax.jit
def _followed(u_BWSK: jax.Array, made_BGSK: jax.Array) -> jax.Array:
    """As many last frames, with those that were made."""
    return jnp.concatenate([u_BWSK, made_BGSK], axis=1)[:, made_BGSK.shape[1]:]


