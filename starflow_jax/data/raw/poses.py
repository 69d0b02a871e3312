"""The camera of each frame of a clip: a video's path at the frames' times, seen through the clip's crop.

A path's timestamps are those of the video beside which it lies. Clips that were cut out of a longer video, as those of
RealEstate10K are, often keep that one's: a path that ends after its video is counted from its first pose, which is then
that of the video's first frame.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from starflow_jax.data.raw.items import Unusable
from starflow_jax.data.raw.job import Bucket
from starflow_jax.io.cameras import Cameras, View, moved, moves_in_turn, square_intrinsics


class Poses:
    """A video's camera path, in the video's own time.

    rate: frames per second of the video; where the path has no times, pose n is that of frame n. begin, duration: of
    the video in its container, in seconds; duration 0: unknown.
    """

    def __init__(self, path: Cameras, rate: float, begin: float, duration: float) -> None:
        seconds_T = np.arange(len(path.intrinsics_T4)) / rate if path.seconds_T is None else path.seconds_T
        self._spacing = max(1 / rate, float(np.median(np.diff(seconds_T)))) if len(seconds_T) > 1 else 1 / rate
        if seconds_T[-1] > duration + self._spacing:
            seconds_T = seconds_T - seconds_T[0]
        self._rate, self._begin, self._path = rate, begin, dataclasses.replace(path, seconds_T=seconds_T)

    def of_clip(self, times_T: Sequence[float], height: float, width: float, bucket: Bucket) -> Cameras:
        """The cameras at a clip's frames.

        times_T: of the frames, in their container. height, width: of the video as shown, of which the bucket's shape is
        cut out. Raises Unusable where the path doesn't reach over the whole clip.
        """
        assert self._path.seconds_T is not None
        seconds_T = np.array(times_T) - self._begin
        first, last = self._path.seconds_T[[0, -1]]
        if seconds_T[0] < first - self._spacing or seconds_T[-1] > last + self._spacing:
            raise Unusable(f"outside the camera's path: its poses are from {first:.3f} to {last:.3f} seconds")
        cameras = self._path.at(seconds_T, self._rate)
        return dataclasses.replace(cameras, intrinsics_T4=_cropped(cameras.intrinsics_T4, height, width, bucket))


class Moves:
    """A camera by moves by name, from the first frame of a video or of its stretch on, in frames of the video's own.

    Moves say how the camera moves and not how far the scene is: each clip sees it at distance 1 of its first camera, as
    a video that is sampled does.
    """

    def __init__(self, moves: str, rate: float, begin: float) -> None:
        """rate: frames per second of the video. begin: of what is read of it, in seconds of its container."""
        self._moves, self._rate, self._begin = moves, rate, begin

    def of_clip(self, times_T: Sequence[float], height: float, width: float, bucket: Bucket) -> Cameras:
        """As that of `Poses`."""
        frames_T = np.maximum(0, np.rint((np.array(times_T) - self._begin) * self._rate)).astype(int)
        first, last = int(frames_T[0]), int(frames_T[-1])
        steps = itertools.islice(moves_in_turn(self._moves), first + 1, last + 1)  # a step leads to its frame
        views = [View(), *moved(steps, View())]
        views += views[-1:] * (last - first + 1 - len(views))  # after the last move it is still
        poses_T34 = np.array([views[frame - first].pose_44[:3] for frame in frames_T], np.float32)
        intrinsics_T4 = np.tile(square_intrinsics(height, width), (len(frames_T), 1))
        return Cameras(_cropped(intrinsics_T4, height, width, bucket), poses_T34)


def _cropped(intrinsics_T4: np.ndarray, height: float, width: float, bucket: Bucket) -> np.ndarray:
    """Of the middle of frames of that size, of which the bucket's shape is cut out."""
    scale = max(bucket.height / height, bucket.width / width)
    wider, higher = width * scale / bucket.width, height * scale / bucket.height
    fx_T, fy_T, cx_T, cy_T = intrinsics_T4.T
    return np.stack([fx_T * wider, fy_T * higher, (cx_T - 0.5) * wider + 0.5, (cy_T - 0.5) * higher + 0.5],
                    axis=1).astype(np.float32)
