"""The programs that sampling runs, in its order, compiled from shapes alone: those of sampling/generate.py for whole
videos, those of sampling/stream.py for a stream. A test compares them with what a run of these compiles.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow_jax import sharding
from starflow_jax.codec.interface import decode_latents, decode_next
from starflow_jax.codec.patch import PatchCodec
from starflow_jax.config import Config, Solver
from starflow_jax.flow import decode, inversion
from starflow_jax.flow.denoiser_stream import score_next
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.codec import patch_shape
from starflow_jax.model.parameters import decoding_variables
from starflow_jax.model.quantize import quantize_params
from starflow_jax.model.store import abstract_params
from starflow_jax.model.text import encode_text, text_encoder
from starflow_jax.planning import codec as plan_codec
from starflow_jax.planning.program import Program
from starflow_jax.sampling.conditions import draw_noise, latent_frames, stack_branches
from starflow_jax.sampling.denoise import denoiser_step
from starflow_jax.sampling.generate import joined
from starflow_jax.sampling.likelihood import window_nll
from starflow_jax.sampling.offload import with_tiles
from starflow_jax.sampling.solver import complete, deep_solver, shallow_solver
from starflow_jax.sampling.stream import place
from starflow_jax.sampling.windows import denoising_windows
from starflow_jax.text.pretrained import FLAN_T5_XL
from starflow_jax.text.t5 import T5Encoder


class Chain:
    """Programs compiled one after the other, each for the shapes, dtypes and shardings that those before it give."""

    def __init__(self, resident: dict[str, Any]) -> None:
        self.programs: list[Program] = []
        self.resident = resident  # what stays on the devices while they run, in shapes

    def run(self, name: str, function: Any, *args: Any, times: float = 1, unknown_trips: float = 1,
            options: dict[str, Any] | None = None, **keywords: Any) -> Any:
        """What the function, a jitted one, returns, in shapes."""
        lowered = function.lower(*args, **keywords)
        compiled = lowered.compile(compiler_options=options)
        self.programs.append(Program(name, compiled, times, unknown_trips, self._held_with((args, keywords)), lowered))
        return jax.tree.map(lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
                            lowered.out_info, compiled.output_shardings)

    def _held_with(self, arguments: Any) -> int:
        """Bytes a device of what is resident and of a program's arguments, also those that it makes no use of."""
        leaves = {id(leaf): leaf for leaf in jax.tree.leaves((self.resident, arguments)) if hasattr(leaf, "sharding")}
        return sum(map(_bytes_per_device, leaves.values()))


