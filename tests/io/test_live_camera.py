"""A camera steered frame by frame: where it goes from where it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.io.cameras import SLIDE, named_cameras, read_cameras
from starflow_jax.io.live_camera import LiveCamera, as_json

HEIGHT, WIDTH, RATE, STRIDE = 6, 8, 8.0, 4


def camera() -> LiveCamera:
    return LiveCamera(HEIGHT, WIDTH, RATE, STRIDE)


def centre(live: LiveCamera) -> np.ndarray:
    """Where the camera is."""
    return np.linalg.inv(live.now.world_to_camera_44)[:3, 3]


def seen(live: LiveCamera, frames: int) -> np.ndarray:
    """(frames, 3, 4) poses of the frame now and of those after it."""
    return np.array([live.now.world_to_camera_44[:3], *(live.next().world_to_camera_44[:3] for _ in range(frames - 1))])


@pytest.mark.parametrize("moves", ["pan_right:5; zoom_in*2:4; roll_left:3", "orbit", "tilt_up:2"])
def test_a_path_from_the_beginning_is_that_of_a_whole_video(moves: str) -> None:
    for frames in (None, 12):
        live = camera()
        live.begin(moves, frames)
        expected = named_cameras(moves, 12, HEIGHT, WIDTH)
        np.testing.assert_allclose(seen(live, 12), expected.world_to_camera_T34, atol=1e-6)
        np.testing.assert_array_equal(live.now.intrinsics_4, expected.intrinsics_T4[0])


def test_moves_go_on_from_where_the_camera_is_and_the_last_one_for_ever() -> None:
    live = camera()
    live.follow("zoom_in:10")
    seen(live, 11)
    live.follow("pan_right:3; pan_left")
    before = centre(live)
    seen(live, 4)
    np.testing.assert_allclose(centre(live) - before, [3 * SLIDE * np.exp(-0.15), 0, 0], atol=1e-9)  # it is nearer now
    assert live.follows("pan_right:3; pan_left")
    seen(live, 1001)
    np.testing.assert_allclose(centre(live) - before, [-997 * SLIDE * np.exp(-0.15), 0, 0], atol=1e-9)


def test_at_the_end_of_its_path_it_stays_and_may_begin_it_anew() -> None:
    live = camera()
    live.follow("pan_right:2")
    assert live.follows("pan_right:2")
    seen(live, 6)
    np.testing.assert_allclose(centre(live), [2 * SLIDE, 0, 0])
    assert not live.follows("pan_right:2")


def test_a_pose_is_reached_within_a_latent_frame_and_held() -> None:
    live, angle = camera(), np.pi / 6
    live.follow("pan_right:3")
    seen(live, 4)
    pose = np.array([[np.cos(angle), -np.sin(angle), 0, 0.4], [np.sin(angle), np.cos(angle), 0, 0.2], [0, 0, 1, 0]])
    given = as_json(pose)
    live.follow(given)
    poses = seen(live, 6)
    np.testing.assert_allclose(poses[[4, 5]], [pose, pose], atol=1e-6)
    angles = np.arctan2(poses[:5, 1, 0], poses[:5, 0, 0])
    np.testing.assert_allclose(angles, np.arange(5) * angle / 4, atol=1e-6)
    assert live.follows(as_json(np.concatenate([pose, [[0, 0, 0, 1]]])))
    live.follow(as_json(np.stack([pose, pose * [1, 1, 1, 2]])))
    np.testing.assert_allclose(seen(live, 4)[1:], [pose, pose * [1, 1, 1, 2], pose * [1, 1, 1, 2]], atol=1e-12)


def test_a_files_path_begins_where_the_camera_is(tmp_path: Path) -> None:
    """At the file's own times; what JSON holds of it needs no file, and is itself such a camera."""
    line = "0.9 1.6 0.5 0.5 0 0 1 0 0 {} 0 1 0 0.5 0 0 1 0"
    (tmp_path / "path.txt").write_text("".join(f"{250_000 * n} {line.format(0.3 + 0.1 * n)}\n" for n in range(3)))
    given = as_json(str(tmp_path / "path.txt"))
    (tmp_path / "path.txt").unlink()
    assert as_json(given) == given
    live = camera()
    live.follow("pan_left:4")
    before = seen(live, 5)[-1]
    live.follow(given)
    poses = seen(live, 7)  # half a second at 8 frames a second, then still
    np.testing.assert_allclose(poses[:, 0, 3] - before[0, 3], [0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2], atol=1e-6)
    np.testing.assert_allclose(live.now.intrinsics_4, [0.9, 1.6, 0.5, 0.5])


def test_a_file_of_moves_is_those_moves(tmp_path: Path) -> None:
    (tmp_path / "moves.txt").write_text("pan_left:4; zoom_in\n")
    assert as_json(str(tmp_path / "moves.txt")) == "pan_left:4; zoom_in"


def test_a_file_is_spread_over_a_video_that_has_an_end(tmp_path: Path) -> None:
    line = "0.9 1.6 0.5 0.5 0 0 1 0 0 {} 0 1 0 0 0 0 1 0"
    (tmp_path / "path.txt").write_text("".join(f"{n} {line.format(0.1 * n)}\n" for n in range(3)))
    live = camera()
    live.begin(as_json(str(tmp_path / "path.txt")), 9)
    expected = read_cameras(str(tmp_path / "path.txt"), 9, HEIGHT, WIDTH)
    np.testing.assert_allclose(seen(live, 9), expected.world_to_camera_T34, atol=1e-6)


@pytest.mark.parametrize("given, words", [
    ("fly", "no such move"), ("pan_left; zoom_in", 'write "pan_left:12"'), ("nothing.txt", "can't be read"),
    (np.ones((3, 4)), "no rotation"), (np.full((3, 4), np.nan), "no finite number"), (np.ones((2, 2)), "of shape"),
    ("", "names no move"), (None, "camera"), ({"pose": [[1]]}, "3 rows"), ({"x": 1}, "world_to_camera"),
    ({"poses": 3}, "world_to_camera"), ([["a"] * 4] * 3, "neither")])
def test_what_is_no_camera_is_one_line(given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        as_json(given)
    assert "\n" not in str(error.value)


def test_no_move_ends_unless_it_is_said() -> None:
    live = camera()
    live.follow("roll_right")
    poses = seen(live, 91)
    np.testing.assert_allclose(np.degrees(np.arctan2(poses[:, 1, 0], poses[:, 0, 0])), -np.arange(91), atol=1e-9)
