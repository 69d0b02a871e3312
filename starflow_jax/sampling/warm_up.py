"""Compiling what a session may need, by making a few frames of short ones."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from starflow_jax.config import Config
from starflow_jax.sampling.denoise import AS_THEY_ARE
from starflow_jax.sampling.session import Session
from starflow_jax.sampling.steered import Change
from starflow_jax.sampling.windows import context_frames

NONE: Mapping[int, Change] = MappingProxyType({})  # no changes


class Begin(Protocol):
    """Begins a session of the settings in question: of so many latent frames to make (0: no end), with changes by that
    of them from which on they hold; behind so many given ones (0: those of the settings)."""

    def __call__(self, frames: int = 0, changes: Mapping[int, Change] = NONE, given: int = 0) -> Session: ...


def warm_up(begin: Begin, steerable: bool, given: Sequence[int]) -> None:
    """Run sessions that together compile every program of such settings. steerable: the model can follow a camera.
    given: numbers of latent frames that they may begin with."""
    config = begin(frames=1).config
    model, settings = config.model, config.sample
    for frames in _ends(config):
        _run(begin(frames))
    if model.frames < 3:  # no window can move on
        return
    for count in given:
        _run(begin(given=count), 3)
    further: list[Change] = [] if settings.guided else [{"guidance": 1.0}]
    further += [{"camera": "still"}] if steerable and not settings.camera else []
    context = context_frames(model, settings)
    few = 1 if context > 1 else 2  # frames in a window, and not as many as when it moves on
    # Each way of working on a window: encoded again with few frames in it and when it moves on, and what follows.
    for chosen in itertools.product(*([{}, change] for change in further)):
        change: Change = {"prompt": " "}
        for one in chosen:
            change |= one
        _run(begin(changes={few: change}), model.frames + 2)
    if settings.renoise:  # the frames of a video's beginning, or of a window, of any number, are first noised anew
        for frame in (*range(1, model.frames), *range(model.frames + 1, 2 * model.frames - context)):
            _run(begin(changes={frame: {"prompt": " "}}), frame + 1)


def _ends(config: Config) -> Iterator[int]:
    """Lengths in latent frames that between them end in every way: the last frames lack their look-ahead."""
    model, settings = config.model, config.sample
    if model.frames < 3:
        longest = model.frames
    elif settings.denoise in AS_THEY_ARE or model.denoiser == "none":
        longest = 2
    elif model.denoiser == "first_layer" and not settings.as_released:
        longest = model.denoiser_lookahead + 2
    else:  # whole windows, of which the last one may have any number of frames
        longest = model.frames
    yield from range(1, longest + 1)


def _run(session: Session, frames: int = 0) -> None:
    """Until so many latent frames are begun beside given ones, and those before them shown; 0: to its end."""
    with session:
        frames += session.begun if frames else 0
        for _ in session:
            if frames and session.begun >= frames:
                break
        next(session, None)
