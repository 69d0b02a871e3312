"""The Python API: a model, loaded once and asked for videos, streams and likelihoods again and again.

    import starflow_jax as sf
    model = sf.load()
    video = model.generate("a blue three moves right", seed=0)
    video.save("three.mp4")
"""

import base64
import dataclasses
import functools
import html
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, UserError, changed
from starflow_jax.io.compiled import keep_compiled_programs
from starflow_jax.io.pictures import resize_crop
from starflow_jax.io.video import at_rate, mp4_bytes, write_mp4
from starflow_jax.model.codec import frame_size
from starflow_jax.model.parameters import Params
from starflow_jax.model.store import PRETRAINED, load_model, settings_of
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import Made, for_each, generate, most_likely
from starflow_jax.sampling.conditions import latent_frames, noised, prompt_changes
from starflow_jax.sampling.files import file_rate, shown_scale
from starflow_jax.sampling.generate import log_likelihood
from starflow_jax.sampling.given import given_frames, read_given, whole_latents
from starflow_jax.sampling.likelihood import frame_nats
from starflow_jax.sampling.requests import Request, extended, rewritten, unknown_word_lines
from starflow_jax.sampling.stream import stream_clips

# Settings of `sample` that belong to the command line: its files, and what the methods' arguments say.
OF_THE_COMMAND_LINE = ("prompt", "prompts_file", "vbench", "stream", "output", "checkpoint")


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A video, generated or made of frames; shows itself in a notebook."""

    frames: np.ndarray  # uint8 (T, H, W, 3)
    fps: float
    prompt: str = ""
    seed: int = 0
    _nats: Callable[[], float] | None = None  # of a generated video

    @functools.cached_property
    def log_likelihood(self) -> float:
        """Exact log p of a generated video's latents (with the training noise) given its prompt, in nats; computed
        when it is first asked for. Raises UserError for frames that no model here generated."""
        if self._nats is None:
            raise UserError("these frames were not generated here; use model.log_likelihood(video, prompt)")
        return self._nats()

    def save(self, path: str | Path) -> Path:
        """Write an MP4 (H.264). Raises UserError for another ending."""
        if Path(path).suffix != ".mp4":
            raise UserError(f"{path}: must end in .mp4")
        write_mp4(path, self.frames, self.fps, shown_scale(self.frames.shape[1]))
        return Path(path)

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        return f"Video({self.prompt!r}, seed={self.seed}: {frames} frames of {height}x{width}, {self.fps} per second)"

    def _repr_html_(self) -> str:
        data = base64.b64encode(mp4_bytes(self.frames, self.fps, shown_scale(self.frames.shape[1]))).decode()
        caption = f"{html.escape(self.prompt)}, seed {self.seed}" if self.prompt else ""
        return (f'<figure><video autoplay loop muted controls src="data:video/mp4;base64,{data}"></video>'
                f"<figcaption>{caption}</figcaption></figure>")


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A trained model with its settings. Keyword arguments of the methods are the settings of `sample`, by their own
    names and checked alike; a setting that is not given is the model's."""

    system: System
    params: Params = dataclasses.field(repr=False)
    source: str

    @property
    def config(self) -> Config:
        return self.system.config

    def __repr__(self) -> str:
        return f"Model({self.config.name}: {self.source})"

    def generate(self, prompt: str | Sequence[str], *, image: Any = "", **settings: Any) -> Any:
        """A `Video`; a list of them for a list of prompts, or for count > 1.

        image: the first frame, a picture file or uint8 (H, W, 3). Raises UserError for what can't be.
        """
        known_THWC, settings = self._picture(image, settings)
        return self._generate(prompt, known_THWC, settings)

    def extend(self, video: Any, prompt: str, **settings: Any) -> Any:
        """The video, read at the model's size and rate, and what follows it: as `generate`.

        video: a `Video`, a file, or uint8 (T, H, W, 3) at the model's rate. frames counts the given ones, too; by
        default a training length is added.
        """
        known_THWC = self._frames(video, keep="end", fps=settings.get("fps", 0))
        return self._generate(prompt, known_THWC, settings, extends=True)

    def stream(self, prompt: str, *, image: Any = "", **settings: Any) -> Iterator[np.ndarray]:
        """The video's frames as they are made, uint8 (T, H, W, 3): the first by itself, then the codec's time stride
        together."""
        known_THWC, settings = self._picture(image, settings)
        system = self._with(settings, stream=True)
        asked = system.config.sample
        known_THWC = given_frames(system.config) if known_THWC is None else known_THWC
        request, = self._requests(system.config, [prompt])
        parts = stream_clips(system, self.params, [request.prompt], [request.seed], asked, for_each(known_THWC, 1))
        return (part_BTHWC[0] for part_BTHWC in parts)

    def log_likelihood(self, video: Any, prompt: str, *, draws: int = 0) -> float:
        """Exact log p of a video under a prompt in nats: of its latents with the training noise, mean over draws of it.

        video: as for `extend`, from its start. draws: 0: evaluate.draws.
        """
        config, frames_THWC = self.config, self._frames(video, keep="start")
        draws = changed(config, "evaluate", {"draws": draws}).evaluate.draws if draws else config.evaluate.draws
        noisy = noised(self.system, frames_THWC[None], range(draws))
        text = self.system.features(self.params, self.system.text_ids([
            self.system.prompt(prompt, is_image=noisy.shape[1] == 1)]))
        nats_BN = frame_nats(self.system, self.params, noisy, jnp.broadcast_to(text, (draws, *text.shape[1:])))
        return -float(nats_BN.sum(axis=1).mean())

    def _generate(self, prompt: str | Sequence[str], known_THWC: np.ndarray | None, settings: dict[str, Any],
                  extends: bool = False) -> Any:
        system = self._with(settings)
        config, asked = system.config, system.config.sample
        known_THWC = given_frames(config) if known_THWC is None else known_THWC
        if known_THWC is not None and (extends or asked.video):
            config = extended(config, len(known_THWC))
            system = dataclasses.replace(system, config=config)
        latent_frames(config, config.sample)
        prompt_changes(config, config.sample)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        requests = self._requests(config, prompts)
        made = [video for batch in generate(system, self.params, requests, known_THWC) for video in batch]
        if asked.keep:
            made = [made[index] for index in most_likely(made, [self._nats_of(video) for video in made], asked.keep)]
        videos = [Video(video.frames_THWC, file_rate(config), video.request.prompt, video.request.seed,
                        functools.partial(self._nats_of, video)) for video in made]
        return videos[0] if isinstance(prompt, str) and asked.count == 1 else videos

    def _with(self, settings: dict[str, Any], stream: bool = False) -> System:
        """The system with other settings of sampling. Raises UserError for those that are none."""
        for name in settings:
            if name in OF_THE_COMMAND_LINE:
                raise UserError(f"sample.{name}: is a setting of the command line, and no argument here")
        config = changed(self.config, "sample", {**settings, "stream": stream})
        return dataclasses.replace(self.system, config=config)

    def _requests(self, config: Config, prompts: Sequence[str]) -> list[Request]:
        asked = config.sample
        requests = [Request(prompt, asked.seed + index) for prompt in prompts for index in range(asked.count)]
        for line in unknown_word_lines(config, requests):
            warnings.warn(line, stacklevel=4)
        return rewritten(config, requests)

    def _picture(self, image: Any, settings: dict[str, Any]) -> tuple[np.ndarray | None, dict[str, Any]]:
        """An array as the first frame; a file by its setting."""
        if isinstance(image, str | Path):
            return None, {**settings, "image": str(image)}
        return resize_crop(np.asarray(image)[None], *frame_size(self.config)), settings

    def _frames(self, video: Any, keep: str, fps: int = 0) -> np.ndarray:
        if isinstance(video, str | Path):
            return read_given(self.config, str(video), fps=fps, keep=keep)[0]
        frames_THWC, rate = (video.frames, video.fps) if isinstance(video, Video) else (np.asarray(video), 0)
        wanted = fps or self.config.text.fps
        frames_THWC = at_rate(frames_THWC, rate, wanted) if rate and wanted else frames_THWC
        return whole_latents(self.config, frames_THWC, keep, "the given video")[0]

    def _nats_of(self, made: Made) -> float:
        clips, one = made.clips, slice(made.index, made.index + 1)
        alone = dataclasses.replace(clips, noisy_BNhwC=clips.noisy_BNhwC[one],
                                    text={at: features_BSD[one] for at, features_BSD in clips.text.items()})
        return float(log_likelihood(self.system, self.params, alone)[0])


def load(source: str | Path = "") -> Model:
    """The model in the package; or that of a workdir, which --mode=train or --mode=convert wrote.

    Programs are compiled once and kept on disk for the next process, in the user's cache folder unless
    jax_compilation_cache_dir names another. Raises UserError where there is no model.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        keep_compiled_programs()
    workdir = Path(source) if str(source) else PRETRAINED
    return Model(*load_model(settings_of(workdir), workdir))
