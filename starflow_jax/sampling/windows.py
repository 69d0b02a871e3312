"""Windows of the training length that cover a video of any length."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Model, Sample, UserError
from starflow_jax.model.system import System
from starflow_jax.sampling.sizes import frames_together
from starflow_jax.sharding import fetch

Latents = jax.Array | np.ndarray


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


def windowed(system: System, noisy: Latents, run: Callable[[jax.Array, Window], jax.Array]) -> Latents:
    """run(a window's frames, the window) over noised latents (B, N, ...) of any length, joined along N. Windows are
    filled up with zeros to one length, which run must be causal for."""
    model, total = system.config.model, noisy.shape[1]
    if total == frames_together(model, total):
        return run(jnp.asarray(noisy), Window(0, total, 0, total))
    whole, spans = fetch(noisy), list(output_windows(system.config, total, ahead=0))
    # Cut in the host's memory: on the device each length would be a program.
    windows = [filled_up(whole[:, span.start:span.stop], model) for span in spans]
    parts = [run(jnp.asarray(window), span) for window, span in zip(windows, spans)]
    return np.concatenate([fetch(part)[:, span.begin - span.start:span.end - span.start]
                           for part, span in zip(parts, spans)], axis=1)


def filled_up(frames_BN: np.ndarray, model: Model) -> np.ndarray:
    """A window's frames with zeros behind them, as many as `frames_together` says."""
    missing = frames_together(model, frames_BN.shape[1]) - frames_BN.shape[1]
    return np.pad(frames_BN, ((0, 0), (0, missing), *((0, 0),) * (frames_BN.ndim - 2))) if missing else frames_BN


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
    # A window's last `ahead` frames lack their look-ahead, so the next window makes them again.
    for start, stop, begin, _ in windows(total, size, size - frames_taken(config, ahead)):
        yield Window(start, stop, max(begin - ahead, 0), stop if stop == total else stop - ahead)


def frames_taken(config: Config, ahead: int) -> int:
    """How many frames `output_windows` takes from each window but the first and the last."""
    size = config.model.frames
    context = max(1, min(config.model.denoiser_window, size * 3 // 4) - ahead)
    return size - context - ahead
