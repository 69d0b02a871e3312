"""Exact likelihoods of videos, frame by frame."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from starflow_jax.data.batch import Batch
from starflow_jax.data.evaluation import evaluation_batches
from starflow_jax.data.examples import ClipLength, TextInput
from starflow_jax.flow.control import Steering, control_of
from starflow_jax.flow.likelihood import nll_per_frame, nll_per_token
from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.model.parameters import Params, flow_variables
from starflow_jax.model.system import System, training_source
from starflow_jax.sampling.conditions import Text, VideoText, steering, text_at
from starflow_jax.sampling.windows import Latents, windowed
from starflow_jax.sharding import fetch, lay_out


def frame_nll(system: System, params: Params, noisy: Latents, text: Text) -> Latents:
    """(B, N) exact -log p(x~_n | earlier frames of its window, text) in nats, constants included.

    noisy: (B, N, h, w, C) noised latents of any length.
    """
    return windowed(system, noisy, lambda part, window: window_nll(
        system.flow, params, part, text_at(text, window.begin, window.start),
        steering(params, system.config.model, text, window.start, window.start, part.shape[1])))


@partial(jax.jit, static_argnums=0)
def window_nll(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array, steering: Steering | None = None
               ) -> jax.Array:
    """The same of at most one window, (B, T)."""
    return nll_per_frame(apply_flow(flow, flow_variables(params), STARFlow.forward, noisy, text, control_of(steering)))


@partial(jax.jit, static_argnums=0)
def window_nll_per_token(flow: STARFlow, params: Params, noisy: jax.Array, text: jax.Array,
                         steering: Steering | None = None) -> jax.Array:
    """(B, T, S): `window_nll` of each token, in raster order."""
    out = apply_flow(flow, flow_variables(params), STARFlow.forward, noisy, text, control_of(steering))
    return nll_per_token(flow, out)


def likelihood_batches(system: System, split: str, limit: int) -> Iterator[Batch]:
    """The first clips of a split with their captions, as training reads them, laid out over the mesh."""
    config = system.config
    return map(lay_out, evaluation_batches(
        training_source(system, split), ClipLength(system.pixel_frames, config.codec.time_stride),
        TextInput(system.prompt, system.text_ids, config.model.text_length),
        batch_size=config.evaluate.batch_size, limit=limit))


def noised_latents(system: System, batch: Batch, seed: int) -> jax.Array:
    """Noised latents of an evaluation batch; a clip's noise depends on its place in the batch and on the seed."""
    latents = system.latents_of(batch)
    return latents + system.config.model.noise_std * jax.random.normal(jax.random.key(seed), latents.shape)


def bits_per_frame(system: System, params: Params, batches: Iterator[Batch], seed: int = 0) -> np.ndarray:
    """(clips, N) bits per dimension of each noised latent frame, given its caption and the frames before it."""
    rows = []
    for index, batch in enumerate(batches):
        noisy = noised_latents(system, batch, seed + index)
        nll_BN = frame_nll(system, params, noisy, batch_text(system, params, batch))
        rows.append(fetch(nll_BN)[fetch(batch.valid_B)] / np.prod(noisy.shape[2:]) / np.log(2))
    return np.concatenate(rows)


def batch_text(system: System, params: Params, batch: Batch) -> Text:
    """The features of a batch's texts; for a model that follows cameras, with those of the batch."""
    features = system.text_of(params, batch.text_B)
    if "control" not in params or batch.intrinsics_BT4 is None:
        return features
    return VideoText(features, {0: features}, batch.cameras_of_latents(system.config.codec.time_stride))
