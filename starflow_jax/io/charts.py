"""Means with their intervals, as points."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from starflow_jax.io.files import atomic_path

Series = tuple[Sequence[float], Sequence[float]]  # means, and halves of their intervals; NaN: none


class Chart(NamedTuple):
    """Points over numbers, or over names; where a series has NaN, it has none."""

    title: str
    x: Sequence[float] | Sequence[str]
    series: dict[str, Series]  # by their labels
    x_label: str = ""
    log: bool = False  # x on a logarithmic scale
    level: float | None = None  # a line to compare with
    joined: bool = True  # a series' points over numbers, by a line


def series(pairs: Sequence[tuple[float, float]]) -> Series:
    """A Series of (mean, half of its interval)."""
    means, halves = zip(*pairs)
    return means, halves


def draw_charts(path: str | os.PathLike[str], charts: Sequence[Chart], headline: str, columns: int = 3) -> None:
    """Write a PNG of charts, `columns` side by side."""
    from matplotlib.figure import Figure  # takes a third of a second to import

    columns = min(columns, len(charts))
    lines = -(-len(charts) // columns)
    figure = Figure(figsize=(3.8 * columns, 2.9 * lines + 0.3), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, chart in zip(grid.flat, charts):
        _draw(axes, chart)
    for axes in grid.flat[len(charts):]:
        axes.remove()
    figure.suptitle(headline, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _draw(axes: Any, chart: Chart) -> None:
    named = isinstance(chart.x[0], str)
    line = "-" if chart.joined and not named else ""
    places = np.arange(len(chart.x)) if named else np.asarray(chart.x, float)
    if chart.level is not None:
        axes.axhline(chart.level, color="0.6", linestyle="--")
    for label, (means, halves) in chart.series.items():
        there = np.isfinite(np.asarray(means, float))
        axes.errorbar(places[there], np.asarray(means)[there], np.nan_to_num(np.asarray(halves, float))[there],
                      marker="o", markersize=4, capsize=3, linestyle=line, label=label)
    if chart.log:
        from matplotlib.ticker import EngFormatter

        axes.set_xscale("log")
        axes.set_xticks(places, [EngFormatter(places=1)(place) for place in places])
        axes.set_xticks([], minor=True)
    if named:
        axes.set_xticks(places, chart.x, fontsize=7, rotation=25, ha="right")
        axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_title(chart.title, fontsize=9)
    axes.set_xlabel(chart.x_label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if len(chart.series) > 1:
        axes.legend(fontsize=7)


def draw_matrices(path: str | os.PathLike[str], matrices: dict[str, np.ndarray], axes_labels: tuple[str, str],
                  headline: str, least: float = 1e-6) -> None:
    """Write a PNG of square matrices side by side, by their titles, with one logarithmic scale of colours: what is not
    above `least` is left white. axes_labels: of rows and of columns."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(matrices) + 1, 3.6), layout="constrained")
    highest = max(float(matrix.max()) for matrix in matrices.values())
    every = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (title, matrix) in zip(every, matrices.items()):
        drawn = axes.imshow(np.ma.masked_less_equal(matrix, least), norm=LogNorm(least, max(highest, 2 * least)))
        axes.set(title=title, xlabel=axes_labels[1], ylabel=axes_labels[0], xticks=range(len(matrix)),
                 yticks=range(len(matrix)))
    figure.colorbar(drawn, ax=list(every), shrink=0.8)
    figure.suptitle(headline, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
