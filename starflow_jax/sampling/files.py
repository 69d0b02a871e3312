"""The files of one sampled video: MP4, contact sheet and JSON."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Config
from starflow_jax.io.files import atomic_path
from starflow_jax.io.pictures import contact_sheet
from starflow_jax.io.video import write_mp4
from starflow_jax.sampling.generate import Clips

SHOWN_PIXELS = 240  # small models' frames are enlarged to about this height


@dataclasses.dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int
    given: str = ""  # what was asked for, where sample.rewrite made the prompt of it
    given_name: str = ""  # what its file is called; "": after what was asked for

    @property
    def name(self) -> str:
        """What its files are called."""
        if self.given_name:
            return self.given_name
        words = "".join(c if c.isalnum() else " " for c in self.given or self.prompt).split()
        return f"{'_'.join(words)[:60] or 'no_prompt'}_seed{self.seed}"


def write_video(folder: Path, config: Config, request: Request, clips: Clips, index: int, nats: float,
                seconds: float) -> tuple:
    """The files of one video of log-likelihood `nats`; returns its line of the table."""
    frames = clips.frames_BTHWC[index]
    scale = max(1, SHOWN_PIXELS // frames.shape[1])
    path = folder / f"{request.name}.mp4"
    write_mp4(path, frames, config.sample.fps or config.text.fps or 1, scale)
    # VBench takes the ending of any file of the folder for that of all: only videos may lie there.
    details = folder.with_name(f"{folder.name}_details") / path.name if config.sample.vbench else path
    contact_sheet(details.with_suffix(".png"), frames[None], [request.prompt], scale=max(1, scale // 2))
    dims = clips.noisy_BNhwC[index].size
    facts = describe(config, request, clips, index, nats, seconds)
    with atomic_path(details.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    steps = int(clips.deep_steps_BK[index].sum())
    return str(path), f"{-nats / dims / np.log(2):.3f}", steps, f"{seconds:.1f}"


def describe(config: Config, request: Request, clips: Clips, index: int, nats: float, seconds: float
             ) -> dict[str, Any]:
    """What the JSON beside a video says."""
    return {
        "prompt": request.prompt,
        "prompt_given": request.given or request.prompt,
        "seed": request.seed,
        "frames": int(clips.frames_BTHWC.shape[1]),
        "settings": dataclasses.asdict(config.sample),
        "log_likelihood_nats": nats,
        "log_likelihood_of": f"the sampled latents with noise {config.model.noise_std}, given the prompt",
        "deep_steps_per_block": clips.deep_steps_BK[index].tolist(),
        "deep_residual_per_block": [float(f"{r:.3g}") for r in clips.deep_residual_BK[index]],
        "shallow_steps": int(clips.shallow_steps_B[index]),
        "converged": bool(clips.converged_B[index]),
        "certificate": None if clips.certificate_B is None else float(clips.certificate_B[index]),
        "seconds": round(seconds, 3),
        "device": jax.devices()[0].device_kind,
    }
