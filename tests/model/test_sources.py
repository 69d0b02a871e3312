"""The examples that a config reads."""

import dataclasses

import numpy as np

from configs.t2v import tiny
from starflow_jax.data.digits.captions import ATTRIBUTES, parse_caption
from starflow_jax.model import sources


def test_long_clips_of_digits_are_as_long_as_asked(monkeypatch):
    monkeypatch.setattr(sources, "data_source", None)  # nothing is written to disk
    config = tiny()
    clips = list(sources.long_clips(config, "test", 2, 61))
    assert [clip["frames"].shape for clip in clips] == [(61, 24, 24, 3)] * 2
    for clip in clips:
        assert parse_caption(clip["caption_long"]) == tuple(clip[name] for name in ATTRIBUTES)


def test_with_a_camera_long_clips_and_the_data_set_have_its_poses(tmp_path):
    config = tiny()
    few = dict(train_clips=2, validation_clips=1, test_clips=1)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, camera=True, directory=str(tmp_path),
                                                                  **few))
    (clip,) = sources.long_clips(config, "test", 1, 61)
    assert clip["frames"].shape == (61, 24, 24, 3) and clip["world_to_camera"].shape == (61, 3, 4)
    recorded = sources.data_source(config, "train")[1]
    assert recorded["world_to_camera"].shape == (len(recorded["frames"]), 3, 4)


def test_long_clips_of_other_data_are_the_first_recorded_ones(monkeypatch):
    recorded = [{"frames": np.zeros((17, 4, 4, 3), np.uint8)}] * 3
    monkeypatch.setattr(sources, "data_source", lambda config, split: recorded)
    config = tiny()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, source="prepared", directory="none"))
    assert [len(clip["frames"]) for clip in sources.long_clips(config, "test", 2, 61)] == [17, 17]
