"""Ways of denoising side by side."""

import dataclasses

import jax
import numpy as np
import pytest

from starflow_jax.evaluation import denoisers
from starflow_jax.evaluation.measures import interval, psnr
from starflow_jax.sampling.conditions import noised
from tests.small_model import CAPTIONS, SETTINGS


@pytest.fixture(scope="module")
def with_decoder(system):
    """The small model with a decoder that paints all black, whatever it is given."""
    config = dataclasses.replace(system.config, sample=SETTINGS)
    decoder = system.codec.fresh_decoder(jax.random.key(0), width=4, layers=1)
    head = {**decoder["head"], "bias": decoder["head"]["bias"] - 100}
    return dataclasses.replace(system, config=config, decoder={**decoder, "head": head})


def test_psnr_of_noised_real_clips(with_decoder, params) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 8, 3), np.uint8)
    found = denoisers.of_real_clips(with_decoder, params, CAPTIONS, frames)
    assert set(found) == {"denoiser", "score", "none", "decoder"}
    black = psnr(frames, np.zeros_like(frames))
    np.testing.assert_allclose(found["decoder"]["psnr_to_the_clip"], (black, 0), atol=1e-6)  # the same for every noise
    expected = [psnr(frames, np.asarray(with_decoder.decode(noised(with_decoder, frames, range(first, first + 3)))))
                for first in (0, 3, 6)]
    np.testing.assert_allclose(found["none"]["psnr_to_the_clip"], interval(expected), rtol=1e-4)
    assert found["none"]["psnr_to_the_codecs"][0] > found["none"]["psnr_to_the_clip"][0]


def test_one_sample_in_every_way(with_decoder, params) -> None:
    shown = denoisers.side_by_side(with_decoder, params, CAPTIONS[0], seed=1)
    assert {frames.shape for frames in shown.values()} == {(9, 8, 8, 3)}
    assert shown["decoder"].max() == 0 and np.abs(shown["none"].astype(int) - shown["denoiser"]).max() > 0
