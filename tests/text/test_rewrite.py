"""Prompt rewriting: commands and functions, and what goes wrong with them."""

import sys
from pathlib import Path

import pytest

from starflow_jax.config import UserError
from starflow_jax.text.rewrite import rewriter

PYTHON = f'"{sys.executable}" -c'


def longer(prompt: str) -> str:
    return f" {prompt},\n in great detail "


def nothing(prompt: str) -> str:
    return "" if prompt else "x"


def failing(prompt: str) -> str:
    raise RuntimeError("no model")


def test_a_function_and_a_command_give_one_line() -> None:
    assert rewriter(f"{__name__}:longer")("a cat") == "a cat, in great detail"
    command = rewriter(f'{PYTHON} "import sys; print(sys.stdin.read() + chr(10) + sys.argv[1])" "$HOME; in detail"')
    assert command("a cat") == "a cat $HOME; in detail"  # no shell


@pytest.mark.parametrize(("hook", "told"), [
    (f"{__name__}:nothing", "gave '' for the prompt 'a cat'"),
    (f"{__name__}:failing", "RuntimeError: no model"),
    (f"{__name__}:absent", "no such function"),
    ("no_such_module:rewrite", "no such function"),
    ("sys:exit", r"failed on the prompt 'a cat' \(SystemExit: a cat\)"),
    ("sys:path", r"failed on the prompt 'a cat' \(TypeError: "),
    ('unclosed "quote', "can't be read as a command"),
    (f'{PYTHON} "import sys; sys.exit(\'out of memory\')"', r"ended with code 1 .*\(out of memory\)"),
    (f'{PYTHON} "print()"', "must give text"),
])
def test_failures_are_one_line(hook: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        rewriter(hook)("a cat")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hook", ["no_such_command --long", ":", "/", "a\0b"])
def test_a_program_that_there_is_not_is_found_at_once(hook: str) -> None:
    with pytest.raises(UserError, match="there is no program"):
        rewriter(hook)


@pytest.mark.parametrize("raised", ["sys.exit(3)", "1 / 0", "raise ValueError('of\\nlines')", "[][0]"])
def test_a_module_that_raises_when_it_is_imported_is_one_line(raised: str, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_that_raises.py").write_text(f"import sys\n{raised}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"its module can't be imported \(\w+: .+\)") as error:
        rewriter("module_that_raises:longer")
    assert "\n" not in str(error.value)
