"""Checksums of a checkpoint's files: what is damaged is found, the checksums themselves included."""

from pathlib import Path

import pytest

from starflow_jax.checkpoints.checksums import CHECKSUMS, damage_of, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "x").write_bytes(b"parameters")
    write_checksums(tmp_path)
    assert damage_of(tmp_path) is None
    return tmp_path


def test_a_changed_or_missing_file_is_named(folder: Path) -> None:
    (folder / "state" / "x").write_bytes(b"parameterz")
    assert damage_of(folder) == "state/x has changed"
    (folder / "state" / "x").unlink()
    assert damage_of(folder) == "state/x is missing"


@pytest.mark.parametrize("text", ["[]", "null", "5", "{}", '{"state/x": null}', '{"state/x": "1"}', '{"state/x": true}',
                                  "", "{", "[" * 100_000, "\udc80"])
def test_checksums_that_are_none_are_damage(folder: Path, text: str) -> None:
    (folder / CHECKSUMS).write_text(text, errors="surrogateescape")
    assert damage_of(folder)
