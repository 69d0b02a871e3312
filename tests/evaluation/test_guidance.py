"""Guidance against adherence and diversity."""

import dataclasses

import numpy as np

from starflow_jax.evaluation import guidance
from starflow_jax.evaluation.measures import interval
from tests.small_model import CAPTIONS, SETTINGS


def test_the_difference_of_two_videos() -> None:
    first = np.zeros((2, 3, 4, 4, 3), np.uint8)
    second = first.copy()
    second[0], second[1, :, :2] = 3, 4  # root mean squares 3 and sqrt(8)
    np.testing.assert_allclose(guidance.diversity(first, second), (3 + 8**0.5) / 2, rtol=1e-6)
    assert guidance.diversity(first, first) == 0


def test_a_row_for_each_weight_over_three_videos_of_each_prompt(system, params) -> None:
    system = dataclasses.replace(system, config=dataclasses.replace(system.config, sample=SETTINGS))
    rows = guidance.measure(system, params, CAPTIONS, None, (0.0, 2.0))
    assert [row["guidance"] for row in rows] == [0.0, 2.0]
    sets = [guidance.sampled(system, params, CAPTIONS, 2.0, seed) for seed in (0, 3, 6)]
    pairs = [guidance.diversity(sets[a], sets[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(rows[1]["diversity"], interval(pairs), rtol=1e-5)
    np.testing.assert_allclose(rows[1]["brightness"], interval([one.mean() for one in sets]), rtol=1e-5)
    assert rows[0]["brightness"] != rows[1]["brightness"]
    assert [chart.title for chart in guidance.charts(rows)] == [
        "difference of two videos of one prompt (RMS of 255)", "mean pixel"]
