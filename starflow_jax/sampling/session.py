"""A session: a stream of one video that is steered while it is made, shown part by part, kept, and made again."""

import collections
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from starflow_jax.codec.interface import Decoded
from starflow_jax.config import Config, UserError, changed
from starflow_jax.flow.generation import Ask, answer
from starflow_jax.io.live_camera import as_json
from starflow_jax.io.video import Recording
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.batches import for_each
from starflow_jax.sampling.conditions import ENDLESS, latent_frames, make_conditions
from starflow_jax.sampling.files import file_rate, shown_scale
from starflow_jax.sampling.finite import finite_frames
from starflow_jax.sampling.given import latents_of
from starflow_jax.sampling.mesh import on_mesh
from starflow_jax.sampling.record import Record, write_record
from starflow_jax.sampling.requests import Request, rewritten, unknown_word_lines
from starflow_jax.sampling.solved import solved
from starflow_jax.sampling.steered import Steered, check_prompt
from starflow_jax.sampling.stream import Step, Surprise, stream_steps
from starflow_jax.sharding import fetch


class Session:
    """An iterator over a video's frames, uint8 (T, H, W, 3): the first by itself, then the codec's time stride
    together.

    `prompt`, `guidance` and `camera` may be set at any time and from any thread. They hold from the next latent frame
    on that is not yet begun: `next_frame` says which that is. As a context manager it lets go of the device at the
    block's end. Each next() raises UserError where a solution, or what is made of it, is not finite.
    """

    def __init__(self, system: System, params: Params, mesh: Mesh, record: Record, *, recording: bool = True,
                 surprise: bool = False, ahead: bool = True) -> None:
        """record: what to make; its frames: how many to show, None: as many as are asked for. Raises UserError where
        the camera that it begins with can't be followed. recording: frames are kept for `save`. surprise:
        tell that of each latent frame. ahead: as `stream_steps` says."""
        self._system, self._params, self._mesh, self._record = system, params, mesh, record
        self._settings = system.config.sample
        if record.start["camera"] is not None:
            self._check_camera(record.start["camera"])
        self._steered = Steered(system, params, self._settings, record.start, record.changes)
        self._set = dict(record.start)
        if self._set["guidance"] is None:
            self._set["guidance"] = self._settings.guidance
        self._recording = Recording(file_rate(system.config), shown_scale(self._pixels[0])) if recording else None
        self.answer: Callable[[Ask], None] = answer  # makes a step of the deep block
        self._steps: Iterator[Ask | Step] | None = None  # from the first frame on
        self._ready: collections.deque[Decoded] = collections.deque()
        self._ahead, self._surprising, self._surprises = ahead, surprise, collections.deque[Surprise]()
        self._surprise: tuple[np.ndarray, np.ndarray | None] | None = None  # (S,) of the last frame that was shown
        self._begun, self._shown = latents_of(record.known_THWC, system.config.codec.time_stride), 0
        self._closed = False

    @property
    def config(self) -> Config:
        """The model's settings, with those of this session."""
        return self._system.config

    @property
    def _pixels(self) -> tuple[int, int]:
        stride, model = self._system.config.codec.stride, self._system.config.model
        return model.height * stride, model.width * stride

    def __iter__(self) -> "Session":
        return self

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, and let go of what it holds on the device. What was shown can still be saved."""
        self._closed = True
        self._steps = iter(())
        if self._recording:
            self._recording.finish()
        self._ready.clear()
        self._surprises.clear()

    def __next__(self) -> np.ndarray:
        while isinstance(part := self.advance(), Ask):
            with on_mesh(self._mesh):
                self.answer(part)
        if part is None:
            raise StopIteration
        return part

    def advance(self) -> np.ndarray | Ask | None:
        """The next frames; or a step of the deep block that must be made before there can be more, for who makes those
        of several sessions together; None: it has ended. Raises as next() does."""
        if self._closed or self._shown == self._record.frames:
            self.close()
            return None
        name = f"{self.prompt!r}, seed {self._record.seed}"
        with on_mesh(self._mesh):
            if self._steps is None:
                self._steps = self._begin()
            while not self._ready:
                step = next(self._steps, None)
                if step is None:
                    self.close()
                    return None
                if isinstance(step, Ask):
                    return step
                self._begun = step.begun
                solved([step.deep], [step.shallow]).check(0, name)
                self._ready.extend(step.pixels)
                self._surprises.extend(step.surprises)
            frames_THWC = finite_frames(self._ready[0], [name])[0]  # one that is not stays, for the next call too
            self._ready.popleft()
            if self._surprises:
                own_BS, other_BS = self._surprises.popleft()
                self._surprise = fetch(own_BS)[0], None if other_BS is None else fetch(other_BS)[0]
        if self._recording:
            self._keep(frames_THWC)
        self._shown += len(frames_THWC)
        return frames_THWC

    @property
    def prompt(self) -> str:
        """What the video shows."""
        return self._set["prompt"]

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self._change("prompt", self._worded(prompt))

    @property
    def guidance(self) -> float:
        """The weight of guidance."""
        return self._set["guidance"]

    @guidance.setter
    def guidance(self, weight: float) -> None:
        self._change("guidance", changed(self._system.config, "sample", {"guidance": float(weight)}).sample.guidance)

    @property
    def camera(self) -> Any:
        """From where the video is seen; None: the model follows no camera so far."""
        return self._set["camera"]

    @camera.setter
    def camera(self, camera: Any) -> None:
        self._check_camera(camera)
        self._change("camera", as_json(camera))

    @property
    def begun(self) -> int:
        """Latent frames that are begun, given ones included."""
        return self._begun

    @property
    def next_frame(self) -> int:
        """The first frame of the video, counted from 0, that what is set now holds for: of the latent frame that is
        begun next."""
        return self._frame_of(self._begun)

    @property
    def shown(self) -> int:
        """Frames that were shown."""
        return self._shown

    @property
    def surprise(self) -> float | None:
        """Of the latent frame that was shown last: its exact -log p given the earlier ones of its window, the prompt
        that it was made from and the camera, in bits per dimension; None: it was not asked for."""
        return None if self._surprise is None else float(self._surprise[0].mean())

    @property
    def surprise_map(self) -> np.ndarray | None:
        """Where in that latent frame it lies: (rows, columns) of its tokens, whose mean is `surprise`; a token's share
        is that of its noise and of every block's scale at its place."""
        return None if self._surprise is None else self._surprise[0].reshape(self._system.token_grid)

    @property
    def other_prompt(self) -> str | None:
        """What the video does not show: from the next latent frame on, each one's surprise is also told under this
        prompt, as `other_surprise`. None: nothing is compared."""
        return self._steered.other_prompt

    @other_prompt.setter
    def other_prompt(self, prompt: str | None) -> None:
        if not self._surprising:
            raise UserError("other_prompt: this session tells no surprise; begin it with surprise=True")
        self._steered.other_prompt = None if prompt is None else self._worded(prompt)

    @property
    def other_surprise(self) -> float | None:
        """As `surprise`, given the other prompt instead; None: it was not compared."""
        other_S = None if self._surprise is None else self._surprise[1]
        return None if other_S is None else float(other_S.mean())

    @property
    def asked(self) -> int:
        """Frames that it has in all; 0: it has no end."""
        return self._settings.frames if self._record.frames is None else self._record.frames

    @property
    def record(self) -> Record:
        """What was made so far, and how: what `save` writes beside the video."""
        changes = dict(self._steered.changes)  # at once: they may grow meanwhile, in another thread
        start, shown = self._steered.start, {
            frame: change for frame, change in changes.items() if self._frame_of(frame) < self._shown}
        return Record(self._record.model, self._record.weights, self._record.settings, self._record.seed, start, shown,
                      self._record.known_THWC, self._shown)

    def save(self, path: str | Path) -> Path:
        """Write what was shown, an MP4, and beside it a JSON from which `Model.replay` makes it again. Raises UserError
        for another ending, without frames, and for a session that keeps none."""
        path = Path(path)
        if path.suffix != ".mp4":
            raise UserError(f"{path}: must end in .mp4")
        if not self._recording:
            raise UserError(f"{path}: this session keeps no frames; begin it without recording=False")
        if not self._shown:
            raise UserError(f"{path}: no frame was shown yet")
        self._recording.save(path)
        write_record(path.with_suffix(".json"), self.record, self._system.config.codec.time_stride)
        return path

    def _begin(self) -> Iterator[Ask | Step]:
        config, settings, known_THWC = self._system.config, self._settings, self._record.known_THWC
        self._steered.begin_video(settings.frames or None, latents_of(known_THWC, config.codec.time_stride))
        given = make_conditions(
            self._system, self._params, [self._steered.start["prompt"]], [self._record.seed],
            self._steered.text_settings, for_each(known_THWC, 1), changes={},
            total=latent_frames(config, settings) if settings.frames else ENDLESS)
        return stream_steps(self._system, self._params, given, settings, live=self._steered,
                            surprise=self._surprising, ahead=self._ahead)

    def _worded(self, prompt: Any) -> str:
        """A prompt as the model is given it. Raises UserError for what is none."""
        config = self._system.config
        request, = rewritten(config, [Request(check_prompt(prompt), self._record.seed)])
        for line in unknown_word_lines(config, [request]):
            warnings.warn(line, stacklevel=3)
        return request.prompt

    def _change(self, name: str, value: Any) -> None:
        self._set[name] = value
        self._steered.ask(name, value)

    def _check_camera(self, camera: Any) -> None:
        if "control" not in self._params:
            raise UserError(f"camera {camera!r:.60}: this model follows no camera; train a control module with "
                            '--config.train.target=control and load it with sf.load(control="WORKDIR")')

    def _keep(self, frames_THWC: np.ndarray) -> None:
        assert self._recording is not None
        try:
            self._recording.write(frames_THWC)
        except OSError as error:
            raise UserError(f"the frames can't be kept for saving ({error}); make room in the folder for temporary "
                            "files, name another one (TMPDIR), or stream with recording=False") from error

    def _frame_of(self, latent_frame: int) -> int:
        return 1 + (latent_frame - 1) * self._system.config.codec.time_stride if latent_frame else 0
