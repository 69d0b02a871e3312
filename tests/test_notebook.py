"""launch/colab.ipynb: its commands are valid, and it runs from top to bottom."""

import importlib
import json
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
    for mode, *flags in ran:
        if mode.removeprefix("--mode=") not in modes():
            continue  # the plan, until it exists
        code = ("import sys; from starflow_jax import main; main.parse_flags(sys.argv); "
                "main.from_config_dict(main.CONFIG.value)")
        words = [sys.executable, "-c", code, "--config=configs/t2v.py", mode, *flags]
        result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path) -> None:
    """In a Jupyter kernel, with a small training; and the model in the package makes both videos."""
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
    assert sorted(path.name for path in (copy / "runs").iterdir())[:3] == [
        "notebook_box", "notebook_stream", "notebook_training"] or "plan" in modes()
