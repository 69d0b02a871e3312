"""How often samples from fixed prompts show what the prompt asks for."""

import dataclasses
import itertools

import numpy as np

from starflow_jax.data.digits import reader
from starflow_jax.model.parameters import Params
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import filled, in_batches
from starflow_jax.sampling.generate import generate_clips


def adherence_of_samples(system: System, params: Params, split: str, count: int, checked: bool = True
                         ) -> dict[str, float]:
    """Share, for each attribute, of the clips generated from a split's first captions with seeds 0, 1, ... that show
    what their caption says. checked: raise UserError for a clip that is not finite; else it shows nothing."""
    captions = fixed_captions(system.config, split, count)
    settings = dataclasses.replace(system.config.sample, frames=0)
    size, frames = settings.batch_size, []
    for begin, batch in zip(itertools.count(step=size), in_batches(captions, size)):
        seeds = range(begin, begin + size)
        clips = generate_clips(system, params, filled(batch, size), seeds, settings)
        if checked:
            clips.checked(batch, seeds)
        frames.append(clips.frames_BTHWC[:len(batch)])
    return reader.default_reader().adherence(reader.labels_of(captions), np.concatenate(frames))