def _bytes_per_device(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


class Sampling:
    """The stages of sampling for plan.videos videos."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        config = with_tiles(config)
        self.config, self.mesh, self.flow = config, mesh, STARFlow(config.model)
        self.total = latent_frames(config, config.sample)
        self.params, self.codec = abstract_model(config, mesh)
        self.variables = decoding_variables(self.params)
        self.chain = Chain({"params": self.params, "codec": self.codec})
        self.shallow: dict[str, Any] = dict(solver=shallow_solver(self.solver), token_grid=config.model.token_grid)

    @property
    def solver(self) -> Solver:
        return complete(self.config.sample.solver, Solver(), self.config.model, stream=self.config.sample.stream)

    @property
    def window(self) -> int:
        """Frames of a video's first window."""
        return min(self.total, self.config.model.frames)

    @property
    def windows(self) -> int:
        return len(denoising_windows(self.config, self.total))

    def conditions(self) -> tuple[Any, Any]:
        """(text by branches, noise)."""
        model, videos, run = self.config.model, self.config.plan.videos, self.chain.run
        text = None
        if model.text_length:
            prompts = videos + (1 if self.config.sample.guidance else 0)
            ids = jax.ShapeDtypeStruct((prompts, model.text_length), jnp.int32)
            encoder, held = abstract_text_encoder(self.config), self.chain.resident
            ahead = self.config.sample.offload and self.config.text.encoder == "frozen"
            if ahead:
                self.chain.resident = {}
            features = run("text encoder", encode_text, encoder, self.params["text"], ids)
            if ahead:
                self.chain.resident = {**held, "params": {**self.params, "text": None}}
            text = run("text by branches", stack_branches, features, videos)
        seeds = jax.ShapeDtypeStruct((videos,), jnp.uint32)
        return text, run("noise", draw_noise, seeds, (self.total, model.tokens_per_frame, model.token_channels))

    def deep_frames(self, texts: Any, noise: Any) -> Iterator[tuple[int, Any]]:
        """(how often such a step runs, u of its frames), of each kind of step; the cache is resident from the first on.
        """
        model, solver = self.config.model, deep_solver(self.solver)
        how: dict[str, Any] = dict(window=model.frames, token_grid=model.token_grid)
        known = jax.ShapeDtypeStruct((*noise.shape[:1], 0, *noise.shape[2:]), noise.dtype)
        state = self.chain.run("deep block, the text", decode.start_window, self.flow, self.variables, known, texts,
                               guess_BSK=None, cache=self.config.sample.cache, **how)
        guidance = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(self.mesh))
        for index, (step, times) in enumerate(_steps(solver, self.window)):
            self.chain.resident["cache"] = state
            z = _frames(noise, step.frames)
            u, state, _ = self.chain.run(
                "deep block, a step" + (" like the first" if index == 0 and step != solver else ""),
                decode.decode_frames, self.flow, self.variables, state, z, guidance, None,
                solver=step, branches=1 if texts is None else texts.shape[0], times=times,
                unknown_trips=self.config.plan.updates, **how)
            self.chain.resident["cache"] = state
            yield times, u

    def whole(self) -> list[Program]:
        """As sampling/generate.py does."""
        config, run = self.config, self.chain.run
        texts, noise = self.conditions()
        made = [u for times, u in self.deep_frames(texts, noise) for _ in range(times)]
        del self.chain.resident["cache"]
        u = run("frames together", joined, *made)
        noisy, _ = run("shallow blocks, all frames", decode.invert_shallow, self.flow, self.variables, u,
                       unknown_trips=config.plan.updates, **self.shallow)
        window, text = _frames(noisy, self.window), _conditional(texts)
        if config.sample.denoise == "denoiser" and config.model.denoiser != "none":
            run("denoiser, a window", denoiser_step, self.flow, self.params, window, text, times=self.windows)
        run("codec, all frames", decode_latents, self.codec, noisy, config.codec.later_frames_scale,
            config.sample.as_released, options=_effort(config))
        whole = jax.ShapeDtypeStruct(window.shape, window.dtype, sharding=sharding.replicated(self.mesh))
        run("likelihood, a window", window_nll, self.flow, self.params, whole, text, times=self.windows)
        return self.chain.programs

    def stream(self) -> list[Program]:
        """As sampling/stream.py does."""
        config, model, run = self.config, self.config.model, self.chain.run
        texts, noise = self.conditions()
        text = _conditional(texts)
        noisy = jax.ShapeDtypeStruct(
            (*noise.shape[:1], self.total, model.height, model.width, model.channels), jnp.float32,
            sharding=sharding.named_sharding(self.mesh, ("batch",), noise.shape[:1]))
        for times, u in self.deep_frames(texts, noise):
            latents, _ = run("shallow blocks, a step", decode.invert_shallow, self.flow, self.variables, u,
                             times=times, unknown_trips=config.plan.updates, **self.shallow)
            noisy = run("frames in their places", place, noisy, latents, 0, times=times)
        denoises = config.sample.denoise == "denoiser" and model.denoiser != "none"
        if denoises and model.denoiser == "first_layer" and not config.sample.as_released:
            self._denoiser_stream(noisy, text)
        elif denoises:
            run("denoiser, a window", denoiser_step, self.flow, self.params, _frames(noisy, self.window), text,
                times=self.total)
        self._codec_stream(_frames(noisy, 1))
        return self.chain.programs

    def _denoiser_stream(self, noisy: Any, text: Any) -> None:
        ahead, state = 1 + self.config.model.denoiser_lookahead, None
        for name, frames, times in (("the first frame", ahead, 1), ("a frame", ahead, self.total - ahead),
                                    ("the last frames", 1, ahead - 1)):
            if times > 0:
                _, state = self.chain.run(
                    f"denoiser, {name}", score_next, self.flow, self.params["denoiser"], state, noisy, 0, text,
                    frames=min(frames, self.total), times=times)
                self.chain.resident["denoiser"] = state

    def _codec_stream(self, latent: Any) -> None:
        cache: Any = None
        for name, times in (("the first frame", 1), ("a frame", self.total - 1)):
            if times > 0:
                _, cache = self.chain.run(
                    f"codec, {name}", decode_next, self.codec, latent, cache, self.config.codec.later_frames_scale,
                    self.config.sample.as_released, times=times, options=_effort(self.config))
                self.chain.resident["codec's cache"] = cache


