"""Cameras: from where each frame of a video is seen, read from a file or named by moves.

Axes are x right, y down, z forward, of the world and of a camera; `camera = world_to_camera @ world`. Intrinsics are
fx, fy, cx, cy, divided by the frame's width (fx, cx) or height (fy, cy). A camera comes as

    RealEstate10K's text   an optional first line with the video's address; then a line for each pose: a timestamp in
                           microseconds, fx fy cx cy, two zeros, and the 3x4 world_to_camera row by row
    JSON                   {"intrinsics": [[fx, fy, cx, cy], ...] or one of them for all, "world_to_camera": [[[..4
                           numbers], [..], [..]], ...], "timestamps": [microseconds, ...], which may be left out}
    moves by name          "orbit", or "pan_right:12; zoom_in:13": moves with their frames, each going on where the one
                           before it ended; "pan_right*0.5" is half as fast

A text file may hold moves in place of poses, also one a line. Timestamps that count up by one are numbers of frames, as
where a JSON has none: pose n is that of frame n.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io.files import parse_json

SUFFIXES = (".txt", ".json")
_RIGID = 1e-2  # what a rotation read from text may be off by
_PIXELS = 50  # a focal length above it is in pixels: divided by the frame's side, it would be a view of one degree

# Of moves, for each frame. The scene is taken to be at distance 1 of the first camera.
SLIDE = 0.025  # pan and tilt: of the distance to the scene
ZOOM = 0.015  # share of the distance, as a logarithm: 15 frames make the scene 1.25 times larger
ANGLE = 1.0  # degrees of roll, turn and orbit
_NEAREST = 14.0  # of the logarithm of the scene's distance; a zoom that goes on for ever ends there, a millionth away


@dataclasses.dataclass(frozen=True, eq=False)
class Cameras:
    """A camera's path: a pose for each frame, or at each of its own times."""

    intrinsics_T4: np.ndarray  # float32
    world_to_camera_T34: np.ndarray  # float32, rotation and translation
    seconds_T: np.ndarray | None = None  # float64, ascending; None: pose n is that of frame n

    @property
    def homogeneous_T44(self) -> np.ndarray:
        """world_to_camera as float64 (T, 4, 4), as `flow.control.plucker_rays` takes it."""
        last_T14 = np.broadcast_to([[0.0, 0.0, 0.0, 1.0]], (len(self.world_to_camera_T34), 1, 4))
        return np.concatenate([self.world_to_camera_T34.astype(np.float64), last_T14], axis=1)

    def relative_to_first(self) -> "Cameras":
        """The same path in a world whose axes are those of the first camera, which looks from the origin."""
        matrices_T44 = self.homogeneous_T44
        relative_T44 = matrices_T44 @ np.linalg.inv(matrices_T44[0])
        return dataclasses.replace(self, world_to_camera_T34=relative_T44[:, :3].astype(np.float32))

    def resampled(self, frames: int) -> "Cameras":
        """The whole path, spread evenly over a number of frames."""
        times_T = np.arange(len(self.intrinsics_T4)) if self.seconds_T is None else self.seconds_T
        return self._at(times_T, np.linspace(times_T[0], times_T[-1], frames))

    def at(self, seconds_T: np.ndarray, rate: float) -> "Cameras":
        """The poses at these seconds of a video; before the first and after the last pose, these.

        rate: frames per second of that video; only used where pose n is that of frame n.
        """
        times_T = np.arange(len(self.intrinsics_T4)) / rate if self.seconds_T is None else self.seconds_T
        return self._at(times_T, np.asarray(seconds_T, np.float64))

    def _at(self, times_T: np.ndarray, wanted_N: np.ndarray) -> "Cameras":
        """Between two poses the camera's place moves in a straight line and its rotation by slerp."""
        from scipy.spatial.transform import Rotation, Slerp  # half a second

        if len(times_T) == 1:
            return Cameras(*(values.repeat(len(wanted_N), 0) for values in (self.intrinsics_T4,
                                                                            self.world_to_camera_T34)))
        wanted_N = np.clip(wanted_N, times_T[0], times_T[-1])
        after_N = np.clip(np.searchsorted(times_T, wanted_N, side="right"), 1, len(times_T) - 1)
        share_N1 = ((wanted_N - times_T[after_N - 1]) / (times_T[after_N] - times_T[after_N - 1]))[:, None]

        def between(values_TD: np.ndarray) -> np.ndarray:
            return (1 - share_N1) * values_TD[after_N - 1] + share_N1 * values_TD[after_N]

        matrices_T34 = self.world_to_camera_T34.astype(np.float64)
        rotations_T = Rotation.from_matrix(matrices_T34[:, :, :3])
        centre_T3 = -rotations_T.inv().apply(matrices_T34[:, :, 3])
        rotation_N33 = Slerp(times_T, rotations_T)(wanted_N).as_matrix()
        translation_N31 = -rotation_N33 @ between(centre_T3)[:, :, None]
        poses_N34 = np.concatenate([rotation_N33, translation_N31], axis=2).astype(np.float32)
        return Cameras(between(self.intrinsics_T4.astype(np.float64)).astype(np.float32), poses_N34)


