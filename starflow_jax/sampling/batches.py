"""Many videos, a batch at a time."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np

from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import noised_by_seeds
from starflow_jax.sampling.generate import Clips, generate_clips, log_likelihood
from starflow_jax.sampling.requests import Request
from starflow_jax.sampling.sizes import videos_together

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Made:
    """One video of a batch."""

    request: Request
    clips: Clips  # of the batch, which may have more videos than were asked for
    index: int  # in the batch
    seconds: float  # its share of the batch's

    def check(self) -> None:
        """Raises UserError where the video, or the solution behind it, is not finite: it shows nothing."""
        self.clips.check(self.index, f"{self.request.prompt!r}, seed {self.request.seed}")

    @property
    def frames_THWC(self) -> np.ndarray:
        """uint8."""
        return self.clips.frames_BTHWC[self.index]


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """`size` of them at a time; the last batch may be smaller."""
    for begin in range(0, len(items), size):
        yield items[begin:begin + size]


def noised_draws(system: System, frames_THWC: np.ndarray, draws: int) -> Iterator[jax.Array]:
    """A video's latents with so many draws of the training noise, evaluate.batch_size of them at a time."""
    latents = system.encode(frames_THWC[None])
    for seeds in in_batches(range(draws), system.config.evaluate.batch_size):
        yield noised_by_seeds(system, latents, seeds)


def filled(batch: Sequence[Item], size: int) -> list[Item]:
    """A batch of `size`, its last item repeated: one shape, one compilation."""
    return [*batch, *[batch[-1]] * (size - len(batch))]


def generate(
    system: System, params: Params, requests: Sequence[Request], known_THWC: np.ndarray | None = None
) -> Iterator[list[Made]]:
    """The videos of sample.batch_size requests at a time, as `make_batch` makes them."""
    size = videos_together(len(requests), system.config.sample.batch_size)
    for batch in in_batches(requests, size):
        yield make_batch(system, params, batch, size, known_THWC)


def make_batch(
    system: System, params: Params, batch: Sequence[Request], size: int, known_THWC: np.ndarray | None = None
) -> list[Made]:
    """The videos asked for, made together by the system's own settings, `size` of them where there are fewer. known:
    uint8 first frames.

    Raises UserError as `generate_clips` does.
    """
    began, whole = time.perf_counter(), filled(batch, size)
    clips = generate_clips(system, params, [request.prompt for request in whole],
                           [request.seed for request in whole], system.config.sample, for_each(known_THWC, size))
    seconds = (time.perf_counter() - began) / len(batch)
    return [Made(request, clips, index, seconds) for index, request in enumerate(batch)]


def log_likelihoods(system: System, params: Params, made: Sequence[Made]) -> list[float]:
    """Of each video of a batch, as `generate.log_likelihood`."""
    return log_likelihood(system, params, made[0].clips)[:len(made)].tolist()


def for_each(known_THWC: np.ndarray | None, count: int) -> np.ndarray | None:
    """Given frames for each of a batch's `count` videos, (B, T, H, W, 3)."""
    return None if known_THWC is None else np.broadcast_to(known_THWC, (count, *known_THWC.shape))


def most_likely(made: Sequence[Made], log_likelihoods: Sequence[float], keep: int) -> list[int]:
    """Which `keep` videos of each prompt have the greatest log-likelihood, the best first; prompts in their order."""
    by_prompt: dict[str, list[int]] = {}
    for index, video in enumerate(made):
        by_prompt.setdefault(video.request.prompt, []).append(index)
    return [index for indices in by_prompt.values()
            for index in sorted(indices, key=lambda index: -log_likelihoods[index])[:keep]]
