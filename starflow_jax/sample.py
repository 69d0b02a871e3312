"""Prompts -> videos: an MP4, a contact sheet and a JSON for each."""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from starflow_jax import vbench
from starflow_jax.config import Config, UserError
from starflow_jax.generation import Clips, generate_clips, latent_frames, prompt_changes
from starflow_jax.metrics import ProgressBar, table
from starflow_jax.model_store import load_model
from starflow_jax.optimizer import Params
from starflow_jax.stream import Timeline, draw_timeline, stream_clips
from starflow_jax.system import System, pixel_frames
from starflow_jax.text.rewrite import rewriter
from starflow_jax.video_io import (
    at_rate,
    atomic_path,
    contact_sheet,
    growing_mp4,
    read_image,
    read_video,
    resize_crop,
    write_mp4,
)

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


def sample(config: Config, workdir: Path) -> None:
    """Make config.sample's videos with the workdir's model, or with the one in the package."""
    requests = read_requests(config)
    prompt_changes(config, config.sample)  # errors before anything is loaded
    known_THWC = given_frames(config)
    config = with_length(config, known_THWC)
    latent_frames(config, config.sample)
    requests = rewritten(config, requests)
    system, params, source = load_model(config, workdir)
    folder = Path(config.sample.output or workdir / "samples")
    print(f"model: {source}")
    make = _stream_all if config.sample.stream else _make_all
    rows, headers = make(folder, system, params, requests, known_THWC)
    print(table(rows, headers))
    if len(rows) > 1:
        print(f"all in {folder}")


def given_frames(config: Config) -> np.ndarray | None:
    """(T, H, W, 3) uint8 of sample.image or sample.video at the model's size and frame rate; None without.

    T is 1 + a multiple of the codec's time stride: of a longer video the last frames.
    """
    settings, stride = config.sample, config.codec.time_stride
    height, width = config.model.height * config.codec.stride, config.model.width * config.codec.stride
    if settings.image and settings.video:
        raise UserError("sample.image and sample.video are both given; leave one out")
    if settings.image:
        return resize_crop(read_image(settings.image)[None], height, width)
    if not settings.video:
        return None
    frames_THWC, fps = read_video(settings.video)
    wanted = settings.fps or config.text.fps or fps
    frames_THWC = at_rate(frames_THWC, fps, wanted)
    return resize_crop(frames_THWC[(len(frames_THWC) - 1) % stride:], height, width)


def with_length(config: Config, known_THWC: np.ndarray | None) -> Config:
    """A given video is gone on from by the training length where no length is asked for."""
    if known_THWC is None or config.sample.frames or not config.sample.video:
        return config
    frames = len(known_THWC) + pixel_frames(config) - 1
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, frames=frames))


def _make_all(folder: Path, system: System, params: Params, requests: list[Request], known_THWC: np.ndarray | None):
    """Whole clips, written batch by batch, or when the most likely of each prompt's are known. Returns the table."""
    settings, made, rows = system.config.sample, [], []
    with ProgressBar("samples", len(requests), unit="video") as progress:
        for batch in _batches(requests, settings.batch_size):
            began = time.perf_counter()
            known = None if known_THWC is None else np.broadcast_to(known_THWC, (len(batch), *known_THWC.shape))
            clips = generate_clips(system, params, [r.prompt for r in batch], [r.seed for r in batch], settings, known)
            seconds = (time.perf_counter() - began) / len(batch)
            made += [(request, clips, index, seconds) for index, request in enumerate(batch)]
            if not settings.keep:
                rows += [_write(folder, system.config, *one) for one in made]
                made = []
            progress.update(len(batch))
    if settings.keep:
        rows = [_write(folder, system.config, *one) for one in most_likely(made, settings.keep)]
    return rows, ("video", "bits/dim", "Jacobi steps", "seconds")


def most_likely(made: list[tuple[Request, Clips, int, float]], keep: int) -> list[tuple[Request, Clips, int, float]]:
    """Each prompt's `keep` videos of greatest exact log-likelihood, the best first; prompts in their order."""
    by_prompt: dict[str, list] = {}
    for one in made:
        by_prompt.setdefault(one[0].prompt, []).append(one)
    return [one for group in by_prompt.values()
            for one in sorted(group, key=lambda one: one[1].nats_B[one[2]])[:keep]]


