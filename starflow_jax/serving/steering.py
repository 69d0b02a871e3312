"""A session over a WebSocket: changes come in as JSON, pieces of an MP4 and JSON go out.

The client's first message asks for the session, as POST /v1/videos does; with "surprise": true each latent frame's is
told, and with "map" where in the frame it lies. Later ones hold any of prompt, guidance and camera (changes),
other_prompt (that frames are compared with, or null), played (frames that it has played), pause (true or false), and
record (true: send the session's JSON). The server's messages are pieces of the video, in binary, and JSON with a type:
queued, begun, video, frames, changed, shown, refused, record, ended.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from starflow_jax.config import Serve, UserError
from starflow_jax.serving.asked import check_change, read_asked, read_json
from starflow_jax.serving.describe import record_of
from starflow_jax.serving.engine import Full
from starflow_jax.serving.feed import Encoder, events_of
from starflow_jax.serving.live import Begun, Changed, Ended, Frames, Live, Place, Refused, Shown
from starflow_jax.serving.service import Service

CHANGES = ("prompt", "guidance", "camera", "other_prompt")
MOST_MISTAKES = 20  # messages that can't be, after which a client is sent away


def steer(service: Service) -> Callable[[WebSocket], Awaitable[None]]:
    """The WebSocket's endpoint."""

    async def session(socket: WebSocket) -> None:
        await socket.accept()
        try:
            await _session(service, socket)
        except (WebSocketDisconnect, TimeoutError, OSError):
            pass  # the client is gone, or does not read

    return session


async def _session(service: Service, socket: WebSocket) -> None:
    try:
        with anyio.fail_after(service.settings.idle_seconds):
            asked = read_asked(read_json(await socket.receive_text(), "the first message"), service.settings,
                               steered=True)
        live = await service.begin(asked, paced=True)
    except (UserError, Full, KeyError) as error:  # starlette's KeyError: the message was not a text
        why = str(error) if isinstance(error, UserError) else "every place is taken; try again later" if isinstance(
            error, Full) else "the first message: must be a text"
        return await _leave(socket, {"type": "ended", "failed": True, "why": why})
    client = _Client(socket, live, service.settings, maps=asked.maps)
    encoder = service.encoder(live)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.listen, tasks.cancel_scope)
            await client.tell(encoder)
            tasks.cancel_scope.cancel()
    except* (WebSocketDisconnect, TimeoutError, OSError, RuntimeError):
        pass  # as above; starlette's RuntimeError: it has been closed
    finally:
        live.close()
        encoder.close()


async def _leave(socket: WebSocket, message: dict[str, Any]) -> None:
    await socket.send_json(message)
    await socket.close(1008)


class _Client:
    """Both directions of one session's WebSocket."""

    def __init__(self, socket: WebSocket, live: Live, settings: Serve, *, maps: bool) -> None:
        """maps: tell where in each latent frame its surprise lies."""
        self._socket, self._live, self._settings, self._maps = socket, live, settings, maps
        self._sending = anyio.Lock()
        self._mistakes = 0

    async def listen(self, scope: anyio.CancelScope) -> None:
        """Until the client is gone, or has sent too much that can't be."""
        while self._mistakes < MOST_MISTAKES:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                break
            try:
                await self._obey(read_json(message.get("text") or "", "a message"))
            except UserError as error:
                self._mistakes += 1
                await self._say("refused", why=str(error))
        self._live.close()
        scope.cancel()

    async def _obey(self, held: dict[str, Any]) -> None:
        changes = {name: check_change(name, held.pop(name), self._settings) for name in CHANGES if name in held}
        played, pause, record = (held.pop(name, None) for name in ("played", "pause", "record"))
        if held:
            raise UserError(f"{next(iter(held))!r:.80}: is nothing that a session knows")
        if not (played is None or isinstance(played, int)) or not (pause is None or isinstance(pause, bool)):
            raise UserError("played must be a whole number, and pause true or false")
        if changes:
            self._live.change(**changes)
        if played is not None:
            self._live.played(played)
        if pause is not None:
            self._live.pause(pause)
        if record:
            await self._say("record", record=record_of(self._live.session))

    async def tell(self, encoder: Encoder) -> None:
        """What happens, until it ends."""
        async for event in events_of(self._live):
            match event:
                case Place(place):
                    await self._say("queued", place=place)
                case Begun():
                    await self._say("begun")
                case Frames():
                    await self._show(event, encoder)
                case Changed(names, frame):
                    await self._say("changed", names=names, frame=frame)
                case Shown(frame, seconds):
                    await self._say("shown", frame=frame, seconds=round(seconds, 4))
                case Refused(why):
                    await self._say("refused", why=why)
                case Ended(why, failed):
                    await self._say("ended", why=why, failed=failed, record=record_of(self._live.session))
        async with self._sending:
            await self._socket.close()

    async def _show(self, made: Frames, encoder: Encoder) -> None:
        piece = await encoder.piece(made.frames_THWC)
        facts = {"type": "frames", "shown": made.first + len(made.frames_THWC), "seconds": round(made.seconds, 4),
                 "surprise": made.surprise}
        if made.other_surprise is not None:
            facts["other_surprise"] = made.other_surprise
        if self._maps and made.surprise_map is not None:
            facts["surprise_map"] = np.round(made.surprise_map.astype(float), 4).tolist()
        async with self._sending:
            if not made.first:
                await self._socket.send_json({"type": "video", "codec": encoder.codec})
            await self._socket.send_bytes(piece)
            await self._socket.send_json(facts)

    async def _say(self, kind: str, **what: Any) -> None:
        async with self._sending:
            await self._socket.send_json({"type": kind, **what})
