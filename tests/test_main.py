"""The command line: bad input is one line that names it, exit code 2, no traceback; --help lists every setting."""

import importlib
from pathlib import Path

import pytest

from starflow_jax import main
from starflow_jax.config import Config
from starflow_jax.settings.listing import describe, sections
from tests.small_run import run, run_here

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


def test_a_process_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = run(tmp_path / "work", tmp_path, "--config.train.batch_size=-3")
    assert result.returncode == 2
    assert result.stderr == "starflow_jax: train.batch_size=-3: must be greater than 0, at most 1000000\n"


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
