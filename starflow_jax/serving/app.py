"""The HTTP API and the page, by starlette, over the engine's sessions."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from starflow_jax.config import Serve, UserError
from starflow_jax.model.codec import frame_size
from starflow_jax.serving.asked import read_asked, read_json
from starflow_jax.serving.describe import model_facts, openapi
from starflow_jax.serving.engine import Engine, Full
from starflow_jax.serving.feed import events_of
from starflow_jax.serving.guard import CutOff, Guard, refused
from starflow_jax.serving.jobs import Job, Jobs
from starflow_jax.serving.live import Ended, Event, Frames, Live
from starflow_jax.serving.metrics import Metrics
from starflow_jax.serving.service import Service
from starflow_jax.serving.steering import steer

PAGE = Path(__file__).parent / "page"
KINDS = {"index.html": "text/html", "style.css": "text/css", **dict.fromkeys(
    ("page.js", "common.js", "session.js", "surprise.js", "camera.js", "seeds.js"), "text/javascript")}
VIDEO = "video/mp4"
BODY_SECONDS = 30.0  # within which a request's body must come


class Videos:
    """What answers requests for videos."""

    def __init__(self, service: Service) -> None:
        self._service, self._settings = service, service.settings
        self.jobs = Jobs(service.settings.videos)

    async def make(self, request: Request) -> Response:
        """POST /v1/videos."""
        try:
            asked = read_asked(read_json(await self._body(request)), self._settings)
            if _wants_video(request):
                if "surprise" in asked.settings:
                    raise UserError("surprise: is told of a job; ask for one, without Accept: video/mp4")
                return await self._streamed(await self._service.begin(asked, paced=False))
            if not self.jobs.room():
                return refused(503, "as many videos are being made as may be; try again later", {"retry-after": "10"})
            live = await self._service.begin(asked, paced=False)
        except UserError as error:
            return refused(422, str(error))
        except Full:
            return refused(503, "every place is taken, and so is every place to wait; try again later",
                           {"retry-after": "10"})
        job = self.jobs.begin(asked, live, frame_size(live.session.config)[0])
        return JSONResponse(job.facts(), 202, {"location": job.facts()["url"]})

    async def job(self, request: Request) -> Response:
        """GET and DELETE /v1/videos/{id}."""
        job = self._job(request)
        if request.method == "DELETE":
            self.jobs.forget(job.name)
            return Response(status_code=204)
        if not _wants_video(request):
            return JSONResponse(job.facts())
        if job.status != "done":
            return refused(409, f"the video is {job.status}; ask again")
        return FileResponse(job.file, media_type=VIDEO)

    def _job(self, request: Request) -> Job:
        job = self.jobs.get(request.path_params["id"])
        if job is None:
            raise HTTPException(404, "no such video: it was deleted, or newer ones have taken its place")
        return job

    async def _body(self, request: Request) -> bytes:
        most, body = self._settings.upload_bytes, bytearray()
        with anyio.move_on_after(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise HTTPException(413, f"the request is larger than {most} bytes")
            return bytes(body)
        raise HTTPException(408, f"the request did not come within {BODY_SECONDS:g} seconds")

    async def _streamed(self, live: Live) -> Response:
        events = events_of(live)
        try:
            async for event in events:
                if isinstance(event, Ended):
                    return refused(500 if event.failed else 503, _words(event))
                if isinstance(event, Frames):
                    return _Answer(live, self._pieces(live, event, events))
            raise AssertionError("a session ends by saying so")
        except BaseException:
            live.close()
            raise

    async def _pieces(self, live: Live, first: Frames, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        encoder = self._service.encoder(live)
        try:
            yield await encoder.piece(first.frames_THWC)
            async for event in events:
                if isinstance(event, Frames):
                    yield await encoder.piece(event.frames_THWC)
                elif isinstance(event, Ended) and event.why != "end":
                    raise CutOff  # what was sent is not the whole video, and must not look like it
        finally:
            encoder.close()


class _Answer(StreamingResponse):
    """A video while it is made. Its session ends with it, also where the client is gone before the first piece."""

    def __init__(self, live: Live, pieces: AsyncIterator[bytes]) -> None:
        super().__init__(pieces, media_type=VIDEO)
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._live.close()


def make_app(engine: Engine, settings: Serve, metrics: Metrics, token: str = "") -> Starlette:
    """The application; it stops the engine when it ends. token: that clients must show; "": none."""
    service = Service(engine, settings)
    videos = Videos(service)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"} if engine.ready else {"status": "not ready"}, 200 if engine.ready else 503)

    async def counts(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    async def facts(_: Request) -> Response:
        return JSONResponse(model_facts(engine.model, settings))

    async def api(_: Request) -> Response:
        return JSONResponse(openapi(settings))

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in KINDS:
            raise HTTPException(404, "no such page")
        return Response((PAGE / name).read_bytes(), media_type=KINDS[name])

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        engine.begin_to_stop()
        await videos.jobs.close()
        await anyio.to_thread.run_sync(engine.stop)

    async def in_words(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refused(error.status_code, error.detail, dict(error.headers or {}))

    async def failed(_: Request, error: Exception) -> Response:
        metrics.errors.inc()
        return refused(500, "an error of the server")

    return Starlette(
        routes=[Route("/", page), Route("/page/{name}", page),
                Route("/v1/videos", videos.make, methods=["POST"]),
                Route("/v1/videos/{id}", videos.job, methods=["GET", "DELETE"]),
                WebSocketRoute("/v1/session", steer(service)), Route("/v1/model", facts), Route("/healthz", health),
                Route("/metrics", counts), Route("/openapi.json", api)],
        middleware=[Middleware(Guard, settings=settings, token=token, metrics=metrics)],
        exception_handlers={HTTPException: in_words, Exception: failed}, lifespan=lifespan)


def _wants_video(request: Request) -> bool:
    return VIDEO in request.headers.get("accept", "")


def _words(event: Ended) -> str:
    return event.why if event.failed else f"the session was ended ({event.why})"
