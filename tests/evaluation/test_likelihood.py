"""Likelihood by token, the way to z and back, interpolation: equations on a small random model, signs on the
pretrained model."""

import dataclasses
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.config import Codec, Config, Evaluate, Model, Text, UserError
from starflow_jax.evaluation.likelihood import (
    Likelihood,
    check_pair,
    decode_z,
    interpolate,
    likelihood,
    round_trip,
    slerp,
)
from starflow_jax.io.pictures import read_image
from starflow_jax.io.video import write_mp4
from starflow_jax.model.store import LoadedModel, load_pretrained
from starflow_jax.model.system import System
from starflow_jax.modes.evaluate import draw_surprise, evaluate
from starflow_jax.sampling.conditions import VideoText, noised
from starflow_jax.sampling.generate import encode_z
from starflow_jax.sampling.likelihood import frame_nll
from tests.helpers import random_params
from tests.small_model import CAPTIONS, small_system

CAPTION, OTHER = CAPTIONS[:2]
CONFIG = Config(
    name="small",
    model=Model(channels=4, frames=3, height=2, width=3, shallow_layers=(1,), shallow_width=40, deep_layers=1,
                deep_width=40, head_dim=20, text_length=24, text_dim=16, denoiser="none", noise_std=0.3),
    text=Text(vocab_size=256, layers=1, d_model=16, d_kv=8, d_ff=16, heads=2), codec=Codec(stride=4, time_stride=4))


@pytest.fixture(scope="module")
def system() -> System:
    return small_system(CONFIG)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, scale=0.3)


def video(frames: int = 9, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 8, 12, 3), np.uint8)


@pytest.mark.parametrize("frames", [9, 25])
def test_likelihood_equals_frame_nll(system: System, params, frames: int) -> None:
    found = likelihood(system, params, video(frames), CAPTION, draws=2)
    noisy = noised(system, video(frames)[None], range(2))
    first, later = (jnp.broadcast_to(system.caption_features(params, [caption]), (2, 24, 16))
                    for caption in (CAPTION, f"(extend) {CAPTION}"))
    expected = frame_nll(system, params, noisy, VideoText(first, {0: later}))
    np.testing.assert_allclose(found.nll_DNS.sum(axis=2), expected, rtol=1e-5)
    assert found.nll_DNS.shape == (2, 1 + (frames - 1) // 4, 6)
    np.testing.assert_allclose(found.bits_NS.sum() * 4 * np.log(2), found.nll_DNS.sum(axis=(1, 2)).mean(), rtol=1e-6)


def test_draws_may_be_measured_a_few_at_a_time(system: System, params) -> None:
    in_twos = dataclasses.replace(system, config=dataclasses.replace(CONFIG, evaluate=Evaluate(batch_size=2)))
    found, expected = (likelihood(of, params, video(), CAPTION, draws=3) for of in (in_twos, system))
    np.testing.assert_allclose(found.nll_DNS, expected.nll_DNS, rtol=1e-5)
    np.testing.assert_allclose(found.null_nll_DNS, expected.null_nll_DNS, rtol=1e-5)


def test_to_z_and_back(system: System, params) -> None:
    noisy, features = noised(system, video()[None], [0]), system.caption_features(params, [CAPTION])
    z = encode_z(system.flow, params, noisy, features)
    assert float(jnp.abs(z.reshape(noisy.shape) - noisy).max()) > 0.1
    np.testing.assert_allclose(decode_z(system, params, z, features), noisy, atol=1e-4)
    back = round_trip(system, params, video(13), CAPTION)
    assert back.latents_error < 1e-5 and back.frames_THWC.shape == back.codec_THWC.shape == (9, 8, 12, 3)
    np.testing.assert_allclose(back.z_mean_square, np.mean(np.square(z)), rtol=1e-5)


def test_interpolation_ends_at_the_videos(system: System, params) -> None:
    pair = video(seed=1), video(seed=2)
    between = interpolate(system, params, pair, (CAPTION, OTHER), steps=4)
    assert between.shape == (4, 9, 8, 12, 3)
    for frames, caption, made in ((pair[0], CAPTION, between[0]), (pair[1], OTHER, between[-1])):
        ours = round_trip(system, params, frames, caption).frames_THWC
        assert np.abs(made.astype(int) - ours).max() <= 1  # a rounded grey level
    for inner in between[1:-1]:
        assert min(np.abs(inner.astype(int) - end).mean() for end in (between[0], between[-1])) > 1


def test_slerp_keeps_the_norm_and_the_ends() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    b *= np.linalg.norm(a) / np.linalg.norm(b)
    points = np.asarray(slerp(jnp.asarray(a), jnp.asarray(b), np.linspace(0, 1, 5)))
    np.testing.assert_allclose(points[0], a, atol=1e-6)
    np.testing.assert_allclose(points[-1], b, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(points.reshape(5, -1), axis=1), np.linalg.norm(a), rtol=1e-5)
    steps = np.linalg.norm(np.diff(points.reshape(5, -1), axis=0), axis=1)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)  # at one speed
    np.testing.assert_allclose(slerp(jnp.asarray(a), jnp.asarray(a), np.array([0.3]))[0], a, rtol=1e-6)


