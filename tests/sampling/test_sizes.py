"""A few sizes serve every number of videos and of frames: no further call compiles anything, values are the same."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax.config import Config
from starflow_jax.flow import decode
from starflow_jax.io.compiled import count_programs
from starflow_jax.model.parameters import shallow_variables
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.batches import make_batch
from starflow_jax.sampling.conditions import caption_text
from starflow_jax.sampling.denoise import denoise, denoise_window
from starflow_jax.sampling.mesh import sampling_mesh
from starflow_jax.sampling.requests import Request
from starflow_jax.sampling.shallow import invert_videos
from starflow_jax.sampling.sizes import frames_together, videos_together
from starflow_jax.sampling.solver import complete, shallow_solver
from tests.helpers import random_params
from tests.small_model import CAPTIONS, CONFIG, SETTINGS, small_system

STRIDE = CONFIG.codec.time_stride


def model_of(of: Any, batch_size: int = 4) -> Model:
    config = dataclasses.replace(CONFIG, model=of, sample=dataclasses.replace(SETTINGS, batch_size=batch_size))
    mesh = sampling_mesh(config, 1, jax.local_devices()[:1])
    return Model(small_system(config), random_params(config, scale=0.3), "small", "0123", mesh)


def test_the_sizes() -> None:
    assert [videos_together(count, 6) for count in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert [frames_together(CONFIG.model, frames) for frames in (1, 2, 3, 7)] == [1, 3, 3, 3]
    of_global = dataclasses.replace(CONFIG.model, local_shallow=False)
    assert [frames_together(of_global, frames) for frames in (1, 2, 3, 7)] == [1, 2, 3, 3]


def test_after_a_video_of_each_kind_no_call_compiles_anything() -> None:
    """One whose window moves on, alone and among others, and a stream of one; then any prompt, guidance, seed, length
    and number."""
    model, compiled = model_of(dataclasses.replace(CONFIG.model, frames=4)), count_programs()
    longest = 1 + 8 * STRIDE
    for prompts in (CAPTIONS[0], CAPTIONS):
        made = model.generate(prompts, frames=longest, guidance=1.0)
        assert np.isfinite((made if isinstance(prompts, str) else made[0]).log_likelihood)
    list(model.stream(CAPTIONS[0], frames=longest))
    before = compiled()
    assert before > 20
    for seed, latents in enumerate((4, 2, 3, 6, 13), start=1):
        how: dict[str, Any] = dict(frames=1 + (latents - 1) * STRIDE, seed=seed, guidance=1.0 + seed)
        prompt = CAPTIONS[seed % 3]
        assert model.generate(prompt, **how).frames.shape[0] == how["frames"]
        made = model.generate([prompt] * (3 + seed % 2), **how)
        assert len(made) == 3 + seed % 2 and np.isfinite(made[-1].log_likelihood)
        assert sum(map(len, model.stream(prompt, **how))) == how["frames"]
    assert compiled() == before
    model.generate([CAPTIONS[0]] * 2)
    assert compiled() > before  # two are a size of their own


def test_videos_that_fill_a_batch_up_change_nothing() -> None:
    model = model_of(CONFIG.model)
    requests = [Request(caption, seed) for seed, caption in enumerate(CAPTIONS)]
    whole = make_batch(model.system, model.params, requests, 3)
    filled = make_batch(model.system, model.params, requests, 4)
    assert [video.request for video in filled] == requests
    for one, other in zip(filled, whole, strict=True):
        np.testing.assert_allclose(one.clips.noisy_BNhwC[one.index], other.clips.noisy_BNhwC[other.index], atol=1e-4)
        steps = [video.clips.solved.deep_steps_BK[video.index] for video in (one, other)]
        np.testing.assert_array_equal(*steps)


@pytest.mark.parametrize("denoiser", ["first_layer", "every_layer"])
@pytest.mark.parametrize("how", ["denoiser", "score"])
def test_frames_that_fill_a_window_up_change_nothing(how: str, denoiser: str) -> None:
    """Whatever they are. The last frame has none to look ahead to."""
    of = dataclasses.replace(CONFIG.model, frames=5, denoiser=denoiser, denoiser_layers=2)
    config = dataclasses.replace(CONFIG, model=of)
    system, params = small_system(config), random_params(config, scale=0.3)
    noisy = jax.random.normal(jax.random.key(0), (2, 5, 2, 2, 4))
    text = caption_text(system, params, CAPTIONS[:2], 3)
    alone = denoise_window(system, params, noisy[:, :3], 0, text, how)
    for behind in (noisy[:, 3:], 9 * noisy[:, 3:]):
        window = np.concatenate([noisy[:, :3], behind], axis=1)
        filled = denoise_window(system, params, window, 0, text, how, count=3)[:, :3]
        np.testing.assert_allclose(filled, alone, atol=1e-5)
    np.testing.assert_allclose(denoise(system, params, noisy[:, :3], text, how), alone, atol=1e-5)
    unaware = denoise_window(system, params, window, 0, text, how)[:, :3]
    assert np.abs(unaware - alone).max() > 1e-3


@pytest.mark.parametrize("of_step", [1, 2])
def test_shallow_blocks_of_parts_that_are_filled_up(params, of_step: int) -> None:
    """Five frames, a window of three at a time, made some at a time; of them the last part has two."""
    config: Config = CONFIG
    solver = shallow_solver(complete(SETTINGS.solver, SETTINGS.solver, config.model))
    flow, shallow = small_system(config).flow, shallow_variables(params)
    tokens = config.model.tokens_per_frame, config.model.token_channels
    u = jax.random.normal(jax.random.key(7), (2, 5, *tokens))
    made = [u[:, begin:begin + of_step] for begin in range(0, 5, of_step)]
    latents, reports = invert_videos(flow, shallow, made, solver=solver, token_grid=config.model.token_grid)
    whole, _ = decode.invert_shallow(flow, shallow, u, solver=solver, token_grid=config.model.token_grid)
    assert len(reports) == 2
    np.testing.assert_allclose(latents, whole, atol=2e-5)
