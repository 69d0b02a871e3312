"""launch/colab.ipynb: its commands are valid, and it runs from top to bottom."""

import importlib
import json
import os
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

from tests.small_run import OVERRIDES, ROOT

NOTEBOOK = ROOT / "launch/colab.ipynb"


def notebook() -> dict:
    return json.loads((NOTEBOOK).read_text())


def source(tag: str | None = None) -> list[str]:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if tag is None or tag in cell["metadata"].get("tags", [])]


def modes() -> tuple[str, ...]:
    return importlib.import_module("starflow_jax.main").MODES


def test_notebook_is_clean_and_its_commands_are_valid() -> None:
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook()["cells"])
    ran: list[list[str]] = []
    scope: dict = {"starflow": lambda *flags: ran.append(list(flags)), "play": lambda folder: None}
    parameters, = source("parameters")
    exec(parameters, scope)
    for cell in source():
        if cell.startswith("starflow("):
            exec(cell.split("\nplay(")[0].split("\ndisplay(")[0].split("\nplan =")[0], scope)
    assert [flags[0] for flags in ran] == ["--mode=sample", "--mode=sample", "--mode=train", "--mode=plan"]
    # In one command line, where the last of a kind wins; the plan's, once that mode exists.
    known = [flag for flags in ran if flags[0].removeprefix("--mode=") in modes() for flag in flags]
    code = ("import sys; from starflow_jax import main; main.parse_flags(sys.argv); "
            "main.from_config_dict(main.CONFIG.value)")
    words = [sys.executable, "-c", code, "--config=configs/t2v.py", *known]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch) -> None:
    """In a Jupyter kernel, with a small training; and the model in the package makes both videos."""
    # Counts as installed, so that no test run installs anything.
    (tmp_path / "site/starflow_jax-0.dist-info").mkdir(parents=True)
    (tmp_path / "site/starflow_jax-0.dist-info/METADATA").write_text("Name: starflow_jax\nVersion: 0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/site", prepend=os.pathsep)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    book = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(book)
    if "plan" not in modes():
        book.cells = [cell for cell in book.cells if "plan" not in cell.metadata.get("tags", [])]
    copy = tmp_path / "checkout"  # so that nothing is written into this one
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tests"))
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nFRAMES = 17\nTRAINING = {[*OVERRIDES, f'data.directory={tmp_path}/data']!r}\n"
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(copy)}}).execute()
    data = [output.data for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
            if output.output_type == "display_data"]
    assert sum("<video" in item.get("text/html", "") for item in data) == 2
    assert sum("image/png" in item for item in data) == 1
