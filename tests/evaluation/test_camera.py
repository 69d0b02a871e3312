"""The model in the package follows a camera: from the user's command and call to where the frames are seen from."""

from pathlib import Path

import numpy as np
import pytest

import starflow_jax as sf
from starflow_jax.data.digits.camera_reader import read_cameras
from starflow_jax.data.digits.captions import DIRECTION_NAMES
from starflow_jax.io.video import read_video
from tests.small_run import run_here

PROMPT, DIRECTION = "a blue three moves right", DIRECTION_NAMES.index("right")
SLID = 12 * 0.025  # what a pan or tilt of 13 frames slides, in sides of the picture (docs/pages/data.md)


def slid(clips: list[np.ndarray]) -> np.ndarray:
    """(across, down) of each clip's last frame, as the evaluation's reader sees it."""
    path = read_cameras(np.stack(clips), np.full(len(clips), DIRECTION)).path
    return np.stack([path.x_BT[:, -1], path.y_BT[:, -1]], axis=1)


@pytest.fixture(scope="module")
def model() -> sf.Model:
    return sf.load()


@pytest.mark.parametrize("move, across, down", [("pan_left", -1, 0), ("pan_right", 1, 0), ("tilt_up", 0, -1),
                                                ("tilt_down", 0, 1)])
def test_pictures_are_seen_from_where_the_camera_goes(model: sf.Model, move: str, across: int, down: int) -> None:
    clips = [video.frames for video in model.generate([PROMPT] * 8, seed=0, camera=move)]
    np.testing.assert_allclose(np.median(slid(clips), axis=0), [across * SLID, down * SLID], atol=SLID / 4)


def test_the_command_follows_a_path_that_turns(tmp_path: Path) -> None:
    code, _, err = run_here(["--config=configs/t2v.py", "--mode=sample", f"--config.sample.prompt={PROMPT}",
                             "--config.sample.camera=tilt_down:7; tilt_up:6", f"--config.sample.output={tmp_path}",
                             f"--workdir={tmp_path / 'none'}"])
    assert code == 0, err
    video, = tmp_path.glob("*.mp4")
    frames = read_video(video)[0]
    scale = frames.shape[1] // 24
    path = read_cameras(frames[None, :, scale // 2::scale, scale // 2::scale], np.array([DIRECTION])).path
    assert path.y_BT[0, 6] > SLID / 4 and path.y_BT[0, 12] < path.y_BT[0, 6] - SLID / 4
