"""The files of one sampled video: MP4, contact sheet and JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from starflow_jax.config import Config, Sample
from starflow_jax.io.files import write_text
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.video import write_mp4
from starflow_jax.sampling.batches import Made
from starflow_jax.sampling.origin import Origin, plain
from starflow_jax.sampling.requests import Request

Row = tuple[object, ...]  # of the table that sampling prints
SHOWN_PIXELS = 240  # small models' frames are enlarged to about this height


def shown_scale(height: int) -> int:
    """The factor by which frames of this height are enlarged in a file."""
    return max(1, SHOWN_PIXELS // height)


def file_rate(config: Config) -> int:
    """Frames per second of a file."""
    return config.sample.fps or config.text.fps or 1


def details_path(folder: Path, settings: Sample, request: Request) -> Path:
    """The JSON file of a video, which is written last."""
    # VBench takes the extension of any one file for that of all in the folder, which must hold only videos.
    folder = folder.with_name(f"{folder.name}_details") if settings.vbench else folder
    return folder / f"{request.name}{'_stream' if settings.stream else ''}.json"


def write_video(folder: Path, config: Config, origin: Origin, made: Made, log_likelihood: float) -> Row:
    """Write the files of one video, `log_likelihood` in nats; returns its row of the table."""
    frames, scale = made.frames_THWC, shown_scale(made.frames_THWC.shape[1])
    path, details = folder / f"{made.request.name}.mp4", details_path(folder, config.sample, made.request)
    write_mp4(path, frames, file_rate(config), scale)
    contact_sheet(details.with_suffix(".png"), frames[None], [made.request.prompt], scale=max(1, scale // 2))
    facts = describe(config, origin, made, log_likelihood)
    write_text(details, json.dumps(facts, indent=1))
    return video_row(path, facts)


def video_row(path: Path, facts: dict[str, Any]) -> Row:
    """(path, bits per dimension, Jacobi steps, how they ended, seconds) of a video, from what its JSON file says."""
    return (str(path), f"{facts['bits_per_dim']:.3f}", sum(facts["deep_steps_per_block"]), facts["outcome"],
            f"{facts['seconds']:.1f}")


def describe(config: Config, origin: Origin, made: Made, log_likelihood: float) -> dict[str, Any]:
    """What the JSON beside a video says."""
    request, clips, index = made.request, made.clips, made.index
    return {
        **described(config, origin, request),
        "frames": int(clips.frames_BTHWC.shape[1]),
        "log_likelihood_nats": log_likelihood,
        "log_likelihood_of": f"the sampled latents with noise {config.model.noise_std}, given the prompt",
        "bits_per_dim": -log_likelihood / clips.noisy_BNhwC[index].size / np.log(2),
        **clips.solved.facts(index),
        "certificate": None if clips.certificate_B is None else float(clips.certificate_B[index]),
        "seconds": round(made.seconds, 3),
    }


def described(config: Config, origin: Origin, request: Request) -> dict[str, Any]:
    """What it says of every video, a stream's too."""
    return {"prompt": request.prompt, "prompt_given": request.given or request.prompt, "seed": request.seed,
            "settings": plain(config.sample), **dataclasses.asdict(origin)}
