"""A scene: scans split for good, exact motion on a torus or within borders, pictures exact to the subpixel."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from starflow_jax.config import UserError
from starflow_jax.data.digits import captions, scene
from starflow_jax.data.digits.scene import MovingDigitsConfig


def test_no_scan_is_in_two_splits_and_every_digit_has_400_30_70():
    splits = {split: scene.split_scan_ids(split) for split in scene.SPLITS}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(5000))
    for split, count in {"train": 400, "validation": 30, "test": 70}.items():
        assert np.bincount(splits[split] // 500).tolist() == [count] * 10


def test_scans_are_the_grid_cells_of_the_picture():
    scans = scene.load_scans(np.arange(5000), 20)  # at their own size: no resizing
    rows = scans.reshape(50, 100, 20, 20).swapaxes(1, 2).reshape(1000, 2000)
    np.testing.assert_array_equal(rows, np.asarray(Image.open(scene._DIGITS_PNG)))


def test_rendered_centroid_moves_at_constant_velocity():
    scan = scene.load_scans(scene.split_scan_ids("train")[:3], 15)
    start = np.array([[0.0, 9.0], [3.25, 1.5], [8.4, 0.0]], np.float32)
    motion = scene.Motion(start, np.array([[0.5, -0.5], [0.0, 0.45], [-0.49, 0.49]], np.float32))
    clips = scene.render_clips(scan, np.array([0, 6, 3]), motion.positions(17), size=24)
    ink_BTHW = clips.max(-1).astype(float)
    grid = np.arange(24)
    rows_BT = (ink_BTHW.sum(3) @ grid) / ink_BTHW.sum((2, 3))
    columns_BT = (ink_BTHW.sum(2) @ grid) / ink_BTHW.sum((2, 3))
    moved = np.stack([rows_BT - rows_BT[:, :1], columns_BT - columns_BT[:, :1]], -1)
    expected = np.arange(17)[:, None] * motion.velocity_B2[:, None]
    np.testing.assert_allclose(moved, expected, atol=0.02)  # rounding to uint8


def test_at_a_whole_pixel_the_scan_itself_is_painted_in_its_colour():
    scan = scene.load_scans(scene.split_scan_ids("test")[:1], 15)
    motion = scene.Motion(np.array([[2, 5]]), np.array([[0, 1]]))
    clip = scene.render_clips(scan, np.array([3]), motion.positions(5), size=24)[0]
    for frame in range(5):
        expected = np.zeros((24, 24, 3), np.uint8)
        expected[2:17, 5 + frame : 20 + frame, :2] = scan[0, :, :, None]  # yellow: red and green
        np.testing.assert_array_equal(clip[frame], expected)


def test_what_leaves_on_one_side_comes_back_on_the_other():
    scan = scene.load_scans(scene.split_scan_ids("test")[:1], 15)
    at = np.array([[[2.25, 5.5]]], np.float32)
    (inside,), (around,) = (scene.render_clips(scan, np.array([0]), at + shift, size=24)
                            for shift in (0, np.array([-7.0, 24 + 13.0], np.float32)))
    np.testing.assert_array_equal(around, np.roll(inside, (-7, 13), axis=(1, 2)))


@pytest.mark.parametrize("size", [24, 32])
def test_clips_begin_anywhere_within_the_canvas_and_move_at_a_speed_of_it(size):
    directions = np.arange(4000) % 8
    motion = scene.random_motion(np.random.default_rng(0), directions, MovingDigitsConfig(size=size, wraps=True))
    room = size - MovingDigitsConfig.digit_size
    assert 0 <= motion.start_B2.min() < 0.01 * room and 0.99 * room < motion.start_B2.max() <= room
    steps = np.array(list(captions.DIRECTIONS.values()))[directions]
    np.testing.assert_array_equal(np.sign(motion.velocity_B2), steps)
    speeds = np.abs(motion.velocity_B2[steps != 0]) / size
    assert scene.SPEED[0] - 1e-6 <= speeds.min() and speeds.max() <= scene.SPEED[1] + 1e-6
    assert speeds.std() > 0.25 * (scene.SPEED[1] - scene.SPEED[0])


@pytest.mark.parametrize("size,digit_size", [(24, 15), (32, 20)])
def test_without_wrapping_the_whole_path_stays_inside_and_is_long_enough_to_see(size, digit_size):
    room, directions = size - digit_size, np.arange(4000) % 8
    config = MovingDigitsConfig(size=size, digit_size=digit_size, wraps=False)
    position = scene.random_motion(np.random.default_rng(0), directions, config).positions(config.frames)
    assert position.min() >= -1e-5 and position.max() <= room + 1e-5
    travel = position[:, -1] - position[:, 0]
    steps = np.array(list(captions.DIRECTIONS.values()))[directions]
    np.testing.assert_array_equal(np.sign(travel), steps)
    distances = np.abs(travel[steps != 0])
    assert 0.78 * room - 1e-5 <= distances.min() and distances.max() <= room + 1e-5
    assert distances.std() > 0.03 * room


@pytest.mark.parametrize(
    "values",
    [
        {"digit_size": 4},
        {"size": 18},
        {"frames": 1},
        {"train_clips": 0},
        {"train_clips": 200_001},
        {"test_clips": -1},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused_by_name(values):
    with pytest.raises(UserError, match=f"data.{next(iter(values))} is"):
        MovingDigitsConfig(**values)


def test_every_setting_has_its_own_folder():
    default = dataclasses.asdict(MovingDigitsConfig())
    changed = [MovingDigitsConfig(**{name: not value if isinstance(value, bool) else value + 1})
               for name, value in default.items()]
    assert len({config.name for config in [*changed, MovingDigitsConfig()]}) == len(changed) + 1
