"""The horizon, from the user's task to its files, on a small random model; its figures against whole clips."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.config import Config, Data, Evaluate
from starflow_jax.data.digits import reader
from starflow_jax.evaluation import horizon
from starflow_jax.evaluation.measures import temporal_flickering
from starflow_jax.evaluation.stretches import Measures
from starflow_jax.io.pictures import read_image
from starflow_jax.model.store import LoadedModel
from starflow_jax.model.system import System
from starflow_jax.modes.evaluate import evaluate
from starflow_jax.sampling.conditions import VideoText, noised
from starflow_jax.sampling.generate import generate_clips, log_likelihood
from starflow_jax.sampling.likelihood import frame_nll
from tests.small_model import CAPTIONS, CONFIG, SETTINGS

CONFIG_OF_TEST = dataclasses.replace(
    CONFIG, sample=dataclasses.replace(SETTINGS, batch_size=2), evaluate=Evaluate(task="horizon", latent_frames=10))


def of(system: System, config: Config = CONFIG_OF_TEST) -> System:
    return dataclasses.replace(system, config=config)


def test_figures_of_stretches_are_those_of_whole_clips(system: System, params) -> None:
    """Three videos in batches of two, three training lengths."""
    prompts = horizon.plain_prompts(CAPTIONS, None, 3)
    found, shown = horizon.measure_samples(of(system), params, prompts, 3, Measures(), "samples")
    clips = generate_clips(system, params, CAPTIONS, [0, 1, 2], dataclasses.replace(SETTINGS, frames=33))
    parts = np.split(clips.frames_BTHWC.astype(float), [9, 21], axis=1)
    for row, part in zip(found.means(), parts, strict=True):
        assert row["mean_pixel"] == pytest.approx(part.mean(), abs=0.1)
        assert row["flickering"] == pytest.approx(temporal_flickering(part), abs=1e-4)
    bits = [row["bits_per_dim"] for row in found.means()]
    total = -log_likelihood(system, params, clips).mean() / clips.noisy_BNhwC[0].size / np.log(2)
    assert np.mean(bits) == pytest.approx(total, rel=1e-3)
    assert np.abs(shown.frames[1, :, 0].astype(int) - clips.frames_BTHWC[:, 9]).max() <= 1


def test_real_clips_are_measured_as_far_as_they_go(system: System, params) -> None:
    """Two training lengths and a bit, of which the second is likely or not under its own caption."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 25, 8, 8, 3), np.uint8)
    found, described = horizon.measure_real(of(system), params, iter([(CAPTIONS[:2], frames, None)]), 3, Measures())
    assert described == CAPTIONS[:2]
    noisy = noised(system, frames[:, :21], range(2))
    first, later = (system.caption_features(params, [f"{begin}{caption}" for caption in CAPTIONS[:2]])
                    for begin in ("", "(extend) "))
    bits = np.asarray(frame_nll(system, params, noisy, VideoText(first, {0: later}))) / 16 / np.log(2)
    assert [row["bits_per_dim"] for row in found.means()] == pytest.approx([bits[:, :3].mean(), bits[:, 3:].mean()])
    assert found.means()[1]["mean_pixel"] == pytest.approx(frames[:, 9:21].mean(), rel=1e-5)
    short, _ = horizon.measure_real(of(system), params, iter([(CAPTIONS[:2], frames, None)]), 1, Measures())
    assert len(short) == 1


@pytest.fixture()
def stand_ins(monkeypatch: pytest.MonkeyPatch, system: System, params) -> None:
    """The model, its test captions and test clips: noise of two training lengths, in batches of two and one."""
    monkeypatch.setattr("starflow_jax.modes.evaluate.load_model",
                        lambda config, workdir: LoadedModel(of(system, config), params, "a test", ""))
    monkeypatch.setattr("starflow_jax.evaluation.split.fixed_captions", lambda config, split, count: CAPTIONS[:count])
    frames = np.random.default_rng(0).integers(0, 256, (3, 25, 8, 8, 3), np.uint8)

    def recorded(system: System, count: int, pixel_frames: int):
        labels = np.zeros((3, 3), int) if system.config.data.source == "digits" else None
        for part in (slice(2), slice(2, 3)):
            yield CAPTIONS[part], frames[part], None if labels is None else labels[part]

    monkeypatch.setattr(horizon, "real_clips", recorded)


def test_files_of_moving_digits(tmp_path: Path, stand_ins: None, capsys: pytest.CaptureFixture,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:  # every clip is a red seven that moves right
        def read(self, frames_BTHWC: np.ndarray) -> tuple[np.ndarray, ...]:
            return tuple(np.full(len(frames_BTHWC), label) for label in (7, 0, 0))

    monkeypatch.setattr(reader, "default_reader", Reader)
    monkeypatch.setattr("starflow_jax.evaluation.split.fixed_captions", lambda config, split, count: CAPTIONS[::-1])
    evaluate(CONFIG_OF_TEST, tmp_path)
    found = json.loads((tmp_path / "horizon.json").read_text())
    assert found["captions"] == CAPTIONS  # the real clips', in place of the split's
    measured = {"digit", "colour", "direction", "mean_pixel", "pixel_variance", "flickering", "bits_per_dim"}
    assert [set(row) for row in found["stretches"]] == [measured] * 3
    assert [set(row) for row in found["real_stretches"]] == [measured] * 2  # as long as they are
    assert found["latent_frames"] == 9 and found["videos"] == 3
    assert found["change"]["every_latent_frames"] == 6 and len(found["change"]["changes"]) == 1
    assert found["stretches"][0] == found["stretches"][0] | {"digit": 1 / 3, "colour": 1 / 3, "direction": 1 / 3}
    assert found["change"]["digit_kept"] == pytest.approx(1 / 3) and found["change"]["direction_read"] < 1
    assert read_image(tmp_path / "horizon.png").shape[0] > 500
    out = capsys.readouterr().out
    assert "samples, 2" in out and "real clips, 0" in out and "change every 6 latent frames" in out


def test_any_other_data_set_has_drift_in_place_of_adherence(tmp_path: Path, stand_ins: None,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        def __call__(self, frames_BTHWC: np.ndarray) -> np.ndarray:
            assert frames_BTHWC.shape[1] == 9
            return frames_BTHWC.mean(axis=(1, 2))[:, 0]

    monkeypatch.setattr(horizon, "I3D", Network)
    evaluate(dataclasses.replace(CONFIG_OF_TEST, data=Data(source="prepared", directory="none")), tmp_path)
    found = json.loads((tmp_path / "horizon.json").read_text())
    assert {"frechet_distance", "bits_per_dim"} <= set(found["stretches"][2]) and "change" not in found
    assert not {"digit", "frechet_distance"} & set(found["real_stretches"][0])


def test_real_clips_are_cut_to_the_shortest_of_their_batch(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two and one; one of another size is left out."""
    shapes = [(13, 8, 8, 3), (9, 8, 8, 3), (5, 16, 8, 3), (17, 8, 8, 3)]
    clips = [{"frames": np.full(shape, index, np.uint8), "caption_long": f"clip {index}".encode()}
             for index, shape in enumerate(shapes)]
    monkeypatch.setattr(horizon, "long_clips", lambda config, split, count, frames: iter(clips[:count]))
    found = list(horizon.real_clips(of(system), 4, 100))
    assert [(captions, frames.shape, labels) for captions, frames, labels in found] == [
        (["clip 0", "clip 1"], (2, 9, 8, 8, 3), None), (["clip 3"], (1, 17, 8, 8, 3), None)]
    assert [int(frames[-1].max()) for _, frames, _ in found] == [1, 3]
