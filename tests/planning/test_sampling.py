"""What a plan of sampling accounts for is what sampling runs: the same programs, to the letter."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs.t2v import tiny
from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.checkpoints.parameters import save_params
from starflow_jax.config import Config
from starflow_jax.flow import decode, inversion
from starflow_jax.model import system
from starflow_jax.model.beside import fingerprint_of, open_checkpoints
from starflow_jax.model.lora import fresh_factors
from starflow_jax.model.store import load_model
from starflow_jax.model.system import save_system
from starflow_jax.planning.abstract import abstract_model
from starflow_jax.planning.program_cost import count
from starflow_jax.planning.sampling import UPDATES, assumed_updates, filled_share, sampling_programs
from starflow_jax.sampling import conditions, denoise, generate, likelihood, renoise, shallow, stream
from tests.helpers import random_params, random_variables
from tests.sharded_sampling import CONFIG_OF_TEST, PROMPTS, write_module, write_workdir
from tests.small_model import small_system
from tests.small_run import run_here

PROGRAMS = [(system, "encode_text"), (system, "decode_latents"), (conditions, "stack_branches"),
            (conditions, "draw_noise"), (decode, "start_window"), (decode, "decode_frames"), (decode, "invert_shallow"),
            (decode, "draft_frames"), (decode, "follow_frames"),
            (shallow, "part_of"), (shallow, "parts_together"), (shallow, "joined"), (denoise, "denoiser_step"),
            (denoise, "score_step"),
            (conditions, "ray_tokens"), (likelihood, "window_nll"), (stream, "place"), (renoise, "encode_again"),
            (stream, "score_next"), (stream, "decode_next"), (generate, "decode_next")]


class Recorder:
    """A jitted function that keeps the text of each program that it runs."""

    def __init__(self, name: str, function: Any, texts: dict[str, list[str]]) -> None:
        self.name, self.function, self.texts = name, function, texts

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, keywords)))
        text = "" if traced else self.function.lower(*args, **keywords).as_text()
        if text and text not in self.texts.setdefault(self.name, []):
            self.texts[self.name].append(text)
        return self.function(*args, **keywords)

    def lower(self, *args: Any, **keywords: Any) -> Any:
        return self.function.lower(*args, **keywords)


def by_function(texts: list[str]) -> dict[str, set[str]]:
    """Texts by the name of the function that they are of."""
    found: dict[str, set[str]] = {}
    for text in texts:
        found.setdefault(text.split("module @jit_", 1)[1].split()[0], set()).add(text)
    return found


def write_student(workdir: Path, teacher: Config) -> str:
    """The workdir of a student of one layer, of random parameters."""
    model = dataclasses.replace(teacher.model, deep_layers=1)
    config = dataclasses.replace(teacher, model=model, train=settings_of.Train(target="student"))
    whole = traverse_util.flatten_dict(random_params(teacher, scale=0.3), sep="/")
    save_system(dataclasses.replace(small_system(config), config=config), workdir / "system")
    block = traverse_util.flatten_dict(random_params(config, scale=0.3, seed=2), sep="/")
    save_params(workdir / "checkpoints", {name: np.asarray(value) for name, value in block.items()
                                          if name.startswith("flow/deep/")}, {})
    open_checkpoints(config, workdir, fingerprint_of(whole)).close()
    return str(workdir)


def write_lora(workdir: Path, backbone: Config) -> str:
    """The workdir of random LoRA factors of rank 2 beside the model that `write_workdir` writes."""
    config = dataclasses.replace(backbone, train=settings_of.Train(target="lora"), lora=settings_of.Lora(rank=2))
    save_system(dataclasses.replace(small_system(config), config=config), workdir / "system")
    factors = random_variables(jax.eval_shape(lambda: fresh_factors(config, jax.random.key(0))), scale=0.1)
    save_params(workdir / "checkpoints", {name: np.asarray(value) for name, value in traverse_util.flatten_dict(
        factors, sep="/").items()}, {})
    whole = traverse_util.flatten_dict(random_params(backbone, scale=0.3), sep="/")
    open_checkpoints(config, workdir, fingerprint_of(whole)).close()
    return str(workdir)


@pytest.mark.parametrize(("streams", "offload", "frames", "beside"), [
    (False, False, 0, ""), (True, False, 0, ""), (False, True, 25, ""),
    pytest.param(True, False, 25, "", marks=pytest.mark.slow),
    pytest.param(True, True, 25, "", marks=pytest.mark.slow),
    pytest.param(False, False, 25, "draft", marks=pytest.mark.slow),
    pytest.param(False, False, 25, "control", marks=pytest.mark.slow),
    pytest.param(False, False, 0, "lora", marks=pytest.mark.slow)],
    ids=["whole videos", "a stream", "past the window, one part after the other", "a stream past the window",
         "a stream past the window, one part after the other", "drafted, past the window",
         "cameras and the score, past the window", "LoRA factors apart"])
def test_the_plans_programs_are_those_that_sampling_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: bool, offload: bool, frames: int, beside: str
) -> None:
    """The user's command on four devices, two guided videos, two frames at once in shallow blocks; past the window,
    which is noised anew."""
    recorded: dict[str, list[str]] = {}
    write_workdir(tmp_path / "model")
    added: dict[str, Any] = {}
    if beside:
        write = {"draft": write_student, "control": write_module, "lora": write_lora}[beside]
        added = {beside: write(tmp_path / beside, CONFIG_OF_TEST)}
    if beside == "control":
        added |= {"camera": "orbit", "denoise": "score"}
    if beside == "lora":
        added = {"lora": f"{added['lora']},{added['lora']}:0.5", "merge_lora": False, "weights": "int8"}
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    tokens = 2 * 2 * CONFIG_OF_TEST.model.tokens_per_frame
    monkeypatch.setattr(shallow, "TOKENS", tokens)
    for module, name in PROGRAMS:
        monkeypatch.setattr(module, name, Recorder(name, getattr(module, name), recorded))
    code, _, error = run_here([
        "--config=configs/t2v.py", "--mode=sample", f"--workdir={tmp_path / 'model'}", "--config.sample.batch_size=2",
        f"--config.sample.prompts_file={tmp_path / 'prompts.txt'}", f"--config.sample.stream={streams}",
        f"--config.sample.offload={offload}", *(f"--config.sample.{name}={value}" for name, value in added.items()),
        f"--config.sample.output={tmp_path / 'videos'}", f"--config.sample.frames={frames}",
        f"--config.sample.renoise={frames > 0}", "--config.mesh.data=2", "--config.mesh.tensor=2",
        "--config.model.unroll_layers=false"])
    assert code == 0 and len(list((tmp_path / "videos").glob("*.mp4"))) == 2, error
    monkeypatch.undo()
    monkeypatch.setattr(shallow, "TOKENS", tokens)
    mesh = sharding.make_mesh(settings_of.Mesh(data=2, tensor=2))
    config = dataclasses.replace(
        CONFIG_OF_TEST, plan=settings_of.Plan(step="sample", videos=2), sample=dataclasses.replace(
            tiny().sample, stream=streams, offload=offload, frames=frames, renoise=frames > 0, **added))
    with jax.set_mesh(mesh):
        programs = sampling_programs(config, mesh)
    planned = by_function([program.lowered.as_text() for program in programs])
    run = by_function([text for texts in recorded.values() for text in texts])
    assert {name: len(texts) for name, texts in planned.items()} == {name: len(texts) for name, texts in run.items()}
    assert [name for name in planned if planned[name] != run[name]] == []
    assert set(planned) >= {"start_window", "decode_frames", "invert_shallow"}
    assert streams or "joined" in planned
    step = next(program for program in programs if program.name == "deep block, a step")
    none, one, all_updates = (count(step.compiled, trips).flops for trips in (0, 1, step.updates - 1))
    assert all_updates == pytest.approx(step.updates * (one - none), rel=0.02)
    solved = [program for program in programs if "module @jit_invert_shallow" in program.lowered.as_text()] + [step]
    assert {program.updates for program in solved} == {4}  # as many as a frame has tokens, after which it is exact


@pytest.mark.parametrize("weights", ["", "int8"])
def test_a_plan_of_a_lora_workdir_has_the_factors_that_it_samples_with(tmp_path: Path, weights: str) -> None:
    write_workdir(tmp_path / "model")
    write_lora(tmp_path / "lora", CONFIG_OF_TEST)
    config = dataclasses.replace(
        CONFIG_OF_TEST, train=settings_of.Train(target="lora", init_from=str(tmp_path / "model")),
        lora=settings_of.Lora(rank=2), sample=dataclasses.replace(
            CONFIG_OF_TEST.sample, weights=weights, merge_lora=False, lora=f"{tmp_path / 'lora'}:0.5"))
    mesh = sharding.make_mesh(settings_of.Mesh(data=2, tensor=2))
    with jax.set_mesh(mesh):
        planned, loaded = abstract_model(config, mesh)[0], load_model(config, tmp_path / "lora").params
    adapted = planned["flow"]["deep"]["transformer"]["layers"]["layer"]["qkv"]["kernel"]
    assert adapted.lora_a.shape[-1] == 4  # its own two and those of sample.lora
    jax.tree.map(lambda plan, leaf: (
        np.testing.assert_equal((plan.shape, plan.dtype), (leaf.shape, leaf.dtype)),
        np.testing.assert_(plan.sharding.is_equivalent_to(leaf.sharding, leaf.ndim))), planned, loaded)


def test_larger_blocks_take_more_updates() -> None:
    """As calibration found: from a frame's 36 tokens to two frames' and four's."""
    def updates_of(block: int, asked: int = 0, **options: int) -> float | None:
        return assumed_updates(asked, inversion.Solver(block, **options), tokens=1024)

    assert updates_of(64) == updates_of(128) == UPDATES
    for times, updates in ((2, 10.1), (4, 15.8)):
        assert updates_of(128 * times) == pytest.approx(UPDATES * updates / 6.8, rel=0.04)
    assert updates_of(1 << 30) == updates_of(1024) and updates_of(512, asked=5) == 5
    assert (updates_of(1), updates_of(6), updates_of(512, max_steps=3)) == (1, 6, 3)
    assert updates_of(64, updates=3) is None  # a wavefront


def test_the_filled_share_of_a_cache() -> None:
    """Whole blocks of 1,024 slots, of which the kernel reads at least one, on the average over the solver's blocks."""
    assert filled_share(0, 600, 100, 600) == 1  # one block
    assert filled_share(256, 2048, 1024, 4352) == pytest.approx((1 + 2) / 2 / 5)  # behind 256 and 1,280 slots
    assert filled_share(2304, 2048, 2048, 4352) == pytest.approx(3 / 5)
