"""Shallow blocks a few frames at a time: the values of all at once, and one program whatever the length."""

import dataclasses

import jax
import numpy as np
import pytest

from starflow_jax.flow import decode
from starflow_jax.flow.inversion import Solver
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.parameters import decoding_variables
from starflow_jax.sampling import shallow
from tests.small_model import CONFIG

GRID, SOLVER = CONFIG.model.token_grid, Solver(1 << 30, 1e-4)
TOKENS, CHANNELS = CONFIG.model.tokens_per_frame, CONFIG.model.token_channels


def u_of(frames: int, videos: int = 2) -> jax.Array:
    return jax.random.normal(jax.random.key(7), (videos, frames, TOKENS, CHANNELS))


@pytest.mark.parametrize("frames", [4, 5])
def test_parts_give_what_all_frames_at_once_give(params, monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    """Two frames of each of two videos at a time; of five, the last part begins with a frame that was made before."""
    flow, variables, u = STARFlow(CONFIG.model), decoding_variables(params), u_of(frames)
    whole, reports = decode.invert_shallow(flow, variables, u, solver=SOLVER, token_grid=GRID)
    monkeypatch.setattr(shallow, "TOKENS", 2 * 2 * TOKENS)
    parts, reports_of_parts = shallow.invert_all(flow, variables, u, solver=SOLVER, token_grid=GRID)
    np.testing.assert_allclose(parts, whole, atol=2e-6)
    for ours, expected in zip(reports_of_parts, reports, strict=True):
        assert ours.steps.shape == (1, 2 * frames) and expected.steps.max() > 1
        np.testing.assert_array_equal(ours.steps, expected.steps)
        np.testing.assert_allclose(ours.residual, expected.residual, rtol=1e-3, atol=1e-9)


def test_another_length_runs_the_same_program(params, monkeypatch: pytest.MonkeyPatch) -> None:
    flow, variables, compiled = STARFlow(CONFIG.model), decoding_variables(params), decode.invert_shallow._cache_size
    monkeypatch.setattr(shallow, "TOKENS", 3 * 2 * TOKENS)
    before = compiled()
    for frames in (7, 4, 11):
        shallow.invert_all(flow, variables, u_of(frames), solver=SOLVER, token_grid=GRID)
    assert compiled() == before + 1


def test_how_many_frames_are_inverted_at_once() -> None:
    model = dataclasses.replace(CONFIG.model, height=30, width=53)
    assert model.tokens_per_frame == 1590
    assert [shallow.frames_at_once(model, videos, 21) for videos in (1, 2, 8)] == [3, 1, 1]
    assert shallow.frames_at_once(model, 1, 1) == 1
    assert shallow.frames_at_once(dataclasses.replace(model, local_shallow=False), 1, 21) == 21
