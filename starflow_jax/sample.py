"""Prompts -> videos: an MP4, a contact sheet and a JSON for each."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.generation import Clips, generate_clips, latent_frames
from starflow_jax.metrics import table
from starflow_jax.model_store import load_model
from starflow_jax.video_io import atomic_path, contact_sheet, write_mp4

SHOWN_PIXELS = 240  # small models' frames are enlarged to about this height


@dataclasses.dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """What its files are called."""
        words = "".join(c if c.isalnum() else " " for c in self.prompt).split()
        return f"{'_'.join(words)[:60] or 'no_prompt'}_seed{self.seed}"


def sample(config: Config, workdir: Path) -> None:
    """Make config.sample's videos with the workdir's model, or with the one in the package."""
    requests = read_requests(config)
    latent_frames(config, config.sample)  # before anything is loaded
    system, params, source = load_model(config, workdir)
    folder = Path(config.sample.output or workdir / "samples")
    print(f"model: {source}")
    rows = []
    for batch in _batches(requests, config.sample.batch_size):
        began = time.perf_counter()
        clips = generate_clips(system, params, [r.prompt for r in batch], [r.seed for r in batch], config.sample)
        seconds = time.perf_counter() - began
        for index, request in enumerate(batch):
            rows.append(_write(folder, config, request, clips, index, seconds / len(batch)))
    print(table(rows, ("video", "bits/dim", "Jacobi steps", "seconds")))
    if len(requests) > 1:
        print(f"all in {folder}")


def read_requests(config: Config) -> list[Request]:
    """The prompts of the configuration, `count` seeds each. Raises UserError where there is none."""
    settings = config.sample
    if settings.prompt and settings.prompts_file:
        raise UserError("sample.prompt and sample.prompts_file are both given; leave one out")
    if settings.prompts_file:
        try:
            lines = Path(settings.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sample.prompts_file={settings.prompts_file}: can't be read as text ({error})") from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"sample.prompts_file={settings.prompts_file}: holds no prompt; write one a line")
    elif settings.prompt:
        prompts = [settings.prompt]
    else:
        raise UserError('there is no prompt; give one with --config.sample.prompt="a blue three moves right" '
                        "or a file of them, one a line, with --config.sample.prompts_file=FILE")
    return [Request(prompt, settings.seed + index) for prompt in prompts for index in range(settings.count)]


def _batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    for begin in range(0, len(requests), size):
        yield requests[begin:begin + size]


def _write(folder: Path, config: Config, request: Request, clips: Clips, index: int, seconds: float) -> tuple:
    """The files of one video; returns its line of the table."""
    frames = clips.frames_BTHWC[index]
    scale = max(1, SHOWN_PIXELS // frames.shape[1])
    path = folder / f"{request.name}.mp4"
    write_mp4(path, frames, config.text.fps or 1, scale)
    contact_sheet(path.with_suffix(".png"), frames[None], [request.prompt], scale=max(1, scale // 2))
    dims = clips.noisy_BNhwC[index].size
    facts = describe(config, request, clips, index, seconds)
    with atomic_path(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    steps = int(clips.deep_steps_BK[index].sum())
    return str(path), f"{clips.nats_B[index] / dims / np.log(2):.3f}", steps, f"{seconds:.1f}"


def describe(config: Config, request: Request, clips: Clips, index: int, seconds: float) -> dict[str, Any]:
    """What the JSON beside a video says."""
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "frames": int(clips.frames_BTHWC.shape[1]),
        "settings": dataclasses.asdict(config.sample),
        "log_likelihood_nats": -float(clips.nats_B[index]),
        "log_likelihood_of": f"the sampled latents with noise {config.model.noise_std}, given the prompt",
        "deep_steps_per_block": clips.deep_steps_BK[index].tolist(),
        "deep_residual_per_block": [float(f"{r:.3g}") for r in clips.deep_residual_BK[index]],
        "shallow_steps": int(clips.shallow_steps_B[index]),
        "converged": bool(clips.converged_B[index]),
        "seconds": round(seconds, 3),
        "device": jax.devices()[0].device_kind,
    }
