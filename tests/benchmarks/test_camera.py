"""What following a camera costs: the times are of the same videos with it and without."""

from pathlib import Path

import numpy as np
import pytest

from configs.t2v import tiny
from starflow_jax.benchmarks import camera


@pytest.mark.slow  # tests/modes/test_sample.py and others have videos with a camera and without
def test_the_figures_are_of_the_same_videos_with_a_camera_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}

    def timed(_, cases, rounds):
        assert rounds == 3
        made.update({case: run().frames_BTHWC for case, run in cases.items()})
        return {case: (frames, len(frames) + bool(case[1])) for case, frames in made.items()}

    monkeypatch.setattr(camera, "timed", timed)
    rows = camera.beside_none(tiny(), tmp_path, rounds=3)
    assert [(row["videos"], row["without, s"], row["with a camera, s"], row["times as long"]) for row in rows] == [
        (1, 1, 2, 2.0), (8, 8, 9, 9 / 8)]
    for videos in (1, 8):
        alone, moved = made[videos, ""].astype(int), made[videos, camera.PATH].astype(int)
        assert alone.shape == moved.shape == (videos, 13, 24, 24, 3)
        assert (np.abs(alone - moved)[:, 1:].max((1, 2, 3, 4)) > 100).all()


def test_a_model_that_follows_no_camera_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("starflow_jax.model.store.control.packaged_module", lambda *_: None)
    assert camera.beside_none(tiny(), tmp_path) == []
