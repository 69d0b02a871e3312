"""Two flipped bits in any file of the package or of a workdir, and files of another kind or content: one line when it
is read, and never another video."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import starflow_jax as sf
from starflow_jax.checkpoints.licences import KEPT
from starflow_jax.checkpoints.training import Checkpoints
from starflow_jax.config import UserError
from starflow_jax.data.digits import scene
from starflow_jax.io.checksums import CHECKSUMS, read_checksums
from starflow_jax.io.tensor_files import write_safetensors
from starflow_jax.model.codec import FITTED_CODEC, read_codec
from starflow_jax.model.own_settings import PRETRAINED, own_settings, settings_of
from starflow_jax.model.store import load_model
from starflow_jax.model.system import save_system
from starflow_jax.training.metrics import MetricWriter
from tests.helpers import flipped_bits
from tests.small_model import CONFIG, small_system


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


@pytest.mark.parametrize("names", [("mean_P", "basis_PC"), ("mean_P", "basis_PC", "scale", "more"),
                                   ("mean_P", "basis_PC", "scale/deep"), ("x", "y", "z"), ()])
def test_wrong_names_in_a_codecs_file_are_listed(tmp_path: Path, names: tuple[str, ...]) -> None:
    write_safetensors(tmp_path / FITTED_CODEC, {name: np.ones(3, np.float32) for name in names})
    with pytest.raises(UserError, match=f"{FITTED_CODEC} is not of this config's model: (missing|unexpected) "):
        read_codec(CONFIG, tmp_path)


def test_a_codec_in_which_an_array_is_a_group_too_is_refused(tmp_path: Path) -> None:
    names = ("mean_P", "basis_PC", "scale", "scale/a")
    write_safetensors(tmp_path / FITTED_CODEC, {name: np.ones(3) for name in names})
    with pytest.raises(UserError, match="others are a part: scale"):
        read_codec(CONFIG, tmp_path)


@pytest.mark.parametrize("has_settings", [False, True])
def test_a_folder_in_the_place_of_model_json_is_one_line(tmp_path: Path, has_settings: bool) -> None:
    (tmp_path / "checkpoints" / "model.json").mkdir(parents=True)
    if has_settings:
        save_system(small_system(), tmp_path / "system")
        (tmp_path / "checkpoints" / "1" / "state").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints'}") as raised:
        sf.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_training_finds_a_folder_in_the_place_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl is a folder"):
        MetricWriter(tmp_path)
    (tmp_path / "model.json").mkdir()
    with pytest.raises(UserError, match="model.json is damaged .*delete it"):
        Checkpoints(tmp_path, keep=1, model_fingerprint={})
