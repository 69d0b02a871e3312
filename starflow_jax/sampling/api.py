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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import ArrayLike

from starflow_jax.config import Config, UserError, changed
from starflow_jax.config import Mesh as MeshSettings
from starflow_jax.flow.generation import Ask, answer
from starflow_jax.io.compiled import keep_compiled_programs
from starflow_jax.io.live_camera import as_json
from starflow_jax.io.video import mp4_bytes, write_mp4
from starflow_jax.model.codec import frame_size
from starflow_jax.model.own_settings import PRETRAINED, settings_of
from starflow_jax.model.parameters import Params
from starflow_jax.model.store import load_model
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import Made, generate, log_likelihoods, most_likely, noised_draws
from starflow_jax.sampling.conditions import ENDLESS, caption_text, check_given, latent_frames, prompt_changes
from starflow_jax.sampling.files import file_rate, shown_scale
from starflow_jax.sampling.generate import Clips, log_likelihood
from starflow_jax.sampling.given import fit_picture, fit_video, given_frames, latents_of, read_given
from starflow_jax.sampling.identity import plain
from starflow_jax.sampling.likelihood import frame_nll
from starflow_jax.sampling.memory import check_making
from starflow_jax.sampling.mesh import on_mesh, sampling_mesh
from starflow_jax.sampling.record import Record, read_record
from starflow_jax.sampling.requests import Request, requests_for, rewritten, unknown_word_lines, with_length
from starflow_jax.sampling.session import Session
from starflow_jax.sampling.sizes import at_asked_size, resized, videos_together
from starflow_jax.sampling.solver import chosen_solver
from starflow_jax.sampling.steered import Change
from starflow_jax.sampling.stream import for_streams
from starflow_jax.sampling.warm_up import NONE, warm_up
from starflow_jax.sharding import fetch

# Settings of `sample` that belong to the command line: its files, and what the methods say in other ways.
OF_THE_COMMAND_LINE = ("offload", "prompt", "prompts_file", "session", "vbench", "stream", "output", "overwrite",
                       "checkpoint")
