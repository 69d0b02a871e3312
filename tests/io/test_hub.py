"""Names on a model hub, by a small server that speaks the hub's file API."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from starflow_jax.config import UserError
from starflow_jax.io.hub import on_disk
from tests.hub_server import serving

FILES: dict[str, dict[str, bytes]] = {
    "someone/flow": {"flow.pth": b"weights", "LICENSE": b"a licence", "video.mp4": b"large", "sub/other.pth": b"x"},
    "someone/two": {"a.pth": b"a", "b.pth": b"b"},
    "google/t5": {"config.json": b"{}", "spiece.model": b"s", "model.safetensors": b"t"},
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of files that the hub was asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    snapshot_download = huggingface_hub.snapshot_download
    with serving(FILES) as (address, files):
        # The package has read HF_ENDPOINT when it was imported.
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: snapshot_download(
            name, endpoint=address, cache_dir=tmp_path / "cache", token=False, **how))
        yield files


def test_a_file_with_what_lies_beside_it(asked: list[str]) -> None:
    path = Path(on_disk("hub:someone/flow", "convert.source"))
    assert path.name == "flow.pth" and path.read_bytes() == b"weights"
    assert path.with_name("LICENSE").read_bytes() == b"a licence"
    assert "video.mp4" not in asked
    assert Path(on_disk("hub:someone/flow:sub/other.pth", "convert.source")).read_bytes() == b"x"


def test_a_folder(asked: list[str]) -> None:
    folder = Path(on_disk("hub:google/t5@main", "convert.text"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "spiece.model", "model.safetensors"}


@pytest.mark.parametrize("name, words", [
    ("hub:someone", "must be hub:OWNER/NAME"), ("hub:someone/none", "can't be downloaded from the hub"),
    ("hub:someone/two", "holds a.pth, b.pth; name one of them after a colon"),
    ("hub:someone/flow:none.pth", "the hub has no such file there"),
])
def test_what_is_not_there_is_one_line(asked: list[str], name: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        on_disk(name, "convert.source")
    assert str(error.value).startswith(f"convert.source={name!r}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"need huggingface_hub; pip install 'starflow_jax\[hub\]'"):
        on_disk("hub:someone/flow", "convert.source")
    assert on_disk("flow.pth", "convert.source") == "flow.pth"
