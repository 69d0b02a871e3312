"""Steps of several sessions as one program, against each session alone."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from starflow_jax.flow.decode import WindowState
from starflow_jax.flow.generation import Ask
from starflow_jax.flow.together import answer_together, groups
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.session import Session
from tests.sampling.test_session import near, steerable, whole
from tests.small_model import CAPTIONS, CONFIG


@pytest.fixture(scope="module")
def model(params) -> Model:
    return steerable(dataclasses.replace(CONFIG.model, frames=4), params)


def run(sessions: dict[int, Session], rounds: int, size: int) -> tuple[dict[int, np.ndarray], list[list[int]]]:
    """The frames of sessions that join at the rounds they are named by, and leave after eight of their own; and of each
    round how many steps were made as one program."""
    made: dict[int, list[np.ndarray]] = {begin: [] for begin in sessions}
    together = []
    for now in range(rounds):
        asks = []
        for begin, session in sessions.items():
            if not begin <= now < begin + 8:
                continue
            if now == begin + 5:
                session.prompt = CAPTIONS[2]
            while not isinstance(part := session.advance(), Ask):
                assert part is not None
                made[begin].append(part)
            asks.append(part)
        together.append([len(group) for group in groups(asks, size)])
        answer_together(asks, [size])
    return {begin: whole(iter(parts)) for begin, parts in made.items()}, together


def test_a_session_has_the_frames_it_has_alone(model: Model) -> None:
    """At other frames of their windows, with changes of prompt, moves of the window, guided and not; bit for bit at the
    same size, to a shade otherwise."""
    settings = [dict(seed=1), dict(seed=2, guidance=3.0), dict(seed=3), dict(seed=4, guidance=0.0)]

    def begun(at: int, index: int) -> Session:
        return model.stream(CAPTIONS[index % 3], recording=False, **settings[index])

    begins = (0, 1, 3, 4)
    together, sizes = run({at: begun(at, index) for index, at in enumerate(begins)}, 12, size=3)
    # Three are guided and begin at rounds 0, 1 and 3, one at 4 is not.
    assert sizes == [[1], [2], [2], [3], *[[3, 1]] * 4, [2, 1], [1, 1], [1, 1], [1]]
    for index, at in enumerate(begins):
        alone, _ = run({at: begun(at, index)}, at + 8, size=3)
        np.testing.assert_array_equal(together[at], alone[at])
        one, _ = run({at: begun(at, index)}, at + 8, size=1)
        assert near(one[at], alone[at])
    unchanged = whole(itertools.islice(begun(0, 0), 4))
    assert near(together[0][:len(unchanged)], unchanged)


def test_a_batch_takes_the_place_of_the_caches_that_it_goes_on_from(model: Model) -> None:
    """Also where a lane is added that repeats another one."""
    sessions = [model.stream(CAPTIONS[0], seed=seed, recording=False) for seed in range(3)]
    asks = [session.advance() for session in sessions]
    assert all(isinstance(ask, Ask) for ask in asks)
    keys = [a_key(ask.given.state) for ask in asks]
    places = {key.unsafe_buffer_pointer() for key in keys}
    answer_together(asks, [4])
    assert all(key.is_deleted() for key in keys)
    assert {a_key(ask.answer[1]).unsafe_buffer_pointer() for ask in asks} == places


def a_key(state: WindowState) -> jax.Array:
    return jax.tree.leaves(state.known.cache.k_LBPHD)[0]
