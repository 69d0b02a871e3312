"""What sampling is given and gives: pictures and videos of any size, prompts, the most likely of many."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from starflow_jax.config import Sample, UserError
from starflow_jax.io.video import write_mp4
from starflow_jax.sampling.batches import Made, most_likely
from starflow_jax.sampling.generate import Clips
from starflow_jax.sampling.given import given_frames, read_given
from starflow_jax.sampling.requests import Request, extended, read_requests, rewritten
from starflow_jax.sampling.solved import Solved
from tests.small_model import CONFIG


def config(**settings):
    return dataclasses.replace(CONFIG, sample=Sample(**settings))


def test_image_is_cut_to_the_models_size(tmp_path: Path) -> None:
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, 20:40] = (250, 0, 0)
    Image.fromarray(picture).save(tmp_path / "wide.png")
    frames = given_frames(config(image=str(tmp_path / "wide.png")))
    assert frames is not None and frames.shape == (1, 8, 8, 3)
    assert frames[0, 4, 4, 0] > 200 and frames[0, 4, 0, 0] < 60


def test_video_comes_at_the_models_rate_and_a_length_that_the_codec_takes(tmp_path: Path) -> None:
    frames = np.repeat(np.arange(24, dtype=np.uint8)[:, None, None, None] * 10, 16, axis=1).repeat(16, 2).repeat(3, 3)
    write_mp4(tmp_path / "fast.mp4", frames, fps=16)
    asked = config(video=str(tmp_path / "fast.mp4"))
    given = given_frames(asked)  # 24 frames at 16 a second are 12 at 8, of which the codec takes the last 9
    assert given is not None and given.shape == (9, 8, 8, 3)
    expected = np.arange(24)[::2][-9:] * 10
    assert np.abs(given.mean(axis=(1, 2, 3)) - expected).max() < 6
    assert extended(asked, len(given)).sample.frames == 9 + 8
    assert extended(config(video="x", frames=13), len(given)).sample.frames == 13


def test_a_video_is_read_from_its_start_or_up_to_its_end(tmp_path: Path) -> None:
    levels = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    write_mp4(tmp_path / "clip.mp4", np.broadcast_to(levels, (12, 20, 40, 3)), fps=8)
    for keep, kept in (("start", slice(0, 9)), ("end", slice(3, 12))):
        frames, left_out = read_given(CONFIG, str(tmp_path / "clip.mp4"), keep=keep)
        assert frames.shape == (9, 8, 8, 3) and left_out == 3
        assert np.abs(frames.mean(axis=(1, 2, 3)) - np.arange(12)[kept] * 20).max() < 6
    write_mp4(tmp_path / "short.mp4", np.zeros((3, 8, 12, 3), np.uint8), fps=8)
    with pytest.raises(UserError, match="at 8 frames per second: 3 frames; the model needs 5 or more"):
        read_given(CONFIG, str(tmp_path / "short.mp4"))


def test_given_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for settings, message in ((dict(image="none.png"), "image not found"),
                              (dict(video=str(tmp_path / "broken.mp4")), "cannot read video"),
                              (dict(image="a", video="b"), "leave one out")):
        with pytest.raises(UserError, match=message):
            given_frames(config(**settings))


def test_the_most_likely_of_each_prompt_are_kept() -> None:
    empty = np.zeros((5, 1))
    clips = Clips(empty, empty, {}, Solved(empty, empty, empty, empty), np.ones(5, bool))
    made = [Made(Request("a" if i < 3 else "b", i), clips, i, 0.0) for i in range(5)]
    assert most_likely(made, [-3.0, -1.0, -2.0, -9.0, -8.0], keep=2) == [1, 2, 4, 3]


def test_prompts_file_gives_count_seeds_each(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n two \none\n")
    requests = read_requests(config(prompts_file=str(tmp_path / "prompts.txt"), count=2, seed=4))
    assert [(r.prompt, r.seed) for r in requests] == [("one", 4), ("one", 5), ("two", 4), ("two", 5)]


@pytest.mark.parametrize("settings", [dict(keep=1), dict(certify=True)])
def test_what_a_stream_cannot_do_is_refused(settings) -> None:
    with pytest.raises(UserError, match="sample.stream=false"):
        Sample(stream=True, **settings)


def test_rewriting_lengthens_each_prompt_once_and_keeps_the_file_names() -> None:
    hook = f"{sys.executable} -c \"print(input() + ', in detail')\""
    asked = config(rewrite=hook, prompt="a cat", count=2)
    before = read_requests(asked)
    after = rewritten(asked, before)
    assert [request.prompt for request in after] == ["a cat, in detail"] * 2
    assert [request.slug for request in after] == [request.slug for request in before] == ["a_cat_seed0", "a_cat_seed1"]
    assert rewritten(config(prompt="a cat", count=2), before) == before
