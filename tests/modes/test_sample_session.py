"""--mode=sample with sample.session: a saved session's video, made again."""

import json
from pathlib import Path

import numpy as np
import pytest

import starflow_jax as sf
from starflow_jax.io.video import read_video
from tests.sharded_sampling import write_workdir
from tests.small_model import CAPTIONS
from tests.small_run import run_here


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("session")
    write_workdir(folder / "model")
    with sf.load(folder / "model").stream(CAPTIONS[0], seed=4, guidance=1.0) as session:
        while session.shown < 21:
            next(session)
            session.prompt = CAPTIONS[1]
        session.save(folder / "steered.mp4")
    return folder


def command(workdir: Path, *arguments: str) -> tuple[int, str, str]:
    return run_here(["--config=configs/t2v.py", "--mode=sample", f"--workdir={workdir / 'model'}",
                     f"--config.sample.session={workdir / 'steered.json'}", *arguments])


def test_the_command_makes_its_video_again(workdir: Path, tmp_path: Path) -> None:
    """From the JSON alone, whatever the command's own settings are."""
    path = tmp_path / "again.mp4"
    code, out, error = command(workdir, f"--config.sample.output={path}", "--config.sample.guidance=3")
    assert code == 0 and str(path) in out, out + error
    for ending in (".mp4", ".json"):
        assert path.with_suffix(ending).read_bytes() == (workdir / "steered").with_suffix(ending).read_bytes()
    frames, _ = read_video(path)
    assert len(frames) == 21 and np.ptp(frames) > 50
    changes = json.loads(path.with_suffix(".json").read_text())["changes"]
    assert changes == [{"latent_frame": 3, "frame": 9, "prompt": CAPTIONS[1]}]


@pytest.mark.parametrize("output", ["file", "file/below", "/proc/starflow", f"{'x' * 300}.mp4"])
def test_an_output_that_cannot_be_written_is_found_before_the_model_is_loaded(
    output: str, workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("starflow_jax.modes.sample.load_model", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    code, _, error = command(workdir, f"--config.sample.output={tmp_path / output}")
    said = error.strip().splitlines()
    assert code == 2 and len(said) == 1 and said[0].startswith("starflow_jax: sample.output=/"), error
    assert ": can't be written to (" in said[0]


def test_what_cannot_be_is_one_line(workdir: Path, tmp_path: Path) -> None:
    before = (workdir / "steered.mp4").read_bytes()
    for arguments, words in (([f"--config.sample.output={workdir}"], "steered.mp4: is there already"),
                             (["--config.sample.prompt=a"], "has its own prompts"),
                             ([f"--config.sample.session={tmp_path / 'none.json'}"], "can't be read")):
        code, _, error = command(workdir, *arguments)
        assert code == 2 and words in error.strip().splitlines()[-1], error
    assert (workdir / "steered.mp4").read_bytes() == before
