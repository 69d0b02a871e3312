"""A workdir is held by the first process of a run, for all of them."""

from pathlib import Path

import jax
import pytest

from starflow_jax import sharding
from starflow_jax.config import UserError
from starflow_jax.io.lock import IN_USE, held
from starflow_jax.modes.alone import alone_in


def test_the_first_process_is_refused_only_once_the_others_have_heard(tmp_path: Path, monkeypatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(sharding, "as_first_process_has_it", lambda value: heard.append(value) or value)
    with held(tmp_path), pytest.raises(UserError) as refused, alone_in(tmp_path):
        pass
    assert heard == [str(refused.value)] and "is using it" in heard[0]
    with alone_in(tmp_path):
        assert heard[1:] == [""] and (tmp_path / IN_USE).exists()


def test_the_others_are_refused_with_it_and_hold_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sharding, "as_first_process_has_it", lambda value: "somebody is using it")
    with pytest.raises(UserError, match="^somebody is using it$"), alone_in(tmp_path):
        pass
    monkeypatch.setattr(sharding, "as_first_process_has_it", lambda value: "")
    with alone_in(tmp_path):
        assert not list(tmp_path.iterdir())
