"""Rows of smaller deep blocks become charts; what each is called; passes of the teacher and of its draft."""

import math
from pathlib import Path

import numpy as np
import pytest

from starflow_jax.config import Student
from starflow_jax.evaluation import students
from starflow_jax.evaluation.measures import share_interval
from starflow_jax.io.charts import draw_charts
from starflow_jax.io.pictures import read_image
from starflow_jax.sampling.generate import Clips
from starflow_jax.sampling.solved import Solved


def row(kind: str, seconds: float, bits: float, saved: float | None = None) -> dict:
    return {"kind": kind, "seconds_per_video": seconds, "bits_above_teacher": (bits, 0.001), "digit": (0.9, 0.02),
            **({} if saved is None else {"as_draft": {"passes_saved": saved}})}


def test_charts_have_a_series_for_each_way_of_training(tmp_path: Path) -> None:
    rows = {"teacher": row("teacher", 2.0, 0.0), "half": row("distilled", 1.0, 0.01, 0.4),
            "quarter": row("distilled", 0.5, 0.05, 0.2), "half_alone": row("likelihood alone", 1.1, 0.03, 0.3)}
    bits, digit, drafts = students.charts(rows)
    assert list(bits.x) == [0.5, 1.0, 1.1, 2.0] and set(bits.series) == {"teacher", "distilled", "likelihood alone"}
    np.testing.assert_array_equal(bits.series["distilled"][0], [0.05, 0.01, math.nan, math.nan])
    assert digit.title == "digit read as asked" and list(drafts.x) == ["half", "quarter", "half_alone"]
    assert drafts.series[""][0] == (0.4, 0.2, 0.3)
    draw_charts(tmp_path / "students.png", [bits, digit, drafts], "headline")
    assert len(np.unique(read_image(tmp_path / "students.png").reshape(-1, 3), axis=0)) > 10


def test_a_student_is_called_by_how_it_is_trained() -> None:
    assert students.kind_of(Student()) == students.kind_of(Student(likelihood=0, mean=0)) == "distilled"
    assert students.kind_of(Student(mean=0, scale=0)) == "likelihood alone"
    assert students.kind_of(Student(start="random", mean=0, scale=0)) == "likelihood alone, from random parameters"


def test_passes_are_counted_of_the_teacher_and_of_its_draft() -> None:
    """Two videos of three frames; behind each but the last the draft is shown what became of the frame."""
    none = np.zeros((2, 3))
    solved = Solved(np.array([[4, 2, 2], [2, 2, 2]]), none, none, none, np.array([[5, 3, 1], [5, 4, 2]]))
    clips = Clips(none, none, None, solved, none)  # type: ignore[arg-type]
    assert students._passes(clips) == {"passes": 7.0, "draft_passes": 10.0 + 2}


def test_an_interval_of_a_share_is_wilsons() -> None:
    """Also of shares of 0 and 1, which are not certain."""
    assert share_interval(0.5, 100) == (0.5, pytest.approx(0.0962, abs=1e-4))
    assert share_interval(1.0, 100)[1] == share_interval(0.0, 100)[1] == pytest.approx(0.0185, abs=1e-4)
