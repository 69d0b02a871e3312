"""The Python API on the pretrained model: what a user calls and gets."""

import base64
import gc
import io
import re
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from PIL import Image

import starflow_jax as sf
from starflow_jax.data.digits.reader import default_reader, labels_of
from starflow_jax.io.video import read_video

PROMPT = "a blue three moves right"


@pytest.fixture(scope="module")
def model() -> sf.Model:
    return sf.load()


@pytest.fixture(scope="module")
def video(model: sf.Model) -> sf.Video:
    return model.generate(PROMPT, seed=0)


def test_a_prompt_gives_a_video_that_shows_it(model: sf.Model, video: sf.Video) -> None:
    assert video.frames.dtype == np.uint8 and video.frames.shape == (13, 24, 24, 3) and video.fps == 8
    assert default_reader().adherence(labels_of([PROMPT]), video.frames[None]) == {
        "digit": 1.0, "colour": 1.0, "direction": 1.0}
    again = model.generate(PROMPT, seed=0)
    np.testing.assert_array_equal(again.frames, video.frames)
    assert np.abs(model.generate(PROMPT, seed=1).frames.astype(int) - video.frames).max() > 50


def test_a_list_gives_a_list_and_each_of_it_is_what_it_is_alone(model: sf.Model, video: sf.Video) -> None:
    videos = model.generate(["a red seven moves left", PROMPT], seed=0)
    assert [one.prompt for one in videos] == ["a red seven moves left", PROMPT]
    difference = np.abs(videos[1].frames.astype(int) - video.frames)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2
    counted = model.generate(PROMPT, count=3, keep=2)
    assert len(counted) == 2 and counted[0].log_likelihood >= counted[1].log_likelihood
    assert {one.seed for one in counted} < {0, 1, 2}


def test_settings_are_those_of_sample(model: sf.Model, video: sf.Video) -> None:
    exact = model.generate(PROMPT, seed=0, solver=dict(tolerance=0.0))
    assert 0 < np.abs(exact.frames.astype(int) - video.frames).max() < 40
    assert model.generate(PROMPT, frames=25).frames.shape[0] == 25
    plain = model.generate(PROMPT, guidance=0.0)
    assert np.abs(plain.frames.astype(int) - video.frames).max() > 40


@pytest.mark.parametrize("settings, words", [
    (dict(guidanc=1.0), "did you mean sample.guidance"), (dict(guidance=-1.0), "sample.guidance=-1.0"),
    (dict(frames=12), "sample.frames=12"), (dict(solver=dict(tolerence=0)), "sample.solver.tolerance"),
    (dict(output="x"), "command line"), (dict(stream=True), "command line"), (dict(image="none.png"), "not found")])
def test_what_cannot_be_is_one_line(model: sf.Model, settings: dict, words: str) -> None:
    with pytest.raises(sf.UserError, match=words) as error:
        model.generate(PROMPT, **settings)
    assert "\n" not in str(error.value)


def test_words_that_no_caption_has_are_named(model: sf.Model) -> None:
    with pytest.warns(UserWarning, match="'cat', 'plays', 'piano'"):
        model.generate("a cat plays the piano")


def test_a_stream_is_the_video_part_by_part(model: sf.Model, video: sf.Video) -> None:
    parts = list(model.stream(PROMPT, seed=0, frames=13))
    assert [len(part) for part in parts] == [1, 4, 4, 4]
    difference = np.abs(np.concatenate(parts).astype(int) - video.frames)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2


def test_a_picture_is_the_first_frame(model: sf.Model, video: sf.Video, tmp_path: Path) -> None:
    Image.fromarray(video.frames[0]).save(tmp_path / "first.png")
    by_file = model.generate(PROMPT, image=tmp_path / "first.png", seed=3)
    by_array = model.generate(PROMPT, image=video.frames[0], seed=3)
    np.testing.assert_array_equal(by_file.frames, by_array.frames)
    error = (by_file.frames[0].astype(float) - video.frames[0]) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 25
    np.testing.assert_allclose(next(model.stream(PROMPT, image=video.frames[0], seed=3))[0].astype(int),
                               by_file.frames[0], atol=1)


def test_a_video_is_extended(model: sf.Model, video: sf.Video, tmp_path: Path) -> None:
    longer = model.extend(video, "a blue three moves left", seed=1)
    assert longer.frames.shape == (25, 24, 24, 3)
    error = (longer.frames[:13].astype(float) - video.frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 25
    by_file = model.extend(video.save(tmp_path / "three.mp4"), "a blue three moves left", seed=1, frames=21)
    assert by_file.frames.shape == (21, 24, 24, 3)


def test_likelihoods_tell_the_prompt(model: sf.Model, video: sf.Video) -> None:
    assert 2_000 < video.log_likelihood < 5_000  # of 6,912 numbers, about -0.65 bits each
    right, wrong = (model.log_likelihood(video, prompt) for prompt in (PROMPT, "a blue three moves left"))
    assert right - wrong > 100
    assert model.log_likelihood(video.frames, PROMPT) == pytest.approx(right)
    assert model.log_likelihood(video, PROMPT, draws=1) != pytest.approx(right, rel=1e-6)


def test_a_saved_video_and_a_shown_one_play(model: sf.Model, video: sf.Video, tmp_path: Path) -> None:
    frames, fps = read_video(video.save(tmp_path / "three.mp4"))
    assert fps == 8 and frames.shape == (13, 240, 240, 3)
    assert np.abs(frames[:, 5::10, 5::10].astype(int) - video.frames).mean() < 6
    data = re.search(r'src="data:video/mp4;base64,([^"]+)"', video._repr_html_())
    assert data is not None
    with av.open(io.BytesIO(base64.b64decode(data[1]))) as container:
        assert sum(1 for _ in container.decode(video=0)) == 13
    with pytest.raises(sf.UserError, match="must end in .mp4"):
        video.save(tmp_path / "three.gif")


@pytest.mark.parametrize("calls", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_calls_compile_once_and_leave_nothing_behind(model: sf.Model, calls: int) -> None:
    compiled: list[str] = []

    def note(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)

    def call(seed: int) -> None:
        made = model.generate(("a red seven moves left", PROMPT)[seed % 2], seed=seed, guidance=2.0 + seed % 3)
        assert np.isfinite(made.log_likelihood)

    call(0)
    gc.collect()
    alive, compiled_at_first = len(jax.live_arrays()), len(compiled)
    for seed in range(1, calls):
        call(seed)
    gc.collect()
    assert len(compiled) == compiled_at_first
    assert len(jax.live_arrays()) == alive
    sf.load().generate(PROMPT)  # the same model once more is the same programs
    assert len(compiled) == compiled_at_first


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(sf.UserError, match="nothing: holds no trained model"):
        sf.load(tmp_path / "nothing")
