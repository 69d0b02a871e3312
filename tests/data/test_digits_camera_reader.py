"""The camera's path read from frames: how near to the true one on real clips, and what spoils it."""

import numpy as np
import pytest

from starflow_jax.data.digits import captions, scene
from starflow_jax.data.digits import dataset as md
from starflow_jax.data.digits.camera_reader import camera_figures, read_cameras
from starflow_jax.data.digits.cameras import Path
from starflow_jax.data.digits.reader import Reader, default_reader

CONFIG = scene.MovingDigitsConfig(train_clips=1, validation_clips=1, test_clips=1, camera=True)


def real_clips(count, frames):
    """(frames, directions, true path, digits, colours) of test scans."""
    clips = list(md.long_clips(CONFIG, "test", count, frames))
    directions, digits, colours = (np.array([clip[name] for clip in clips])
                                   for name in ("direction", "digit", "colour"))
    asked = Path.of(np.stack([clip["world_to_camera"] for clip in clips]))
    return np.stack([clip["frames"] for clip in clips]), directions, asked, digits, colours


@pytest.fixture(scope="module")
def clips():
    return real_clips(16, 13)


@pytest.fixture(scope="module")
def read(clips):
    return read_cameras(clips[0], clips[1])


def test_the_path_of_real_clips_is_read(clips, read):
    figures = camera_figures(read.path, clips[2])
    assert figures["correlation_x"] > 0.999 and figures["correlation_y"] > 0.999
    assert figures["scale_error"] < 0.006 and figures["roll_error_degrees"] < 0.4
    assert all((values[:, 0] == 0).all() for values in read.path)


def test_the_digit_is_read_from_the_tile_that_all_frames_show(clips, read):
    ids = scene.split_scan_ids("train")[::10]
    found = Reader.fit(scene.load_scans(ids, 20), ids // 500).read(read.tiles_BSSC[:, None])
    assert (found[0] == clips[3]).mean() >= 0.8  # of a reader that saw a tenth of the scans; the whole one below
    np.testing.assert_array_equal(found[1], clips[4])


def test_noise_costs_little(clips):
    noisy = clips[0] + np.random.default_rng(1).normal(0, 20, clips[0].shape)
    figures = camera_figures(read_cameras(noisy.clip(0, 255).astype(np.uint8), clips[1]).path, clips[2])
    assert min(figures["correlation_x"], figures["correlation_y"]) > 0.995
    assert figures["scale_error"] < 0.015 and figures["roll_error_degrees"] < 1.5


def test_the_digit_s_own_way_is_told_from_the_camera_s(clips, read):
    turned = (clips[1] + 4) % len(captions.DIRECTIONS)  # taken for moving the other way
    wrong = read_cameras(clips[0][:2], turned[:2]).path
    step = 2 * 0.02 * np.array(list(captions.DIRECTIONS.values()))[turned[:2]]
    for found, right, axis in ((wrong.x_BT, read.path.x_BT[:2], 1), (wrong.y_BT, read.path.y_BT[:2], 0)):
        np.testing.assert_allclose(found - right, step[:, axis:axis + 1] * np.arange(13), atol=1e-4)


def test_figures_see_each_way_by_itself(clips):
    asked = clips[2]
    perfect = camera_figures(asked, asked)
    assert perfect["correlation_x"] == pytest.approx(1) and perfect["scale_error"] == 0
    other = camera_figures(asked._replace(y_BT=asked.y_BT[::-1], log_scale_BT=asked.log_scale_BT + np.log(1.1),
                                          roll_BT=asked.roll_BT - np.deg2rad(3)), asked)
    assert other["correlation_x"] == pytest.approx(1) and other["correlation_y"] < 0.7
    assert other["scale_error"] == pytest.approx(0.1) and other["roll_error_degrees"] == pytest.approx(3)


def test_black_frames_stop_nothing():
    path = read_cameras(np.zeros((2, 5, 24, 24, 3), np.uint8), np.zeros(2, int)).path
    assert all(np.isfinite(values).all() for values in path) and (path.roll_BT == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("count,frames", [(200, 13), (60, 49)])
def test_its_own_error_over_many_clips_and_long_ones(count, frames):
    clips, directions, asked, digits, _ = real_clips(count, frames)
    read = read_cameras(clips, directions)
    figures = camera_figures(read.path, asked)
    assert min(figures["correlation_x"], figures["correlation_y"]) > 0.9995
    # A digit begins whole, near the middle, where size and roll move its ink least.
    assert figures["scale_error"] < 0.004 and figures["roll_error_degrees"] < 0.3
    assert (default_reader().read(read.tiles_BSSC[:, None])[0] == digits).mean() >= 0.94
