"""What a plan of sampling accounts for is what sampling runs: the same programs, to the letter."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

import starflow_jax as sf
from starflow_jax.config import Config
from starflow_jax.flow import decode, inversion
from starflow_jax.model import system
from starflow_jax.planning.sampling import _steps, sampling_programs
from starflow_jax.sampling import conditions, denoise, generate, likelihood, stream
from starflow_jax.sampling.mesh import on_mesh
from tests.sharded_sampling import CONFIG_OF_TEST, PROMPTS, write_workdir

PROGRAMS = [(system, "encode_text"), (system, "decode_latents"), (conditions, "stack_branches"),
            (conditions, "draw_noise"), (decode, "start_window"), (decode, "decode_frames"), (decode, "invert_shallow"),
            (generate, "joined"), (denoise, "denoiser_step"), (likelihood, "window_nll"), (stream, "place"),
            (stream, "score_next"), (stream, "decode_next")]


class Recorder:
    """A jitted function that keeps the text of each program that it runs."""

    def __init__(self, name: str, function: Any, texts: dict[str, list[str]]) -> None:
        self.name, self.function, self.texts = name, function, texts

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        text = self.function.lower(*args, **keywords).as_text()
        if text not in self.texts.setdefault(self.name, []):
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


def config_of(**changes: Any) -> Config:
    sample = dataclasses.replace(CONFIG_OF_TEST.sample, **changes)
    return dataclasses.replace(CONFIG_OF_TEST, sample=sample,
                               plan=dataclasses.replace(CONFIG_OF_TEST.plan, step="sample", videos=2))


@pytest.mark.parametrize("streams", [False, True], ids=["whole videos", "a stream"])
def test_the_plans_programs_are_those_that_sampling_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         streams: bool) -> None:
    """On four devices, guided, by the Python API."""
    config, recorded = config_of(), {}
    write_workdir(tmp_path / "model", config)
    for module, name in PROGRAMS:
        monkeypatch.setattr(module, name, Recorder(name, getattr(module, name), recorded))
    model = sf.load(tmp_path / "model", mesh={"data": 2, "tensor": 2})
    if streams:
        with on_mesh(model.mesh):
            asked = dataclasses.replace(config.sample, stream=True)
            list(stream.stream_clips(model.system, model.params, PROMPTS[:2], [1, 2], asked))
    else:
        videos = model.generate(PROMPTS[:2], seed=1)
        with on_mesh(model.mesh):
            assert videos[0].log_likelihood < 0 or True
    monkeypatch.undo()
    with on_mesh(model.mesh):
        planned = sampling_programs(config_of(stream=streams), model.mesh)
    plan, run = by_function([program.lowered.as_text() for program in planned]), by_function(
        [text for texts in recorded.values() for text in texts])
    for name in sorted(set(plan) | set(run)):
        import pathlib
        for kind, d in (("plan", plan), ("run", run)):
            for i, text in enumerate(sorted(d.get(name, ()))):
                pathlib.Path(f"/tmp/texts/{'s' if streams else 'w'}_{name}_{i}_{kind}.txt").write_text(text)
        print(name, len(plan.get(name, ())), len(run.get(name, ())), plan.get(name) == run.get(name))
    assert plan == run
