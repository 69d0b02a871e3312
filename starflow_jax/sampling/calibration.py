"""Decoding made fast for one trained model: first guesses are fitted, and solvers and block sizes are measured."""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Model, Sample, Solver, UserError, changed
from starflow_jax.data.evaluation import evaluation_batches
from starflow_jax.data.examples import ClipLength, TextInput, parts_of
from starflow_jax.flow import first_guess, inversion
from starflow_jax.io.progress import ProgressBar
from starflow_jax.io.timing import timed
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import data_source, fixed_captions
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import in_batches
from starflow_jax.sampling.conditions import make_conditions, noise_for, shallow_tokens
from starflow_jax.sampling.generate import deep_frames
from starflow_jax.sampling.solver import chosen_solver, deep_solver
from starflow_jax.sharding import fetch

FITTED_CLIPS = 4_096
PROMPTS = 16
SAMPLED_CLIPS = 32  # videos whose tokens are fitted to their noise
ROUNDS = 3  # timings of each candidate, of which the median counts
TOLERANCES = tuple(float(f"{10 ** (-2 - step / 12):.1e}") for step in range(25))  # 1e-2 to 1e-4
ERROR = 1e-3  # largest allowed squared distance to sequential decoding, as a share of the squared norm

Decoder = Callable[[], tuple[np.ndarray, float]]  # -> (what is decoded, runs of the deep block)


@dataclasses.dataclass(frozen=True)
class Measured:
    """How one solver does on a few prompts."""

    solver: Solver
    passes: float  # runs of the deep block, mean over videos
    updates: float  # of a block, mean over blocks and videos
    seconds: float  # for all prompts
    error: float  # `relative_error` against sequential decoding


def fit_guess(system: System, params: Params) -> first_guess.FirstGuess:
    """The first frame of a clip, as the deep block sees it, from its caption; fitted to training clips.

    Raises UserError where none of them has the size that is sampled.
    """
    texts, frames = [], []
    text = TextInput(lambda caption, _, **metadata: system.prompt(caption, **metadata), system.text_ids)
    source = data_source(system.config, "train")
    batches = evaluation_batches(source, ClipLength(1), text, batch_size=64, limit=FITTED_CLIPS)
    clips = min(FITTED_CLIPS, sum(map(len, parts_of(source, "images"))))
    with ProgressBar("first guess", clips, unit="clip", compiles=True) as progress:
        for index, batch in enumerate(batches):
            latents = system.latents_of(batch)
            if latents.shape[2:4] == (system.config.model.height, system.config.model.width):  # prepared: others, too
                noise = jax.random.normal(jax.random.key(index), latents.shape)
                noisy = latents + system.config.model.noise_std * noise
                frames.append(np.asarray(shallow_tokens(system.flow, params, noisy))[:, 0])
                texts.append(np.asarray(system.features(params, batch.text_B)))
            progress.update(int(np.sum(fetch(batch.valid_B))))
    if not frames:
        raise UserError(f"calibration needs training clips of the size that is sampled, {system.config.model.height}x"
                        f"{system.config.model.width} latents; the prepared data holds none")
    return first_guess.fit(np.concatenate(texts), np.concatenate(frames))


def fit_noise_guess(system: System, params: Params) -> first_guess.NoiseGuess:
    """Tokens of u from their noise; fitted to sampled videos, guided as the config says."""
    model, captions = system.config.model, fixed_captions(system.config, "train", SAMPLED_CLIPS)
    settings = whole_clips(system.config, start="previous")
    shape, pairs = (model.frames, model.tokens_per_frame, model.token_channels), []
    with ProgressBar("guess from the noise", len(captions), unit="clip", compiles=True) as progress:
        for begin, batch in zip(itertools.count(step=PROMPTS), in_batches(captions, PROMPTS)):
            u, _ = decode_deep(system, params, batch, settings, first_seed=begin)
            z = np.asarray(noise_for(range(begin, begin + len(batch)), shape))
            pairs.append((z, u))
            progress.update(len(batch))
    return first_guess.fit_noise(*map(np.concatenate, zip(*pairs)))


def whole_clips(config: Config, **solver: object) -> Sample:
    """The config's settings for whole videos of the training length, with these of the solver's changed."""
    return changed(config, "sample", {"frames": 0, "stream": False, "solver": solver}).sample


