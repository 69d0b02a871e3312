"""Videos from the first frames of test clips."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data.digits import reader
from starflow_jax.data.digits.captions import ATTRIBUTES
from starflow_jax.evaluation import ti2v
from starflow_jax.evaluation.measures import psnr
from starflow_jax.evaluation.split import read
from starflow_jax.io.command_line import load_config
from starflow_jax.io.pictures import read_image
from starflow_jax.model.system import System
from starflow_jax.modes.evaluate import evaluate
from tests.small_model import CAPTIONS, CONFIG, small_system

VIDEOS, TOGETHER = len(CAPTIONS), 2


def test_figures_are_those_of_the_frames_after_the_given_one(
    monkeypatch: pytest.MonkeyPatch, system: System, params
) -> None:
    """Batches of two, the last one filled up; the sheet has the given frames and then all that was made."""
    random, shape = np.random.default_rng(0), (system.pixel_frames, 8, 8, 3)
    source = [{"caption_long": caption.encode(), "frames": random.integers(0, 256, shape, np.uint8),
               **dict(zip(ATTRIBUTES, (7, 0, index)))} for index, caption in enumerate(CAPTIONS)]
    monkeypatch.setattr(ti2v, "data_source", lambda config, split: source)

    class Reader:  # reads every third digit as a seven, all colours as the first, and the right directions
        adherence = reader.Reader.adherence

        def read(self, frames_BTHWC: np.ndarray) -> tuple[np.ndarray, ...]:
            pixels = frames_BTHWC.astype(int).sum(axis=(1, 2, 3, 4))
            return pixels % 3 + 5, pixels * 0, pixels % 2

    monkeypatch.setattr(reader, "default_reader", Reader)
    sample = dataclasses.replace(CONFIG.sample, batch_size=TOGETHER, guidance=0.0)
    of = dataclasses.replace(system, config=dataclasses.replace(CONFIG, sample=sample))
    found, shown = ti2v.measure(of, params, VIDEOS)
    clips = list(ti2v.moving_clips(of, VIDEOS))
    assert found["clips"] == VIDEOS and shown.captions == [clip.caption for clip in clips]
    np.testing.assert_array_equal(shown.frames_BTHWC[:, 0], [clip.frames_THWC[0] for clip in clips])
    made = shown.frames_BTHWC[:, 1:]
    decibels = [psnr(clip.frames_THWC[0], one[0]) for clip, one in zip(clips, made)]
    assert found["psnr_of_the_first_frame"] == pytest.approx(np.mean(decibels))
    assert found["worst_psnr"] == min(decibels)
    real = np.stack([clip.frames_THWC[1:] for clip in clips])
    labels = np.array([clip.labels_3 for clip in clips])
    for name, frames in (("samples", made[:, 1:]), ("real_clips", real)):
        assert found[name] == pytest.approx(read(labels, frames), abs=1e-6)
    assert found["half_of_95_percent_interval"].keys() == set(ATTRIBUTES)


def test_clips_of_another_size_or_too_short_are_left_out(monkeypatch: pytest.MonkeyPatch, system: System) -> None:
    length = system.pixel_frames
    source = [{"caption_long": b"short", "frames": np.zeros((length - 1, 8, 8, 3), np.uint8)},
              {"caption_long": b"wide", "frames": np.zeros((length, 8, 99, 3), np.uint8)},
              {"caption_long": b"right", "frames": np.zeros((length + 2, 8, 8, 3), np.uint8)}]
    monkeypatch.setattr(ti2v, "data_source", lambda config, split: source)
    (clip,) = ti2v.moving_clips(system, 3)
    assert clip.caption == "right" and len(clip.frames_THWC) == length
    monkeypatch.setattr(ti2v, "data_source", lambda config, split: source[:2])
    with pytest.raises(UserError, match=f"no test clip has {length} frames of the model's size"):
        ti2v.measure(system, {}, 3)


def test_a_model_of_pictures_has_nothing_to_go_on_with() -> None:
    pictures = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, frames=1))
    with pytest.raises(UserError, match="makes single pictures"):
        ti2v.measure(small_system(pictures), {}, 1)


def test_the_package_s_model_keeps_the_given_digit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """From the command to its files."""
    evaluate(load_config(evaluate={"task": "ti2v", "prompts": 16}, sample={"batch_size": 8}), tmp_path)
    held = json.loads((tmp_path / "ti2v.json").read_text())
    assert held["psnr_of_the_first_frame"] > 33 and held["samples"]["colour"] == 1
    assert held["samples"]["digit"] >= 0.8
    sheet = read_image(tmp_path / "ti2v.png")
    assert sheet.std() > 10
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("16 given first frames") for row in rows)
    assert any(row.startswith("samples") and f"{held['psnr_of_the_first_frame']:.1f}" in row for row in rows)
