"""The programs that sampling runs, in its order, compiled from shapes alone: those of sampling/generate.py for whole
videos, those of sampling/stream.py for a stream. A test compares them with what a run of these compiles.
"""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow_jax import sharding
from starflow_jax.codec.interface import decode_latents, decode_next
from starflow_jax.config import Config, Solver
from starflow_jax.flow import decode, generation, inversion
from starflow_jax.flow.control import LatentCameras, Steering, ray_tokens
from starflow_jax.flow.denoiser_stream import score_next
from starflow_jax.flow.schedule import Step, schedule
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.parameters import decoding_variables, shallow_variables
from starflow_jax.model.text import encode_text
from starflow_jax.nn.cache import BLOCK, rounded_slots
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning.abstract import abstract_model, abstract_text_encoder
from starflow_jax.planning.chain import Chain
from starflow_jax.planning.program import Program
from starflow_jax.sampling.conditions import draw_noise, latent_frames, stack_branches
from starflow_jax.sampling.denoise import denoiser_alone, denoiser_step, score_step
from starflow_jax.sampling.generate import drafting
from starflow_jax.sampling.likelihood import window_nll
from starflow_jax.sampling.offload import takes_turns, with_tiles
from starflow_jax.sampling.renoise import encode_again
from starflow_jax.sampling.shallow import filled_at_once, frames_at_once, joined, part_of, parts_together
from starflow_jax.sampling.sizes import frames_together
from starflow_jax.sampling.solver import complete, deep_solver, shallow_solver
from starflow_jax.sampling.stream import by_frames, place
from starflow_jax.sampling.windows import Window, context_frames, denoising_windows

UPDATES, UP_TO = 8, 128  # of a block of up to so many tokens
# --mode=calibrate on the package's model: 6.8 updates of blocks of 36 tokens, 10.1 of 72, 15.8 of 144.
GROWTH = 0.61


def assumed_updates(asked: int, solver: inversion.Solver, tokens: int) -> float | None:
    """Updates of each block of so many tokens until it has converged: plan.updates, or what is likely, and no more than
    the solver makes. None: a wavefront, which has no loop until something has converged."""
    if solver.updates:
        return None
    block = min(solver.block_size, tokens)
    return min(asked or UPDATES * max(1.0, block / UP_TO)**GROWTH, solver.max_steps or block)