OF_LOADING = ("weights", "lora", "merge_lora", "control", "draft", "decoder")


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A video, generated or built from frames; it shows itself in a notebook."""

    frames: np.ndarray  # uint8 (T, H, W, 3)
    fps: float
    prompt: str = ""
    seed: int = 0
    _log_likelihood: Callable[[], float] | None = None  # of a generated video

    @functools.cached_property
    def log_likelihood(self) -> float:
        """Exact log p of a generated video's latents (with the training noise) given its prompt, in nats; computed on
        first access. Raises UserError for a video that was not generated here."""
        if self._log_likelihood is None:
            raise UserError("these frames were not generated here; use model.log_likelihood(video, prompt)")
        return self._log_likelihood()

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
    """A trained model with its settings. Keyword arguments of the methods are the settings of `sample` under their own
    names, checked by the same code; one that is not given keeps the model's value."""

    system: System
    params: Params = dataclasses.field(repr=False)
    source: str
    weights: str  # a checksum, equal for equal parameters
    mesh: Mesh = dataclasses.field(repr=False)  # that the parameters lie on

    @property
    def config(self) -> Config:
        return self.system.config

    def __repr__(self) -> str:
        return f"Model({self.config.name}: {self.source})"

    def generate(self, prompt: str | Sequence[str], *, image: str | Path | ArrayLike = "", **settings: Any) -> Any:
        """A `Video`; a list of them for a list of prompts, or for count > 1.

        image: the first frame, a picture file or uint8 (H, W, 3). Raises UserError for what can't be.
        """
        with on_mesh(self.mesh):
            return self._videos(prompt, *self._begin(prompt, settings, image=image))

    def extend(self, video: "Video | str | Path | ArrayLike", prompt: str, **settings: Any) -> Any:
        """The video, at the model's size and frame rate, and what follows it; returns what `generate` does.

        video: a `Video`, a file, or uint8 (T, H, W, 3) at the model's rate. frames counts the given ones too; by
        default a training length is added. Raises UserError for what can't be.
        """
        with on_mesh(self.mesh):
            return self._videos(prompt, *self._begin(prompt, settings, video=video))

    def stream(self, prompt: str, *, frames: int = 0, image: str | Path | ArrayLike = "",
               video: "Video | str | Path | ArrayLike | None" = None, recording: bool = True, surprise: bool = False,
               ahead: bool = True, **settings: Any) -> Session:
        """A session: the video's frames as they are made, uint8 (T, H, W, 3), the first by itself, then the codec's
        time stride together; its prompt, guidance and camera may be changed meanwhile.

        frames: after how many it ends, given ones included; 0: never. image: the first frame, as for `generate`; or
        video: the first frames, as for `extend`. recording: frames are kept, on disk, so that the session can be saved.
        surprise: the session tells each latent frame's, `Session.surprise`. ahead: the device works on the next latent
        frame while one is handed out; without, a change holds a latent frame earlier. Raises UserError for what can't
        be.
        """
        return self._session(prompt, {**settings, "frames": frames}, image, video, recording=recording,
                             surprise=surprise, ahead=ahead)

    def replay(self, path: str | Path) -> Session:
        """The session of a JSON that `Session.save` wrote, once more: the same frames, bit for bit on the same device.
        It ends where that was saved; until then it may be steered anew.

        Raises UserError for what is no such JSON, and for one of other weights.
        """
        record = read_record(path)
        if self._parameters != record.weights:
            raise UserError(f"{path}: is of {record.model} with weights {record.weights}; those of {self.source} are "
                            f"{self._parameters}")
        with on_mesh(self.mesh):
            system, _, _ = self._begin(record.start["prompt"], record.settings, stream=True)
        if record.known_THWC is not None:
            count, *size = record.known_THWC.shape[:3]
            if tuple(size) != frame_size(system.config) or (count - 1) % system.config.codec.time_stride:
                raise UserError(f"{path}: its {count} given frames of {size[0]}x{size[1]} don't suit this model")
        return Session(system, self._stream_params, self.mesh, record)

    def warm_up(self, *, answer: Callable[[Ask], None] = answer, surprise: bool = False, given: Sequence[int] = (1,),
                **settings: Any) -> None:
        """Compile, by making a few frames, all that a session of these settings of `stream` may need, so that none
        waits for the compiler: its beginning, also from a picture, windows that move on, changes of prompt, guidance
        and camera, and its end.

        answer: what makes each step of the deep block, and may compile further programs for it. given: of how many
        latent frames the pictures (1) and videos are that a session may begin with; each is programs of its own."""
        stride, image = self.config.codec.time_stride, settings.pop("image", "")
        settings = {**settings, "frames": 0, "rewrite": ""}
        _, _, known_THWC = self._begin("", settings, image=image, stream=True)
        known = latents_of(known_THWC, stride)

        def begin(frames: int = 0, changes: Mapping[int, Change] = NONE, given: int = 0) -> Session:
            video = np.zeros((1 + (given - 1) * stride, 8, 8, 3), np.uint8) if given else None
            asked = {**settings, "frames": 1 + (known + frames - 1) * stride if frames else 0}
            session = self._session("", asked, image, video, changes, recording=False, surprise=surprise)
            session.answer = answer
            return session

        warm_up(begin, steerable="control" in self.params, given=[] if known else given)

    @functools.cached_property
    def _stream_params(self) -> Params:
        with on_mesh(self.mesh):
            return for_streams(self.params, devices=1)

    def _session(self, prompt: str, settings: dict[str, Any], image: str | Path | ArrayLike,
                 video: "Video | str | Path | ArrayLike | None", changes: Mapping[int, Change] = NONE,
                 recording: bool = True, surprise: bool = False, ahead: bool = True) -> Session:
        """changes: beside those of settings, by the latent frame from which on they hold, given ones aside."""
        with on_mesh(self.mesh):
            system, requests, known_THWC = self._begin(prompt, settings, image=image, video=video, stream=True)
        config = changed(system.config, "sample", {"frames": settings["frames"]})  # 0: no end, and no length
        if len(requests) > 1:
            raise UserError(f"sample.count={len(requests)}: a stream is one video; call it once for each seed")
        request, sample = requests[0], config.sample
        if not sample.frames and config.model.frames < 3:
            raise UserError(f"frames=0: a window of {config.model.frames} latent frames is too short to move on; ask "
                            f"for up to {system.pixel_frames} frames")
        if chosen_solver(system, sample).frames_per_step > 1:
            raise UserError(f"sample.solver.frames_per_step={sample.solver.frames_per_step}: a session begins one "
                            "latent frame at a time, so that it can be steered; leave it out")
        given = check_given(config, sample, known_THWC, latent_frames(config, sample) if sample.frames else ENDLESS)
        script: dict[int, Change] = {at: {"prompt": other} for at, other in prompt_changes(config, sample).items()}
        script |= {given + at: change for at, change in changes.items()}
        if min(script, default=given) < given:
            raise UserError(f"sample.changes={sample.changes!r}: the prompt of given frames can't be changed")
        # The record has what these say in fields of its own.
        kept = plain(dataclasses.replace(sample, image="", video="", camera="", changes="", rewrite=""))
        kept = {name: value for name, value in kept.items() if name not in (*OF_THE_COMMAND_LINE, *OF_LOADING)}
        camera = as_json(sample.camera) if sample.camera else None
        start = {"prompt": request.prompt, "guidance": None, "camera": camera}
        record = Record(self.source, self._parameters, kept, request.seed, start, script, known_THWC)
        return Session(dataclasses.replace(system, config=config), self._stream_params, self.mesh, record,
                       recording=recording, surprise=surprise, ahead=ahead)

    def log_likelihood(self, video: "Video | str | Path | ArrayLike", prompt: str, *, camera: str = "", draws: int = 0
                       ) -> float:
        """Exact log p of a video given a prompt, in nats: of its latents with the training noise, averaged over draws
        of that noise.

        video: as for `extend`, but read from its start. camera: that it is seen by, as sample.camera. draws: how many;
        0: evaluate.draws. Raises UserError for a video that can't be read or is too short, for a camera that can't be
        read, and for one where the model follows none.
        """
        config, frames_THWC = self.config, _frames(self.config, video, keep="start")
        draws = changed(config, "evaluate", {"draws": draws}).evaluate.draws if draws else config.evaluate.draws
        with on_mesh(self.mesh):
            nll = 0.0
            for noisy in noised_draws(self.system, frames_THWC, draws):
                text = caption_text(self.system, self.params, [prompt] * len(noisy), noisy.shape[1], camera)
                nll += float(frame_nll(self.system, self.params, noisy, text).sum(axis=1).mean()) * len(noisy) / draws
            return -nll

    @property
    def _parameters(self) -> str:
        """What they are, and as what they are kept."""
        sample = self.config.sample
        apart = ", LoRA apart" if sample.lora and not sample.merge_lora else ""
        return f"{self.weights} as {sample.weights or self.config.model.dtype}{apart}"

    def _begin(self, prompt: str | Sequence[str], settings: dict[str, Any], *, image: str | Path | ArrayLike = "",
               video: "Video | str | Path | ArrayLike | None" = None, stream: bool = False,
               ) -> tuple[System, list[Request], np.ndarray | None]:
        """(the system with these settings of sampling, the videos asked for, the given frames)."""
        for name in settings:
            if name in OF_THE_COMMAND_LINE:
                raise UserError(f"sample.{name}: is a setting of the command line, not an argument here")
            if name in OF_LOADING:
                raise UserError(f"sample.{name}: is chosen when a model is loaded, as in sf.load({name}=...)")
        if isinstance(image, str | Path):
            settings = {**settings, "image": str(image)}
        config = at_asked_size(changed(self.config, "sample", {**settings, "stream": stream}))
        if video is not None and not (isinstance(image, str) and not image):
            raise UserError("image and video are both given; leave one out")
        if video is not None:
            known_THWC: np.ndarray | None = _frames(config, video, keep="end", fps=config.sample.fps)
        else:
            known_THWC = given_frames(config) if isinstance(image, str | Path) else fit_picture(config, image)
        config = with_length(config, known_THWC, extends=video is not None or bool(config.sample.video))
        requests = requests_for([prompt] if isinstance(prompt, str) else list(prompt), config.sample)
        check_making(config, self.mesh, videos_together(len(requests), config.sample.batch_size),
                     latent_frames(config, config.sample), stream)
        requests = rewritten(config, requests)
        for line in unknown_word_lines(config, requests):
            warnings.warn(line, stacklevel=3)
        return resized(self.system, config), requests, known_THWC

    def _videos(self, prompt: str | Sequence[str], system: System, requests: list[Request],
                known_THWC: np.ndarray | None) -> Any:
        keep = system.config.sample.keep
        made: list[Made] = []
        likelihoods: list[float] = []
        for batch in generate(system, self.params, requests, known_THWC):
            for video in batch:
                video.check()
            made += batch
            if keep:
                likelihoods += log_likelihoods(system, self.params, batch)
        if keep:
            made = [made[index] for index in most_likely(made, likelihoods, keep)]
        videos = [Video(video.frames_THWC, file_rate(system.config), video.request.prompt, video.request.seed,
                        functools.partial(_log_likelihood_of, self, system, _alone(video))) for video in made]
        return videos[0] if isinstance(prompt, str) and system.config.sample.count == 1 else videos


