"""What evaluation makes of clips and of single pictures; its two baselines."""

import dataclasses

import numpy as np
import pytest

from starflow_jax.evaluation.split import baselines, generate_and_read, read
from starflow_jax.evaluation.two_sample import clip_statistics
from starflow_jax.model.system import System
from starflow_jax.sampling.generate import generate_clips
from tests.small_model import CAPTIONS, CONFIG


def test_pictures_have_no_direction_and_do_not_flicker() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24, 3), np.uint8)
    labels = np.zeros((2, 3), int)
    assert set(read(labels, frames)) == {"digit", "colour", "direction", "temporal_flickering"}
    assert set(read(labels, frames[:, :1])) == {"digit", "colour"}
    assert set(read(None, frames)) == {"temporal_flickering"} and read(None, frames[:, :1]) == {}
    assert read(None, frames[:, [0, 0]]) == {"temporal_flickering": 1.0}


def test_baselines_know_their_own_data() -> None:
    """Gaussian latents, and a walk whose steps are a tenth as wide: bits by the formula of a Gaussian's entropy."""
    random = np.random.default_rng(1)
    entropy = 0.5 * np.log2(2 * np.pi * np.e)
    still = random.normal(size=(4_000, 3, 1, 1, 2))
    assert abs(baselines(still[:2_000], still[2_000:])["gaussian"] - entropy) < 0.02
    walk = np.cumsum(still * np.array([1.0, 0.1, 0.1])[:, None, None, None], axis=1)
    expected = entropy + 2 / 3 * np.log2(0.1)
    assert abs(baselines(walk[:2_000], walk[2_000:])["last_frame"] - expected) < 0.02


def test_figures_of_batches_are_those_of_all_clips(system: System, params) -> None:
    """Three clips in batches of two, the last one filled up; each way of denoising."""
    sample = dataclasses.replace(CONFIG.sample, batch_size=2, guidance=0.0)
    of = dataclasses.replace(system, config=dataclasses.replace(CONFIG, sample=sample))
    scores, shown, statistics = generate_and_read(of, params, CAPTIONS, None)
    for how, found in scores.items():
        settings = dataclasses.replace(sample, denoise=how, frames=0)
        frames = generate_clips(of, params, CAPTIONS, [0, 1, 2], settings).frames_BTHWC
        assert found == {"temporal_flickering": pytest.approx(read(None, frames)["temporal_flickering"], abs=1e-4)}
        if how == sample.denoise:
            assert np.abs(shown.astype(int) - frames).max() <= 1
            np.testing.assert_allclose(statistics, clip_statistics(frames), rtol=0.02, atol=0.01)
    assert len({round(found["temporal_flickering"], 5) for found in scores.values()}) > 1
