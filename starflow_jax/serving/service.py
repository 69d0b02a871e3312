"""What requests and WebSockets share: the engine's sessions, and the pictures that some begin with."""

import anyio
import anyio.to_thread

from starflow_jax.config import Serve
from starflow_jax.model.codec import frame_size, pixel_frames
from starflow_jax.serving.asked import Asked
from starflow_jax.serving.engine import Engine
from starflow_jax.serving.feed import Encoder
from starflow_jax.serving.live import Live
from starflow_jax.serving.uploads import read_picture

PICTURES_AT_ONCE = 2


class Service:
    """Of one server."""

    def __init__(self, engine: Engine, settings: Serve) -> None:
        self.engine, self.settings = engine, settings
        self._pictures = anyio.CapacityLimiter(PICTURES_AT_ONCE)

    async def begin(self, asked: Asked, *, paced: bool) -> Live:
        """A session; one that is not paced has the training length where none is asked for, if it may be so long.
        Raises UserError and Full."""
        config, image = self.engine.model.config, None
        if asked.image:
            fit = "resize_then_crop" if config.sample.as_released else "resize_crop"
            image = await anyio.to_thread.run_sync(read_picture, asked.image, *frame_size(config), fit,
                                                   limiter=self._pictures)
        frames = asked.frames or (0 if paced else min(pixel_frames(config), self.engine.most_frames))
        return await anyio.to_thread.run_sync(lambda: self.engine.begin(
            asked.prompt, paced=paced, frames=frames, image=image, **asked.settings))

    def encoder(self, live: Live) -> Encoder:
        """Of its frames."""
        return Encoder(live, frame_size(live.session.config)[0])
