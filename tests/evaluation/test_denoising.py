"""Real clips through noise and each way of denoising."""

import dataclasses

import numpy as np
import pytest

from starflow_jax.evaluation import denoising
from starflow_jax.evaluation.denoising import denoised_real_clips
from starflow_jax.evaluation.measures import psnr
from starflow_jax.evaluation.two_sample import clip_statistics
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import noised
from starflow_jax.sampling.denoise import denoise
from tests.small_model import CAPTIONS, CONFIG


def test_psnr_and_statistics_of_batches_are_those_of_all_clips(system: System, params, monkeypatch) -> None:
    """Three clips in batches of two, two of them in every way."""
    monkeypatch.setattr(denoising, "PSNR_CLIPS", 2)
    config = dataclasses.replace(CONFIG, sample=dataclasses.replace(CONFIG.sample, batch_size=2))
    frames = np.random.default_rng(1).integers(0, 256, (3, 9, 8, 8, 3), np.uint8)
    found, statistics = denoised_real_clips(dataclasses.replace(system, config=config), params, CAPTIONS, frames,
                                            ["denoiser", "score", "none"])
    noisy, text = noised(system, frames, range(3)), system.caption_features(params, CAPTIONS)
    coded = np.asarray(system.decode(system.encode(frames)))
    for how in ("denoiser", "score", "none"):
        made = np.asarray(system.decode(denoise(system, params, noisy, text, how)))
        assert found[how] == pytest.approx(psnr(coded[:2], made[:2]), abs=0.05)
        if how == "denoiser":
            np.testing.assert_allclose(statistics, clip_statistics(made), rtol=0.02, atol=0.01)
    assert len(set(found.values())) == 3
