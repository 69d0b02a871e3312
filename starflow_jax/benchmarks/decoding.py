"""How fast the flow is inverted: passes and time by block size, each at the loosest tolerance that keeps the error
against sequential decoding within calibration's."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.benchmarks.random_flow import RandomFlow, RandomVideo
from starflow_jax.config import Config, Model, Solver
from starflow_jax.flow.first_guess import NoiseGuess
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.io.compiled import count_programs
from starflow_jax.io.timing import timed
from starflow_jax.model.calibration import Calibration
from starflow_jax.model.parameters import Params, inference_params
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.store import load_pretrained
from starflow_jax.model.system import System
from starflow_jax.sampling.calibration import Decoder, deep_decoder, loosest, relative_error
from starflow_jax.sampling.conditions import make_conditions
from starflow_jax.sampling.generate import deep_frames
from starflow_jax.sampling.solver import TOLERANCE

PROMPTS = 8
ROUNDS = 3
LENGTHS = (1, 4, 32)  # times the training length

Guess = Callable[[jax.Array], jax.Array]  # a video's noise -> where its solver starts


def trained_model(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """The pretrained model, guided: each scheme's passes, error against sequential decoding and time, one video
    at a time and several together. The base line starts each frame from the one before, the first from 0."""
    system, params = pretrained(config, workdir)
    captions = fixed_captions(config, "test", PROMPTS)
    plain = dataclasses.replace(system, calibration=Calibration())
    tokens, window = config.model.tokens_per_frame, config.model.frames

    def jacobi(block_size: int, frames: int = 1, start: str = "previous") -> Solver:
        return Solver("jacobi", block_size, frames, start=start)

    cases: list[tuple[str, System, Solver]] = [("sequential", plain, Solver("sequential", 1))]
    cases += [("base line", plain, jacobi(block)) for block in (tokens // 6, tokens // 3, tokens // 2, tokens)]
    cases += [("first guess", system, jacobi(tokens))]
    cases += [("first guess, several frames", system, jacobi(tokens * frames, frames))
              for frames in (window // 2, window)]
    cases += [("from the noise, all frames", system, jacobi(tokens * window, window, "noise")),
              ("wavefront, 6 updates", system, Solver("wavefront", tokens * 2 // 3, window, 6, "noise"))]

    def decoder_of(solver: Solver, of: System = plain, videos: int = PROMPTS) -> Decoder:
        settings = dataclasses.replace(config.sample, frames=0, solver=solver)
        return deep_decoder(of, params, captions[:videos], settings)

    exact, _ = decoder_of(cases[0][2])()
    cases = [(name, of, loosest(partial(decoder_of, of=of), solver, exact)) for name, of, solver in cases]
    found = timed("decoding", {(name, solver, videos): decoder_of(solver, of, videos)
                               for name, of, solver in cases for videos in (1, PROMPTS)}, ROUNDS)
    rows = []
    for name, _, solver in cases:
        (u, passes), seconds = found[name, solver, PROMPTS]
        rows.append({"scheme": name, "block": solver.block_size, "frames_per_step": solver.frames_per_step or 1,
                     "tolerance": _tolerance(solver), "passes": passes, "error": relative_error(u, exact),
                     "seconds_one_video": found[name, solver, 1][1], f"seconds_{PROMPTS}_videos": seconds})
    return rows


def _tolerance(solver: Solver) -> float | str:
    """The tolerance of a solver that has one."""
    return solver.tolerance if solver.kind == "jacobi" else ""


def pretrained(config: Config, workdir: Path) -> tuple[System, Params]:
    """The model in the package, as sampling uses it."""
    system, params, *_ = load_pretrained(config, workdir)
    return system, inference_params(config, params)


def random_model(model: Model, guidance: float = 2.0) -> list[dict[str, Any]]:
    """A whole guided video (both stacks inverted, without the denoiser) in guided forward passes (shallow and deep
    on both branches), with random weights: how little the solver costs where nothing can be guessed."""
    of = RandomFlow(model, clips=1)
    video = RandomVideo(of, guidance)

    @jax.jit
    def forward(params: Any) -> tuple[jax.Array, ...]:
        return tuple(apply_flow(of.flow, {"params": params}, STARFlow.forward, of.x, text).z_BTSK
                     for text in video.texts_GBTD)

    def made(solver: Solver, guess: Guess | None) -> tuple[np.ndarray, float]:
        return video.decoded(solver, None if guess is None else guess(video.z_BTSK))

    def started_at(guess: Guess | None) -> Callable[[Solver], Decoder]:
        return lambda solver: partial(made, solver, guess)

    schemes = _schemes(video.tokens, model.frames, video.fitted())
    exact, _ = video.decoded(schemes["sequential"][0])
    for name, (solver, guess) in schemes.items():
        schemes[name] = loosest(started_at(guess), solver, exact), guess
    runs: dict[str, Callable[[], Any]] = {"forward": lambda: jax.block_until_ready(forward(of.params))}
    runs |= {name: started_at(guess)(solver) for name, (solver, guess) in schemes.items()}
    found: dict[str, tuple[Any, float]] = timed("random weights", runs, ROUNDS)
    _, pass_seconds = found.pop("forward")
    return [{"scheme": name, "tolerance": _tolerance(schemes[name][0]), "passes": passes,
             "error": relative_error(out, exact), "seconds": seconds, "guided_forward_passes": seconds / pass_seconds}
            for name, ((out, passes), seconds) in found.items()]


def _schemes(tokens: int, frames: int, guess: NoiseGuess) -> dict[str, tuple[Solver, Guess | None]]:
    """The solvers, and what each starts from; None: every frame from the one before."""
    frame_by_frame = Solver("jacobi", tokens, 1)
    return {
        "sequential": (Solver("sequential", 1, 1), None),
        "base line": (frame_by_frame, None),
        "from the noise": (frame_by_frame, lambda z: z),
        "guess from the noise": (frame_by_frame, guess),
        "the same, all frames": (Solver("jacobi", tokens * frames, frames), guess),
        "the same, wavefront of 3 updates": (Solver("wavefront", 3 * tokens, frames, updates=3, tolerance=TOLERANCE),
                                             guess)}


def lengths(config: Config, workdir: Path) -> list[dict[str, Any]]:
    """Longer and longer videos by the same compiled step: programs that their noisy frames compile, cache and time per
    latent frame."""
    system, params = pretrained(config, workdir)
    captions, programs = fixed_captions(config, "test", 1), count_programs()
    rows = []
    for times in LENGTHS:
        frames = 1 + (config.model.frames * times - 1) * config.codec.time_stride
        settings = dataclasses.replace(config.sample, frames=frames, solver=dataclasses.replace(
            config.sample.solver, frames_per_step=1))
        given = make_conditions(system, params, captions, [0], settings)
        before, began, made = programs(), time.perf_counter(), 0
        for u, _ in deep_frames(system, params, given, settings):
            made += jax.block_until_ready(u).shape[1]
        rows.append({"times_training_length": times, "latent_frames": made,
                     "programs_compiled": programs() - before,
                     "cache_megabytes": cache_bytes(system, settings.guidance > 0) / 1e6,
                     "live_megabytes": sum(a.nbytes for a in jax.live_arrays()) / 1e6,
                     "seconds_per_latent_frame": (time.perf_counter() - began) / made})
    return rows


def cache_bytes(system: System, guided: bool) -> int:
    """Of one video's window: keys and values of all layers and slots."""
    model = system.config.model
    slots = model.text_length + model.frames * model.tokens_per_frame
    return 2 * (1 + guided) * model.deep_layers * slots * model.deep_width * jnp.dtype(model.dtype).itemsize


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Time and passes against block size (the paper's Fig. 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("passes", "seconds_one_video"), ("passes of the deep block",
                                                                                         "seconds, one video")):
        for name in dict.fromkeys(row["scheme"] for row in rows):
            points = [(row["block"], row[key]) for row in rows if row["scheme"] == name]
            axes.plot(*zip(*points), marker="o", label=name)
        axes.set_xlabel("block size (tokens)")
        axes.set_ylabel(label)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
