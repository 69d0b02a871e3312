"""What requests and WebSockets share: the engine's sessions, and the pictures and videos that some begin with."""

from typing import Any

import anyio
import anyio.to_thread
import numpy as np

from starflow_jax.config import Serve
from starflow_jax.model.codec import frame_size, pixel_frames
from starflow_jax.sampling.given import fit_video, latents_of
from starflow_jax.serving.asked import Asked
from starflow_jax.serving.engine import Engine, given_sizes
from starflow_jax.serving.feed import Encoder
from starflow_jax.serving.live import Live
from starflow_jax.serving.uploads import read_clip, read_picture

FILES_AT_ONCE = 2


class Service:
    """Of one server."""

    def __init__(self, engine: Engine, settings: Serve) -> None:
        self.engine, self.settings = engine, settings
        self._config = engine.model.config
        self._files = anyio.CapacityLimiter(FILES_AT_ONCE)

    async def begin(self, asked: Asked, *, paced: bool) -> Live:
        """A session; one that is not paced has the training length where none is asked for, beside the frames of a
        video that it begins with, if it may be so long. Raises UserError and Full."""
        known: dict[str, Any] = {}
        if asked.image:
            known["image"] = await anyio.to_thread.run_sync(self._picture, asked.image, limiter=self._files)
        if asked.video:
            known["video"] = await anyio.to_thread.run_sync(self._clip, asked.video, limiter=self._files)
        most = min(len(known.get("video", "-")) - 1 + pixel_frames(self._config), self.engine.most_frames)
        frames = asked.frames or (0 if paced else most)
        return await anyio.to_thread.run_sync(lambda: self.engine.begin(
            asked.prompt, paced=paced, frames=frames, **known, **asked.settings))

    def encoder(self, live: Live) -> Encoder:
        """Of its frames."""
        return Encoder(live, frame_size(live.session.config)[0])

    def _picture(self, content: bytes) -> np.ndarray:
        fit = "resize_then_crop" if self._config.sample.as_released else "resize_crop"
        return read_picture(content, *frame_size(self._config), fit)

    def _clip(self, content: bytes) -> np.ndarray:
        """(T, H, W, 3): the end of a video, at the model's size and rate, of as many latent frames as is compiled."""
        config, stride = self._config, self._config.codec.time_stride
        sizes = given_sizes(config, self.engine.most_frames)
        wanted = config.sample.fps or config.text.fps or 1  # frames per second
        frames_THWC, fps = read_clip(content, *frame_size(config), seconds=(2 + sizes[-1] * stride) / wanted)
        frames_THWC, _ = fit_video(config, frames_THWC, fps, fps=config.sample.fps, keep="end", name="video")
        latents = max(size for size in sizes if size <= latents_of(frames_THWC, stride))
        return frames_THWC[-(1 + (latents - 1) * stride):]
