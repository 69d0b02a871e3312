"""Exact likelihoods of videos, frame by frame."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from starflow_jax.data.pipeline import evaluation_batches
from starflow_jax.flow.likelihood import nats
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.sources import training_source
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Text, text_at
from starflow_jax.sampling.windows import windowed
from starflow_jax.sharding import fetch, lay_out


def frame_nats(system: System, params: Params, noisy: jax.Array, text: Text) -> jax.Array:
    """(B, N) exact -log p(x~_n | earlier frames of its window, text) in nats, constants included."""
    run = jax.jit(nats_of_window, static_argnums=0)
    return windowed(system, noisy, lambda window, frame: run(system, params, window, text_at(text, frame)), 0)


def nats_of_window(system: System, params: Params, noisy: jax.Array, text: jax.Array) -> jax.Array:
    return nats(apply_flow(system.flow, flow_variables(params), STARFlow.forward, noisy, text))


def likelihood_batches(system: System, split: str, limit: int) -> Iterator[dict[str, np.ndarray]]:
    """The first clips of a split with their captions, as training reads them, laid out over the mesh."""
    batches = evaluation_batches(
        training_source(system, split), batch_size=system.config.evaluate.batch_size, limit=limit,
        pixel_frames=system.pixel_frames, latent_stride=system.config.codec.time_stride, encode_text=system.text_ids,
        format_caption=system.prompt, text_length=system.config.model.text_length)
    return ({**batch, **lay_out({name: batch[name] for name in batch if name not in ("captions_B", "valid_B")})}
            for batch in batches)


def noised_latents(system: System, batch: dict[str, Any], seed: int) -> jax.Array:
    """Noised latents of an evaluation batch; the noise depends on the clip's place in it and the seed."""
    latents = system.latents_of(batch)
    return latents + system.config.model.noise_std * jax.random.normal(jax.random.key(seed), latents.shape)


def bits_per_frame(system: System, params: Params, batches: Iterator[dict[str, Any]], seed: int = 0) -> np.ndarray:
    """(clips, N) bits per dimension of each noised latent frame, given its caption and the frames before it."""
    text_of, rows = jax.jit(system.text_of), []
    for index, batch in enumerate(batches):
        noisy = noised_latents(system, batch, seed + index)
        text = {name: batch[name] for name in ("text_ids_BS", "features_BSD") if name in batch}
        nats_BN = frame_nats(system, params, noisy, text_of(params, text))
        rows.append(fetch(nats_BN)[np.asarray(batch["valid_B"])] / np.prod(noisy.shape[2:]) / np.log(2))
    return np.concatenate(rows)
