"""Pieces of an MP4 that play as they come."""

from pathlib import Path

import numpy as np
import pytest

from starflow_jax.io.fragments import Fragments
from starflow_jax.io.video import Recording, read_video


@pytest.mark.parametrize("fps, size", [(8, (40, 40)), (29.97, (17, 23))])
def test_what_has_come_so_far_is_a_video_of_all_its_frames(tmp_path: Path, fps: float, size: tuple[int, int]) -> None:
    """None of them is kept back, a key frame in the middle included, and their times are right."""
    frames = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    frames = np.concatenate([np.roll(frames, shift, axis=2) for shift in range(300)])
    fragments = Fragments(fps, 2)
    shown, file = 0, b""
    for count in (1, 4, 4, 291):
        file += fragments.piece(frames[shown:shown + count])
        shown += count
        (tmp_path / "one.mp4").write_bytes(file)
        found, rate = read_video(tmp_path / "one.mp4")
        assert len(found) == shown and rate == pytest.approx(fps, rel=1e-3)
    fragments.close()
    recording = Recording(fps, 2)
    recording.write(frames)
    recording.save(tmp_path / "whole.mp4")
    np.testing.assert_array_equal(found, read_video(tmp_path / "whole.mp4")[0])
    assert fragments.codec.startswith("avc1.64") and len(fragments.codec) == 11