def _alone(made: Made) -> Clips:
    """The one clip, so that a video does not keep the others of its batch."""
    clips, one = made.clips, slice(made.index, made.index + 1)
    if len(clips.frames_BTHWC) == 1:
        return clips
    return dataclasses.replace(clips, frames_BTHWC=clips.frames_BTHWC[one], noisy_BNhwC=clips.noisy_BNhwC[one].copy(),
                               text=jax.tree.map(lambda features_BSD: fetch(features_BSD)[one], clips.text))


def _log_likelihood_of(model: Model, system: System, clips: Clips) -> float:
    with on_mesh(model.mesh):
        return float(log_likelihood(system, model.params, clips)[0])


def _frames(config: Config, video: "Video | str | Path | ArrayLike", keep: str, fps: int = 0) -> np.ndarray:
    if isinstance(video, str | Path):
        return read_given(config, str(video), fps=fps, keep=keep)[0]
    frames_THWC, own_fps = (video.frames, video.fps) if isinstance(video, Video) else (np.asarray(video), 0)
    return fit_video(config, frames_THWC, own_fps, fps=fps, keep=keep)[0]


def load(source: str | Path = "", *, weights: str = "", lora: str | Path = "", merge_lora: bool | None = None,
         control: str | Path = "", draft: str | Path = "", decoder: str | Path = "",
         mesh: Mapping[str, int] | None = None) -> Model:
    """The model in the package; or that of a workdir, which --mode=train or --mode=convert wrote.

    weights: what the layers' matrices are kept as, "int8", "int4" or, by default, as the model's own settings say.
    lora: "FILE[:SCALE],...", LoRA factors that are added to it: workdirs of train.target=lora, or PEFT's files.
    merge_lora: whether they, or a workdir's own, are added to the matrices or kept apart; by default as its settings
    say.
    control: a workdir of train.target=control, or a file of its module, with which the model follows a camera; by
    default the package's model has its own.
    draft: a workdir of train.target=student, or a file of its block, which drafts for the model.
    decoder: a workdir of train.target=decoder, or a file of its decoder, which then takes the denoiser's place.
    mesh: over which of this process's devices it is sharded, the settings of `mesh` under their own names, such as
    {"tensor": 4}; by default over as many as suit it. Programs are compiled once and kept on disk for the next process,
    in the user's cache folder unless jax_compilation_cache_dir names another. Raises UserError where there is no model,
    and for a mesh that does not suit it.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        keep_compiled_programs()
    workdir = Path(source) if str(source) else PRETRAINED
    config = settings_of(workdir)
    asked = {"weights": weights or None, "lora": str(lora) or None, "merge_lora": merge_lora,
             "control": str(control) or None, "draft": str(draft) or None,
             **({"decoder": str(decoder), "denoise": "decoder", "renoise": False} if str(decoder) else {})}
    config = changed(config, "sample", {name: value for name, value in asked.items() if value is not None})
    # Not the mesh that it was trained on.
    config = changed(config, "mesh", {**dataclasses.asdict(MeshSettings()), **(mesh or {})})
    devices = sampling_mesh(config, videos=1)
    with on_mesh(devices):
        loaded = load_model(config, workdir)
    return Model(loaded.system, loaded.params, loaded.source, loaded.weights, devices)
