"""Charts of means with intervals."""

import math
from pathlib import Path

import numpy as np

from starflow_jax.io.charts import Chart, draw_charts, draw_matrices, series
from starflow_jax.io.pictures import read_image


def test_charts_are_drawn_side_by_side(tmp_path: Path) -> None:
    one = Chart("a", [0.0, 1.0], {"x": ([1.0, 2.0], [0.1, math.nan]), "y": ([2.0, 1.0], [0.2, 0.2])}, "weight")
    sizes = Chart("c", [1e6, 3e6], {"": ([1.0, 2.0], [0.1, 0.1])}, log=True)
    named = Chart("b", ["first", "second"], {"": ([1.0, 2.0], [0.1, 0.1])}, level=0.0)
    for name, charts in {"one": [one], "five": [one, named, sizes, named, one]}.items():
        draw_charts(tmp_path / f"{name}.png", charts, "headline")
    draw_charts(tmp_path / "apart.png", [one._replace(joined=False)], "headline")
    joined, apart = ((read_image(tmp_path / f"{name}.png").min(axis=-1) < 200).sum() for name in ("one", "apart"))
    assert apart < 0.95 * joined
    small, large = (read_image(tmp_path / f"{name}.png") for name in ("one", "five"))
    assert large.shape[0] > 1.5 * small.shape[0] and large.shape[1] > 2.5 * small.shape[1]
    assert len(np.unique(small.reshape(-1, 3), axis=0)) > 10
    assert series([(1.0, 0.1), (2.0, 0.2)]) == ((1.0, 2.0), (0.1, 0.2))


def test_matrices_side_by_side(tmp_path: Path) -> None:
    """What is not above the least value is white, all else has one scale of colours."""
    causal = np.tril(np.ones((4, 4)))
    draw_matrices(tmp_path / "both.png", {"causal": causal, "whole": np.full((4, 4), 1e-3)}, ("of", "by"), "moved")
    picture = read_image(tmp_path / "both.png").astype(int)
    left, right = picture[:, :picture.shape[1] // 2], picture[:, picture.shape[1] // 2:]
    white = [int((part.min(axis=-1) == 255).sum()) for part in (left, right)]
    assert white[0] - white[1] > 0.2 * 3.2**2 / 2 * 110**2 * 0.5  # six of sixteen cells
