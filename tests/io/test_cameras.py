"""Cameras are read as they are written, named by moves, and brought to a video's frames; faults name their line."""

import json

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.flow.control import plucker_rays
from starflow_jax.io.cameras import MOVES, SLIDE, Cameras, named_cameras, parse_cameras, read_cameras

URL = "https://www.youtube.com/watch?v=QShWPZxTDoE"


def rotation(axis, degrees):
    """By the right-hand rule about x, y or z."""
    angle, (first, second) = np.deg2rad(degrees), ((axis + 1) % 3, (axis + 2) % 3)
    matrix = np.eye(3)
    matrix[[first, second], [first, second]] = np.cos(angle)
    matrix[second, first], matrix[first, second] = np.sin(angle), -np.sin(angle)
    return matrix


def pose(axis=1, degrees=0.0, centre=(0.0, 0.0, 0.0)):
    """world_to_camera (3, 4) of a camera at a place."""
    turned = rotation(axis, degrees)
    return np.concatenate([turned, -turned @ np.reshape(centre, (3, 1))], axis=1)


def line(stamp, matrix_34, intrinsics=(0.5, 0.9, 0.5, 0.5)):
    numbers = [*intrinsics, 0, 0, *matrix_34.ravel()]
    return " ".join([str(stamp), *(f"{number:.9f}" for number in numbers)])


def centres(cameras):
    matrix_T34 = cameras.world_to_camera_T34
    return -np.einsum("tji,tj->ti", matrix_T34[:, :, :3], matrix_T34[:, :, 3])


TURNING = [pose(1, 10 * index, (index, 0, 0)) for index in range(4)]
TEXT = "\n".join([URL, *(line(52_000_000 + 500_000 * index, TURNING[index]) for index in range(4)), ""])


def test_realestate10k_s_text_is_read():
    for text in (TEXT, TEXT.removeprefix(URL + "\n"), TEXT.replace("\n", "\r\n")):
        cameras = parse_cameras(text.encode(), "a.txt")
        np.testing.assert_allclose(cameras.world_to_camera_T34, TURNING, atol=1e-6)
        np.testing.assert_allclose(cameras.intrinsics_T4, [[0.5, 0.9, 0.5, 0.5]] * 4, atol=1e-7)
        np.testing.assert_array_equal(cameras.seconds_T, [52, 52.5, 53, 53.5])
        assert cameras.world_to_camera_T34.dtype == cameras.intrinsics_T4.dtype == np.float32


def test_json_says_the_same():
    matrices = [matrix.tolist() for matrix in TURNING]
    one = {"intrinsics": [0.5, 0.9, 0.5, 0.5], "world_to_camera": matrices}
    each = {**one, "intrinsics": [one["intrinsics"]] * 4, "timestamps": [0, 500_000, 1_000_000, 1_500_000]}
    for given, seconds in ((one, None), (each, [0, 0.5, 1, 1.5])):
        cameras = parse_cameras(json.dumps(given).encode(), "a.json")
        np.testing.assert_allclose(cameras.world_to_camera_T34, TURNING, atol=1e-6)
        np.testing.assert_allclose(cameras.intrinsics_T4, [[0.5, 0.9, 0.5, 0.5]] * 4, atol=1e-7)
        np.testing.assert_array_equal(cameras.seconds_T, seconds)


def test_timestamps_that_count_are_numbers_of_frames():
    cameras = parse_cameras("\n".join(line(7 + index, TURNING[index]) for index in range(4)).encode(), "a.txt")
    assert cameras.seconds_T is None
    np.testing.assert_allclose(centres(cameras.at(np.array([0, 0.25, 0.5]), rate=4.0))[:, 0], [0, 1, 2], atol=1e-5)


@pytest.mark.parametrize("number,edit,message", [
    (3, lambda fields: fields[:-1], "line 3: 18 fields"),
    (2, lambda fields: [*fields[:4], "here", *fields[5:]], "line 2: 'here' is no finite number"),
    (4, lambda fields: [*fields[:9], "nan", *fields[10:]], "line 4: 'nan' is no finite number"),
    (5, lambda fields: ["52000000", *fields[1:]], "line 5: timestamp 52000000 after 53000000; they must ascend"),
    (3, lambda fields: [*fields[:7], "2", *fields[8:]], "line 3: .* no rotation"),
    (3, lambda fields: [*fields[:5], "0.1", *fields[6:]], "line 3: fields 6 and 7"),
    (3, lambda fields: [fields[0], "960", *fields[2:]], "line 3: fx 960 .* divided by the frame's width"),
    (3, lambda fields: [fields[0], "-0.5", *fields[2:]], "line 3: fx -0.5"),
])
def test_a_fault_names_its_line(number, edit, message):
    lines = TEXT.splitlines()
    lines[number - 1] = " ".join(edit(lines[number - 1].split()))
    with pytest.raises(UserError, match=f"^a.txt, {message}"):
        parse_cameras("\n".join(lines).encode(), "a.txt")


