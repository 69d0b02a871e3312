"""What following a camera costs: whole videos with it and without, from one model."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from starflow_jax.config import Config
from starflow_jax.io.timing import timed
from starflow_jax.model.sources import fixed_captions
from starflow_jax.model.store import load_model
from starflow_jax.sampling.generate import generate_clips

VIDEOS, ROUNDS = (1, 8), 5
PATH = "pan_right"


def beside_none(config: Config, workdir: Path, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each number of videos at a time; none for a model that follows no camera."""
    system, params, *_ = load_model(config, workdir)
    if "control" not in params:
        return []
    captions = fixed_captions(config, "test", max(VIDEOS))
    cases = {(videos, camera): partial(generate_clips, system, params, captions[:videos], range(videos),
                                       dataclasses.replace(config.sample, camera=camera))
             for videos in VIDEOS for camera in ("", PATH)}
    seconds = {case: of_case for case, (_, of_case) in timed("camera", cases, rounds).items()}
    return [{"videos": videos, "without, s": seconds[videos, ""], "with a camera, s": seconds[videos, PATH],
             "times as long": seconds[videos, PATH] / seconds[videos, ""]} for videos in VIDEOS]
