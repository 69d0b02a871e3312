"""Arguments before flags: short names written out, files of settings found, near names offered."""

import sys
import types
from pathlib import Path

import pytest

from starflow_jax.config import UserError
from starflow_jax.io import command_line
from starflow_jax.io.command_line import check_names, with_config, written_out
from tests.small_run import run_here

MODES = {"sample": "sample", "train": "train", "package": "sample"}
FLAGS = {"config", "workdir", "verbosity", "seed"}
START = ["--config=configs/t2v.py"]


@pytest.mark.parametrize("given, written", [
    (["sample", "a b"], ["--mode=sample", "--config.sample.prompt=a b"]),
    (["sample", "--frames", "49", "a b"],
     ["--mode=sample", "--config.sample.frames=49", "--config.sample.prompt=a b"]),
    (["sample", "--stream", "a b"], ["--mode=sample", "--config.sample.stream=true", "--config.sample.prompt=a b"]),
    (["sample", "--stream=false", "--prompt="], ["--mode=sample", "--config.sample.stream=false",
                                                 "--config.sample.prompt="]),
    (["train", "--steps=3", "--mesh.fsdp=4", "--config.data.size=32"],
     ["--mode=train", "--config.train.steps=3", "--config.mesh.fsdp=4", "--config.data.size=32"]),
    (["train", "--workdir", "runs/a b", "--verbosity=1"],
     ["--mode=train", "--workdir=runs/a b", "--verbosity=1"]),
    (["train", "--seed=3"], ["--mode=train", "--config.train.seed=3"]),  # a setting comes before a flag
    (["train", "--config=mine.py"], ["--mode=train", "--config=mine.py"]),
    (["sample", "--help"], ["--mode=sample", "--help"]),
])
def test_short_names_are_written_out(given: list[str], written: list[str]) -> None:
    assert written_out(given, MODES, FLAGS) == START + written


def test_without_a_mode_there_is_help() -> None:
    assert written_out([], MODES, FLAGS) == written_out(["--help"], MODES, FLAGS) == ["--help"]
    assert written_out(["--help=sample"], MODES, FLAGS) == ["--help=sample"]


@pytest.mark.parametrize("given, words", [
    (["fly"], "fly: no such mode; there are sample, train, package"),
    (["sample", "a seven", "moves left"], "moves left: a second prompt; "),
    (["train", "a prompt"], "a prompt: only `starflow sample` takes a prompt"),
    (["sample", "--steps=3"], "sample.steps: no such setting; did you mean "),
    (["sample", "--train.stepz=3"], "train.stepz: no such setting; did you mean train.steps?"),
])
def test_errors_of_short_names(given: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        written_out(given, MODES, FLAGS)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("argument", ["--config.sample.frames=3", "--config.sample.stream", "--noconfig.sample.stream",
                                      "-config.name=x", "--workdir=--config.x", "--config=configs/t2v.py"])
def test_known_names_pass(argument: str) -> None:
    check_names([argument])


@pytest.mark.parametrize("argument, words", [
    ("--config.sample.framse=3", "did you mean sample.frames"),
    ("--noconfig.sample.steam", "did you mean sample.stream"),
    ("--config.mesh=3", "mesh: is a section of settings; it has data, fsdp, tensor, sequence")])
def test_unknown_names_do_not(argument: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_names([argument])


def test_a_config_is_found_here_or_in_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = str(command_line.CONFIGS / "t2v.py")
    assert with_config(["--mode=plan", "--config=configs/t2v.py:3b"]) == [f"--config={packaged}:3b", "--mode=plan"]
    assert with_config(["--mode=plan"]) == ["--mode=plan"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "t2v.py").write_text("")
    assert with_config(["--config", "configs/t2v.py"]) == ["--config=configs/t2v.py"]
    assert with_config(["--config=none.py", "--config=configs/t2v.py"]) == ["--config=configs/t2v.py"]  # the last one
    for missing in ("configs/none.py", "none.py", "elsewhere/t2v.py"):
        with pytest.raises(UserError) as error:
            with_config([f"--config={missing}"])
        assert f"no file {missing}" in str(error.value)
        assert "configs/t2i.py, configs/t2v.py, configs/ti2v.py" in str(error.value)


def test_configs_anywhere_can_build_on_those_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not (Path(path) / "configs").is_dir()])
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "beside.py").write_text("number = 3")
    with_config(["--config=mine.py"])
    scope: dict[str, types.ModuleType] = {}
    exec("from configs import beside, t2v", scope)
    assert scope["beside"].number == 3
    assert scope["t2v"].tiny().name == "tiny"
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("built, words", [
    ("Sample(block_size=4)", "sample.block_size: this setting has another name now: sample.solver.block_size"),
    ("Model(parted_attention='ring')", "model.parted_attention: this setting has another name now: "),
    ("Solver(kinds='jacobi')", "sample.solver.kinds: no such setting; did you mean sample.solver.kind?"),
    ("Config(nam='x')", "nam: no such setting; "),
    ("Sample() + 1", "--config: the config can't be used: TypeError: unsupported operand"),
])
def test_a_file_of_settings_with_a_mistake(built: str, words: str, tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text(f"from starflow_jax.config import *\ndef get_config():\n    return {built}\n")
    code, _, err = run_here([f"--config={config}"])
    assert code == 2 and len(err.splitlines()) == 1
    assert err.startswith(f"starflow_jax: {words}"), err