@pytest.mark.parametrize("given,message", [
    ("{", "unreadable JSON .*line 1"),
    ("[]", "must be an object"),
    ({"intrinsics": [1, 1, 0.5, 0.5], "world_to_camera": []}, "holds no pose"),
    ({"intrinsics": [[1, 1, 0.5, 0.5]] * 2, "world_to_camera": [np.eye(3, 4).tolist()]}, "2 intrinsics for 1"),
    ({"intrinsics": [1, 1, 0.5], "world_to_camera": [np.eye(3, 4).tolist()]}, "pose 1: intrinsics must be 4"),
    ({"world_to_camera": [np.eye(3, 4).tolist()]}, "0 intrinsics for 1"),
    ({"intrinsics": [1, 1, 0.5, 0.5], "world_to_camera": [np.eye(3, 4).tolist(), np.eye(3).tolist()]},
     "pose 2: world_to_camera must be 3 rows of 4"),
    ({"intrinsics": [1, 1, 0.5, "wide"], "world_to_camera": [np.eye(3, 4).tolist()]}, "pose 1: 'wide' is no finite"),
])
def test_a_fault_of_a_json_names_its_pose(given, message):
    content = given if isinstance(given, str) else json.dumps(given)
    with pytest.raises(UserError, match=f"^a.json[,:].*{message}"):
        parse_cameras(content.encode(), "a.json")


def test_what_is_no_text_and_no_pose_is_said():
    with pytest.raises(UserError, match="not UTF-8"):
        parse_cameras(b"\xff\xfe", "a.txt")
    with pytest.raises(UserError, match="a.txt: holds no pose; each line has 19 numbers"):
        parse_cameras(URL.encode(), "a.txt")
    with pytest.raises(UserError, match="unreadable JSON"):
        parse_cameras(b"[" * 100_000, "a.json")


