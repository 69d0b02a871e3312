"""The command line: bad input is one line that names it, exit code 2, no traceback; --help lists every setting."""

import errno
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from starflow_jax import main
from starflow_jax.config import Config, UserError
from starflow_jax.settings.listing import describe, sections
from tests.small_run import interruptible, run, run_here

T2V = "--config=configs/t2v.py"
SAMPLE = [T2V, "--mode=sample"]
EVALUATE = [T2V, "--mode=evaluate", "--config.evaluate.task=video"]
CASES = {
    "no config": ([], "--config=configs/t2v.py"),
    "unknown field": ([T2V, "--config.model.no_such_field=1"], "no_such_field"),
    "mistyped field": ([T2V, "--config.sample.guidence=1"], "did you mean sample.guidance"),
    "renamed field": ([T2V, "--config.model.parted_attention=ring"], "model.sequence_parallel=ulysses"),
    "renamed variant": ([T2V + ":box"], ":tiny_gpu"),
    "section": ([T2V, "--config.mesh=4"], "mesh: is a section"),
    "bad value": ([T2V, "--config.train.batch_size=-3"], "train.batch_size=-3"),
    "wrong type": ([T2V, "--config.train.batch_size=many"], "train.batch_size=many: must be a whole number"),
    "unknown flag": ([T2V, "--worksdir=x"], "worksdir"),
    "unknown mode": ([T2V, "--mode=fly"], "fly"),
    "unknown topic": (["--help=fly"], "fly"),
    "unknown variant": (["--config=configs/t2v.py:9000b"], "9000b"),
    "missing config": (["--config=configs/nothing.py"], "configs/t2i.py, configs/t2v.py, configs/ti2v.py"),
    "missing prompts": ([*SAMPLE, "--config.sample.prompts_file=no_such_prompts.txt"], "no_such_prompts.txt"),
    "missing image": ([*SAMPLE, "--config.sample.prompt=x", "--config.sample.image=none.png"], "none.png"),
    "no prompt": (SAMPLE, "sample.prompt"),
    "blank prompt": ([*SAMPLE, "--config.sample.prompt=\n\n "], "there is no prompt"),
    "prompt of other bytes": ([*SAMPLE, "--config.sample.prompt=\udcff"],
                              "sample.prompt='\\udcff': must be text in UTF-8, without NUL"),
    "changes": ([*SAMPLE, "--config.sample.prompt=x", "--config.sample.changes=²: x"], "sample.changes='²: x'"),
    "aspect ratio": ([*SAMPLE, "--config.sample.prompt=x", f"--config.sample.aspect_ratio={'1' * 5_000}:1"],
                     "W:H, such as 16:9"),
    "rewriter": ([*SAMPLE, "--config.sample.prompt=x", "--config.sample.rewrite= "], "names no command"),
    "no config at all": (["--config="], "configs/t2v.py"),
    "folder": (["--config=configs"], "configs/t2v.py"),
    "length": ([*SAMPLE, "--config.sample.prompt=x", "--config.sample.frames=12"], "sample.frames=12"),
    "no checkpoint": ([T2V + ":7b", "--mode=sample", "--config.sample.prompt=x", "--workdir={tmp}/none"],
                      "--config.convert.source=FILE_OR_DIR"),
    "missing video": ([*EVALUATE, "--config.evaluate.video=no.mp4", "--config.evaluate.caption=x"], "no.mp4"),
    "no caption": ([*EVALUATE, "--config.evaluate.video=no.mp4"], "evaluate.caption"),
    "stray argument": ([T2V, "train"], "train"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    arguments, named = CASES[name]
    code, out, err = run_here([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    assert code == 2 and out == "", (out, err)
    assert len(err.splitlines()) == 1 and err.startswith("starflow_jax: ") and named in err, err


CONFIGS = {
    "def get_config(: pass": "config.py, line 1: ",
    "raise ValueError('a line\\nand another')": "and another",
    "import sys; sys.exit(3)": "sys.exit",
    "def get_config(): return 5": "get_config must return settings",
    "def get_config(): raise ValueError('not today')": "not today",
}


@pytest.mark.parametrize("program", CONFIGS)
@pytest.mark.parametrize("setting", ["--config.sample.prompt=x", "--mode=sample"])
def test_a_config_that_is_none_is_one_line(program: str, setting: str, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(program)
    code, out, err = run_here([f"--config={tmp_path / 'config.py'}", setting])
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and CONFIGS[program] in err, err


@pytest.mark.parametrize("distributed", ["127.0.0.1:4567,²,0", ":,1,0", ":4567,1,0", "h:0,1,0", "h:65536,1,0",
                                         "h:1,2,2", "h:1,0,0", "h:1,2", "h,2,1", "h:1,2,-1",
                                         f"h:1,{'9' * 5_000},0"])
def test_other_processes_are_named_as_they_can_be_reached(distributed: str) -> None:
    with pytest.raises(UserError, match="must be true or HOST:PORT,COUNT,INDEX"):
        main.coordinator(distributed)
    assert main.coordinator("[::1]:4567,2,1") == dict(coordinator_address="[::1]:4567", num_processes=2, process_id=1)


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
@pytest.mark.parametrize("where", ["file", "file/below", "/proc/starflow", "x" * 5_000, "a/" * 3_000])
def test_a_workdir_that_cannot_be_written_is_found_at_once(mode: str, where: str, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(f"starflow_jax.modes.{mode}.{mode}", lambda *_: pytest.fail("it began"))
    code, out, err = run_here([T2V, f"--mode={mode}", f"--workdir={tmp_path / where}", "--config.sample.prompt=x"])
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and len(err) < 500, err
    assert err.startswith("starflow_jax: --workdir=/") and "can't be written to (" in err


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EROFS, errno.EEXIST, errno.ELOOP])
def test_what_storage_refuses_is_one_line(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(error, os.strerror(error), "/data/run/x.mp4")

    monkeypatch.setattr(main.modes, "run", full)
    code, out, err = run_here([*SAMPLE, "--config.sample.prompt=x", f"--workdir={tmp_path}"])
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"starflow_jax: /data/run/x.mp4: {os.strerror(error).lower()}; ")


def test_a_process_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = run(tmp_path / "work", tmp_path, "--config.train.batch_size=-3")
    assert result.returncode == 2
    assert result.stderr == "starflow_jax: train.batch_size=-3: must be greater than 0, at most 1000000\n"


ALLOCATOR_OF_A_MODE = """
import sys
from starflow_jax import main, modes
from starflow_jax.io import memory

memory._set_allocator = lambda values: print("set, JAX there:", "jax" in sys.modules)
modes.run = lambda mode, config, workdir: print("runs", mode)
main.run()
"""


@pytest.mark.parametrize("mode, keeps", [("train", True), ("benchmark", True), ("sample", False)])
def test_training_and_benchmarks_keep_freed_memory_from_before_jax_is_imported(
    mode: str, keeps: bool, tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATOR_OF_A_MODE, "--config=configs/t2v.py", f"--mode={mode}",
         f"--workdir={tmp_path}", "--config.sample.prompt=a red seven moves left"],
        capture_output=True, text=True, check=True, env={**kept, "JAX_PLATFORMS": "cpu"})
    assert done.stdout.splitlines() == ["set, JAX there: False"] * keeps + [f"runs {mode}"]


def test_every_mode_is_a_function_of_its_name() -> None:
    """And lists sections that exist."""
    tops = {name for name, _ in sections(Config)}
    for mode, (_, listed) in main.MODES.items():
        assert callable(getattr(importlib.import_module(f"starflow_jax.modes.{mode}"), mode))
        assert set(listed) <= tops


def test_help_lists_every_setting_mode_and_option() -> None:
    code, out, err = run_here(["--help"])
    assert (code, err) == (0, "")
    names = {line.split("=")[0].strip() for line in out.splitlines() if line.startswith("  ") and "=" in line}
    assert {one.name.rpartition(".")[2] for one in describe(Config)} <= names
    assert all(f"\n  {mode} " in out for mode in main.MODES)
    assert all(f"\n  --{option} " in out for option in ("config", "workdir", "mode", "distributed"))


def test_help_of_a_mode_shows_its_sections_with_the_values_of_the_config() -> None:
    _, defaults, _ = run_here(["--mode=sample", "--help"])
    assert "\nsample: " in defaults and "\ntrain: " not in defaults and "\n  guidance=2.5 " in defaults
    _, same, _ = run_here(["--help=sample"])
    assert same == defaults
    _, paper, _ = run_here([T2V + ":7b", "--mode=sample", "--help"])
    assert "\n  guidance=3.5 " in paper and "the values of 7b" in paper
    _, mesh, _ = run_here(["--help=mesh"])
    assert "\nmesh: " in mesh and "\nsample: " not in mesh


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`starflow` with arguments: what it runs, and what it says."""
    def call(*arguments: str) -> tuple[list[str], int, str]:
        ran: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["starflow", *arguments])
            patch.setattr(main, "run", lambda: ran.extend(main.sys.argv[1:]))
            try:
                main.starflow()
                code = 0
            except SystemExit as ended:
                code = int(ended.code or 0)
        return ran, code, capsys.readouterr().err
    return call


def test_the_console_script_runs_the_module_and_says_its_errors(short) -> None:
    ran, code, _ = short("sample", "a blue three moves right", "--frames=49")
    assert code == 0
    assert ran == [T2V, "--mode=sample", "--config.sample.prompt=a blue three moves right", "--config.sample.frames=49"]
    ran, code, err = short("sample", "--framse=49")
    assert (ran, code) == ([], 2)
    assert err == "starflow_jax: sample.framse: no such setting; did you mean sample.frames?\n"


def test_ctrl_c_in_a_callback_which_cannot_pass_it_on_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", main._unless_too_late)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        Interrupted()
        time.sleep(10)
