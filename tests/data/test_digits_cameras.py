"""The digits' world seen by a camera: frames are those that the poses say, and paths stay within their bounds."""

import dataclasses

import numpy as np
import pytest

from starflow_jax.data.digits import cameras, captions, scene
from starflow_jax.data.digits import dataset as md
from starflow_jax.data.digits.cameras import Path

CONFIG = scene.MovingDigitsConfig(train_clips=30, validation_clips=2, test_clips=4, camera=True)


def still(clips, frames, **changes):
    """Cameras that don't move, but for these fields of a path."""
    zero = np.zeros((clips, frames))
    return Path(*(zero + changes.get(name, 0) for name in ("x", "y", "log_scale", "roll")))


def digits(count):
    return scene.load_scans(scene.split_scan_ids("test")[:count], 15)


def render(path, position=(3.3, 5.8), velocity=(0.0, 0.0), scans=None):
    scans = digits(len(path.x_BT)) if scans is None else scans
    start_B2, velocity_B2 = (np.tile(np.float32(each), (len(scans), 1)) for each in (position, velocity))
    motion = scene.Motion(start_B2, velocity_B2)
    return scene.render_clips(scans, np.full(len(scans), 6), motion.positions(path.x_BT.shape[1]), size=24,
                              path=path)[..., 0].astype(int)


def test_a_camera_that_does_not_move_sees_the_clip_without_one():
    path = still(4, 3)
    motion = scene.Motion(np.tile(np.float32([3.3, 20.8]), (4, 1)), np.tile(np.float32([0.48, -0.48]), (4, 1)))
    plain = scene.render_clips(digits(4), np.full(4, 6), motion.positions(3), size=24)[..., 0].astype(int)
    seen = render(path, (3.3, 20.8), (0.48, -0.48))
    assert np.abs(seen - plain).max() <= 1 and (seen != plain).mean() < 1e-3  # rounding


def test_what_the_camera_passes_moves_the_other_way():
    right = render(still(2, 3, x=np.arange(3) / 24))
    down = render(still(2, 3, y=np.arange(3) / 24))
    for frame in range(3):
        np.testing.assert_allclose(right[:, frame], np.roll(right[:, 0], -frame, axis=2), atol=1)
        np.testing.assert_allclose(down[:, frame], np.roll(down[:, 0], -frame, axis=1), atol=1)


def test_a_quarter_turn_turns_the_picture_back():
    upright, turned = (render(still(3, 1, roll=roll))[:, 0] for roll in (0, np.pi / 2))
    # A camera that rolls clockwise sees the world turn counterclockwise.
    np.testing.assert_allclose(turned, np.rot90(upright, axes=(1, 2)), atol=1)


def test_a_nearer_camera_sees_less_of_the_plane_and_a_farther_one_more_tiles():
    scans = np.zeros((1, 15, 15), np.uint8)
    scans[0, 3:9, 3:9] = 255
    middle = (12 - 6, 12 - 6)  # the square is around the middle of the frame
    for scale in (0.5, 1.0, 2.0):
        (frame,) = render(still(1, 1, log_scale=np.log(scale)), middle, scans=scans)[0]
        tiles = max(1, 1 / scale**2)
        assert frame.sum() == pytest.approx(255 * 36 * scale**2 * tiles, rel=0.02)
        centre = np.array([frame.sum(axis) @ np.arange(24) for axis in (1, 0)]) / frame.sum()
        np.testing.assert_allclose(centre, 11.5, atol=0.02)


def test_smaller_pictures_are_smoothed_by_what_a_pixel_covers():
    tile = np.zeros((1, 24, 24), np.float32)
    tile[0, 12, 12] = 1
    for scale, wide in ((1.25, 0.0), (1.0, 0.0), (0.8, (1 / 0.64 - 1) / 6)):
        smooth = cameras.smoothed(tile, np.log([scale]))[0]
        assert smooth.sum() == pytest.approx(1)
        for profile in (smooth.sum(0), smooth.sum(1)):
            assert profile @ (np.arange(24) - 12) ** 2 == pytest.approx(wide, abs=1e-6)


def test_a_pose_says_where_each_point_of_the_plane_is_seen():
    path = cameras.random_path(np.random.default_rng(3), 5, 40)
    matrix_BT34 = path.world_to_camera()
    for found, expected in zip(Path.of(matrix_BT34), path):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    of_last = path.part(np.s_[:, -1])
    rows, columns = cameras.plane_points(of_last, np.zeros((1, 2)), 24)
    plane_BSS4 = np.stack([(columns + 0.5) / 24 - 0.5, (rows + 0.5) / 24 - 0.5, *2 * [np.ones_like(rows)]], axis=-1)
    camera_BSS3 = np.einsum("bij,bhwj->bhwi", matrix_BT34[:, -1], plane_BSS4)
    places = camera_BSS3[..., :2] / camera_BSS3[..., 2:] * 24 + 11.5  # by the intrinsics, in pixels
    across = np.arange(24)
    tile = np.exp(of_last.log_scale_BT)[:, None, None, None] * 24  # the same tile again, in pixels of the frame
    offset = places - np.stack(np.broadcast_arrays(across, across[:, None]), axis=-1)
    # The same offset everywhere, by whole tiles turned with the camera.
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], offset.shape), atol=2e-4)
    cosine, sine = np.cos(of_last.roll_BT), np.sin(of_last.roll_BT)
    turned = np.stack([cosine * offset[:, 0, 0, 0] - sine * offset[:, 0, 0, 1],
                       sine * offset[:, 0, 0, 0] + cosine * offset[:, 0, 0, 1]], axis=-1) / tile[:, 0, 0]
    np.testing.assert_allclose(turned, np.rint(turned), atol=1e-4)


