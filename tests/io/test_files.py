"""Files and folders appear whole or not at all, also where several processes make the same."""

import os

import pytest

from starflow_jax.io.files import atomic_path, size_in_words, write_text


def test_nothing_is_there_before_all_of_it_is(tmp_path):
    path = tmp_path / "deep" / "model.safetensors"
    with atomic_path(path) as local:
        assert local.name == path.name  # writers choose a format by it
        local.write_bytes(b"half")
        assert not path.exists()
        local.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and os.listdir(path.parent) == [path.name]


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    write_text(tmp_path / "facts.json", "old")
    for path in (tmp_path / "facts.json", tmp_path / "other.json"):
        with pytest.raises(RuntimeError), atomic_path(path) as local:
            local.write_text("half")
            raise RuntimeError
    assert (tmp_path / "facts.json").read_text() == "old" and os.listdir(tmp_path) == ["facts.json"]
    write_text(tmp_path / "facts.json", "new")
    assert (tmp_path / "facts.json").read_text() == "new" and os.listdir(tmp_path) == ["facts.json"]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_another_process_made_is_kept(tmp_path, folder, when):
    def write(path, text):
        if folder:
            path.mkdir()
        (path / "summary" if folder else path).write_text(text)

    path = tmp_path / "part"
    if when == "before":
        write(path, "theirs")
    with atomic_path(path, keep=True) as local:
        write(local, "ours")
        if when == "meanwhile":
            write(path, "theirs")
    assert (path / "summary" if folder else path).read_text() == "theirs" and os.listdir(tmp_path) == ["part"]


@pytest.mark.parametrize("count, words", [(0, "0 bytes"), (999, "999 bytes"), (1_000, "1.0 kB"), (3_240_000, "3.2 MB"),
                                          (7 * 10**9, "7.0 GB"), (12_345 * 10**12, "12,345.0 TB")])
def test_sizes_have_the_unit_that_suits_them(count, words):
    assert size_in_words(count) == words
