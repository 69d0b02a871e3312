"""What --mode=sample is asked for: prompts, seeds and given frames."""

import dataclasses
from pathlib import Path

import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.io.pictures import read_image, resize_crop
from starflow_jax.io.progress import ProgressBar
from starflow_jax.io.video import at_rate, read_video
from starflow_jax.model.shapes import pixel_frames
from starflow_jax.sampling import vbench
from starflow_jax.sampling.files import Request
from starflow_jax.sampling.generate import Clips
from starflow_jax.text.rewrite import rewriter


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


def most_likely(made: list[tuple[Request, Clips, int, float]], keep: int) -> list[tuple[Request, Clips, int, float]]:
    """Each prompt's `keep` videos of greatest exact log-likelihood, the best first; prompts in their order."""
    by_prompt: dict[str, list] = {}
    for one in made:
        by_prompt.setdefault(one[0].prompt, []).append(one)
    return [one for group in by_prompt.values()
            for one in sorted(group, key=lambda one: one[1].nats_B[one[2]])[:keep]]


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