def _stream_all(folder: Path, system: System, params: Params, requests: list[Request], known_THWC: np.ndarray | None):
    """Each batch's videos grow on disk while they are made; the pipeline's times are drawn beside them."""
    settings, rows = system.config.sample, []
    for batch in _batches(requests, settings.batch_size):
        known = None if known_THWC is None else np.broadcast_to(known_THWC, (len(batch), *known_THWC.shape))
        scale = max(1, SHOWN_PIXELS // (system.config.model.height * system.config.codec.stride))
        paths = [folder / f"{request.name}_stream.mp4" for request in batch]
        writers = [growing_mp4(path, settings.fps or system.config.text.fps or 1, scale) for path in paths]
        timeline, began, first, frames = Timeline(), time.perf_counter(), 0.0, 0
        prompts, seeds = [r.prompt for r in batch], [r.seed for r in batch]
        with ProgressBar("stream", settings.frames or system.pixel_frames, unit="frame") as progress:
            for part_BTHWC in stream_clips(system, params, prompts, seeds, settings, known, timeline):
                first = first or time.perf_counter() - began
                frames += part_BTHWC.shape[1]
                for writer, part_THWC in zip(writers, part_BTHWC):
                    writer.write(part_THWC)
                progress.update(part_BTHWC.shape[1])
        seconds = time.perf_counter() - began
        events = timeline.close()
        for writer, path, request in zip(writers, paths, batch):
            writer.close()
            facts = {"prompt": request.prompt, "prompt_given": request.given or request.prompt,
                     "seed": request.seed, "frames": frames, "seconds": round(seconds, 3),
                     "seconds_to_first_frame": round(first, 3), "settings": dataclasses.asdict(settings),
                     "timeline": [dataclasses.asdict(event) for event in events]}
            with atomic_path(path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps(facts, indent=1))
            draw_timeline(path.with_suffix(".timeline.png"), events)
            rows.append((str(path), f"{first:.2f}", f"{frames / seconds:.2f}"))
    return rows, ("video", "seconds to the first frame", "frames per second")


def read_requests(config: Config) -> list[Request]:
    """The prompts of the configuration, `count` seeds each. Raises UserError where there is none."""
    settings = config.sample
    if settings.vbench and (settings.prompt or settings.prompts_file):
        raise UserError("sample.vbench is a list of prompts; leave out sample.prompt and sample.prompts_file")
    if settings.vbench:
        return [Request(prompt, settings.seed + index, given_name=vbench.stem(prompt, index))
                for prompt in vbench.read_prompts(settings.vbench) for index in range(settings.count)]
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


def rewritten(config: Config, requests: list[Request]) -> list[Request]:
    """The requests with prompts made longer by sample.rewrite, each prompt once. Raises UserError where it fails."""
    if not config.sample.rewrite:
        return requests
    hook, prompts = rewriter(config.sample.rewrite), {request.prompt: "" for request in requests}
    with ProgressBar("rewrite", len(prompts), unit="prompt") as progress:
        for prompt in prompts:
            prompts[prompt] = hook(prompt)
            progress.update()
    return [dataclasses.replace(request, prompt=prompts[request.prompt], given=request.prompt) for request in requests]


def _batches(requests: list[Request], size: int) -> Iterator[list[Request]]:
    for begin in range(0, len(requests), size):
        yield requests[begin:begin + size]


def _write(folder: Path, config: Config, request: Request, clips: Clips, index: int, seconds: float) -> tuple:
    """The files of one video; returns its line of the table."""
    frames = clips.frames_BTHWC[index]
    scale = max(1, SHOWN_PIXELS // frames.shape[1])
    path = folder / f"{request.name}.mp4"
    write_mp4(path, frames, config.sample.fps or config.text.fps or 1, scale)
    # VBench takes the ending of any file of the folder for that of all: only videos may lie there.
    details = folder.with_name(f"{folder.name}_details") / path.name if config.sample.vbench else path
    contact_sheet(details.with_suffix(".png"), frames[None], [request.prompt], scale=max(1, scale // 2))
    dims = clips.noisy_BNhwC[index].size
    facts = describe(config, request, clips, index, seconds)
    with atomic_path(details.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))
    steps = int(clips.deep_steps_BK[index].sum())
    return str(path), f"{clips.nats_B[index] / dims / np.log(2):.3f}", steps, f"{seconds:.1f}"


def describe(config: Config, request: Request, clips: Clips, index: int, seconds: float) -> dict[str, Any]:
    """What the JSON beside a video says."""
    return {
        "prompt": request.prompt,
        "prompt_given": request.given or request.prompt,
        "seed": request.seed,
        "frames": int(clips.frames_BTHWC.shape[1]),
        "settings": dataclasses.asdict(config.sample),
        "log_likelihood_nats": -float(clips.nats_B[index]),
        "log_likelihood_of": f"the sampled latents with noise {config.model.noise_std}, given the prompt",
        "deep_steps_per_block": clips.deep_steps_BK[index].tolist(),
        "deep_residual_per_block": [float(f"{r:.3g}") for r in clips.deep_residual_BK[index]],
        "shallow_steps": int(clips.shallow_steps_B[index]),
        "converged": bool(clips.converged_B[index]),
        "certificate": None if clips.certificate_B is None else float(clips.certificate_B[index]),
        "seconds": round(seconds, 3),
        "device": jax.devices()[0].device_kind,
    }