def sampling_programs(config: Config, mesh: Mesh) -> list[Program]:
    """The programs of plan.videos videos of config.sample, of a stream of them with sample.stream, on the mesh."""
    sampling = Sampling(config, mesh)
    return sampling.stream() if config.sample.stream else sampling.whole()


def _steps(solver: inversion.Solver, frames: int) -> list[tuple[inversion.Solver, int]]:
    """The solvers of a window's steps, in order, and how many steps in a row have each."""
    steps, done = [], 0
    while done < frames:
        step = solver if done else solver.of_first_frame
        steps.append(dataclasses.replace(step, frames=min(step.frames, frames - done)))
        done += steps[-1].frames
    return [(step, len(list(same))) for step, same in itertools.groupby(steps)]


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


def _effort(config: Config) -> dict[str, Any] | None:
    return plan_codec.LEAST_EFFORT if config.codec.kind == "wan" else None


def abstract_text_encoder(config: Config) -> T5Encoder:
    """The encoder of text.weights; where no folder is named, a frozen one has the depth of flan-t5-xl."""
    if config.text.encoder == "frozen" and not config.text.weights:
        sizes = dataclasses.replace(FLAN_T5_XL, d_model=config.model.text_dim)
        return T5Encoder(sizes, dtype=jnp.dtype(config.model.dtype))
    return text_encoder(config)


def abstract_model(config: Config, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """(parameters as `load_model` places them on the mesh, the codec), in shapes."""
    params = abstract_params(config, mesh)
    if config.text.encoder == "frozen" and config.model.text_length:
        encoder, ids = abstract_text_encoder(config), jax.ShapeDtypeStruct((1, config.model.text_length), jnp.int32)
        shapes = jax.eval_shape(lambda ids: encoder.init(jax.random.key(0), ids)["params"], ids)
        shapes = sharding.layers_as(shapes, jnp.dtype(config.model.dtype))
        if config.sample.weights == "int8":
            params |= sharding.abstract(jax.eval_shape(quantize_params, {"text": shapes}), mesh)
        else:
            params["text"] = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                  sharding=sharding.spread_sharding(leaf.shape, mesh)), shapes)
    return params, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)),
        abstract_codec(config))


def abstract_codec(config: Config) -> Any:
    """The config's codec in shapes."""
    if config.codec.kind != "patch":
        return plan_codec.abstract_codec(config)
    shape = patch_shape(config)
    mean_P, basis_PC, scale = (jax.ShapeDtypeStruct(size, jnp.float32) for size in (
        (shape.pixels,), (shape.pixels, config.model.channels), ()))
    return PatchCodec(mean_P, basis_PC, scale, shape)  # type: ignore[arg-type]  # shapes in place of arrays
