"""The bar says what it waits for, and the table lines up."""

import re

import pytest

from starflow_jax.io.progress import ProgressBar, table


def states(err: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", err) if line.strip()]


def test_a_bar_says_compiling_until_its_first_update(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("samples", 2, unit="video", compiles=True) as progress:
        first, = states(capsys.readouterr().err)
        progress.update(2)
    assert "0/2" in first and "compiling" in first
    last = states(capsys.readouterr().err)[-1]
    assert "2/2" in last and "compiling" not in last


def test_a_bar_that_compiles_nothing_does_not_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("convert", 2) as progress:
        progress.update(loss="1.2500 bits/dim")
        progress.update(loss="0.5000 bits/dim")
    shown = capsys.readouterr().err
    assert "compiling" not in shown and "0.5000 bits/dim" in states(shown)[-1]


def test_numbers_are_aligned_at_the_right() -> None:
    assert table([("a", 1.0), ("long", 12345.678)], ("name", "x")).splitlines() == [
        "name          x", "----  ---------", "a             1", "long  1.235e+04"]
