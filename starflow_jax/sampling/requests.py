"""Which videos are asked for: prompts, seeds and lengths."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from starflow_jax.config import Config, Sample, UserError, changed
from starflow_jax.data.digits.captions import unknown_words
from starflow_jax.io.progress import ProgressBar
from starflow_jax.model.codec import pixel_frames
from starflow_jax.sampling import vbench
from starflow_jax.sampling.conditions import latent_frames, prompt_changes
from starflow_jax.sharding import as_first_process_has_it
from starflow_jax.text.rewrite import rewriter

LONGEST = 160  # bytes of a name's words; with seed, hash and ending a file's name may have 255


@dataclasses.dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int
    given: str = ""  # the prompt that sample.rewrite made this one from; "": it was not rewritten
    given_name: str = ""  # of its files; "": named after the prompt that was given

    @property
    def slug(self) -> str:
        """The words of the prompt that was given, as many as a file's name takes, and the seed."""
        words = "".join(c if c.isalnum() else " " for c in self.given or self.prompt).split()
        begun = "_".join(words)[:60].encode()[:LONGEST].decode(errors="ignore")
        return f"{begun or 'no_prompt'}_seed{self.seed}"


def with_length(config: Config, known_THWC: np.ndarray | None, *, extends: bool) -> Config:
    """The config with the length of the videos set.

    extends: the given frames are a video to extend. Raises UserError for a length, or for changes of the prompt, that
    can't be.
    """
    if extends and known_THWC is not None:
        config = extended(config, len(known_THWC))
    latent_frames(config, config.sample)
    prompt_changes(config, config.sample)
    return config


def extended(config: Config, known_frames: int) -> Config:
    """A given video is extended by the training length where no length is asked for."""
    if config.sample.frames:
        return config
    return changed(config, "sample", {"frames": known_frames + pixel_frames(config) - 1})


def requests_for(prompts: Sequence[str], settings: Sample) -> list[Request]:
    """sample.count seeds of each prompt."""
    return [Request(prompt, settings.seed + index) for prompt in prompts for index in range(settings.count)]


def read_requests(config: Config) -> list[Request]:
    """The config's prompts, sample.count seeds of each. Raises UserError where there is none, and where there are
    several for the one file that sample.output names."""
    settings = config.sample
    settings.check_prompts()
    if settings.vbench:
        return [Request(prompt, settings.seed + index, given_name=vbench.stem(prompt, index))
                for prompt in vbench.read_prompts(settings.vbench) for index in range(settings.count)]
    prompts = [settings.prompt]
    if settings.prompts_file:
        try:
            lines = Path(settings.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"sample.prompts_file={settings.prompts_file}: can't be read as text ({error})") from error
        prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
        if not prompts:
            raise UserError(f"sample.prompts_file={settings.prompts_file}: holds no prompt; write one per line")
    requests = requests_for(prompts, settings)
    if not settings.output_file:
        return requests
    settings.require("output", len(prompts) * (settings.keep or settings.count) == 1,
                     "is the file of one video, and several are asked for; name a folder")
    return [dataclasses.replace(request, given_name=Path(settings.output_file).stem) for request in requests]


def unknown_word_lines(config: Config, requests: Sequence[Request]) -> list[str]:
    """A line for each prompt with words that no training caption of moving digits has."""
    if config.data.source != "digits" or config.text.encoder == "frozen":
        return []
    unknown = {request.prompt: unknown_words(request.prompt) for request in requests}
    return [f"{prompt!r}: no training caption has {', '.join(map(repr, words))}; this model knows only moving digits, "
            'such as "a red seven moves left"' for prompt, words in unknown.items() if words]


def rewritten(config: Config, requests: list[Request],
              on_failure: Callable[[Request, UserError], None] | None = None, together: bool = False) -> list[Request]:
    """The requests with prompts made longer by sample.rewrite, each prompt once.

    on_failure: called for each request whose prompt can't be, which is then left out; without it UserError is raised.
    together: all processes make the same videos, of the first one's prompts.
    """
    if not config.sample.rewrite or all(request.given for request in requests):  # done before
        return requests
    longer: dict[str, str] = {}
    failures: dict[str, str] = {}
    if not together or jax.process_index() == 0:
        longer, failures = _longer(config.sample.rewrite, list(dict.fromkeys(request.prompt for request in requests)))
    if together:
        longer, failures = as_first_process_has_it([longer, failures])
    for request in requests:
        if request.prompt in failures:
            error = UserError(failures[request.prompt])
            if on_failure is None:
                raise error
            on_failure(request, error)
    return [dataclasses.replace(request, prompt=longer[request.prompt], given=request.prompt) for request in requests
            if request.prompt in longer]


def _longer(rewrite: str, prompts: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(longer prompts by the given ones, why others can't be)."""
    hook = rewriter(rewrite)
    longer: dict[str, str] = {}
    failures: dict[str, str] = {}
    with ProgressBar("rewrite", len(prompts), unit="prompt") as progress:
        for prompt in prompts:
            try:
                longer[prompt] = hook(prompt)
            except UserError as error:
                failures[prompt] = str(error)
            progress.update()
    return longer, failures


def share_of(requests: Sequence[Request], settings: Sample, process: int, processes: int) -> list[Request]:
    """The videos that one of several processes makes: one in so many, or all of one prompt in so many where the most
    likely of each prompt are kept."""
    if not settings.keep:
        return list(requests[process::processes])
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    own = set(prompts[process::processes])
    return [request for request in requests if request.prompt in own]