class Sampling:
    """The stages of sampling for plan.videos videos."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        config = with_tiles(config)
        self.config, self.mesh, self.flow = config, mesh, STARFlow(config.model)
        self.total = latent_frames(config, config.sample)
        self.params, self.codec = abstract_model(config, mesh)
        self.variables, self.shallow_blocks = decoding_variables(self.params), shallow_variables(self.params)
        # As sampling/offload.py: what waits in the host's memory is on the devices as an argument alone.
        self.in_turns = takes_turns(config.sample)
        resident: dict[str, Any] = {"params": self.params, "codec": self.codec}
        if self.in_turns:
            resident = {"params": self._without_denoiser()}
            if config.sample.stream:
                resident["params"]["flow"] = self.shallow_blocks["params"]
        self.chain = Chain(resident, (self.params, self.codec))
        self.seeds = jax.ShapeDtypeStruct((config.plan.videos,), jnp.uint32)
        self.shallow: dict[str, Any] = dict(solver=shallow_solver(self.solver), token_grid=config.model.token_grid)

    def _without_denoiser(self) -> dict[str, Any]:
        return {name: part for name, part in self.params.items() if name != "denoiser"}

    @property
    def solver(self) -> Solver:
        return complete(self.config.sample.solver, Solver(), self.config.model, stream=self.config.sample.stream)

    @property
    def _shallow_updates(self) -> float | None:
        """Of a frame at once, whose tokens depend little on one another."""
        solver, model = self.shallow["solver"], self.config.model
        tokens = model.tokens_per_frame * (1 if model.local_shallow else self.total)
        return assumed_updates(self.config.plan.updates or UPDATES, solver, tokens)

    def _deep_updates(self, solver: inversion.Solver) -> float | None:
        return assumed_updates(self.config.plan.updates, solver, solver.frames * self.config.model.tokens_per_frame)

    @property
    def window(self) -> int:
        """Frames of a window behind the deep block."""
        return frames_together(self.config.model, self.total)

    @property
    def windows(self) -> int:
        return sum(1 for _ in denoising_windows(self.config, self.total))

    def conditions(self) -> tuple[Any, Any]:
        """(text by branches, noise of a step)."""
        model, videos, run = self.config.model, self.config.plan.videos, self.chain.run
        text = None
        if model.text_length:
            prompts = videos + (1 if self.config.sample.guided else 0)
            ids = jax.ShapeDtypeStruct((prompts, model.text_length), jnp.int32)
            encoder, held = abstract_text_encoder(self.config), self.chain.resident
            ahead = self.config.sample.offload and self.config.text.encoder == "frozen"
            if ahead:
                self.chain.resident = {}
            captions = 2 if self.total > model.frames else 1  # of a window that has moved on, others
            features = run("text encoder", encode_text, encoder, self.params["text"], ids, times=captions)
            if ahead:
                self.chain.resident = {**held, "params": {**held["params"], "text": None}}
            text = run("text by branches", stack_branches, features, videos, times=captions)
        shape = model.tokens_per_frame, model.token_channels
        drawn = [run("noise of a step", draw_noise, self.seeds, (frames, *shape), 0, times=times)
                 for frames, times in collections.Counter(step.frames for step in self.steps).items()]
        return text, drawn[0]

    @property
    def steps(self) -> list[inversion.Solver]:
        """The deep block's steps in order, each as a solver of its own number of frames."""
        return [dataclasses.replace(step.solver, frames=step.frames) for step in self._schedule()]

    def _schedule(self) -> Iterator[Step]:
        return schedule(self.total, 0, deep_solver(self.solver), window=self.config.model.frames,
                        context=context_frames(self.config.model, self.config.sample))

    def deep_frames(self, texts: Any, noise: Any) -> dict[inversion.Solver, Any]:
        """u of each kind of step's frames, in the order of `steps`; the cache is resident from the first on."""
        how: dict[str, Any] = dict(window=self.config.model.frames, token_grid=self.config.model.token_grid)
        encoded = collections.Counter(step.encode for step in self._schedule() if step.index and step.encode)
        guidance = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(self.mesh))
        branches = 1 if texts is None else texts.shape[0]
        nothing = jax.ShapeDtypeStruct((noise.shape[0], 0, *noise.shape[2:]), noise.dtype)
        steers = {frames: self._steering(frames, times)
                  for frames, times in collections.Counter(step.frames for step in self.steps).items()}
        state = self._begin("the text", texts, nothing)
        draft = drafting(self.config.model, self.params["draft"], self.config.sample) if self.drafts else None
        drafted = self._begin("the text", texts, nothing, draft=draft) if draft else None
        made = {}
        filled = self._filled()
        for index, (step, times) in enumerate(collections.Counter(self.steps).items()):
            self.chain.resident |= {"cache": state, "draft's cache": drafted}
            like = " like the first" if index == 0 and step != deep_solver(self.solver) else ""
            z, start, solving = _frames(noise, step.frames), None, dict(
                branches=branches, times=times, updates=self._deep_updates(step),
                filled=filled[step], **how)
            if draft:
                start, _ = self.chain.run(
                    f"draft, a step{like}", decode.draft_frames, draft.model, draft.params, drafted, z, guidance, None,
                    solver=dataclasses.replace(step, tolerance=draft.tolerance), **solving)
            made[step], state, _ = self.chain.run(
                f"deep block, a step{like}", decode.decode_frames, self.flow, self.variables, state, z, guidance, start,
                steers[step.frames], solver=step, **solving)
            if draft:
                drafted = self.chain.run(
                    f"draft, behind a step{like}", decode.follow_frames, draft.model, draft.params, drafted, made[step],
                    branches=branches, times=times, **how)
        for frames, times in encoded.items():
            self._drop_caches()
            kept = _frames(made[step], frames)
            if self.config.sample.renoise:
                kept = self._renoised(_frames(made[step], self.config.model.frames), texts, frames, times)
            for one in (None, draft) if draft else (None,):
                self._begin("frames encoded again", texts, kept, times, one)
        self.chain.resident |= {"cache": state, "draft's cache": drafted}
        return made

    def _steering(self, frames: int, times: float = 1) -> Steering | None:
        """Of so many frames in a window, as sampling/conditions.py does; None for a model without a control module."""
        if "control" not in self.params:
            return None
        model, shape = self.config.model, (self.config.plan.videos, frames, self.config.codec.time_stride)
        poses = [jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=sharding.replicated(self.mesh))
                 for sizes in ((*shape, 4), (*shape, 4, 4), (shape[0], 4, 4), (*shape[:2], 4, 4))]
        rays = self.chain.run(f"rays of the cameras of {frames} frames", ray_tokens, LatentCameras(*poses[:2]),
                              *poses[2:], model, times=times)
        return self.params["control"], rays

    @property
    def drafts(self) -> bool:
        """Whether a smaller deep block drafts each step."""
        return "draft" in self.params

    def _drop_caches(self) -> None:
        self.chain.resident |= {"cache": None, "draft's cache": None}

    def _filled(self) -> dict[inversion.Solver, float]:
        """Of each kind of step the share of its cache that is filled, on the average over steps and blocks."""
        model, shares = self.config.model, collections.defaultdict[inversion.Solver, list[float]](list)
        tokens, in_window = model.tokens_per_frame, 0
        for step, kind in zip(self._schedule(), self.steps):
            in_window = in_window if step.encode is None else step.encode
            before = model.text_length + in_window * tokens
            shares[kind].append(filled_share(before, step.frames * tokens, step.solver.block_size,
                                             model.text_length + model.frames * tokens))
            in_window += step.frames
        return {kind: sum(found) / len(found) for kind, found in shares.items()}

    def _begin(self, name: str, texts: Any, known: Any, times: int = 1, draft: generation.Draft | None = None) -> Any:
        model = self.config.model
        flow, variables = (draft.model, draft.params) if draft else (self.flow, self.variables)
        return self.chain.run(
            f"{'draft' if draft else 'deep block'}, {name}", decode.start_window, flow, variables, known, texts,
            guess_BSK=None, window=model.frames, token_grid=model.token_grid, cache=self.config.sample.cache,
            steering=self._steering(known.shape[1], times) if known.shape[1] and not draft else None, times=times)

    def _renoised(self, u: Any, texts: Any, frames: int, times: int) -> Any:
        """As sampling/renoise.py does."""
        sample, text = self.config.sample, _conditional(texts)
        noisy = self.shallow_frames(u, "of a window", times)
        step, given = (score_step, (self.params, noisy, text, self._steering(noisy.shape[1], times))
                       ) if sample.denoise == "score" else (denoiser_step, (denoiser_alone(self.params), noisy, text))
        clean = self.chain.run(f"{sample.denoise}, frames encoded again", step, self.flow, *given, times=times)
        fresh = self.chain.run("noise of frames encoded again", draw_noise, self.seeds, (frames, *clean.shape[2:]), 0,
                               times=times)
        return self.chain.run("shallow blocks, frames encoded again", encode_again, self.flow, self.shallow_blocks,
                              clean, fresh, times=times)

    def whole(self) -> list[Program]:
        """As sampling/generate.py does."""
        config, run = self.config, self.chain.run
        texts, noise = self.conditions()
        of_step = self.deep_frames(texts, noise)
        self._drop_caches()
        self._shallow_parts(of_step)
        window, text = self._latents(self.window), _conditional(texts)
        if config.sample.denoise == "denoiser" and config.model.denoiser != "none":
            run("denoiser, a window", denoiser_step, self.flow, denoiser_alone(self.params), window, text, self.window,
                times=self.windows)
        elif config.sample.denoise == "score":
            run("score, a window", score_step, self.flow, self.params, window, text,
                self._steering(self.window, self.windows), self.window, times=self.windows)
        if config.codec.tile:
            run("codec, all frames", decode_latents, self.codec, self._latents(self.total),
                config.codec.later_frames_scale, config.sample.as_released, options=effort(config))
        else:
            self._codec_stream(self._latents(1))
        whole = jax.ShapeDtypeStruct(window.shape, window.dtype, sharding=sharding.replicated(self.mesh))
        run("likelihood, a window", window_nll, self.flow, self._without_denoiser(), whole, text,
            self._steering(self.window, self.windows), times=self.windows)
        return self.chain.programs

    def _latents(self, frames: int) -> Any:
        """Of so many frames of all videos, as they come from the host."""
        model, videos = self.config.model, (self.config.plan.videos,)
        placed = sharding.named_sharding(self.mesh, ("batch",), videos)
        return jax.ShapeDtypeStruct((*videos, frames, model.height, model.width, model.channels), jnp.float32,
                                    sharding=placed)

    def _shallow_parts(self, of_step: dict[inversion.Solver, Any]) -> None:
        """The latents of whole videos, as `invert_videos` makes them. of_step: as `deep_frames` returns it."""
        run, frame = self.chain.run, None
        for step, times in collections.Counter(self.steps).items():
            frame = made = of_step[step]
            if step.frames > 1:
                frame = run("a frame of a step", part_of, made, 0, 1, times=times * step.frames)
        at_once = filled_at_once(self.config.model, self.config.plan.videos, self.total)
        parts = -(-self.total // at_once)
        u = run(f"{at_once} frames together", joined, *[frame] * at_once, times=parts)
        run(f"shallow blocks, {at_once} frames", decode.invert_shallow, self.flow, self.shallow_blocks, u, times=parts,
            updates=self._shallow_updates, filled=self._shallow_filled, **self.shallow)

    @property
    def _shallow_filled(self) -> float:
        """Of a shallow block's cache, whose sequence is a frame; of all frames where such blocks see them all."""
        tokens = self.config.model.tokens_per_frame * (1 if self.config.model.local_shallow else self.total)
        return filled_share(0, tokens, self.shallow["solver"].block_size, tokens)

    def shallow_frames(self, u: Any, which: str = "all", runs: int = 1) -> Any:
        """Latents of whole videos, in shapes, as sampling/shallow.py makes them, so often."""
        run, flow, variables = self.chain.run, self.flow, self.shallow_blocks
        invert = dict(updates=self._shallow_updates, filled=self._shallow_filled, **self.shallow)
        videos, frames = u.shape[:2]
        at_once = frames_at_once(self.config.model, videos, frames)
        if at_once == frames:
            return run(f"shallow blocks, {which} frames", decode.invert_shallow, flow, variables, u, times=runs,
                       **invert)[0]
        parts = -(-frames // at_once)
        part = run(f"{at_once} of {which} frames", part_of, u, 0, at_once, times=runs * parts)
        made = run(f"shallow blocks, {at_once} of {which} frames", decode.invert_shallow, flow, variables, part,
                   times=runs * parts, **invert)
        return run(f"{which} frames together", parts_together, [made] * parts, videos, frames, times=runs)[0]

    def stream(self) -> list[Program]:
        """As sampling/stream.py does."""
        config, model, run = self.config, self.config.model, self.chain.run
        texts, noise = self.conditions()
        text = _conditional(texts)
        noisy = self._latents(model.frames)
        times_of = collections.Counter(self.steps)
        for step, u in self.deep_frames(texts, noise).items():
            times = times_of[step]
            latents, _ = run("shallow blocks, a step", decode.invert_shallow, self.flow, self.shallow_blocks, u,
                             times=times, updates=self._shallow_updates, filled=self._shallow_filled,
                             **self.shallow)
            noisy = run("frames in their places", place, noisy, _frames(latents, 1), 0, times=times)
        denoises = config.sample.denoise == "denoiser" and model.denoiser != "none"
        if denoises:
            windows = list(denoising_windows(config, self.total))
            whole = [window for window in windows if not by_frames(config, window)]
            if whole:
                run("denoiser, a window", denoiser_step, self.flow, denoiser_alone(self.params), noisy, text,
                    self.window, times=sum(window.end - window.begin for window in whole))
            self._denoiser_stream(noisy, text, [window for window in windows if by_frames(config, window)])
        self._codec_stream(_frames(noisy, 1))
        return self.chain.programs

    def _denoiser_stream(self, noisy: Any, text: Any, windows: list[Window]) -> None:
        """Of windows that are worked on frame by frame, each from its beginning on."""
        ahead, state = 1 + self.config.model.denoiser_lookahead, None
        further = [(window, frame) for window in windows for frame in range(window.start + 1, window.end)]
        last = sum(frame + ahead > window.stop for window, frame in further)
        for name, frames, times in (("the first frame", ahead, len(windows)),
                                    ("a frame", ahead, len(further) - last), ("the last frames", 1, last)):
            if times > 0:
                _, state = self.chain.run(
                    f"denoiser, {name}", score_next, self.flow, self.params["denoiser"], state, noisy, 0, text,
                    frames=min(frames, self.total), times=times)
                if not self.in_turns:
                    self.chain.resident["denoiser"] = state

    def _codec_stream(self, latent: Any) -> None:
        cache: Any = None
        for name, times in (("the first frame", 1), ("a frame", self.total - 1)):
            if times > 0:
                _, cache = self.chain.run(
                    f"codec, {name}", decode_next, self.codec, latent, cache, self.config.codec.later_frames_scale,
                    self.config.sample.as_released, times=times, options=effort(self.config))
                if not self.in_turns:
                    self.chain.resident["codec's cache"] = cache


def sampling_programs(config: Config, mesh: Mesh) -> list[Program]:
    """The programs of plan.videos videos of config.sample, of a stream of them with sample.stream, on the mesh."""
    sampling = Sampling(config, mesh)
    return sampling.stream() if config.sample.stream else sampling.whole()


def filled_share(before: int, tokens: int, block: int, slots: int) -> float:
    """Of a cache for `slots` the share that attention reads, in whole blocks of its kernel, on the average over the
    solver's blocks of some tokens behind those `before` them."""
    starts, room = np.arange(before, before + tokens, min(block, tokens)), rounded_slots(slots)
    return float(np.clip(-(-starts // BLOCK) * BLOCK, min(BLOCK, room), room).mean() / room)


def _frames(array_BN: Any, frames: int) -> Any:
    """So many frames of an array, in shapes."""
    return jax.ShapeDtypeStruct((array_BN.shape[0], frames, *array_BN.shape[2:]), array_BN.dtype,
                                sharding=array_BN.sharding)


def _conditional(texts_GBSD: Any) -> Any:
    """texts[0], in shapes."""
    if texts_GBSD is None:
        return None
    placed = NamedSharding(texts_GBSD.sharding.mesh, PartitionSpec(*texts_GBSD.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(texts_GBSD.shape[1:], texts_GBSD.dtype, sharding=placed)


def effort(config: Config) -> dict[str, Any] | None:
    """The compiler's options for a codec's programs."""
    return plan_codec.LEAST_EFFORT if config.codec.kind == "wan" else None
