"""README and manual: every block of shell and Python runs, in the order of its page.

A comment before a block says what it needs: pytest.mark.slow is minutes; pytest.mark.skip names what no test has, a
GPU, a cloud, a download. The commands of every block, these too, are valid to the parsers that will read them.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from pytest_codeblocks.main import CodeBlock, extract_from_file

from docs.layout import PICTURE, layout
from tests.docs.checkout import Checkout, wrong_commands
from tests.small_run import ROOT

PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/pages/*.md"))]}
BLOCKS = {name: extract_from_file(path) for name, path in PAGES.items()}


def marks(block: CodeBlock) -> list[pytest.MarkDecorator]:
    return [eval(mark, {"pytest": pytest}) for mark in block.marks]


def mark_names(block: CodeBlock) -> set[str]:
    return {mark.name for mark in marks(block)}


class Page:
    """The blocks of a page that have run, what Python ones defined, and where they wrote."""

    def __init__(self, name: str, folder: Path, cache: Path):
        self.blocks, self.cache, self.done = BLOCKS[name], cache, set[int]()
        self.checkout, self.scope = Checkout(folder), dict[str, Any]()

    def run(self, block: CodeBlock) -> None:
        """Run the block behind those before it that it may build on: all for a slow one, else the quick ones."""
        allowed = {"slow"} if "slow" in mark_names(block) else set()
        for one in self.blocks:
            if one.lineno <= block.lineno and one.lineno not in self.done and mark_names(one) <= allowed:
                self._run_one(one)
                self.done.add(one.lineno)

    def _run_one(self, block: CodeBlock) -> None:
        if block.syntax == "bash":
            self.checkout.run(block.code, self.cache, quick="slow" not in mark_names(block))
        elif block.syntax == "python":
            exec(compile(block.code, f"block at line {block.lineno}", "exec"), self.scope)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Page]:
    """Pages by name, made when first asked for."""
    class Pages(dict[str, Page]):
        def __missing__(self, name: str) -> Page:
            self[name] = Page(name, tmp_path_factory.mktemp("page"), tmp_path_factory.getbasetemp() / "cache")
            return self[name]

    return Pages()


@pytest.mark.parametrize("name, block", [
    pytest.param(name, block, marks=marks(block), id=f"{name}:{block.lineno}")
    for name, blocks in BLOCKS.items() for block in blocks if block.syntax in ("bash", "python")])
def test_block_runs(name: str, block: CodeBlock, pages, monkeypatch) -> None:
    page = pages[name]
    monkeypatch.chdir(page.checkout.folder)
    page.run(block)


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if any(b.syntax == "bash" for b in blocks)])
def test_commands_are_valid(name: str, tmp_path) -> None:
    checkout = Checkout(tmp_path)
    commands = [command for block in BLOCKS[name] if block.syntax == "bash"
                for command in checkout.rehearse(block.code)]
    assert len(commands) >= sum(block.code.count("-m starflow_jax.main") for block in BLOCKS[name])
    assert wrong_commands(commands) == ""


@pytest.mark.parametrize("code, words", [
    ('.venv/bin/python -m starflow_jax.main --config=configs/t2v.py --config.sample.colour="a red seven"',
     ["main", "--config=configs/t2v.py", "--config.sample.colour=a red seven"]),
    ('.venv/bin/starflow sample "a red seven" --colour=red', ["starflow", "sample", "a red seven", "--colour=red"])])
def test_an_invalid_command_is_found(code: str, words: list[str], tmp_path) -> None:
    commands = Checkout(tmp_path).rehearse(code)
    assert commands == [words]
    assert "colour" in wrong_commands(commands)


@pytest.mark.parametrize("code", [
    ".venv/bin/pip install --colour=red jax", ".venv/bin/pip install -r nothing.txt", "echo 'unfinished",
    "bash launch/tpu_vm.sh create --name=flow --colour=red", "uv run launch/xmanager.py --colour=red",
    "no-such-program"])
def test_what_other_parsers_refuse_is_found(code: str, tmp_path) -> None:
    with pytest.raises(AssertionError):
        Checkout(tmp_path).rehearse(code)


@pytest.mark.parametrize("name", PAGES)
def test_blocks_name_their_language(name: str) -> None:
    assert all(block.syntax in ("bash", "python", "bibtex") for block in BLOCKS[name])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    text = PAGES[name].read_text()
    targets = [target.split("#")[0] for target in re.findall(r'(?:\]\(|src=")([^)"\s]+)', text) if "://" not in target]
    missing = [target for target in targets if target and not (PAGES[name].parent / target).exists()]
    assert set(missing) <= {"settings.md", "release_keys.md"}  # made by docs/hooks.py


def test_extras_exist() -> None:
    """What pages say to install as .[EXTRA] is in setup.cfg."""
    extras = set(re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().split("[options.extras_require]")[1], re.M))
    named = {extra for path in PAGES.values() for extra in re.findall(r"\.\[(\w+)\]", path.read_text())}
    assert named and named <= extras


def test_ci_runs_the_command_of_the_front_page() -> None:
    command, = re.findall(r'python -m (pytest .*"not slow")', PAGES["README.md"].read_text())
    assert command in (ROOT / ".ci/run").read_text()


def test_picture_of_the_rooms_is_up_to_date() -> None:
    """Made anew by python -m docs.layout."""
    assert layout() == PICTURE.read_text()