def read_cameras(given: str, frames: int, height: int, width: int) -> Cameras:
    """The camera of a video of so many frames: a file's path spread over it, or moves by name.

    height, width: of a frame, in pixels; named moves see square pixels, the longer side at 53 degrees. Raises UserError
    for a file that is missing or faulty, and for a name that is no move.
    """
    if not names_a_file(given):
        return named_cameras(given, frames, height, width)
    content = camera_file(given)
    if moves := moves_in(content, given.strip()):
        return named_cameras(moves, frames, height, width)
    return parse_cameras(content, given.strip()).resampled(frames)


def names_a_file(given: str) -> bool:
    """Whether a camera is a file's, rather than moves by name."""
    return given.strip().endswith(SUFFIXES)


def camera_file(given: str) -> bytes:
    """The content of a camera's file. Raises UserError where it can't be read."""
    path = Path(given.strip())
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the camera can't be read ({error.strerror or error}); name a file, or moves such as "
                        '"pan_right:12; zoom_in:13"') from error


def moves_in(content: bytes, name: str) -> str:
    """The moves by name that a file holds, "" where it does not begin with a word, as poses don't. Raises UserError,
    with the file's name, as `named_cameras` does."""
    text = content.decode("utf-8-sig", errors="replace").strip()
    if not re.match("[A-Za-z_]", text) or "://" in text.splitlines()[0]:
        return ""
    moves = "; ".join(text.splitlines())
    try:
        _read_moves(moves)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return moves


def are_moves(text: str) -> bool:
    """Whether all parts of a text begin with the name of a move."""
    return all(re.split("[*:]", part)[0].strip() in _MOVES for part in text.split(";"))


