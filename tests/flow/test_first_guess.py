"""The first guess: least squares, and what it saves."""

import numpy as np

from starflow_jax.flow import first_guess


def test_a_linear_relation_is_found() -> None:
    rng = np.random.default_rng(0)
    text = rng.normal(size=(400, 5, 6)).astype(np.float32)
    weights = rng.normal(size=(6, 4 * 3))
    frames = (text.mean(axis=1) @ weights + 2.0).reshape(-1, 4, 3)
    guess = first_guess.fit(text, frames)
    error = np.asarray(guess(text)) - frames
    assert (error**2).mean() < 1e-3 * frames.var()


def test_rank_keeps_the_strongest_directions() -> None:
    rng = np.random.default_rng(1)
    text = rng.normal(size=(300, 1, 6)).astype(np.float32)
    strong, weak = np.zeros(12), np.zeros(12)
    strong[3], weak[7] = 10.0, 0.1
    frames = (text[:, 0, :1] * strong + text[:, 0, 1:2] * weak).reshape(-1, 4, 3)
    guess = np.asarray(first_guess.fit(text, frames, rank=1)(text)).reshape(-1, 12)
    assert np.abs(guess[:, 3] - frames.reshape(-1, 12)[:, 3]).max() < 0.2
    assert np.abs(guess[:, 7]).max() < 0.02
