"""Windows of the training length that cover a video of any length."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from starflow_jax.config import Config, Model, Sample, UserError
from starflow_jax.model.system import System


class Window(NamedTuple):
    """A window of a video: frames start to stop go in, those before `begin` for context, and frames begin to end are
    taken from what comes out."""

    start: int
    stop: int
    begin: int
    end: int


def context_frames(model: Model, settings: Sample) -> int:
    """Latent frames that are encoded again when the window moves on. Raises UserError where they fill the window."""
    window = model.frames
    context = settings.context_frames or max(1, window * 3 // 4)
    if context >= window > 1:
        raise UserError(f"sample.context_frames={context}: must be less than the window of {window} latent frames")
    return context


def windows(total: int, size: int, context: int) -> Iterator[Window]:
    """Windows of `size` frames that cover `total`, each with the `context` frames before those taken from it."""
    done = min(size, total)
    yield Window(0, done, 0, done)
    while done < total:
        start = done - context
        stop = min(start + size, total)
        yield Window(start, stop, done, stop)
        done = stop


def windowed(
    system: System, noisy: jax.Array, run: Callable[[jax.Array, Window], jax.Array], lookahead: int | None = None
) -> jax.Array:
    """run(a window's frames, the window) over noised latents (B, N, ...) of any length, joined along N."""
    ahead = system.config.model.denoiser_lookahead if lookahead is None else lookahead
    spans = output_windows(system.config, noisy.shape[1], ahead)
    return jnp.concatenate([run(noisy[:, span.start:span.stop], span)[:, span.begin - span.start:span.end - span.start]
                            for span in spans], axis=1)


def denoising_windows(config: Config, total: int) -> Iterator[Window]:
    """The windows in which a clip is denoised, one after the other. As released, they overlap by the denoiser's window,
    and all frames after the overlap are taken."""
    if not config.sample.as_released:
        return output_windows(config, total, config.model.denoiser_lookahead)
    size = config.model.frames
    overlap = min(config.model.denoiser_window, size - 1)
    return windows(total, size, overlap)


def output_windows(config: Config, total: int, ahead: int) -> Iterator[Window]:
    """Windows of the training length that cover a clip, each frame taken from one with the `ahead` frames after it."""
    size = config.model.frames
    if total <= size:
        yield Window(0, total, 0, total)
        return
    context = max(1, min(config.model.denoiser_window, size * 3 // 4) - ahead)
    # A window's last `ahead` frames lack their look-ahead, so the next window makes them again.
    for start, stop, begin, _ in windows(total, size, context + ahead):
        yield Window(start, stop, max(begin - ahead, 0), stop if stop == total else stop - ahead)