def parse_cameras(content: bytes, name: str) -> Cameras:
    """A file's cameras. name: what it is called in messages; a JSON's ends with .json. Raises UserError that says in
    which line, or pose of a JSON, which fault is."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start}); give a camera as text or JSON") from error
    poses = _json_poses(text, name) if name.endswith(".json") else _text_poses(text, name)
    if not poses:
        raise UserError(f"{name}: holds no pose; each line has 19 numbers: timestamp, fx fy cx cy, 0 0, and 12 of the "
                        "3x4 world_to_camera")
    for before, pose in zip([None, *poses], poses):
        _check_pose(pose, before)
    numbers_TD = np.array([pose.numbers for pose in poses])
    stamps_T = numbers_TD[:, 0]
    in_frames = len(poses) == 1 or bool((np.diff(stamps_T) == 1).all())
    return Cameras(numbers_TD[:, 1:5].astype(np.float32), numbers_TD[:, 5:].reshape(-1, 3, 4).astype(np.float32),
                   None if in_frames else stamps_T / 1e6)


@dataclasses.dataclass(frozen=True)
class _Pose:
    """One pose as read: where it stands, for messages, and timestamp, 4 intrinsics, 12 of world_to_camera."""

    where: str
    numbers: tuple[float, ...]


def _text_poses(text: str, name: str) -> list[_Pose]:
    poses = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields, where = line.split(), f"{name}, line {number}"
        if not fields or (number == 1 and "://" in line):
            continue
        if len(fields) != 19:
            raise UserError(f"{where}: {len(fields)} fields; a pose has 19: timestamp, fx fy cx cy, 0 0, and 12 of the "
                            "3x4 world_to_camera row by row")
        numbers = [_number(field, where) for field in fields]
        if numbers[5] or numbers[6]:
            raise UserError(f"{where}: fields 6 and 7 are {fields[5]} and {fields[6]}; a lens that distorts can't be "
                            "used, undistort the video and write 0 0")
        poses.append(_Pose(where, (*numbers[:5], *numbers[7:])))
    return poses


def _json_poses(text: str, name: str) -> list[_Pose]:
    try:
        given = parse_json(text)
    except ValueError as error:
        raise UserError(f"{name}: unreadable JSON ({error})") from error
    if not isinstance(given, dict) or not isinstance(given.get("world_to_camera"), list):
        raise UserError(f'{name}: must be an object with "intrinsics" and a list "world_to_camera" of 3x4 matrices')
    matrices, intrinsics = given["world_to_camera"], given.get("intrinsics", [])
    if isinstance(intrinsics, list) and intrinsics and not isinstance(intrinsics[0], list):
        intrinsics = [intrinsics] * len(matrices)
    stamps = given.get("timestamps", list(range(len(matrices))))
    for field, values in (("intrinsics", intrinsics), ("timestamps", stamps)):
        if not isinstance(values, list) or len(values) != len(matrices):
            count = len(values) if isinstance(values, list) else "no"
            raise UserError(f'{name}: {count} {field} for {len(matrices)} matrices; give as many')
    poses = []
    for number, (stamp, four, rows) in enumerate(zip(stamps, intrinsics, matrices), start=1):
        where = f"{name}, pose {number}"
        if not isinstance(rows, list) or len(rows) != 3 or not all(isinstance(r, list) and len(r) == 4 for r in rows):
            raise UserError(f"{where}: world_to_camera must be 3 rows of 4 numbers")
        if not isinstance(four, list) or len(four) != 4:
            raise UserError(f"{where}: intrinsics must be 4 numbers, fx fy cx cy")
        poses.append(_Pose(where, tuple(_number(value, where) for value in (stamp, *four, *sum(rows, [])))))
    return poses


def _number(value: Any, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {str(value)[:40]!r} is no finite number")
    return number


def _check_pose(pose: _Pose, before: _Pose | None) -> None:
    stamp, fx, fy = pose.numbers[:3]
    rotation_33 = np.reshape(pose.numbers[5:], (3, 4))[:, :3]
    if before is not None and stamp <= before.numbers[0]:
        raise UserError(f"{pose.where}: timestamp {stamp:.15g} after {before.numbers[0]:.15g}; they must ascend")
    if not (0 < fx <= _PIXELS and 0 < fy <= _PIXELS):
        raise UserError(f"{pose.where}: fx {fx:g} and fy {fy:g} must be positive and divided by the frame's width and "
                        "height")
    off = np.abs(rotation_33 @ rotation_33.T - np.eye(3)).max()
    if not off <= _RIGID or np.linalg.det(rotation_33) < 0:
        raise UserError(f"{pose.where}: the first three columns of world_to_camera are no rotation (off by {off:.2g}); "
                        "give a rigid transform")


@dataclasses.dataclass(frozen=True)
class _Step:
    """What a move does in one frame, in the axes of the camera: it slides, then turns."""

    slide: tuple[float, float] = (0.0, 0.0)  # right and down, in distances to the scene
    zoom: float = 0.0  # log of the scene's growth
    degrees: float = 0.0
    axis: int = 2  # x, y, z: what is turned about
    around_scene: bool = False  # it turns about the scene, not about itself


_MOVES: dict[str, _Step] = {
    "still": _Step(),
    "pan_left": _Step(slide=(-SLIDE, 0)),
    "pan_right": _Step(slide=(SLIDE, 0)),
    "tilt_up": _Step(slide=(0, -SLIDE)),
    "tilt_down": _Step(slide=(0, SLIDE)),
    "zoom_in": _Step(zoom=ZOOM),
    "zoom_out": _Step(zoom=-ZOOM),
    "roll_left": _Step(degrees=-ANGLE),
    "roll_right": _Step(degrees=ANGLE),
    "turn_left": _Step(degrees=-ANGLE, axis=1),
    "turn_right": _Step(degrees=ANGLE, axis=1),
    "turn_up": _Step(degrees=ANGLE, axis=0),
    "turn_down": _Step(degrees=-ANGLE, axis=0),
    "orbit": _Step(degrees=-ANGLE, axis=1, around_scene=True),
    "orbit_left": _Step(degrees=ANGLE, axis=1, around_scene=True),
    "orbit_right": _Step(degrees=-ANGLE, axis=1, around_scene=True),
}
MOVES = tuple(_MOVES)


def named_cameras(moves: str, frames: int, height: float, width: float) -> Cameras:
    """A path of `frames` poses by moves, such as "orbit" or "pan_right:12; zoom_in*0.5:13".

    The first frame is seen from where the path begins, and then each move brings the camera on from frame to frame.
    Pan and tilt slide it sideways and up or down, zoom brings it nearer to the scene, as papers on camera control use
    these words; turn rotates it in its place, roll about the way it looks (right: clockwise, as what stands behind it
    sees it), orbit goes around the scene, to the right where no side is named. A move without a number has its share of
    the frames that the others leave; what comes after the last move is still. Moves see the scene at distance 1.

    Raises UserError for an unknown move and a bad number.
    """
    steps = [_MOVES["still"]] * frames
    begin = 0
    for move, factor, count in _counted(moves, frames):
        steps[begin:begin + count] = [_faster(_MOVES[move], factor)] * len(steps[begin:begin + count])
        begin += count
    poses = [view.pose_44[:3] for view in (View(), *moved(steps[1:], View()))]  # the first is where the path begins
    intrinsics_T4 = np.tile(square_intrinsics(height, width), (frames, 1))
    return Cameras(intrinsics_T4, np.array(poses, np.float32))


def square_intrinsics(height: float, width: float) -> np.ndarray:
    """fx, fy, cx, cy, float32, of a camera with square pixels that sees the longer side at 53 degrees."""
    focal = max(height, width)
    return np.array([focal / width, focal / height, 0.5, 0.5], np.float32)


class View(NamedTuple):
    """Where a camera is: its pose, float64 (4, 4) world to camera, and the distance at which moves see the scene."""

    pose_44: np.ndarray = np.eye(4)
    distance: float = 1.0


def moved(steps: Iterable["_Step"], view: View) -> Iterator[View]:
    """The views after each of the steps, from a view on."""
    for step in steps:
        moved_44, distance = _moved(step, view.distance)
        view = View(moved_44 @ view.pose_44, distance)
        yield view


def moves_in_turn(moves: str) -> Iterator["_Step"]:
    """The steps of moves by name, of which the last one, without a number of frames, goes on for ever. Raises UserError
    as `named_cameras` does, and for another one without a number."""
    read = _read_moves(moves)
    for move, _, count in read[:-1]:
        if count is None:
            raise UserError(f'camera "{moves}": only the last move may go on without a number of frames; write '
                            f'"{move}:12" for {move}')
    return itertools.chain.from_iterable(
        itertools.repeat(_faster(_MOVES[move], factor), *([] if count is None else [count]))
        for move, factor, count in read)


def _counted(moves: str, frames: int) -> list[tuple[str, float, int]]:
    """(move, factor, frames) of each."""
    read = _read_moves(moves)
    open_moves = sum(count is None for _, _, count in read)
    left = max(0, frames - sum(count or 0 for _, _, count in read))
    shares = iter(np.diff(np.arange(open_moves + 1) * left // max(open_moves, 1)).tolist())
    return [(move, factor, next(shares) if count is None else count) for move, factor, count in read]


def _read_moves(moves: str) -> list[tuple[str, float, int | None]]:
    """(move, factor, frames or None) of each."""
    read: list[tuple[str, float, int | None]] = []
    for part in filter(None, (part.strip() for part in moves.split(";"))):
        named, colon, count = (piece.strip() for piece in part.partition(":"))
        move, star, factor = (piece.strip() for piece in named.partition("*"))
        if move not in _MOVES:
            raise UserError(f'camera "{part[:40]}": no such move; there are {", ".join(MOVES)}, or name a file that '
                            f"ends with {' or '.join(SUFFIXES)}")
        read.append((move, _positive(factor, float, part) if star else 1.0,
                     _positive(count, int, part) if colon else None))
    if not read:
        raise UserError('camera: names no move; give one, such as "pan_right", or several, "pan_right:12; zoom_in:13"')
    return read


def _positive(text: str, kind: Callable[[str], Any], part: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        what = "a number of frames, 1 or more" if kind is int else "a factor above 0"
        raise UserError(f'camera "{part[:40]}": "{text[:40]}" is not {what}; an example: "pan_right*0.5:12"')
    return value


def _faster(step: _Step, factor: float) -> _Step:
    right, down = step.slide
    return dataclasses.replace(step, slide=(right * factor, down * factor), zoom=step.zoom * factor,
                               degrees=step.degrees * factor)


def _moved(step: _Step, distance: float) -> tuple[np.ndarray, float]:
    """((4, 4) that takes the axes of the camera before to those after a step, the distance of the scene then)."""
    nearer = distance * math.exp(min(max(-step.zoom, -_NEAREST), _NEAREST))
    nearer = min(max(nearer, math.exp(-_NEAREST)), math.exp(_NEAREST))
    slide_44 = _translation((-step.slide[0] * distance, -step.slide[1] * distance, nearer - distance))
    # The camera's turn by an angle turns the world, as it sees it, by the opposite one.
    turn_44 = _rotation(step.axis, -math.radians(step.degrees))
    if step.around_scene:
        turn_44 = _translation((0, 0, nearer)) @ turn_44 @ _translation((0, 0, -nearer))
    return turn_44 @ slide_44, nearer


def _translation(by: Sequence[float]) -> np.ndarray:
    matrix_44 = np.eye(4)
    matrix_44[:3, 3] = by
    return matrix_44


def _rotation(axis: int, radians: float) -> np.ndarray:
    """About x, y or z by the right-hand rule."""
    matrix_44, (first, second) = np.eye(4), ((axis + 1) % 3, (axis + 2) % 3)
    matrix_44[first, first] = matrix_44[second, second] = math.cos(radians)
    matrix_44[second, first] = math.sin(radians)
    matrix_44[first, second] = -math.sin(radians)
    return matrix_44
