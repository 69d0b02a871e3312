"""A result that is not finite is an error in whole videos, streams, sessions and evaluation, whatever part made it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.codec.interface import decode_latents, decode_next
from starflow_jax.config import UserError
from starflow_jax.evaluation import denoisers, horizon
from starflow_jax.evaluation.adherence import adherence_of_samples
from starflow_jax.evaluation.denoising import denoised_real_clips
from starflow_jax.evaluation.guidance import sampled
from starflow_jax.evaluation.likelihood import round_trip
from starflow_jax.evaluation.split import generate_and_read, split_likelihood
from starflow_jax.evaluation.stretches import Measures
from starflow_jax.model.system import System
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.generate import pixels
from starflow_jax.sampling.mesh import sampling_mesh
from tests.small_model import CAPTIONS, CONFIG, SETTINGS, small_system

NOT_FINITE = "^'a red seven moves right', seed 0.*: what the denoiser or the codec made is not finite; "


@pytest.fixture(scope="module")
def damaged(params: Any) -> Any:
    """Parameters with one NaN, in the denoiser."""
    leaves, kind = jax.tree.flatten(params["denoiser"])
    return {**params, "denoiser": jax.tree.unflatten(kind, [leaves[0].at[(0,) * leaves[0].ndim].set(jnp.nan),
                                                           *leaves[1:]])}


@pytest.fixture(scope="module")
def system() -> System:
    """Three videos together."""
    return small_system(dataclasses.replace(CONFIG, sample=SETTINGS))


def without_a_finite_codec(system: System) -> System:
    return dataclasses.replace(system, codec=system.codec.replace(mean_P=system.codec.mean_P.at[3].set(jnp.inf)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_which_videos_are_finite_is_known_where_they_are_decoded(system: System, value: float) -> None:
    """One value of the second of three videos' last latent frame; of a stream's parts only the last one's."""
    latents = np.random.default_rng(0).normal(size=(3, 3, 2, 2, 4)).astype(np.float32)
    latents[1, 2, 0, 1, 2] = value
    found = pixels(system, latents, "none")
    assert found.frames_BTHWC.dtype == np.uint8
    np.testing.assert_array_equal(found.finite_B, [True, False, True])
    np.testing.assert_array_equal(decode_latents(system.codec, latents, 1.0).finite_B, [True, False, True])
    cache, parts = None, []
    for index in range(3):
        part, cache = decode_next(system.codec, jnp.asarray(latents[:, index:index + 1]), cache, 1.0)
        parts.append(part.finite_B.tolist())
    assert parts == [[True] * 3, [True] * 3, [True, False, True]]


@pytest.mark.parametrize("part", ["denoiser", "codec"])
def test_of_the_api(system: System, params: Any, damaged: Any, part: str) -> None:
    """A session shows no such frame, and says so at each call."""
    system = dataclasses.replace(system, config=dataclasses.replace(
        CONFIG, sample=dataclasses.replace(SETTINGS, batch_size=1)))
    made_by = (system, damaged) if part == "denoiser" else (without_a_finite_codec(system), params)
    model = Model(*made_by, "small", "0123", sampling_mesh(system.config, 1, jax.local_devices()[:1]))
    with pytest.raises(UserError, match=NOT_FINITE):
        model.generate(CAPTIONS[0], seed=0)
    with model.stream(CAPTIONS[0], seed=0) as session:
        for _ in range(2):
            with pytest.raises(UserError, match=NOT_FINITE):
                next(session)
        assert session.shown == 0


def test_of_evaluation(system: System, params: Any, damaged: Any) -> None:
    """Its samples, decoded as they are and denoised."""
    with pytest.raises(UserError, match=NOT_FINITE.replace("seed 0.*", "seed 0, denoise=denoiser")):
        generate_and_read(system, damaged, CAPTIONS, None)
    with pytest.raises(UserError, match=NOT_FINITE):
        generate_and_read(without_a_finite_codec(system), params, CAPTIONS, None)


@pytest.mark.slow  # quick: as above, of the test split
def test_of_each_experiment(system: System, damaged: Any) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 9, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=NOT_FINITE):
        sampled(system, damaged, CAPTIONS, 1.5, 0)
    with pytest.raises(UserError, match=NOT_FINITE):
        horizon.measure_samples(system, damaged, horizon.plain_prompts(CAPTIONS, None, 1), 1, Measures(), "samples")
    for measure in (lambda: denoised_real_clips(system, damaged, CAPTIONS, frames, ("denoiser",)),
                    lambda: denoisers.of_real_clips(system, damaged, CAPTIONS, frames)):
        with pytest.raises(UserError, match=NOT_FINITE.replace("seed 0.*", "seed 0, real, denoise=denoiser")):
            measure()
    with pytest.raises(UserError, match="^video 1 of 1, decoded from z: what the denoiser"):
        round_trip(system, damaged, frames[0], CAPTIONS[0])


def test_samples_that_training_reads_stop_it_not(system: System, damaged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow_jax.evaluation.adherence.fixed_captions", lambda config, split, count: CAPTIONS)
    monkeypatch.setattr("starflow_jax.evaluation.adherence.reader.labels_of", lambda captions: None)
    monkeypatch.setattr("starflow_jax.evaluation.adherence.reader.default_reader", Reader)
    with pytest.raises(UserError, match=NOT_FINITE):
        adherence_of_samples(system, damaged, "test", 3)
    assert adherence_of_samples(system, damaged, "validation", 3, checked=False) == {"clips": 3}


class Reader:
    def adherence(self, labels: None, frames_BTHWC: np.ndarray) -> dict[str, int]:
        return {"clips": len(frames_BTHWC)}


def test_a_likelihood_that_is_not_finite_is_no_figure(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.array([[1.0, 2.0], [np.nan, 2.0], [1.0, np.inf]])
    monkeypatch.setattr("starflow_jax.evaluation.split.likelihood_batches", lambda *_: [])
    monkeypatch.setattr("starflow_jax.evaluation.split.bits_per_frame", lambda *_: bits)
    with pytest.raises(UserError, match="^the likelihood of 2 of 3 test clips is not finite; "):
        split_likelihood(system, {})
