"""Two flipped bits in any file of the package or of a workdir: one line when it is read, and never another video."""

import shutil
from pathlib import Path

import pytest

from starflow_jax.checkpoints.licences import KEPT
from starflow_jax.config import UserError
from starflow_jax.data.digits import scene
from starflow_jax.io.checksums import CHECKSUMS, read_checksums
from starflow_jax.model.own_settings import PRETRAINED, own_settings, settings_of
from starflow_jax.model.store import load_model
from tests.helpers import flipped_bits


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "package"
    shutil.copytree(PRETRAINED, folder)
    for module in ("own_settings", "store"):
        monkeypatch.setattr(f"starflow_jax.model.{module}.PRETRAINED", folder)
    return folder


@pytest.mark.parametrize("name", sorted({path.name for path in PRETRAINED.iterdir()} - {CHECKSUMS, KEPT}))
def test_of_the_package(package: Path, tmp_path: Path, name: str) -> None:
    config = settings_of(package)
    with flipped_bits(package / name) as path:
        with pytest.raises(UserError, match=f"{path}: is damaged, it has another checksum") as raised:
            load_model(own_settings(config, tmp_path / "none")[0], tmp_path / "none")
        assert "\n" not in str(raised.value)


def test_all_that_the_package_carries_has_a_checksum() -> None:
    for folder in (PRETRAINED, scene._DIGITS_PNG.parent):
        assert set(read_checksums(folder)) == {path.name for path in folder.iterdir()} - {CHECKSUMS, KEPT}


def test_of_the_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(scene._DIGITS_PNG.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(scene, "_DIGITS_PNG", tmp_path / "digits.png")
    scene._all_scans.cache_clear()
    with flipped_bits(tmp_path / "digits.png") as path, pytest.raises(UserError, match=f"{path}: is damaged"):
        scene._all_scans()


@pytest.mark.parametrize("text", ["[]", "{}", '{"name": "x", "model": []}', '{"model": {"channels": -1}}', "[",
                                  "[" * 10**5])
def test_settings_that_are_none_name_their_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "settings.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path / 'system' / 'settings.json'}: can't be read as settings"):
        settings_of(tmp_path)
