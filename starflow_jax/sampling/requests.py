"""What --mode=sample is asked for: prompts, seeds and given frames."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from starflow_jax.config import Config, UserError
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.codec import pixel_frames
from starflow_jax.sampling import vbench
from starflow_jax.sampling.files import Request
from starflow_jax.sampling.generate import Clips
from starflow_jax.text.rewrite import rewriter


def with_length(config: Config, known_THWC: np.ndarray | None) -> Config:
    """A given video is extended by the training length where no length is asked for."""
    if known_THWC is None or config.sample.frames or not config.sample.video:
        return config
    frames = len(known_THWC) + pixel_frames(config) - 1
    return dataclasses.replace(config, sample=dataclasses.replace(config.sample, frames=frames))


@dataclasses.dataclass(frozen=True)
class Made:
    """One video of a batch."""

    request: Request
    clips: Clips
    index: int
    nats: float  # log-likelihood
    seconds: float


def most_likely(made: Sequence[Made], keep: int) -> list[Made]:
    """Each prompt's `keep` videos of greatest exact log-likelihood, the best first; prompts in their order."""
    by_prompt: dict[str, list[Made]] = {}
    for video in made:
        by_prompt.setdefault(video.request.prompt, []).append(video)
    return [video for videos in by_prompt.values()
            for video in sorted(videos, key=lambda video: -video.nats)[:keep]]


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