def test_between_poses_the_place_moves_straight_and_the_rotation_evenly(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    cameras = read_cameras(str(tmp_path / "a.txt"), 13, 9, 16)
    assert cameras.world_to_camera_T34.shape == (13, 3, 4) and cameras.intrinsics_T4.shape == (13, 4)
    for index, matrix_34 in enumerate(cameras.world_to_camera_T34):
        np.testing.assert_allclose(matrix_34, pose(1, 2.5 * index, (index / 4, 0, 0)), atol=1e-6)
    late = parse_cameras(TEXT.encode(), "a.txt").at(np.array([0, 52.25, 99]), rate=1.0)
    np.testing.assert_allclose(centres(late)[:, 0], [0, 0.5, 3], atol=1e-6)
    one = parse_cameras(line(5, TURNING[1]).encode(), "a.txt").resampled(3)
    np.testing.assert_allclose(one.world_to_camera_T34, [TURNING[1]] * 3, atol=1e-6)


def test_re_based_on_the_first_frame_the_first_one_is_the_world_and_rays_agree():
    cameras = Cameras(np.full((3, 4), 0.5, np.float32), np.array(TURNING[1:], np.float32))
    relative = cameras.relative_to_first()
    np.testing.assert_allclose(relative.world_to_camera_T34[0], np.eye(3, 4), atol=1e-6)
    expected = plucker_rays(cameras.intrinsics_T4, cameras.homogeneous_T44, 4, 6, relative_to_first=True)
    rays = plucker_rays(relative.intrinsics_T4, relative.homogeneous_T44, 4, 6, relative_to_first=False)
    np.testing.assert_allclose(rays, expected, atol=1e-5)


def seen(matrix_34, point=(0.0, 0.0, 1.0)):
    """Where a camera sees a point of the scene: right and down of the middle, by focal length."""
    x, y, z = matrix_34[:, :3] @ point + matrix_34[:, 3]
    return np.array([x / z, y / z])


@pytest.mark.parametrize("move,place,moves_to,point", [
    ("pan_right", (1, 0, 0), (-1, 0), (0, 0, 1)), ("pan_left", (-1, 0, 0), (1, 0), (0, 0, 1)),
    ("tilt_up", (0, -1, 0), (0, 1), (0, 0, 1)), ("tilt_down", (0, 1, 0), (0, -1), (0, 0, 1)),
    ("zoom_in", (0, 0, 1), (1, 0), (0.2, 0, 1)), ("zoom_out", (0, 0, -1), (-1, 0), (0.2, 0, 1)),
    ("roll_right", (0, 0, 0), (0, -1), (0.2, 0, 1)), ("roll_left", (0, 0, 0), (0, 1), (0.2, 0, 1)),
    ("turn_right", (0, 0, 0), (-1, 0), (0, 0, 1)), ("turn_left", (0, 0, 0), (1, 0), (0, 0, 1)),
    ("turn_up", (0, 0, 0), (0, 1), (0, 0, 1)), ("turn_down", (0, 0, 0), (0, -1), (0, 0, 1)),
    ("orbit", (1, 0, 0), (0, 0), (0, 0, 1)), ("orbit_right", (1, 0, 0), (0, 0), (0, 0, 1)),
    ("orbit_left", (-1, 0, 0), (0, 0), (0, 0, 1)), ("still", (0, 0, 0), (0, 0), (0.2, 0.1, 1)),
])
def test_every_move_goes_where_its_name_says(move, place, moves_to, point):
    cameras = named_cameras(move, 9, 24, 24)
    np.testing.assert_array_equal(cameras.world_to_camera_T34[0], np.eye(3, 4))
    last = cameras.world_to_camera_T34[-1]
    np.testing.assert_allclose(last[:, :3] @ last[:, :3].T, np.eye(3), atol=1e-6)
    # Signs of the larger part: an orbit also comes forward a little, a roll is a circle.
    for found, expected in ((centres(cameras)[-1], place), (seen(last, point) - np.array(point[:2]), moves_to)):
        found = np.where(np.abs(found) > 0.5 * np.abs(found).max(), found, 0)
        np.testing.assert_array_equal(np.sign(np.round(found, 5)), expected)


def test_all_moves_are_tested():
    marks = test_every_move_goes_where_its_name_says.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(MOVES)


def test_moves_follow_one_another_each_from_where_the_last_ended():
    both = named_cameras("pan_right:12; zoom_in:13", 25, 24, 24).world_to_camera_T34
    pan = named_cameras("pan_right", 12, 24, 24).world_to_camera_T34
    np.testing.assert_array_equal(both[:12], pan)
    np.testing.assert_allclose(-pan[-1, 0, 3], 11 * SLIDE, rtol=1e-5)  # the first frame is where it begins
    zoom = named_cameras("zoom_in", 14, 24, 24).world_to_camera_T34  # its first frame is the pan's last one
    np.testing.assert_allclose(both[12:, :, 3], zoom[1:, :, 3] + pan[-1, :, 3], atol=1e-6)


def test_moves_without_numbers_share_what_the_others_leave_and_the_end_is_still():
    def columns(moves, frames):
        return named_cameras(moves, frames, 24, 24).world_to_camera_T34[:, :, 3]

    np.testing.assert_array_equal(columns("pan_left; tilt_up:3; zoom_in", 13), columns(
        "pan_left:5; tilt_up:3; zoom_in:5", 13))
    ended = columns("pan_left:5", 13)
    np.testing.assert_array_equal(ended[4:], np.broadcast_to(ended[4], (9, 3)))
    np.testing.assert_array_equal(columns("pan_left:20", 13), columns("pan_left", 13))
    np.testing.assert_allclose(columns("pan_left*0.5", 13), 0.5 * columns("pan_left", 13), rtol=1e-6)


def test_an_orbit_goes_round_at_the_same_distance():
    cameras = named_cameras("orbit*10", 37, 24, 24)
    np.testing.assert_allclose(np.linalg.norm(centres(cameras) - [0, 0, 1], axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(centres(cameras)[18], [0, 0, 2], atol=1e-5)
    np.testing.assert_allclose(cameras.world_to_camera_T34[-1], np.eye(3, 4), atol=1e-5)


def test_named_moves_see_square_pixels():
    for height, width, expected in ((24, 24, (1, 1)), (480, 960, (1, 2)), (960, 480, (2, 1))):
        cameras = named_cameras("orbit", 2, height, width)
        np.testing.assert_array_equal(cameras.intrinsics_T4, [[*expected, 0.5, 0.5]] * 2)


def test_a_file_may_hold_moves(tmp_path):
    (tmp_path / "moves.txt").write_text("\ufeffpan_right:12; zoom_in\n", encoding="utf-8")
    found, expected = (read_cameras(given, 25, 24, 48) for given in (f"{tmp_path}/moves.txt", "pan_right:12; zoom_in"))
    np.testing.assert_array_equal(found.world_to_camera_T34, expected.world_to_camera_T34)
    np.testing.assert_array_equal(found.intrinsics_T4, expected.intrinsics_T4)
    (tmp_path / "moves.txt").write_text("pan_right:many")
    with pytest.raises(UserError, match='moves.txt: camera "pan_right:many": "many" is not a number of frames'):
        read_cameras(f"{tmp_path}/moves.txt", 13, 24, 24)


def test_a_zoom_that_goes_on_ends_far_away():
    for moves in ("zoom_out", "zoom_out*99999", "zoom_in*99999"):
        assert np.isfinite(read_cameras(moves, 6000, 24, 24).world_to_camera_T34).all()


@pytest.mark.parametrize("given,message", [
    ("pan_rihgt", "no such move; there are still, pan_left, pan_right"),
    ("pan_right:many", '"many" is not a number of frames'),
    ("pan_right:0", '"0" is not a number of frames'),
    ("pan_right*-1", '"-1" is not a factor above 0'),
    ("pan_right*nan", '"nan" is not a factor above 0'),
    (" ; ", "names no move"),
    ("missing.txt", "missing.txt: the camera can't be read .*No such file"),
])
def test_what_is_no_move_and_no_file_is_said(given, message):
    with pytest.raises(UserError, match=message):
        read_cameras(given, 13, 24, 24)
