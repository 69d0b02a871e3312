"""launch/colab.ipynb and colab_released.ipynb: their settings are valid, and they run from top to bottom."""

import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import nbclient
import nbformat
import pytest

import starflow_jax as sf
from starflow_jax.io.hub import on_disk
from starflow_jax.io.pictures import webp_bytes
from starflow_jax.io.video import read_video
from starflow_jax.sampling.mesh import sampling_mesh
from tests.hub_server import serving
from tests.make_release import make_release
from tests.small_model import CAPTIONS, CONFIG, SETTINGS, small_system
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


def test_it_opens_in_colab_on_a_tpu() -> None:
    """Where a repository is named, the badge opens the notebook there."""
    book, scope = notebook(NOTEBOOK), dict[str, Any]()
    exec(*source("parameters"), scope)
    badge, = re.findall(r"svg\)\]\(([^)\s]+)\)", "".join(book["cells"][0]["source"]))
    _, _, repository = scope["REPOSITORY"].removesuffix(".git").partition("github.com/")
    assert badge == "https://colab.research.google.com/github" + (
        f"/{repository}/blob/main/launch/colab.ipynb" if repository else "")
    assert book["metadata"]["accelerator"] == "TPU" and book["metadata"]["colab"]["gpuType"] == "V5E1"


def install(repository: str = "") -> None:
    cell, = (cell for cell in source() if cell.startswith("import importlib"))
    exec(cell, {"REPOSITORY": repository})


def test_it_finds_the_package(tmp_path, monkeypatch) -> None:
    """In the checkout around it, in a wheel beside it, or in the repository that is named."""
    ran: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"upload a starflow_jax-\*\.whl, or set REPOSITORY"):
        install()
    wheel = tmp_path / "starflow_jax-0.1.0-py3-none-any.whl"
    wheel.touch()
    install("https://example.com/repository")
    assert ran == [[*pip, f"{wheel}[tpu,notebook]"]] and Path.cwd() == tmp_path
    wheel.unlink()
    (tmp_path / "starflow_jax").mkdir()
    install("https://example.com/repository")
    clone = ["git", "clone", "--quiet", "--depth=1", "https://example.com/repository", f"{tmp_path}/starflow_jax"]
    assert ran[1:] == [clone, [*pip, "--editable", ".[tpu,notebook]"]] and Path.cwd() == tmp_path / "starflow_jax"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.chdir(ROOT / "launch")
    install()
    assert ran[3:] == [[*pip, "--editable", ".[tpu]"]] and Path.cwd() == ROOT


def test_its_widgets_play_a_session_and_steer_it(params) -> None:
    """Each tick of the clock shows a latent frame; what is typed meanwhile holds from the next one on."""
    pytest.importorskip("ipywidgets", reason="the extra notebook is not installed")
    config = dataclasses.replace(CONFIG, sample=dataclasses.replace(SETTINGS, batch_size=1))
    mesh = sampling_mesh(config, 1, jax.local_devices()[:1])
    model = sf.Model(small_system(config), params, "small", "0123", mesh)
    scope: dict[str, Any] = {"sf": sf, "model": model, "video": SimpleNamespace(fps=8)}
    cell, = source("steer")
    exec(cell.replace("a blue three moves right", CAPTIONS[0]), scope)
    session, clock, prompt = scope["session"], scope["clock"], scope["prompt"]
    assert clock.interval == 500  # milliseconds
    alone = [webp_bytes(frames, 8, scale=8) for frames, _ in zip(model.stream(CAPTIONS[0], seed=0), range(6))]
    shown = []

    def tick(count: int) -> None:
        for _ in range(count):
            clock.value += 1
            shown.append(bytes(scope["screen"].value))

    tick(2)
    assert scope["said"].value == "5 frames"
    holds = session.next_frame
    prompt.value = CAPTIONS[1]
    assert scope["said"].value == f"From frame {holds} on: {CAPTIONS[1]}"
    tick(4)
    part = (holds + 3) // 4  # the first one by itself, then four frames each
    # The one before it is denoised in sight of it.
    assert shown[:part - 1] == alone[:part - 1] and shown[part] != alone[part]
    assert list(session.record.changes.values()) == [{"prompt": CAPTIONS[1]}]


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
    """In a Jupyter kernel, with a small training; four videos are shown, and the sheet of samples. Its widgets are used
    as a page uses them: a blue digit is seen, then a red one."""
    pytest.importorskip("ipywidgets", reason="the extra notebook is not installed")
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
    steer = next(place for place, cell in enumerate(book.cells) if "steer" in cell.metadata.get("tags", []))
    book.cells.insert(steer + 1, nbformat.v4.new_code_cell('session.save("steered.mp4")'))
    client = nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(copy)}})

    def use_widgets(cell: Any, cell_index: int, **_: Any) -> None:
        if cell_index != steer:
            return
        assert client.kc is not None
        names = {state["_model_name"]: name for name, state in client.widget_state.items()}
        for widget, value in [*(("PlayModel", tick) for tick in range(1, 6)), ("TextModel", "a red seven moves left"),
                              *(("PlayModel", tick) for tick in range(6, 18))]:
            update = {"method": "update", "state": {"value": value}, "buffer_paths": []}
            client.kc.shell_channel.send(client.kc.session.msg("comm_msg", {"comm_id": names[widget], "data": update}))

    client.on_cell_executed = use_widgets
    client.execute()
    frames, _ = read_video(copy / "steered.mp4")
    red, _, blue = frames.astype(int).sum(axis=(1, 2)).T
    assert len(frames) == 1 + 4 * 16 and (blue > 2 * red)[:16].all() and (red > 2 * blue)[-12:].all()
    data = [output.data for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
            if output.output_type in ("display_data", "execute_result")]
    assert sum("<video" in item.get("text/html", "") for item in data) == 4
    assert sum("image/png" in item for item in data) == 1
