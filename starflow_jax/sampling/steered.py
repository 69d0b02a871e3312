"""What steers a stream while it is made: its prompt, its guidance and its camera, from a latent frame on that the deep
block has not begun."""

import dataclasses
import queue
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Sample, UserError
from starflow_jax.flow.control import LatentCameras, Steering, ray_tokens
from starflow_jax.io.live_camera import LiveCamera, Seen
from starflow_jax.model.codec import frame_size
from starflow_jax.model.parameters import Params
from starflow_jax.model.system import System
from starflow_jax.sampling.conditions import Conditions, extended, guidance_texts
from starflow_jax.sampling.files import file_rate

NAMES = ("prompt", "guidance", "camera")
Change = dict[str, Any]  # those of NAMES that change; the camera in the form of io/live_camera.py


class Steered:
    """The `Live` of a session's one video. Changes are asked for in any thread; each holds from the next step on that
    begins, all of those before it together. What would change nothing is left out."""

    def __init__(self, system: System, params: Params, settings: Sample, start: Change, script: Mapping[int, Change],
                 ) -> None:
        """start: prompt, guidance (None: as the settings say) and camera (None: none) of the first frame. script: what
        changes then, by the latent frame from which on it holds."""
        self._system, self._params, self._settings = system, params, settings
        self.start, self._script = dict(start), dict(script)
        self.changes: dict[int, Change] = {}  # what has changed so far, in the form of the script
        self._now = self.start  # what holds
        self._asked: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        model, stride = system.config.model, system.config.codec.time_stride
        self._camera = LiveCamera(*frame_size(system.config), file_rate(system.config), stride)
        self._seen: dict[int, list[Seen]] = {}  # a latent frame's cameras, of those that a window may have
        self._next_seen, self._frame, self._window, self._stride = 0, 0, model.frames, stride
        self.other_prompt: str | None = None  # that latent frames are compared with; may be set in any thread
        self._other_texts: dict[tuple[str, bool], jax.Array] = {}  # its features, of a video's beginning or not

    def ask(self, name: str, value: Any) -> None:
        """Change something from the next step on."""
        self._asked.put((name, value))

    def begin_video(self, frames: int | None, given: int) -> None:
        """Take what was asked for so far as the start. frames: pixel frames of the video; None: it has no end. given:
        latent frames that are given."""
        self._frame = given
        self.start |= self._due() | self._taken()
        self._now = dict(self.start)
        if self._now["camera"] is not None:
            self._camera.begin(self._now["camera"], frames)

    @property
    def guided(self) -> bool:
        """Whether the deep block works on both branches of guidance."""
        return self._settings.guided or bool(self._now["guidance"])

    @property
    def text_settings(self) -> Sample:
        """Settings that give texts with as many branches as the deep block works on, and neither a camera nor changes,
        which are followed here."""
        return dataclasses.replace(self._settings, guidance=1.0 if self.guided else 0.0, later_guidance=-1.0, camera="",
                                   changes="")

    def begin(self, given: Conditions, frame: int) -> None:
        """As `Live` says."""
        self._frame = given.given + frame
        change = self._due() | self._taken() if frame else {}
        if change:
            self._see(self._frame)
        change = {name: change[name] for name in NAMES if name in change and self._differs(name, change[name])}
        if not change:
            return
        guided, followed = self.guided, self._now["camera"] is not None
        self._now |= change
        self.changes[self._frame] = change
        if "camera" in change:
            self._camera.follow(change["camera"])
        # The window is encoded again where what it was encoded with has changed, and the steps with it.
        if "prompt" in change or guided != self.guided or followed != (self._now["camera"] is not None):
            captions = extended(self._system.config, [self._now["prompt"]], self._settings)
            features = guidance_texts(self._system, self._params, captions, self.text_settings, is_image=False)
            given.texts.change(frame, features, needed=frame - 3 * self._window)

    def guidance(self, later: bool) -> float:
        """As `Live` says."""
        weight = self._now["guidance"]
        return self._settings.weight(later) if weight is None else weight

    def steering(self, begin: int, first: int, frames: int) -> Steering | None:
        """As `Live` says."""
        if self._now["camera"] is None:
            return None
        # Where a window is encoded again, it may ask for frames that are not begun, whose cameras do not matter.
        self._see(min(first + frames, self._frame) if first < self._frame else first + frames)
        # In double precision to the axes of the window's first camera: a path may lead far from where it began.
        to_first_44 = np.linalg.inv(self._seen[begin][-1].world_to_camera_44)
        latents = [min(frame, self._next_seen - 1) for frame in range(first, first + frames)]
        seen_NR = [self._seen[frame] for frame in latents]
        intrinsics_NR4 = np.array([[one.intrinsics_4 for one in seen_R] for seen_R in seen_NR], np.float32)
        poses_NR44 = np.array([[one.world_to_camera_44 @ to_first_44 for one in seen_R] for seen_R in seen_NR])
        before_N44 = np.array([self._seen[max(frame - 1, begin)][-1].world_to_camera_44 @ to_first_44
                               for frame in latents])
        cameras = LatentCameras(intrinsics_NR4[None], poses_NR44[None].astype(np.float32))
        rays = ray_tokens(cameras, jnp.eye(4)[None], jnp.float32(before_N44)[None], self._system.config.model)
        return self._params["control"], rays

    def other_text(self, given: Conditions, frame: int, start: int) -> jax.Array | None:
        """As `Live` says."""
        prompt, begins = self.other_prompt, given.begins(frame, start)
        if prompt is None:
            return None
        if (prompt, begins) not in self._other_texts:
            config = self._system.config
            captions = [prompt] if begins else extended(config, [prompt], self._settings)
            self._other_texts = {of: text for of, text in self._other_texts.items() if of[0] == prompt}
            self._other_texts[prompt, begins] = guidance_texts(
                self._system, self._params, captions, self.text_settings, is_image=begins and given.total == 1)[0]
        return self._other_texts[prompt, begins]

    def _due(self) -> Change:
        """What the script says of the next step's frames, or of frames before them."""
        change: Change = {}
        for frame in sorted(frame for frame in self._script if frame <= self._frame):
            change |= self._script.pop(frame)
        return change

    def _taken(self) -> Change:
        """What was asked for since, the last of each."""
        change: Change = {}
        while not self._asked.empty():
            name, value = self._asked.get()
            change[name] = value
        return change

    def _differs(self, name: str, value: Any) -> bool:
        if name == "camera":
            return not self._camera.follows(value)
        if name == "guidance" and self._now[name] is None:
            return {value} != {self._settings.guidance, self._settings.guidance_past_window}
        return value != self._now[name]

    def _see(self, frames: int) -> None:
        """Let the camera move on until it has seen so many latent frames; forgets those that no window has any more."""
        while self._next_seen < frames:
            alone = self._next_seen == 0  # a video's first latent frame is one frame, where the path begins
            self._seen[self._next_seen] = [self._camera.now] * self._stride if alone else [
                self._camera.next() for _ in range(self._stride)]
            self._seen.pop(self._next_seen - 2 * self._window, None)
            self._next_seen += 1


def check_prompt(prompt: Any) -> str:
    """A prompt of a session. Raises UserError for what is no text."""
    if not isinstance(prompt, str):
        raise UserError(f"prompt: must be a text, not {type(prompt).__name__}")
    return prompt
