"""launch/colab.ipynb and colab_released.ipynb: their settings are valid, and they run from top to bottom."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

import starflow_jax as sf
from starflow_jax.io.hub import on_disk
from starflow_jax.io.video import read_video
from tests.hub_server import serving
from tests.make_release import make_release
from tests.small_run import ROOT

NOTEBOOK, RELEASED = ROOT / "launch/colab.ipynb", ROOT / "launch/colab_released.ipynb"


def notebook(path: Path) -> dict:
    return json.loads(path.read_text())


def source(tag: str | None = None, path: Path = NOTEBOOK) -> list[str]:
    cells = [cell for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if tag is None or tag in cell["metadata"].get("tags", [])]


@pytest.mark.parametrize("path", [NOTEBOOK, RELEASED], ids=lambda path: path.stem)
def test_notebook_is_clean(path: Path) -> None:
    cells = notebook(path)["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)


def test_its_settings_are_valid(monkeypatch) -> None:
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


def run_released(**parameters: Any) -> dict[str, Any]:
    """What the cells but for the installation define, with some of the parameters changed."""
    given, = source("parameters", RELEASED)
    scope: dict[str, Any] = {"Path": Path}
    for cell in source(path=RELEASED):
        if not cell.startswith("import importlib"):
            exec(cell, scope)
        if cell == given:
            scope |= parameters
    return scope


def test_the_released_one_converts_files_of_a_hub(monkeypatch, tmp_path) -> None:
    """Their names can be read, and asked for where huggingface_hub is."""
    with pytest.raises(RuntimeError, match="FLOW, above, must name"):
        run_released(WORKDIR=str(tmp_path))
    ran: list[tuple] = []
    monkeypatch.setattr("starflow_jax.modes.run", lambda *arguments: ran.append(arguments))
    with pytest.raises(sf.UserError, match="holds no trained model"):
        run_released(FLOW="hub:owner/flow:flow.pth", WORKDIR=str(tmp_path))
    (mode, config, _), = ran
    assert mode == "convert" and config.model.deep_width == 4096 and config.convert.source == "hub:owner/flow:flow.pth"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("source", "codec", "statistics", "text"):
        with pytest.raises(sf.UserError, match="names on a hub need huggingface_hub"):
            on_disk(getattr(config.convert, name), name)


@pytest.mark.slow
def test_the_released_one_runs_with_a_small_release_on_a_hub(tmp_path, monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    make_release(tmp_path / "made", "tiny")
    read = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir() if path.is_file()}
    repositories = {
        "owner/flow": {"flow.pth": read["starflow-v.pth"]},
        "Wan-AI/Wan2.2-TI2V-5B": {"Wan2.2_VAE.pth": read["Wan2.2_VAE.pth"]},
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers": {"vae/config.json": read["vae.json"]},
        "google/flan-t5-xl": {path.name: path.read_bytes() for path in (tmp_path / "made/flan-t5-xl").iterdir()}}
    download = huggingface_hub.snapshot_download
    with serving(repositories) as (address, _):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: download(
            name, endpoint=address, cache_dir=tmp_path / "cache", token=False, **how))
        scope = run_released(FLOW="hub:owner/flow:flow.pth", WORKDIR=f"{tmp_path}/workdir",
                             CONFIG=f"configs/released.py:{tmp_path}/made/starflow-v.yaml")
    assert scope["model"].config.sample.weights == "int8" and scope["video"].frames.shape == (5, 64, 64, 3)
    assert len(read_video(tmp_path / "workdir/sample.mp4")[0]) == 5


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
