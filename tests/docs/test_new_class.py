"""The stars of docs/new_class.py: varied, told from digits by the reader, and in captions of their own."""

import re
from pathlib import Path

import numpy as np

from docs import new_class
from starflow_jax.data.digits.captions import COLOURS, DIRECTIONS
from starflow_jax.io.video import read_video


def test_stars_are_varied_and_read() -> None:
    drawn = np.stack([new_class.draw_star(seed) for part in new_class.STARS.values() for seed in part])
    assert len({scan.tobytes() for scan in drawn}) == len(drawn)
    reader, random = new_class.star_reader(), np.random.default_rng(0)
    clips, colours, directions = new_class.moving(drawn[len(new_class.STARS["train"]):], random)
    kind, colour, direction = reader.read(clips)
    assert (kind == new_class.STAR).mean() >= 0.95
    np.testing.assert_array_equal(colour, colours)
    np.testing.assert_array_equal(direction, directions)


def test_captions_say_star() -> None:
    random = np.random.default_rng(0)
    for look in np.ndindex(len(COLOURS), len(DIRECTIONS)):
        said = new_class.star_caption(*look, random, True)
        assert re.search(r"\bstar\b", said) and "7" not in said and "seven" not in said and "digit" not in said


def test_drawn_videos_have_captions(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(new_class, "STARS", {"train": range(2), "test": range(2, 3)})
    new_class.draw(tmp_path, digits=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{name}.{kind}" for name in ("digit_002", "star_000", "star_001") for kind in ("mp4", "txt")]
    frames = read_video(tmp_path / "star_000.mp4")[0]
    assert frames.shape == (new_class.FRAMES, 96, 96, 3) and "star" in (tmp_path / "star_000.txt").read_text()
