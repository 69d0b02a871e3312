"""launch/colab.ipynb: its commands are valid, and it runs from top to bottom."""

import json
import os
import shutil

import nbclient
import nbformat
import pytest

import starflow_jax as sf
from tests.small_run import ROOT

NOTEBOOK = ROOT / "launch/colab.ipynb"


def notebook() -> dict:
    return json.loads((NOTEBOOK).read_text())


def source(tag: str | None = None) -> list[str]:
    cells = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if tag is None or tag in cell["metadata"].get("tags", [])]


def test_notebook_is_clean_and_its_settings_are_valid(monkeypatch) -> None:
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook()["cells"])
    ran: list[tuple] = []
    monkeypatch.setattr("starflow_jax.modes.run", lambda *arguments: ran.append(arguments))
    scope: dict = {"sf": sf}
    parameters, = source("parameters")
    exec(parameters, scope)
    for cell in source():
        if cell.startswith("sf.run("):
            exec(cell.splitlines()[0], scope)
    assert [mode for mode, _, _ in ran] == ["train", "plan"]
    assert ran[0][1].train.steps == 60 and ran[0][1].data.train_clips == 4000
    assert ran[1][1].plan.topology == "v5e:2x2"


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch) -> None:
    """In a Jupyter kernel, with a small training; four videos are shown, and the sheet of samples."""
    # Counts as installed, so that no test run installs anything.
    (tmp_path / "site/starflow_jax-0.dist-info").mkdir(parents=True)
    (tmp_path / "site/starflow_jax-0.dist-info/METADATA").write_text("Name: starflow_jax\nVersion: 0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/site", prepend=os.pathsep)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    book = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(book)
    copy = tmp_path / "checkout"  # so that nothing is written into this one
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "tests"))
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    training = {"train": {"steps": 8, "batch_size": 4, "image_batch_size": 8, "validation_clips": 8, "log_every": 1},
                "data": {"train_clips": 200, "validation_clips": 20, "directory": f"{tmp_path}/data"}}
    parameters.source += f"\nFRAMES = 17\nTRAINING = {training!r}\n"
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(copy)}}).execute()
    data = [output.data for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
            if output.output_type in ("display_data", "execute_result")]
    assert sum("<video" in item.get("text/html", "") for item in data) == 4
    assert sum("image/png" in item for item in data) == 1
