"""How often samples of fixed prompts show what the prompt asks for."""

import dataclasses

import numpy as np

from starflow_jax.data.digits import reader
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.system import System
from starflow_jax.sampling.generate import generate_clips


def fixed_prompts(system: System, split: str, count: int) -> tuple[list[str], np.ndarray]:
    """The first long captions of a split and what they ask for: (captions, labels (B, 3))."""
    captions = fixed_captions(system.config, split, count)
    return captions, reader.labels_of(captions)


def adherence_of_samples(system: System, params: Params, split: str, count: int) -> dict[str, float]:
    """Shares of clips, generated from a split's first captions with seeds 0, 1, ..., that do as asked."""
    captions, labels_B3 = fixed_prompts(system, split, count)
    settings = dataclasses.replace(system.config.sample, frames=0)
    frames = []
    for begin in range(0, len(captions), settings.batch_size):
        batch = captions[begin:begin + settings.batch_size]
        filled = batch + [batch[-1]] * (settings.batch_size - len(batch))  # one shape, one compilation
        clips = generate_clips(system, params, filled, range(begin, begin + len(filled)), settings)
        frames.append(clips.frames_BTHWC[:len(batch)])
    return reader.default_reader().adherence(labels_B3, np.concatenate(frames))
