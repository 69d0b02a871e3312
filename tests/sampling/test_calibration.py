"""Calibration: its candidates, its measure of error, and that what it found is used and kept."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.t2v import paper, tiny
from starflow_jax.config import Config, Sample, Solver, UserError
from starflow_jax.flow import decode
from starflow_jax.flow.first_guess import FirstGuess, NoiseGuess, fit_noise
from starflow_jax.io.arrays import export_arrays
from starflow_jax.io.checksums import CHECKSUMS
from starflow_jax.model.calibration import Calibration
from starflow_jax.model.quantize import quantize_params
from starflow_jax.model.system import System, load_system, save_system
from starflow_jax.sampling.calibration import (
    ERROR,
    TOLERANCES,
    Decoder,
    candidates,
    decode_deep,
    fit_noise_guess,
    loosest,
    mean_updates,
    measure,
    relative_error,
)
from starflow_jax.sampling.conditions import make_conditions, noise_for
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.solver import TOLERANCE, chosen_solver, complete, deep_solver, shallow_solver
from tests.helpers import changed
from tests.small_model import CAPTIONS, CONFIG, SETTINGS

SOLVER = Solver("jacobi", block_size=8, frames_per_step=2)


def with_guess(system: System, value: float, solver: Solver = SOLVER) -> System:
    guess = FirstGuess(jnp.zeros(16), jnp.full((4, 4), value), jnp.zeros((16, 2)), jnp.zeros((2, 4, 4)))
    return dataclasses.replace(system, calibration=Calibration(solver, guess, NoiseGuess(
        jnp.full(4, value), 2 * jnp.eye(4), 3 * jnp.eye(4))))


def deep(system: System, settings: Sample) -> decode.Solver:
    return deep_solver(chosen_solver(system, settings))


def test_candidates_are_single_tokens_parts_of_a_frame_whole_frames_and_wavefronts(system: System) -> None:
    assert candidates(system) == [
        Solver("sequential"), *(Solver("jacobi", size, frames, start=start) for size, frames, start in (
            (1, 1, "previous"), (2, 1, "previous"), (4, 1, "previous"), (4, 1, "noise"), (12, 3, "previous"),
            (12, 3, "noise"))),
        *(Solver("wavefront", size, 3, updates, "noise") for size in (3, 4, 6) for updates in (3, 6))]


def test_parts_of_a_large_frame_leave_no_small_rest(system: System) -> None:
    large = dataclasses.replace(system, config=dataclasses.replace(
        system.config, model=dataclasses.replace(system.config.model, height=30, width=53)))
    parts = [solver.block_size for solver in candidates(large) if solver.kind == "jacobi" and solver.block_size < 1590]
    assert parts == [159, 265, 398, 530, 795]


def test_relative_error_is_the_squared_distance_to_the_norm() -> None:
    exact = np.ones((2, 3, 4))
    assert np.isclose(relative_error(exact * 1.1, exact), 0.01)


def test_calibrated_settings_hold_unless_others_are_asked_for(system: System) -> None:
    calibrated, asked = with_guess(system, 0.0), changed(SETTINGS, block_size=0)
    assert (deep(calibrated, asked).block_size, deep(calibrated, asked).frames) == (8, 2)
    assert deep(calibrated, changed(asked, block_size=2, frames_per_step=1)).block_size == 2
    assert deep(calibrated, changed(asked, stream=True)).frames == 1
    assert deep(system, asked).block_size == CONFIG.model.tokens_per_frame


@pytest.mark.parametrize("tokens, block", [(36, 36), (300, 300), (301, 151), (1590, 265), (1591, 266)])
def test_a_large_frame_is_solved_in_equal_parts_where_nothing_was_calibrated(tokens: int, block: int) -> None:
    model = dataclasses.replace(CONFIG.model, height=1, width=tokens)
    assert complete(Solver(), Solver(), model).block_size == block
    assert complete(Solver(), dataclasses.replace(SOLVER, block_size=159), model).block_size == 159


@pytest.mark.parametrize("config", [tiny(), paper("7b", 24, 4096)], ids=lambda config: config.name)
def test_calibration_is_used_by_every_config_of_ours(config: Config) -> None:
    for found in (Solver("jacobi", 159, 1, start="noise", tolerance=2e-3), Solver("sequential", tolerance=TOLERANCE)):
        used = complete(config.sample.solver, found, config.model)
        assert (used.kind, used.start, used.tolerance) == (found.kind, found.start or "previous", found.tolerance)
        assert used.kind == "sequential" or (used.block_size, used.frames_per_step) == (159, 1)


def test_it_is_kept_beside_the_model_and_the_sample_stays_the_same(system: System, params, tmp_path: Path) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    loaded = load_system(CONFIG, tmp_path)
    found = loaded.calibration
    assert found.solver == SOLVER and found.first_guess is not None and found.noise_guess is not None
    np.testing.assert_allclose(found.noise_guess(jnp.arange(8.0).reshape(1, 1, 2, 4)).reshape(2, 4),
                               [0.5 + 2 * np.arange(4), 0.5 + 2 * np.arange(4, 8) + 3 * np.arange(4)])
    np.testing.assert_array_equal(found.first_guess(jnp.ones((1, 3, 16))), np.full((1, 4, 4), 0.5))
    exact = changed(SETTINGS, tolerance=0.0, block_size=0)
    guessed = generate_clips(loaded, params, CAPTIONS, [5, 6, 7], exact)
    plain = generate_clips(system, params, CAPTIONS, [5, 6, 7], exact)
    np.testing.assert_allclose(guessed.noisy_BNhwC, plain.noisy_BNhwC, atol=1e-3)


def test_another_models_calibration_is_not_left_behind(system: System, tmp_path: Path) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    save_system(system, tmp_path)
    found = load_system(CONFIG, tmp_path).calibration
    assert found.first_guess is None and found.noise_guess is None and found.solver == Solver()


def test_a_file_that_names_a_wavefront_by_its_updates_alone_is_read(system: System, tmp_path: Path) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    for updates, solver in ((0, Solver("jacobi", 36, 1, start="previous")),
                            (6, Solver("wavefront", 36, 1, 6, "previous"))):
        (tmp_path / "decoding.json").write_text(json.dumps(
            {"block_size": 36, "frames_per_step": 1, "updates": updates, "start": "previous"}))
        assert load_system(CONFIG, tmp_path).calibration.solver == solver


def test_a_guess_of_each_tokens_own_noise_alone_is_read(system: System, tmp_path: Path) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    export_arrays(tmp_path / "noise_guess.safetensors", {"mean_K": np.zeros(4), "weights_KK": 2 * np.eye(4)})
    found = load_system(CONFIG, tmp_path).calibration.noise_guess
    assert found is not None
    np.testing.assert_allclose(found(jnp.ones((1, 1, 2, 4))), np.full((1, 1, 2, 4), 2.0))


def test_a_calibrated_tolerance_is_of_its_blocks_and_start(system: System) -> None:
    calibrated = with_guess(system, 0.0, dataclasses.replace(SOLVER, start="noise", tolerance=4e-3))
    asked = changed(SETTINGS, block_size=0, tolerance=-1.0)
    assert deep(calibrated, asked).tolerance == 4e-3
    assert shallow_solver(chosen_solver(calibrated, asked)).tolerance == pytest.approx(4e-4)
    assert deep(calibrated, changed(asked, block_size=8)).tolerance == 4e-3
    for other in (dict(block_size=4), dict(frames_per_step=1), dict(start="previous"), dict(kind="jacobi")):
        assert deep(calibrated, changed(asked, **other)).tolerance == TOLERANCE, other
    assert deep(calibrated, changed(asked, stream=True)).tolerance == TOLERANCE
    assert deep(system, asked).tolerance == TOLERANCE
    for tolerance in (0.0, 1e-5, 0.1):
        assert deep(calibrated, changed(asked, tolerance=tolerance)).tolerance == tolerance
    with pytest.raises(UserError, match="sample.solver.tolerance=-0.5: must be -1"):
        Solver(tolerance=-0.5)


def test_the_loosest_tolerance_within_the_error() -> None:
    exact = np.ones((1, 1))

    def with_error(share: float) -> Callable[[Solver], Decoder]:  # of so many times the tolerance
        return lambda solver: lambda: (exact + (share * solver.tolerance) ** 0.5, 0.0)

    for share, largest in ((0.05, TOLERANCES[0]), (0.2, 4.6e-3), (50.0, TOLERANCES[-1])):
        assert loosest(with_error(share), SOLVER, exact) == dataclasses.replace(SOLVER, tolerance=largest)
    for other in (Solver("wavefront", 4, 1), Solver("sequential")):
        assert loosest(with_error(0.05), other, exact) == other


def test_mean_updates_of_a_block() -> None:
    """Of three frames of four tokens."""
    model = CONFIG.model
    for block, frames, blocks in ((4, 1, 3), (2, 1, 6), (3, 1, 6), (12, 3, 1), (8, 2, 2), (5, 2, 3)):
        assert mean_updates(Solver("jacobi", block, frames), 12.0, model) == 12 / blocks
    assert mean_updates(Solver("wavefront", 6, 3, 5), 8.0, model) == 5
    assert mean_updates(Solver("sequential"), 12.0, model) == 1


def test_a_solver_is_used_where_it_was_measured_and_guesses_everywhere(
    system: System, params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, asked = jax.default_backend(), changed(SETTINGS, block_size=0, tolerance=-1.0)
    calibrated = with_guess(system, 0.5, dataclasses.replace(SOLVER, start="noise", tolerance=4e-3))
    for platform, blocks in ((here, 8), ("", 8), ("another", 4)):
        measured = dataclasses.replace(calibrated.calibration, platform=platform)
        save_system(dataclasses.replace(calibrated, calibration=measured), tmp_path)
        assert ("platform" in json.loads((tmp_path / "decoding.json").read_text())) == bool(platform)
        loaded = load_system(CONFIG, tmp_path)
        assert loaded.calibration.platform == platform and deep(loaded, asked).block_size == blocks
        given = make_conditions(loaded, params, CAPTIONS, [5, 6, 7], asked)
        np.testing.assert_allclose(given.guess_BSK, np.full((3, 4, 4), 0.5), atol=1e-3)
    assert chosen_solver(loaded, asked) == chosen_solver(system, asked)
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    assert deep(loaded, asked).block_size == 8


def test_calibrated_sequential_decoding_is_of_the_deep_block_and_gives_way_to_blocks_that_are_asked_for(
    system: System, params
) -> None:
    calibrated, asked = with_guess(system, 0.0, Solver("sequential")), changed(SETTINGS, block_size=0, tolerance=-1.0)
    assert deep(calibrated, asked) == decode.Solver(block_size=1)
    assert shallow_solver(chosen_solver(calibrated, asked)).tolerance == pytest.approx(0.1 * TOLERANCE)
    exact = changed(asked, kind="sequential")
    assert shallow_solver(chosen_solver(system, exact)) == deep(system, exact) == decode.Solver(block_size=1)
    for change in (dict(block_size=2), dict(frames_per_step=2), dict(start="noise"), dict(max_steps=2),
                   dict(tolerance=0.0), dict(draft="a"), dict(kind="jacobi")):
        other = changed(asked, **change)
        assert chosen_solver(calibrated, other) == chosen_solver(system, other), change
    assert chosen_solver(calibrated, changed(asked, stream=True)) == chosen_solver(calibrated, asked)
    clips, exact_clips = (generate_clips(calibrated, params, CAPTIONS[:1], [5], how) for how in (asked, exact))
    assert (clips.solved.deep_steps_BK == 1).all() and clips.solved.deep_steps_BK.shape == (1, 12)
    assert relative_error(clips.noisy_BNhwC, exact_clips.noisy_BNhwC) < ERROR


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"block_size": -5}', '{"tolerence": 1}'])
def test_a_damaged_file_is_named(system: System, tmp_path: Path, text: str) -> None:
    save_system(with_guess(system, 0.5), tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    (tmp_path / "decoding.json").write_text(text)
    with pytest.raises(UserError, match="decoding.json|block_size=-5"):
        load_system(CONFIG, tmp_path)


def test_a_calibrated_wavefront_serves_whole_videos_within_a_tolerance(system: System, params) -> None:
    of = with_guess(system, 0.0, Solver("wavefront", 6, 3, 3, "noise"))
    asked = changed(SETTINGS, block_size=0, tolerance=1e-3)
    assert deep(of, asked) == decode.Solver(6, 1e-3, 0, 3, 3) and chosen_solver(of, asked).start == "noise"
    for change in ({"stream": True}, {"tolerance": 0.0}, {"kind": "jacobi"}):
        other = changed(asked, **change)
        assert deep(of, other).updates == 0 and chosen_solver(of, other).start == "previous"
    named = changed(asked, kind="wavefront", updates=2, start="noise")
    assert deep(system, named).updates == 2
    given = make_conditions(of, params, CAPTIONS, [5, 6, 7], named)
    found = np.concatenate([given.start(0, 1), given.start(1, 2)], axis=1)
    np.testing.assert_allclose(found, of.calibration.noise_guess(noise_for([5, 6, 7], (3, 4, 4))), atol=1e-6)
    clips = generate_clips(of, params, CAPTIONS, [5, 6, 7], asked)
    assert clips.solved.deep_steps_BK.shape == (3, 6) and (clips.solved.deep_steps_BK == 3).all()
    exact = generate_clips(of, params, CAPTIONS, [5, 6, 7], changed(asked, tolerance=0.0))
    assert 0 < relative_error(clips.noisy_BNhwC, exact.noisy_BNhwC) < 0.1
    alone = generate_clips(of, params, CAPTIONS[:1], [5], asked)
    np.testing.assert_allclose(alone.noisy_BNhwC, clips.noisy_BNhwC[:1], atol=1e-5)


def test_videos_are_decoded_a_batch_at_a_time(system: System, params) -> None:
    asked = changed(SETTINGS, block_size=0, tolerance=1e-3)
    together, passes = decode_deep(system, params, CAPTIONS, asked, first_seed=5)
    batched, batched_passes = decode_deep(system, params, CAPTIONS, changed(asked, batch_size=2), 5)
    np.testing.assert_allclose(batched, together, atol=1e-5)
    assert batched_passes == pytest.approx(passes)


def test_tokens_are_fitted_to_their_noise() -> None:
    z = np.random.default_rng(0).normal(size=(20, 5, 5, 3))
    before = np.concatenate([np.zeros((20, 1, 3)), z.reshape(20, 25, 3)[:, :-1]], axis=1).reshape(z.shape)
    u = z @ np.diag([0.5, 1.0, 2.0]) + before @ np.diag([0.0, -1.0, 0.5]) + [1.0, 0.0, -1.0]
    guess = fit_noise(z, u)
    np.testing.assert_allclose(guess(jnp.asarray(z[:5])), u[:5], atol=2e-2)


@pytest.mark.parametrize(("few", "weights"), [(True, ""), pytest.param(
    True, "int8", marks=pytest.mark.slow), pytest.param(
    False, "", marks=pytest.mark.slow)], ids=["few", "of int8 weights", "all"])
def test_calibration_of_a_small_model(system: System, params, monkeypatch, few: bool, weights: str) -> None:
    """Both guesses fitted, each candidate measured against sequential decoding."""
    params = quantize_params(params) if weights else params
    chosen = candidates(system)
    if few:
        chosen = [Solver("sequential"), Solver("jacobi", 4, 1, start="previous"),
                  Solver("jacobi", 12, 3, start="noise"), Solver("wavefront", 3, 3, 3, "noise")]
        monkeypatch.setattr("starflow_jax.sampling.calibration.candidates", lambda system: chosen)
    small = dataclasses.replace(system, calibration=Calibration(noise_guess=fit_noise_guess(system, params)))
    rows = measure(small, params)
    assert [dataclasses.replace(row.solver, tolerance=-1.0) for row in rows] == chosen
    error = {dataclasses.replace(row.solver, tolerance=-1.0): row.error for row in rows}
    jacobi = [row for row in rows if row.solver.kind == "jacobi"]
    assert jacobi and all(row.error <= ERROR and row.solver.tolerance in TOLERANCES for row in jacobi)
    assert error[Solver("wavefront", 3, 3, 3, "noise")] < 1e-9  # strides of one token are exact
    assert error[Solver("sequential")] == 0
    blocks = {Solver("sequential"): 12, Solver("jacobi", 4, 1, start="previous"): 3,
              Solver("jacobi", 12, 3, start="noise"): 1}
    for row in rows:
        found = dataclasses.replace(row.solver, tolerance=-1.0)
        assert row.updates == pytest.approx(row.passes / blocks[found] if found in blocks else row.updates)