def test_paths_begin_at_the_origin_stay_in_their_bounds_and_are_smooth():
    path = cameras.random_path(np.random.default_rng(0), 400, 49)
    assert all((values[:, 0] == 0).all() for values in path)
    scale, roll = np.exp(path.log_scale_BT), np.rad2deg(path.roll_BT)
    assert 0.8 <= scale.min() < 0.82 and 1.22 < scale.max() <= 1.25
    assert -20 <= roll.min() < -19 and 19 < roll.max() <= 20
    for place in (path.x_BT, path.y_BT):
        assert 0.03 < np.abs(np.diff(place)).max() <= 0.04
        assert np.abs(np.diff(place, n=2)).max() < 0.03
        turns = np.sign(place[:, 24] - place[:, 20]) != np.sign(place[:, 4] - place[:, 0])
        assert 0.2 < turns.mean() < 0.6  # some turn round, some don't, some are still
        assert 0.1 < (place == 0).all(1).mean() < 0.3
        steady = np.abs(np.diff(place, n=2)).max(1) < 1e-9
        assert 0.3 < steady.mean() < 0.6
    assert np.abs(np.diff(path.log_scale_BT)).max() < 0.12 and np.abs(np.diff(roll)).max() < 11


def test_turning_paths_go_back_the_way_they_came():
    path = cameras.turning_path(np.random.default_rng(0), 50, 13)
    for place in (path.x_BT, path.y_BT):
        np.testing.assert_allclose(place, place[:, ::-1])
        speed = np.diff(place)
        np.testing.assert_allclose(speed[:, :6], speed[:, :1].repeat(6, 1), atol=1e-12)
        assert 0.03 < np.abs(speed).max() <= 0.04 and (place[:, 0] == 0).all()
    assert not path.log_scale_BT.any() and not path.roll_BT.any()


def test_clips_are_those_that_wrap_with_their_poses_beside_them():
    wraps = list(md.generate_clips(dataclasses.replace(CONFIG, camera=False, wraps=True), "train"))
    for example, plain in zip(md.generate_clips(CONFIG, "train"), wraps, strict=True):
        frames = len(example["frames"])
        assert frames == len(plain["frames"]) and example["caption_long"] == plain["caption_long"]
        assert example["intrinsics"].shape == (frames, 4) and example["world_to_camera"].shape == (frames, 3, 4)
        np.testing.assert_array_equal(example["frames"][0], plain["frames"][0])
        assert "world_to_camera" not in plain
        # From the poses alone the same frames come out again.
        if example["change"] == frames:
            start = _start(example)
            velocity = 24 * cameras.SPEED[0] * np.array(list(captions.DIRECTIONS.values()))[example["direction"]]
            position = scene.Motion(start[None], velocity[None].astype(np.float32)).positions(frames)
            again = scene.render_clips(scene.load_scans(np.array([example["scan"]]), 15), np.array([example["colour"]]),
                                    position, size=24, path=Path.of(example["world_to_camera"][None]))[0]
            assert np.abs(again.astype(int) - example["frames"]).max() <= 2


def _start(example):
    """Where the digit is in the first frame, by trying all places of a fine grid."""
    scan = scene.load_scans(np.array([example["scan"]]), 15)
    target = example["frames"][0].max(-1).astype(np.float32)
    start, step = np.zeros(2, np.float32), 1.0
    grid = np.stack(np.meshgrid(np.arange(24.0), np.arange(24.0), indexing="ij"), -1).reshape(-1, 2)
    while step > 1e-3:
        tried = (start + grid).astype(np.float32)
        clips = scene.render_clips(np.repeat(scan, len(tried), 0), np.full(len(tried), 6), tried[:, None], size=24)
        start = tried[np.abs(clips[:, 0, ..., 0].astype(np.float32) - target).sum((1, 2)).argmin()]
        step /= 4
        grid = step * np.stack(np.meshgrid(np.arange(-5, 6), np.arange(-5, 6), indexing="ij"), -1).reshape(-1, 2)
    return start


def test_the_data_set_and_long_clips_hold_the_poses(tmp_path):
    source = md.source(CONFIG, "test", str(tmp_path))
    for index, made in enumerate(md.generate_clips(CONFIG, "test")):
        for name in ("frames", "intrinsics", "world_to_camera"):
            np.testing.assert_array_equal(source[index][name], made[name])
            assert source[index][name].dtype == made[name].dtype
    clips = list(md.long_clips(CONFIG, "test", 3, 60))
    assert {clip["frames"].shape for clip in clips} == {(60, 24, 24, 3)}
    assert {clip["world_to_camera"].shape for clip in clips} == {(60, 3, 4)}
    assert not np.array_equal(clips[0]["world_to_camera"], clips[1]["world_to_camera"])
    (again,) = md.long_clips(CONFIG, "test", 1, 60)
    np.testing.assert_array_equal(again["world_to_camera"], clips[0]["world_to_camera"])
