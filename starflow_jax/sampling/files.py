"""The files of one sampled video: MP4, contact sheet and JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Config
from starflow_jax.io.files import write_text
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.video import write_mp4
from starflow_jax.sampling.batches import Made

SHOWN_PIXELS = 240  # small models' frames are enlarged to about this height


def shown_scale(height: int) -> int:
    """The factor by which frames of this height are enlarged in a file."""
    return max(1, SHOWN_PIXELS // height)


def file_rate(config: Config) -> int:
    """Frames per second of a file."""
    return config.sample.fps or config.text.fps or 1


def write_video(folder: Path, config: Config, made: Made, log_likelihood: float) -> tuple[str, str, int, str]:
    """Write the files of one video, `log_likelihood` in nats; returns its row of the table: path, bits per dimension,
    Jacobi steps, seconds."""
    frames, scale = made.frames_THWC, shown_scale(made.frames_THWC.shape[1])
    path = folder / f"{made.request.name}.mp4"
    write_mp4(path, frames, file_rate(config), scale)
    # VBench takes the extension of any one file for that of all in the folder, which must hold only videos.
    details = folder.with_name(f"{folder.name}_details") / path.name if config.sample.vbench else path
    contact_sheet(details.with_suffix(".png"), frames[None], [made.request.prompt], scale=max(1, scale // 2))
    write_text(details.with_suffix(".json"), json.dumps(describe(config, made, log_likelihood), indent=1))
    bits = -log_likelihood / made.clips.noisy_BNhwC[made.index].size / np.log(2)
    return str(path), f"{bits:.3f}", int(made.clips.deep_steps_BK[made.index].sum()), f"{made.seconds:.1f}"


def describe(config: Config, made: Made, log_likelihood: float) -> dict[str, Any]:
    """What the JSON beside a video says."""
    request, clips, index = made.request, made.clips, made.index
    return {
        "prompt": request.prompt,
        "prompt_given": request.given or request.prompt,
        "seed": request.seed,
        "frames": int(clips.frames_BTHWC.shape[1]),
        "settings": dataclasses.asdict(config.sample),
        "log_likelihood_nats": log_likelihood,
        "log_likelihood_of": f"the sampled latents with noise {config.model.noise_std}, given the prompt",
        "deep_steps_per_block": clips.deep_steps_BK[index].tolist(),
        "deep_residual_per_block": [float(f"{r:.3g}") for r in clips.deep_residual_BK[index]],
        "shallow_steps": int(clips.shallow_steps_B[index]),
        "converged": bool(clips.converged_B[index]),
        "certificate": None if clips.certificate_B is None else float(clips.certificate_B[index]),
        "seconds": round(made.seconds, 3),
        "device": jax.devices()[0].device_kind,
    }
