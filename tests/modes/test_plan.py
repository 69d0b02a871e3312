"""--mode=plan: plan.json, the table, and what it says where it can't."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import pytest

from starflow_jax.config import Mesh
from starflow_jax.io.arrays import import_arrays
from starflow_jax.model.control import PACKAGED
from starflow_jax.model.own_settings import PRETRAINED
from starflow_jax.modes import plan as plan_mode
from starflow_jax.modes.plan import plan
from tests.planning.test_meshes import with_plan
from tests.planning.test_plan import ALWAYS_KNOWN, COST, small, small_codec
from tests.small_run import run, run_here


def needs_libtpu() -> None:
    pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")


def test_training_is_planned_for_a_pod_that_is_not_there(tmp_path, capsys) -> None:
    needs_libtpu()
    plan(with_plan(small(), topology="v5e:2x2"), tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert set(row) == ALWAYS_KNOWN | COST
    assert row["chips"] == 4 and row["fits"] and row["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "sequence": 1}
    out = capsys.readouterr().out
    assert "fits, " in out and "memory, GiB a chip: train" in out and str(tmp_path / "plan.json") in out


def test_what_does_not_divide_is_one_line_before_anything_is_compiled(tmp_path) -> None:
    needs_libtpu()
    for asked in ("--config.plan.topology=v5e:2x2", "--config.train.batch_size=30"):
        code, _, error = run_here(["--config=configs/t2v.py", "--mode=plan", f"--workdir={tmp_path}",
                                   "--config.train.batch_size=2", "--config.plan.topology=v5e:2x4",
                                   "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.sequence=2", asked])
        assert code == 2 and len(error.splitlines()) == 1 and "must" in error, error
    code, _, error = run_here(["--config=configs/t2v.py", "--mode=plan", f"--workdir={tmp_path}",
                               "--config.plan.search=true", "--config.train.batch_size=7"])
    assert code == 2 and len(error.splitlines()) == 1 and "no mesh of 64 devices" in error, error


@pytest.mark.slow
def test_sampling_is_planned_program_by_program(tmp_path) -> None:
    needs_libtpu()
    config = with_plan(small(), topology="v5e:2x2", step="sample")
    plan(dataclasses.replace(config, mesh=Mesh(data=1, fsdp=4)), tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert row["fits"] and row["mesh"]["fsdp"] == 4 and [part["program"] for part in row["memory"]] == [
        "text encoder", "text by branches", "noise of a step", "deep block, the text", "deep block, a step",
        *(f"{config.model.frames} frames together", f"shallow blocks, {config.model.frames} frames"),
        "denoiser, a window", "codec, the first frame", "codec, a frame", "likelihood, a window"]


@pytest.mark.slow  # quick: tests/model/test_control.py
@pytest.mark.parametrize("stream", [False, True], ids=["whole videos", "a stream"])
def test_sampling_along_a_camera_is_planned_with_the_packages_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """As a user asks for it, on a mesh: with the rays of each step, which a plan without a camera does not have."""
    monkeypatch.setattr(plan_mode, "topology", lambda _: jax.devices()[:4])

    def planned(*asked: str) -> tuple[set[str], int]:
        code, out, error = run_here([
            "--config=configs/t2v.py", "--mode=plan", "--config.plan.step=sample", "--config.plan.topology=gpu:80GB",
            "--config.plan.videos=2", f"--config.sample.stream={stream}", "--config.mesh.data=2",
            "--config.mesh.fsdp=2", f"--workdir={tmp_path}", *asked])
        assert code == 0 and "fits, " in out, error
        row = json.loads((tmp_path / "plan.json").read_text())
        assert row["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1, "sequence": 1}
        step = next(part for part in row["memory"] if part["program"] == "deep block, a step")
        return {part["program"] for part in row["memory"]}, step["arguments"]

    (programs, held), (plain, held_plain) = planned("--config.sample.camera=orbit"), planned()
    assert programs - plain == {"rays of the cameras of 1 frames"} | (
        set() if stream else {"rays of the cameras of 4 frames"})
    module = sum(array.nbytes for array in jax.tree.leaves(import_arrays(PRETRAINED / PACKAGED)))
    assert module / 2 <= held - held_plain < 0.6 * module  # over mesh.fsdp; the rays are small


def test_what_the_compiler_refuses_is_a_plan_that_does_not_fit(tmp_path, capsys) -> None:
    """Six million videos at once: refused by the compiler, reported by the plan."""
    needs_libtpu()
    plan(with_plan(small(), topology="v5e:2x2", step="sample", videos=6_000_000), tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert set(row) == ALWAYS_KNOWN | COST | {"advice"} and not row["fits"]
    assert row["bound_seconds_per_step"] is None and "exceeds a chip's memory by" in row["advice"]
    assert row["advice"] in capsys.readouterr().out


def test_a_search_over_the_codec_is_a_table_of_its_choices(tmp_path, monkeypatch, capsys) -> None:
    needs_libtpu()
    config = small_codec(monkeypatch, tile_overlap=4)
    plan(with_plan(config, topology="v6e:1x1", step="codec", search=True), tmp_path)
    row = json.loads((tmp_path / "plan.json").read_text())
    assert {(one["dtype"], one["tile"]) for one in row["searched"]} == {
        ("bfloat16", 0), ("bfloat16", 8), ("float32", 0), ("float32", 8)}
    seconds = [one["bound_seconds_per_step"] for one in row["searched"]]
    assert seconds == sorted(seconds) and row["dtype"] == row["searched"][0]["dtype"]
    out = capsys.readouterr().out
    assert "bfloat16, whole frames: fits" in out and "bound, seconds: decode, a video" in out


def test_without_libtpu_it_says_how_to_install_it(tmp_path) -> None:
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed")
    result = run(tmp_path / "work", tmp_path, "--mode=plan")
    assert result.returncode == 2 and 'pip install "jax[tpu]"' in result.stderr, result.stderr
