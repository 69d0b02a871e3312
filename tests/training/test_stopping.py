"""Ctrl-C and SIGTERM while a model is trained."""

import signal
from collections.abc import Iterator

import jax
import pytest

from starflow_jax.config import Mesh
from starflow_jax.sharding import make_mesh
from starflow_jax.training import stopping


@pytest.fixture
def stop() -> Iterator[stopping.StopOnTerm]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield stopping.StopOnTerm(make_mesh(Mesh(1), jax.local_devices()[:1]))
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_ctrl_c_asks_and_the_second_leaves_at_once(
    stop: stopping.StopOnTerm, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(stopping.os, "_exit", left.append)
    assert not stop.agreed()
    signal.raise_signal(signal.SIGINT)
    assert stop.agreed() and stop.interrupted and left == []
    signal.raise_signal(signal.SIGINT)
    assert left == [130]


def test_sigterm_asks_and_is_no_interruption(stop: stopping.StopOnTerm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping.os, "_exit", None)
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    assert stop.agreed() and not stop.interrupted
