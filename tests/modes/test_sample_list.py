"""A list of prompts: what is there is not made again, one that fails stops no other, and processes share it."""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from starflow_jax.checkpoints.parameters import save_params, stored_params
from starflow_jax.config import UserError
from starflow_jax.flow.jacobi import Outcome
from starflow_jax.io.arrays import export_arrays, import_arrays
from starflow_jax.io.checksums import checksums_of
from starflow_jax.io.video import read_video
from starflow_jax.sampling import generate, stream, videos
from starflow_jax.sampling.identity import facts_of
from tests.modes.test_processes import free_port
from tests.sharded_sampling import write_workdir
from tests.small_run import ROOT, environment, interruptible, run_here
from tests.test_sharding import xla_flags

PROMPTS = ["a red seven moves right", "a blue three drifts left", "a green one floats up"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("list") / "model"
    write_workdir(folder)
    return folder


def asked(model: Path, folder: Path, *arguments: str) -> list[str]:
    """The command line for one video after the other, without guidance; later arguments override earlier ones."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return ["--config=configs/t2v.py", "--mode=sample", f"--workdir={model}", "--config.sample.batch_size=1",
            f"--config.sample.prompts_file={folder / 'prompts.txt'}", "--config.sample.guidance=0",
            f"--config.sample.output={folder / 'videos'}", *arguments]


def made(folder: Path) -> dict[str, int]:
    """When each video was written, by its name."""
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "videos").glob("*.mp4")}


def without_hashes(names: Iterable[str]) -> set[str]:
    """Names of files without what makes them unique."""
    return {re.sub("_[0-9a-f]{8}(_stream)?$", "", name) for name in names}


def details(folder: Path) -> dict[str, int]:
    """When each whole JSON was written, by its name."""
    return {path.stem: path.stat().st_mtime_ns for path in (folder / "videos").glob("*.json")
            if "outcome" in facts_of(path)}


def test_what_is_there_of_the_same_kind_is_not_made_again(model: Path, tmp_path: Path) -> None:
    command = asked(model, tmp_path)
    code, first, error = run_here(command)
    assert code == 0, error
    before = made(tmp_path)
    assert len(before) == 3
    lost = next((tmp_path / "videos").glob("a_blue*.json"))
    lost.unlink()  # as if the run had been killed before it was written
    code, again, error = run_here(command)
    assert code == 0 and "2 of 3 videos are there already" in again, again + error
    after = made(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {lost.stem}
    rows = [line.split("/")[-1].split()[:3] for text in (first, again) for line in text.splitlines() if ".mp4" in line]
    assert sorted(rows[:3]) == sorted(rows[3:])  # the figures of what was there come from its JSON
    code, other, error = run_here([*command, "--config.sample.solver.tolerance=0.5"])
    assert code == 0 and "there already" not in other, other + error
    assert len(made(tmp_path)) == 6 and made(tmp_path).items() > after.items()  # beside those that were there
    assert json.loads(next((tmp_path / "videos").glob("a_red*.json")).read_text()).keys() >= {
        "prompt", "seed", "identity", "settings", "weights", "outcome", "bits_per_dim", "seconds"}


def test_of_prompts_whose_likeliest_are_kept_all_are_compared_again(model: Path, tmp_path: Path) -> None:
    command = asked(model, tmp_path, "--config.sample.count=3", "--config.sample.keep=2")
    assert run_here(command)[0] == 0
    before = made(tmp_path)
    assert len(before) == 6
    lost = next((tmp_path / "videos").glob("a_blue*.json"))
    lost.unlink()
    code, out, error = run_here(command)
    assert code == 0 and "4 of 9 videos are there already" in out, out + error
    after = made(tmp_path)
    assert set(after) == set(before) and {name[:6] for name in after if after[name] != before[name]} == {"a_blue"}
    code, out, error = run_here([*command, "--config.sample.keep=1"])  # another choice is made anew
    assert code == 0 and "there already" not in out, out + error


def test_a_prompt_that_fails_is_listed_and_the_others_are_made(model: Path, tmp_path: Path) -> None:
    hook = f"{sys.executable} -c \"p = input(); assert 'three' not in p; print(p)\""
    code, out, error = run_here(asked(model, tmp_path, f"--config.sample.rewrite={hook}"))
    assert code == 2 and "starflow_jax: 'a blue three drifts left', seed 0: sample.rewrite=" in error
    assert without_hashes(made(tmp_path)) == {"a_red_seven_moves_right_seed0", "a_green_one_floats_up_seed0"}


def test_what_another_run_made_under_a_given_name_is_replaced_only_when_asked(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the model is loaded; the same video is there already."""
    path = tmp_path / "mine" / "seven.mp4"
    command = ["--config=configs/t2v.py", "--mode=sample", f"--workdir={model}", f"--config.sample.output={path}",
               f"--config.sample.prompt={PROMPTS[0]}", "--config.sample.guidance=0", "--config.sample.batch_size=1"]
    code, out, error = run_here(command)
    assert code == 0 and str(path) in out, error
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert set(before) == {"seven.mp4", "seven.png", "seven.json"}
    code, out, error = run_here(command)
    assert code == 0 and "1 of 1 videos are there already" in out, error
    code, out, error = run_here([*command, "--config.sample.seed=1", "--config.sample.overwrite=true"])
    assert code == 0 and json.loads((path.parent / "seven.json").read_text())["seed"] == 1, error
    (path.parent / "seven.json").unlink()  # a file that no run of ours says it made
    kept = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr("starflow_jax.modes.sample.load_model", None)
    for other in ("--config.sample.seed=1", "--config.sample.seed=2"):
        code, out, error = run_here([*command, other])
        assert code == 2 and len(error.splitlines()) == 1 and f"{path}: is there, of another run" in error, error
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == kept != before


def test_a_batch_that_fails_is_made_one_by_one(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_batch = videos.make_batch

    def failing(system, params, batch, size, known):
        if any("seven" in request.prompt for request in batch):
            raise UserError("no sevens today")
        return make_batch(system, params, batch, size, known)

    monkeypatch.setattr(videos, "make_batch", failing)
    code, out, error = run_here(asked(model, tmp_path, "--config.sample.batch_size=2"))
    assert code == 2 and "'a red seven moves right', seed 0: no sevens today" in error, out + error
    assert len(made(tmp_path)) == 2
    monkeypatch.setattr(videos, "make_batch", lambda *_: (_ for _ in ()).throw(UserError("nothing today")))
    code, out, error = run_here(asked(model, tmp_path, "--config.sample.seed=7"))
    assert code == 2 and error.strip().splitlines()[-1] == "starflow_jax: nothing today"


def start_two(arguments: list[str], *of_second: str, devices: int = 1) -> list[subprocess.Popen]:
    """of_second: arguments of the second process alone."""
    port = free_port()
    return [subprocess.Popen([sys.executable, "-m", "starflow_jax.main", *arguments, *more,
                              f"--distributed=127.0.0.1:{port},2,{index}"], cwd=ROOT, text=True,
                             env=environment(XLA_FLAGS=xla_flags(devices)), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for index, more in enumerate(((), of_second))]


def test_a_process_that_fails_says_why_and_waits_for_the_others(model: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    monkeypatch.setattr("starflow_jax.modes.sample._wait_for_the_others", lambda: waited.append(True))
    (tmp_path / "file").touch()
    code, out, error = run_here(asked(model, tmp_path, f"--config.sample.output={tmp_path / 'file'}"))
    assert code == 2 and error.strip().splitlines()[-1].startswith(
        f"starflow_jax: sample.output={tmp_path / 'file'}: can't be written to"), out + error
    assert waited == [True]


@pytest.mark.parametrize("more", [(), ("--config.sample.stream=true",)], ids=["whole", "stream"])
@pytest.mark.parametrize("output", ["file", "file/below", "/proc/starflow", "x" * 300, "file/NAME.mp4",
                                    "/proc/NAME.mp4", f"{'x' * 300}.mp4", f"{'x' * 251}.mp4", "folder.mp4"])
def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(
    output: str, more: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last but one the video's own name is as long as one may be, and that of the JSON beside it too long."""
    monkeypatch.setattr("starflow_jax.modes.sample.load_model", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    code, _, error = run_here(["--config=configs/t2v.py", "--mode=sample", f"--workdir={model}", *more,
                               "--config.sample.prompt=a red seven", "--config.sample.overwrite=true",
                               f"--config.sample.output={tmp_path / output}"])
    said = error.strip().splitlines()
    assert code == 2 and len(said) == 1 and said[0].startswith(f"starflow_jax: sample.output={tmp_path / output}"[:80])
    assert ": can't be written to (" in said[0] and sorted(path.name for path in tmp_path.iterdir()) == [
        "file", "folder.mp4"]


def test_ctrl_c_ends_what_is_written_and_says_what_is_there(model: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole videos: the second is interrupted; the same command makes two. A stream is cut short, and plays."""
    make_batch, stream_clips, calls = videos.make_batch, videos.stream_clips, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return make_batch(*args)

    monkeypatch.setattr(videos, "make_batch", interrupted)
    code, out, error = run_here(asked(model, tmp_path))
    assert code == 130 and error.strip().splitlines()[-1] == "starflow_jax: interrupted", error
    assert out.splitlines()[-1] == (f"interrupted: 1 of 3 videos are in {tmp_path / 'videos'}; the same command makes "
                                    "the rest")
    code, out, error = run_here(asked(model, tmp_path))
    assert code == 0 and "1 of 3 videos are there already" in out and len(calls) == 4

    def cut_short(*args: Any) -> Any:
        yield from itertools.islice(stream_clips(*args), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(videos, "stream_clips", cut_short)
    code, out, error = run_here(asked(model, tmp_path, "--config.sample.stream=true"))
    path = next((tmp_path / "videos").glob("a_red_seven_moves_right_seed0_*_stream.mp4"))
    assert code == 130 and f"{path}: cut short after 5 frames" in out.splitlines(), out + error
    assert len(read_video(path)[0]) == 5


@pytest.mark.slow  # its quick sibling is above
@pytest.mark.parametrize("streams", [False, True])
def test_a_process_that_is_interrupted_leaves_what_it_says(model: Path, tmp_path: Path, streams: bool) -> None:
    """A real SIGINT while the second video is made: whole videos are whole, a stream plays up to there."""
    more = ["--config.sample.stream=true", "--config.sample.frames=801"] if streams else ["--config.sample.count=400"]
    with interruptible():
        process = subprocess.Popen([sys.executable, "-m", "starflow_jax.main", *asked(model, tmp_path, *more)],
                                   cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
    while process.poll() is None and not (made(tmp_path) if streams else details(tmp_path)):
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.strip().splitlines()[-1] == "starflow_jax: interrupted", out + error
    assert "Traceback" not in error and not list((tmp_path / "videos").glob(".*"))
    said = re.fullmatch(r"interrupted: (\d+) of (\d+) videos are in .*; the same command makes the rest",
                        out.splitlines()[-1])
    assert said, out
    cut = {Path(path): int(frames) for path, frames in re.findall(r"^(.*): cut short after (\d+) frames$", out, re.M)}
    frames = {path: len(read_video(path)[0]) for path in (tmp_path / "videos").glob("*.mp4")}
    whole = len(frames) - len(cut)  # the last one may have been written, but not yet been counted
    assert int(said[1]) in (whole - 1, whole) and int(said[2]) == (3 if streams else 1200)
    assert {path: frames[path] for path in cut} == cut
    assert len(cut) <= (1 if streams else 0) and {frames[path] for path in set(frames) - set(cut)} <= {9, 801}


@pytest.mark.parametrize("streams", [False, True])
def test_what_is_not_finite_is_no_video(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                        streams: bool) -> None:
    """Of three videos, the second's solution and the third's pixels."""
    solved, of_streams = generate.solved, videos.solved
    decoding = stream if streams else generate
    decode_next = decoding.decode_next

    def third(*args: Any) -> Any:
        decoded, cache = decode_next(*args)
        return decoded._replace(finite_B=np.asarray(decoded.finite_B) & [True, True, False]), cache

    def second(deep: Any, shallow: Any) -> Any:
        found = (of_streams if streams else solved)(deep, shallow)
        outcome_B = np.where(np.arange(len(found.outcome_B)) == 1, Outcome.NOT_FINITE, found.outcome_B)
        return dataclasses.replace(found, outcome_B=outcome_B)

    monkeypatch.setattr(videos if streams else generate, "solved", second)
    monkeypatch.setattr(decoding, "decode_next", third)
    code, out, error = run_here(asked(model, tmp_path, "--config.sample.batch_size=3",
                                      f"--config.sample.stream={streams}"))
    assert code == 2 and "'a blue three drifts left', seed 0: the solver's result is not finite" in error, out + error
    assert "failed: 'a green one floats up', seed 0: what the denoiser or the codec made is not finite; " in out, out
    assert without_hashes(made(tmp_path)) == {"a_red_seven_moves_right_seed0"}
    assert len(list((tmp_path / "videos").glob("*.json"))) == 1


def of_the_damaged(model: Path, tmp_path: Path, *arguments: str) -> str:
    """The line that sampling one video ends with; it leaves no file behind."""
    code, _, error = run_here(["--config=configs/t2v.py", "--mode=sample", f"--workdir={model}", *arguments,
                               "--config.sample.batch_size=1", f"--config.sample.prompt={PROMPTS[0]}",
                               "--config.sample.guidance=0", f"--config.sample.output={tmp_path / 'videos'}"])
    assert code == 2 and not [path for path in (tmp_path / "videos").glob("*") if path.is_file()], error
    line = error.strip().splitlines()[-1]
    assert line.startswith("starflow_jax: ") and "Traceback" not in error
    return line.removeprefix("starflow_jax: ")


def test_a_codec_that_is_not_finite_is_named_before_anything_is_made(model: Path, tmp_path: Path) -> None:
    """Its checksum is right: it was written so."""
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "system" / "codec.safetensors"
    arrays = import_arrays(path)
    arrays["basis_PC"][1, 2] = np.nan
    with checksums_of(path.parent, [path.name]):
        export_arrays(path, arrays)
    for streams in (False, True):
        assert of_the_damaged(tmp_path / "model", tmp_path, f"--config.sample.stream={streams}") == (
            f"{path}: basis_PC holds values that are not finite; it is damaged: make or copy it again")


@pytest.mark.slow  # quick: tests/sampling/test_finite.py, of the API; above, of the command
@pytest.mark.parametrize("streams", [False, True])
def test_a_denoiser_that_is_not_finite_makes_no_video(model: Path, tmp_path: Path, streams: bool) -> None:
    """Among the parameters of a checkpoint that is whole."""
    shutil.copytree(model / "system", tmp_path / "model" / "system")
    arrays = {name: np.array(array) for name, array in stored_params(model / "checkpoints" / "0").items()}
    name = min(name for name in arrays if name.startswith("denoiser/"))
    arrays[name].flat[0] = np.nan
    save_params(tmp_path / "model" / "checkpoints", arrays, {})
    assert of_the_damaged(tmp_path / "model", tmp_path, f"--config.sample.stream={streams}").startswith(
        "'a red seven moves right', seed 0: what the denoiser or the codec made is not finite; ")


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_stops_no_other(model: Path, tmp_path: Path, failing: int) -> None:
    """It can't write its first video while the other has more to make; also where it is the one that the other is
    connected to."""
    arguments = asked(model, tmp_path, "--config.sample.count=2", f"--config.sample.output={tmp_path / 'file'}")
    (tmp_path / "file").touch()
    good = f"--config.sample.output={tmp_path / 'videos'}"
    pair = start_two(arguments, good) if failing == 0 else start_two(
        [*arguments, good], f"--config.sample.output={tmp_path / 'file'}")
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == ([2, 0] if failing == 0 else [0, 2]), said
    assert "can't be written to" in said[failing].strip().splitlines()[-1] and len(made(tmp_path)) == 3


@pytest.mark.slow  # quick: tests/test_sharding.py, what the first process has is what all have
@pytest.mark.parametrize("streams", [False, True])
def test_a_mesh_over_two_processes_makes_the_videos_of_one(model: Path, tmp_path: Path, streams: bool) -> None:
    """Two devices each, 2 x 2 for data and heads. They have no disk in common: the first one writes, and says what is
    there of an interrupted list."""
    mesh = ("--config.mesh.data=2", "--config.mesh.tensor=2", "--config.sample.batch_size=2")
    arguments = asked(model, tmp_path, f"--config.sample.stream={streams}")
    assert run_here([*arguments, f"--config.sample.output={tmp_path / 'alone'}", "--config.mesh.data=1"])[0] == 0

    def run_two() -> str:
        pair = start_two([*arguments, *mesh], f"--config.sample.output={tmp_path / 'second'}", devices=2)
        said = [process.communicate(timeout=300)[0] for process in pair]
        assert [process.returncode for process in pair] == [0, 0], said
        return said[0]

    run_two()
    before = made(tmp_path)
    assert len(before) == 3 and not list((tmp_path / "second").glob("*"))
    for path in (tmp_path / "videos").glob("*.mp4"):
        ours, alone = (read_video(folder / path.name)[0].astype(int) for folder in (path.parent, tmp_path / "alone"))
        assert ours.shape == alone.shape and np.abs(ours - alone).max() <= 3  # an MP4 rounds
    facts = json.loads(next((tmp_path / "videos").glob("*.json")).read_text())
    assert (facts["mesh"]["data"], facts["mesh"]["tensor"]) == (2, 2)
    lost = next((tmp_path / "videos").glob("a_blue*.json"))
    lost.unlink()
    assert "2 of 3 videos are there already" in run_two()
    assert {name for name, time in made(tmp_path).items() if time != before[name]} == {lost.stem}


@pytest.mark.slow
def test_two_processes_share_a_list_and_one_that_is_killed_stops_no_other(model: Path, tmp_path: Path) -> None:
    """Twelve videos. The second process is killed after its first one; the first makes its own six to the end; the same
    command makes what is missing, and nothing again."""
    arguments = asked(model, tmp_path, "--config.sample.count=4")

    shares = [{f"{prompt.replace(' ', '_')}_seed{seed}" for prompt in PROMPTS for seed in seeds}
              for seeds in ((0, 2), (1, 3))]
    pair = start_two(arguments)
    while not shares[1] & without_hashes(details(tmp_path)):
        assert pair[1].poll() is None, pair[1].communicate()[0]
        time.sleep(0.02)
    pair[1].kill()
    said = pair[0].communicate(timeout=600)[0]
    assert pair[0].returncode == 0, said
    before = details(tmp_path)
    assert shares[0] <= without_hashes(before) and len(before) < 12
    pair = start_two(arguments)
    outputs = [process.communicate(timeout=600)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    after = details(tmp_path)
    assert len(after) == 12 and all(after[name] == when for name, when in before.items())
    assert f"{len(shares[0])} of 6 videos are there already" in outputs[0]
    assert {json.loads(path.read_text())["seed"] for path in (tmp_path / "videos").glob("*.json")} == {0, 1, 2, 3}
