"""The denoiser: which frames and which text each output depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.flow.block import block_rope
from starflow_jax.flow.denoiser import Denoiser
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.kernels.mask import FrameWindow, seen
from tests.helpers import HEAD_DIM, depends, latents, random_flow, randomised, text, tiny_model

FRAMES, TEXT = 6, 3


def dependence(layers: int, window: int, first_layer_only: bool, lookahead: int = 1, with_text: bool = False):
    """(frames, frames) and (frames, text tokens): which outputs depend on which inputs."""
    denoiser = Denoiser(channels=2, width=40, layers=layers, head_dim=HEAD_DIM, window=window, lookahead=lookahead,
                        first_layer_only=first_layer_only, text=with_text)
    random = np.random.default_rng(3)
    x = jnp.asarray(random.normal(size=(1, FRAMES * 2, 2)), jnp.float32)
    features = jnp.asarray(random.normal(size=(1, TEXT, 4)), jnp.float32)
    rope = block_rope((FRAMES, 1, 2), 2.0, TEXT if with_text else 0, HEAD_DIM)
    run = lambda variables, x, features: denoiser.apply(  # noqa: E731
        variables, x, FRAMES, rope, features if with_text else None)
    variables = randomised(jax.jit(lambda: denoiser.init(
        jax.random.key(0), x, FRAMES, rope, features if with_text else None))(), scale=1.0)
    by_x, by_text = jax.jit(jax.jacrev(run, argnums=(1, 2)))(variables, x, features)
    frames = np.asarray(by_x).reshape(FRAMES, 4, FRAMES, 4)
    return depends(frames, 0, 2), depends(np.asarray(by_text).reshape(FRAMES, 4, TEXT, 4), 0, 2)


def band(back: int, ahead: int) -> np.ndarray:
    """(frames, frames): output n depends on frames n-back .. n+ahead."""
    distance = np.arange(FRAMES)[None, :] - np.arange(FRAMES)[:, None]
    return (distance >= -back) & (distance <= ahead)


@pytest.mark.parametrize("layers", [1, 3])
def test_first_layer_looks_one_frame_ahead(layers: int) -> None:
    frames, _ = dependence(layers, window=FRAMES, first_layer_only=True)
    assert np.array_equal(frames, band(FRAMES, 1))


@pytest.mark.parametrize("layers", [1, 3])
def test_every_layers_look_ahead_adds_up(layers: int) -> None:
    frames, _ = dependence(layers, window=FRAMES, first_layer_only=False)
    assert np.array_equal(frames, band(FRAMES, layers))


@pytest.mark.parametrize("lookahead", [0, 2])
def test_look_ahead_is_a_setting(lookahead: int) -> None:
    frames, _ = dependence(2, window=FRAMES, first_layer_only=True, lookahead=lookahead)
    assert np.array_equal(frames, band(FRAMES, lookahead))


def test_a_window_of_two_frames_reaches_one_back_per_layer() -> None:
    assert np.array_equal(dependence(1, window=2, first_layer_only=True)[0], band(1, 1))
    assert np.array_equal(dependence(2, window=2, first_layer_only=True)[0], band(2, 1))


def test_text_is_seen_by_all_and_sees_the_first_frames() -> None:
    frames, by_text = dependence(1, window=1, first_layer_only=True, with_text=True)
    assert by_text.all()
    assert np.array_equal(frames, band(0, 1))  # in one layer nothing comes by way of the text
    first_two = np.arange(FRAMES)[None, :] < 2
    assert np.array_equal(dependence(2, 1, True, with_text=True)[0], band(0, 1) | first_two)
    assert np.array_equal(dependence(2, 1, False, with_text=True)[0], band(0, 2) | first_two)


def test_mask_of_text_and_window() -> None:
    """Two text tokens, then frames 0 0 1 1 2 2 3 3; window 2, look-ahead 1."""
    rows = ["11 11 11 00 00", "11 11 11 00 00",
            "11 11 11 00 00", "11 11 11 00 00", "11 11 11 11 00", "11 11 11 11 00",
            "11 00 11 11 11", "11 00 11 11 11", "11 00 00 11 11", "11 00 00 11 11"]
    expected = np.array([[c == "1" for c in row.replace(" ", "")] for row in rows])
    slot = np.arange(10)
    found = seen(FrameWindow(prefix=2, tokens=2, window=2, lookahead=1), slot[:, None], slot, 10, np)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("placement", ["first_layer", "every_layer"])
def test_the_models_placement(placement: str) -> None:
    model = tiny_model(frames=4, height=1, width=2, text_length=0, denoiser=placement, denoiser_layers=2)
    flow, variables = random_flow(model)
    score = lambda x: flow.apply(variables, x, None, method=STARFlow.score)  # noqa: E731
    jacobian = np.asarray(jax.jit(jax.jacrev(score))(latents(model)))
    assert jacobian.shape[:5] == latents(model).shape
    ahead = {"first_layer": 1, "every_layer": 2}[placement]
    assert np.array_equal(depends(jacobian, 1, 6), np.tril(np.ones((4, 4), bool), ahead))


def test_one_frame_is_the_first_of_a_video_that_it_cannot_see() -> None:
    model = tiny_model(frames=3, denoiser="first_layer", denoiser_layers=2, denoiser_lookahead=0)
    flow, variables = random_flow(model)
    score = jax.jit(lambda x: flow.apply(variables, x, text(model), method=STARFlow.score))
    video, image = score(latents(model)), score(latents(model)[:, :1])
    assert np.abs(image).max() > 0.1
    np.testing.assert_allclose(image, video[:, :1], atol=1e-5)
