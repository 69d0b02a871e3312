"""A camera that is steered while the frames that it sees are made.

What it is given is kept as JSON holds it, so that the same path can be flown again:

    "pan_right"                         moves by name, from where the camera is; the last one may go on for ever
    {"world_to_camera": ..., ...}       a file's path, as a JSON of cameras has it, from where the camera is
    {"pose": [[..4], [..4], [..4]]}     a pose in the axes of the video's first camera, reached within a latent frame
    {"poses": [...]}                    such poses, one for each frame

At the end of a path, and at a pose, it stays.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.config import UserError
from starflow_jax.io.cameras import (
    Cameras,
    View,
    camera_file,
    moved,
    moves_in,
    moves_in_turn,
    named_cameras,
    names_a_file,
    parse_cameras,
    square_intrinsics,
)

NAME = "camera.json"  # what messages call a camera that was no file


class Seen(NamedTuple):
    """A frame's camera."""

    intrinsics_4: np.ndarray  # float32
    world_to_camera_44: np.ndarray  # float64


def as_json(camera: Any) -> Any:
    """A camera as JSON holds it: of moves by name, a file, a pose (3 or 4, 4), poses (T, 3 or 4, 4), or what this gave.

    Raises UserError for what is none.
    """
    if isinstance(camera, str):
        if names_a_file(camera):
            content = camera_file(camera)
            moves = moves_in(content, camera.strip())
            if not moves:
                return _json_of(parse_cameras(content, camera.strip()))
            camera = moves
        moves_in_turn(camera)
        return camera.strip()
    if isinstance(camera, dict):
        _poses_of(camera) if {"pose", "poses"} & set(camera) else parse_cameras(json.dumps(camera).encode(), NAME)
        return camera
    try:
        poses = np.asarray(camera, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError('camera: neither a text nor an array of numbers; give moves such as "pan_right", a file, or a '
                        "pose of shape (3, 4)") from error
    if poses.ndim not in (2, 3) or poses.shape[-1] != 4 or poses.shape[-2] not in (3, 4) or not len(poses):
        raise UserError(f"camera: an array of shape {poses.shape}; a pose, world to camera, has (3, 4), several have "
                        "(T, 3, 4)")
    given = {"pose" if poses.ndim == 2 else "poses": poses[..., :3, :].tolist()}
    _poses_of(given)
    return given


def _poses_of(given: dict[str, Any]) -> np.ndarray:
    """(T, 3, 4) float64 of a pose, or of poses. Raises UserError for what is none."""
    poses = [given["pose"]] if "pose" in given else given["poses"]
    parse_cameras(json.dumps({"intrinsics": [1, 1, 0.5, 0.5], "world_to_camera": poses}).encode(), NAME)
    return np.array(poses, np.float64)


def _json_of(cameras: Cameras) -> dict[str, Any]:
    """As a JSON file would hold them."""
    given: dict[str, Any] = {"intrinsics": cameras.intrinsics_T4.tolist(),
                             "world_to_camera": cameras.world_to_camera_T34.tolist()}
    if cameras.seconds_T is not None:
        given["timestamps"] = [seconds * 1e6 for seconds in cameras.seconds_T.tolist()]
    return given


class LiveCamera:
    """The camera of one frame after the other, of a video of any length."""

    def __init__(self, height: int, width: int, rate: float, time_stride: int) -> None:
        """height, width: of a frame, in pixels. rate: frames per second. time_stride: frames within which a pose is
        reached."""
        self._height, self._width, self._rate, self._stride = height, width, rate, time_stride
        self._intrinsics_4, self._view = square_intrinsics(height, width), View()
        self._ahead: Iterator[tuple[np.ndarray, View]] = iter(())
        self._given: Any = None
        self._ended = False

    @property
    def now(self) -> Seen:
        """The last frame's."""
        return Seen(self._intrinsics_4, self._view.pose_44)

    def next(self) -> Seen:
        """The next frame's."""
        found = next(self._ahead, None)
        if found is None:
            self._ended = True
        else:
            self._intrinsics_4, self._view = found
        return self.now

    def follows(self, given: Any) -> bool:
        """Whether this would change nothing: it is on this way, or at this pose."""
        return given == self._given and (not self._ended or "pose" in given and isinstance(given, dict))

    def begin(self, given: Any, frames: int | None) -> None:
        """Take the first frame's camera, and what follows, from what is given as JSON holds it. frames: of the whole
        video, over which moves and a file's path are spread; None: it has no end."""
        path: Any = None
        if isinstance(given, dict) and {"pose", "poses"} & set(given):
            path = [(self._intrinsics_4, View(_homogeneous(pose))) for pose in _poses_of(given)]
        elif frames is not None:
            cameras = named_cameras(given, frames, self._height, self._width) if isinstance(given, str) else (
                parse_cameras(json.dumps(given).encode(), NAME).resampled(frames))
            path = [(four, View(pose)) for four, pose in zip(cameras.intrinsics_T4, cameras.homogeneous_T44)]
        if path is None:
            self.follow(given)
            if isinstance(given, str):  # the first frame is where the path begins, and takes the first move's time
                steps = moves_in_turn(given)
                next(steps, None)
                self._ahead = self._moves(steps)
        else:
            (self._intrinsics_4, self._view), self._ahead = path[0], iter(path[1:])
            self._given, self._ended = given, False

    def follow(self, given: Any) -> None:
        """Go on from here as given, in the form of `as_json`."""
        self._given, self._ended = given, False
        if isinstance(given, str):
            self._ahead = self._moves(moves_in_turn(given))
        elif "poses" in given:
            self._ahead = iter([(self._intrinsics_4, View(_homogeneous(pose), self._view.distance))
                                for pose in _poses_of(given)])
        elif "pose" in given:
            target_44 = _homogeneous(_poses_of(given)[0]) @ np.linalg.inv(self._view.pose_44)
            way = Cameras(np.tile(self._intrinsics_4, (2, 1)), np.stack([np.eye(4), target_44])[:, :3],
                          np.array([0.0, self._stride]))
            self._ahead = self._relative(way.at(np.arange(self._stride + 1), 1.0))
        else:
            self._ahead = self._relative(self._at_rate(parse_cameras(json.dumps(given).encode(), NAME)))

    def _moves(self, steps: Any) -> Iterator[tuple[np.ndarray, View]]:
        return zip(itertools.repeat(self._intrinsics_4), moved(steps, self._view))

    def _at_rate(self, path: Cameras) -> Cameras:
        """A pose for each of this video's frames."""
        if path.seconds_T is None:
            return path
        frames = 1 + int(np.ceil((path.seconds_T[-1] - path.seconds_T[0]) * self._rate - 1e-6))
        return path.at(path.seconds_T[0] + np.arange(frames) / self._rate, self._rate)

    def _relative(self, path: Cameras) -> Iterator[tuple[np.ndarray, View]]:
        """The poses behind the path's first one, which is where the camera is now."""
        poses_T44, now = path.homogeneous_T44, self._view
        self._intrinsics_4 = path.intrinsics_T4[0]
        from_first_T44 = poses_T44 @ np.linalg.inv(poses_T44[0])
        return iter([(four, View(pose_44 @ now.pose_44, now.distance))
                     for four, pose_44 in zip(path.intrinsics_T4[1:], from_first_T44[1:])])


def _homogeneous(pose_34: np.ndarray) -> np.ndarray:
    return np.concatenate([pose_34, [[0.0, 0.0, 0.0, 1.0]]])

