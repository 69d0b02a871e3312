"""Checksums of a folder's files: damage is found when they are read, and what has none is read."""

import json
import os
from pathlib import Path

import pytest

from starflow_jax.config import UserError
from starflow_jax.io.checksums import CHECKSUMS, check_file, checksum, checksums_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with checksums_of(tmp_path, ["a", "b", "missing"]):
        for name in "ab":
            (tmp_path / name).write_text(name * 10)
    return tmp_path


def test_what_has_changed_is_named_with_what_to_do(folder: Path) -> None:
    check_file(folder / "a")
    check_file(folder / "of no entry")
    status = os.stat(folder / "a")
    (folder / "a").write_text("b" * 10)
    os.utime(folder / "a", ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # of the same size, within a clock's tick
    with pytest.raises(UserError, match=f"{folder / 'a'}: is damaged.*restore it from a copy.*delete"):
        check_file(folder / "a")
    check_file(folder / "b")
    (folder / CHECKSUMS).unlink()  # as in a folder from before there were any
    check_file(folder / "a")


def test_what_is_written_again_has_another_and_what_is_deleted_none(folder: Path) -> None:
    with checksums_of(folder, ["a", "b"]):
        (folder / "a").write_text("anew")
        (folder / "b").unlink()
    check_file(folder / "a")
    assert json.loads((folder / CHECKSUMS).read_text()) == {"a": checksum(folder / "a")}


def test_a_run_that_is_killed_leaves_files_that_are_read(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), checksums_of(folder, ["a"]):
        (folder / "a").write_text("anew")
        raise KeyboardInterrupt
    check_file(folder / "a")
    assert set(json.loads((folder / CHECKSUMS).read_text())) == {"b"}


@pytest.mark.parametrize("text", ["[]", "null", "{", "", '{"a": "1"}', '{"a": true}', "[" * 100_000, "\udc80"])
def test_checksums_that_are_none_are_one_line(folder: Path, text: str) -> None:
    (folder / CHECKSUMS).write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=f"{CHECKSUMS}: .*restore that folder from a copy"):
        check_file(folder / "a")