def test_pairs_that_have_nothing_between_them_are_refused() -> None:
    with pytest.raises(UserError, match="13 frames .*evaluate.video has 9"):
        check_pair(CONFIG, video(9), video(13))
    with pytest.raises(UserError, match="longer than the window of 9"):
        check_pair(CONFIG, video(13), video(13))


@pytest.mark.parametrize("settings, named", [
    (dict(task="video", video="a.mp4"), "needs a caption"),
    (dict(task="video", video="a.mp4", caption="  "), "needs a caption"), (dict(task="video", caption="x"), "video"),
    (dict(video="a.mp4", caption="x"), "evaluate.task=video"), (dict(caption="x"), "evaluate.task=video"),
    (dict(task="classify", other="b.mp4"), "evaluate.task=video"), (dict(every_caption=True), "evaluate.task=classify"),
    (dict(task="video", video="a.mp4", caption="x", other_caption="y"), "other_caption"),
    (dict(task="watch"), "test_set, horizon, ti2v, camera, video, classify, quality"),
    (dict(steps=1), "steps"), (dict(draws=0), "draws")])
def test_settings_that_cannot_be(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Evaluate(**settings)


@pytest.fixture(scope="module")
def pretrained_config():
    from configs.t2v import tiny

    return tiny()


def moving_bar(colour: int, step: int) -> np.ndarray:
    """A one, or a bar of its kind, in one colour, that moves sideways."""
    frames = np.zeros((13, 24, 24, 3), np.uint8)
    for time in range(13):
        left = 11 + round(step * (time - 6) * 0.6)
        frames[time, 5:18, left:left + 2, colour] = 220
    return frames


def test_the_caption_that_fits_is_told_from_one_that_does_not(pretrained_config, tmp_path: Path) -> None:
    pretrained, params, *_ = load_pretrained(pretrained_config, tmp_path)
    frames = moving_bar(colour=0, step=1)

    def fit(caption: str) -> float:
        return float(likelihood(pretrained, params, frames, caption, draws=2).caption_fit_NS.sum())

    assert fit("a red one moves right") > 5
    assert fit("a red one moves left") < 0
    assert fit("a green one moves right") < -100


def test_surprise_is_drawn_where_it_is(tmp_path: Path, system: System) -> None:
    """A black video in which one token surprises: where the colour of the most surprise lies in the picture."""
    def place(frame: int, token: int) -> np.ndarray:
        nll_DNS = np.zeros((1, 3, 6))
        nll_DNS[0, frame, token] = 1.0
        found = Likelihood(nll_DNS, nll_DNS, dims=4)
        draw_surprise(tmp_path / "surprise.png", system, np.zeros((9, 8, 12, 3), np.uint8), found, CAPTION)
        most = 0.75 * np.array([252, 255, 164])  # inferno's last colour, over black
        picture = read_image(tmp_path / "surprise.png").astype(float)
        return np.argwhere(np.abs(picture - most).max(-1) < 4)

    rows_columns = place(0, 0)
    height, width = np.ptp(rows_columns, axis=0) + 1
    assert len(rows_columns) > 0.9 * height * width and 0.7 < width / height < 1.4  # a square token
    corner = rows_columns.min(axis=0)
    for token, offset in ((2, (0, 2)), (3, (1, 0)), (5, (1, 2))):
        np.testing.assert_allclose(place(0, token).min(axis=0) - corner, np.array(offset) * (height, width), atol=3)
    (up, first), (_, second) = (place(frame, 0).min(axis=0) - corner for frame in (1, 2))
    assert abs(up) <= 1 and first > 3 * width and abs(second - 2 * first) <= 3


def test_files_of_a_video(tmp_path: Path, monkeypatch, capsys, system: System, params) -> None:
    monkeypatch.setattr("starflow_jax.modes.evaluate.load_model",
                        lambda config, workdir: LoadedModel(system, params, "a test", ""))
    for name, seed in (("one", 1), ("two", 2)):
        write_mp4(tmp_path / f"{name}.mp4", video(10, seed), fps=8)
    settings = Evaluate(task="video", video=str(tmp_path / "one.mp4"), caption=CAPTION,
                        other=str(tmp_path / "two.mp4"), steps=4, draws=2)
    evaluate(dataclasses.replace(CONFIG, evaluate=settings), tmp_path)
    folder = tmp_path / "inspected"
    details, = folder.glob("*.json")
    assert re.fullmatch("one_[0-9a-f]{8}", details.stem)
    assert {path.name for path in folder.iterdir()} == {details.name, *(f"{details.stem}_{end}" for end in (
        "surprise.png", "round_trip.png", "to_two.mp4", "to_two.png"))}
    facts = json.loads(details.read_text())
    assert facts["frames"] == 9 and facts["frames_left_out"] == 1
    for kind in ("log_likelihood_nats", "caption_fit_nats"):
        np.testing.assert_allclose(np.sum(facts[f"{kind}_per_token"], axis=1), facts[f"{kind}_per_frame"], rtol=1e-4,
                                   atol=1e-4)
        np.testing.assert_allclose(np.sum(facts[f"{kind}_per_frame"]), facts[kind], rtol=1e-4, atol=1e-4)
    assert "bits per dimension" in capsys.readouterr().out
