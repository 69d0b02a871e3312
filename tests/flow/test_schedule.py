"""In which steps a video is decoded."""

import dataclasses

import pytest

from starflow_jax.flow.inversion import Solver
from starflow_jax.flow.schedule import schedule

SOLVER = Solver(block_size=8, frames=2, first_block_size=4)


def steps(total: int, known: int = 0, **windows) -> list[tuple[int, int, bool, int | None]]:
    """(index, frames, later, encode) of each."""
    return [(step.index, step.frames, step.later, step.encode)
            for step in schedule(total, known, SOLVER, **{"window": 6, "context": 2, **windows})]


def test_a_first_frame_of_its_own_then_what_a_step_takes() -> None:
    found = list(schedule(6, 0, SOLVER, window=6, context=2))
    assert [step.frames for step in found] == [1, 2, 2, 1]
    assert [step.solver for step in found] == [dataclasses.replace(SOLVER, block_size=4, frames=1, first_block_size=0),
                                               *[SOLVER] * 3]
    assert [step.encode for step in found] == [0, None, None, None]


def test_a_full_window_begins_again_with_its_context() -> None:
    assert steps(11) == [(0, 1, False, 0), (1, 2, False, None), (3, 2, False, None), (5, 1, False, None),
                         (6, 2, True, 2), (8, 2, True, None), (10, 1, True, 2)]


def test_another_text_begins_again_with_what_the_window_has() -> None:
    """At frame 3, with its own three frames; 0 among the changes is no change."""
    found = steps(5, changes={0: "", 3: ""})
    assert found == [(0, 1, False, 0), (1, 2, False, None), (3, 2, True, 3)]
    texts = [step.text for step in schedule(5, 0, SOLVER, window=6, context=2, changes={0: "", 3: "", 4: ""})]
    assert texts == [0, 0, 3, 4]


def test_given_frames_that_fill_the_window_are_cut_to_its_context() -> None:
    assert steps(1, known=5) == [(0, 1, False, 5)]
    assert steps(3, known=6) == steps(3, known=9) == [(0, 2, True, 2), (2, 1, True, None)]
    assert steps(0, known=9) == []


@pytest.mark.parametrize("context", [0, 6])
def test_a_context_must_fit_the_window(context: int) -> None:
    assert len(steps(6, context=context)) == 4
    with pytest.raises(ValueError, match=f"context={context}"):
        steps(7, context=context)
