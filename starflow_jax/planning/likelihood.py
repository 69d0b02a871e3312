"""The programs that measure a given clip of the training length, compiled from shapes alone: evaluate.draws of its
likelihood, with and without its caption, and its way to z and back, as evaluation/likelihood.py has them for
--mode=evaluate --config.evaluate.task=video; and the likelihood by frames, which `model.log_likelihood` runs. A test
compares them with what those compile.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starflow_jax.codec.interface import decode_latents, encode_frames
from starflow_jax.config import Config, Solver, changed
from starflow_jax.flow import inversion
from starflow_jax.model.codec import frame_size, pixel_frames
from starflow_jax.model.text import encode_text
from starflow_jax.planning.abstract import abstract_text_encoder
from starflow_jax.planning.program import Program
from starflow_jax.planning.sampling import Sampling, effort
from starflow_jax.sampling.batches import in_batches
from starflow_jax.sampling.conditions import draw_noise, with_noise
from starflow_jax.sampling.denoise import denoiser_alone, denoiser_step, score_step
from starflow_jax.sampling.generate import encode_z
from starflow_jax.sampling.likelihood import window_nll, window_nll_per_token
from starflow_jax.sampling.shallow import joined


class GivenClip(Sampling):
    """The stages of measuring one clip; those of its way back from z are sampling's, exact and without guidance."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        super().__init__(changed(changed(config, "plan", {"videos": 1}), "sample", dict(
            guidance=0.0, later_guidance=-1.0, solver=vars(Solver("jacobi", tolerance=0.0)), frames=0, stream=False,
            offload=False, renoise=False, draft="")), mesh)

    def _deep_updates(self, solver: inversion.Solver) -> float | None:
        """As many as of a small block, or plan.updates: too few for a frame at once, but how many tolerance 0 takes is
        the clip's matter."""
        return self._shallow_updates

    def given(self) -> list[Program]:
        """All of them."""
        settings, run = self.config.evaluate, self.chain.run
        batches = collections.Counter(map(len, in_batches(range(settings.draws), settings.batch_size)))
        latents = run("codec, encode", encode_frames, self.codec, self._frames(), self.config.codec.later_frames_scale,
                      times=3, options=effort(self.config))
        for draws, times in batches.items():
            noisy, text = self._noised(latents, draws, times), self._text(draws, 2 * times)
            run(f"likelihood, {draws} draws", window_nll_per_token, self.flow, self.params, noisy, text,
                times=2 * times)
            run(f"likelihood by frames, {draws} draws", window_nll, self.flow, self.params, noisy, text, times=0)
        noisy, text = self._noised(latents, 1), self._text(1)
        back = self._decoded(run("to z", encode_z, self.flow, self.params, noisy, text), text)
        if self.config.sample.denoise == "denoiser" and self.config.model.denoiser != "none":
            run("denoiser", denoiser_step, self.flow, denoiser_alone(self.params), back, text, self.total)
        elif self.config.sample.denoise == "score":
            run("score", score_step, self.flow, self.params, back, text, None, self.total)
        run("codec, decode", decode_latents, self.codec, back, self.config.codec.later_frames_scale,
            self.config.sample.as_released, times=2, options=effort(self.config))
        return self.chain.programs

    def _frames(self) -> Any:
        return jax.ShapeDtypeStruct((1, pixel_frames(self.config), *frame_size(self.config), 3), jnp.uint8)

    def _noised(self, latents: Any, draws: int, times: int = 1) -> Any:
        model, run = self.config.model, self.chain.run
        seeds = jax.ShapeDtypeStruct((draws,), jnp.uint32)
        shape = self.total, model.height * model.width, model.channels
        noise = run("noise", draw_noise, seeds, shape, 0, times=times)
        return run("noised latents", with_noise, latents, noise, model.noise_std, times=times)

    def _text(self, prompts: int, times: int = 1) -> Any:
        """Features of so many captions; None: a model without text."""
        ids = jax.ShapeDtypeStruct((prompts, self.config.model.text_length), np.int32)
        return self.chain.run(f"text encoder, {prompts} captions", encode_text, abstract_text_encoder(self.config),
                              self.params["text"], ids, times=times)

    def _decoded(self, z: Any, text: Any) -> Any:
        """As `decode_z` does."""
        texts = jax.ShapeDtypeStruct((1, *text.shape), text.dtype,
                                     sharding=NamedSharding(self.mesh, PartitionSpec(None, *text.sharding.spec)))
        of_step = self.deep_frames(texts, z)
        self._drop_caches()
        return self.shallow_frames(self.chain.run("frames together", joined, *(of_step[step] for step in self.steps)))


def likelihood_programs(config: Config, mesh: Mesh) -> list[Program]:
    """The programs of config.evaluate.draws of one clip on the mesh."""
    return GivenClip(config, mesh).given()
