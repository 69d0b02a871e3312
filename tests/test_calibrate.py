"""Calibration: its candidates, its measure of error, and that what it found is used and kept."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from starflow_jax.calibrate import candidates, relative_error
from starflow_jax.flow.first_guess import FirstGuess
from starflow_jax.generation import deep_solver, generate_clips
from starflow_jax.system import Calibrated, System, load_system, save_system
from tests.test_generation import CAPTIONS, CONFIG, SETTINGS, params, system

__all__ = ["params", "system"]  # fixtures


def with_guess(system: System, value: float) -> System:
    guess = FirstGuess(jnp.zeros(16), jnp.full((4, 4), value), jnp.zeros((16, 2)), jnp.zeros((2, 4, 4)))
    return dataclasses.replace(system, guess=guess, calibrated=Calibrated(block_size=8, frames_per_step=2))


def test_candidates_are_parts_of_a_frame_and_whole_frames(system: System) -> None:
    assert candidates(system) == [(1, 1), (2, 1), (4, 1), (12, 3)]


def test_relative_error_is_the_squared_distance_to_the_norm() -> None:
    exact = np.ones((2, 3, 4))
    assert np.isclose(relative_error(exact * 1.1, exact), 0.01)


def test_calibrated_settings_hold_unless_others_are_asked_for(system: System) -> None:
    calibrated, asked = with_guess(system, 0.0), dataclasses.replace(SETTINGS, block_size=0)
    solver = deep_solver(calibrated, asked)
    assert (solver.block_size, solver.frames) == (8, 2)
    assert deep_solver(calibrated, dataclasses.replace(asked, block_size=2, frames_per_step=1)).block_size == 2
    assert deep_solver(calibrated, dataclasses.replace(asked, stream=True)).frames == 1
    assert deep_solver(system, asked).block_size == CONFIG.model.tokens_per_frame


def test_it_is_kept_beside_the_model_and_the_sample_stays_the_same(system: System, params, tmp_path: Path) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    loaded = load_system(CONFIG, tmp_path)
    assert loaded.calibrated == Calibrated(8, 2) and loaded.guess is not None
    np.testing.assert_array_equal(loaded.guess(jnp.ones((1, 3, 16))), np.full((1, 4, 4), 0.5))
    exact = dataclasses.replace(SETTINGS, tolerance=0.0, block_size=0)
    guessed = generate_clips(loaded, params, CAPTIONS, [5, 6, 7], exact)
    plain = generate_clips(system, params, CAPTIONS, [5, 6, 7], exact)
    np.testing.assert_allclose(guessed.noisy_BNhwC, plain.noisy_BNhwC, atol=1e-3)


def test_another_models_calibration_is_not_left_behind(system: System, tmp_path: Path) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    save_system(system, tmp_path)
    loaded = load_system(CONFIG, tmp_path)
    assert loaded.guess is None and loaded.calibrated == Calibrated()