def candidates(system: System) -> list[Solver]:
    """One token after another; block Jacobi over parts of a frame, a frame, several frames; wavefronts of a whole
    window of frames."""
    tokens, window = system.config.model.tokens_per_frame, system.config.model.frames

    def jacobi(block_size: int, frames: int, start: str) -> Solver:
        return Solver("jacobi", block_size, frames, start=start)

    parts = [jacobi(size, 1, "previous") for size in sorted({-(-tokens // n) for n in (10, 6, 4, 3, 2)})]
    several = sorted({1, max(1, window // 2), window})
    whole = [jacobi(tokens * frames, frames, start) for frames in several for start in ("previous", "noise")]
    sizes = sorted({max(updates, tokens * share // 4) for updates in (3, 6) for share in (2, 4)})
    wavefronts = [Solver("wavefront", size, window, updates, "noise") for size in sizes for updates in (3, 6)]
    return [Solver("sequential"), *parts, *whole, *wavefronts]


def measure(system: System, params: Params) -> list[Measured]:
    """Each candidate on a few validation prompts, used as a calibrated solver is and at its loosest tolerance."""
    captions = fixed_captions(system.config, "validation", PROMPTS)
    exact, _ = decode_deep(system, params, captions, whole_clips(system.config, kind="sequential"))
    open_settings = whole_clips(system.config, kind="", start="", block_size=0, frames_per_step=0, tolerance=-1.0)

    def decoder_of(solver: Solver) -> Decoder:
        calibration = dataclasses.replace(system.calibration, solver=solver, platform="")
        calibrated = dataclasses.replace(system, calibration=calibration)
        return deep_decoder(calibrated, params, captions, open_settings)

    found, decoders = candidates(system), {}
    with ProgressBar("tolerances", len(found), unit="solver", compiles=True) as progress:
        for solver in found:
            solver = loosest(decoder_of, solver, exact)
            decoders[solver] = decoder_of(solver)
            progress.update()
    model = system.config.model
    return [Measured(solver, passes, mean_updates(solver, passes, model), seconds, relative_error(u, exact))
            for solver, ((u, passes), seconds) in timed("measuring", decoders, ROUNDS).items()]


def loosest(decoder_of: Callable[[Solver], Decoder], solver: Solver, exact: np.ndarray) -> Solver:
    """The solver with the largest of TOLERANCES that stays within ERROR of what is exact, or else with the smallest.
    A wavefront and sequential decoding have none: they make the same updates at any."""
    if solver.kind != "jacobi":
        return solver

    def at(index: int) -> Solver:
        return dataclasses.replace(solver, tolerance=TOLERANCES[index])

    def within(index: int) -> bool:
        found, _ = decoder_of(at(index))()
        return relative_error(np.asarray(found), exact) <= ERROR

    smallest = len(TOLERANCES) - 1
    return at(bisect.bisect_left(range(smallest), True, key=within))


def decode_deep(system: System, params: Params, captions: Sequence[str], settings: Sample, first_seed: int = 0
                ) -> tuple[np.ndarray, float]:
    """(u of all captions' videos, runs of the deep block as a mean over them)."""
    return deep_decoder(system, params, captions, settings, first_seed)()


def deep_decoder(system: System, params: Params, captions: Sequence[str], settings: Sample, first_seed: int = 0
                 ) -> Decoder:
    """What `decode_deep` does, as a function to be timed: text and first guesses are ready before."""
    solver, size = deep_solver(chosen_solver(system, settings)), settings.batch_size
    batches = list(in_batches(captions, size))
    given = jax.block_until_ready([
        make_conditions(system, params, batch, range(begin, begin + len(batch)), settings)
        for begin, batch in zip(itertools.count(first_seed, size), batches)])

    def decode_all() -> tuple[np.ndarray, float]:
        parts, passes = [], 0.0
        for batch, conditions in zip(batches, given):
            made, reports = zip(*deep_frames(system, params, conditions, settings))
            parts.append(np.asarray(jnp.concatenate(made, axis=1)))
            passes += sum(deep_passes(report, solver) for report in reports) * len(batch) / len(captions)
        return np.concatenate(parts), passes

    return decode_all


def deep_passes(report: inversion.Report, solver: inversion.Solver) -> float:
    """Runs of the deep block, mean over samples; one run of a wavefront updates all strides of its window."""
    steps = np.asarray(report.steps)
    return float(len(steps) + solver.updates - 1 if solver.updates else steps.sum(axis=0).mean())


def mean_updates(solver: Solver, passes: float, model: Model) -> float:
    """Of a block of a whole video, which took so many runs of the deep block; of a wavefront, and of one token after
    another, those of a token."""
    if solver.kind != "jacobi":
        return float(solver.updates if solver.kind == "wavefront" else 1)
    frames = [min(solver.frames_per_step, model.frames - at) for at in range(0, model.frames, solver.frames_per_step)]
    return passes / sum(-(-count * model.tokens_per_frame // solver.block_size) for count in frames)


def relative_error(u: np.ndarray, exact: np.ndarray) -> float:
    """Mean over videos of ||u - exact||^2 / ||exact||^2."""
    axes = tuple(range(1, u.ndim))
    return float((((u - exact) ** 2).sum(axes) / (exact**2).sum(axes)).mean())
