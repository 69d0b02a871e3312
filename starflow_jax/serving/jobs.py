"""Videos that are made while their clients are elsewhere: jobs, the newest of which are kept."""

import asyncio
import contextlib
import dataclasses
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from starflow_jax.serving.asked import Asked
from starflow_jax.serving.describe import record_of
from starflow_jax.serving.feed import Encoder, events_of
from starflow_jax.serving.live import Begun, Ended, Frames, Live, Place


@dataclasses.dataclass
class Job:
    """One video."""

    name: str
    asked: Asked
    live: Live
    file: Path
    status: str = "queued"  # then running, and done or failed
    place: int = 0
    frames: int = 0
    error: str = ""
    surprises: list[float] = dataclasses.field(default_factory=list)  # of its latent frames, where they were asked for
    task: asyncio.Task | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more comes."""
        return self.status in ("done", "failed")

    def facts(self) -> dict[str, Any]:
        """What its client is told."""
        facts: dict[str, Any] = {"id": self.name, "status": self.status, "prompt": self.asked.prompt,
                                 "seed": self.live.session.record.seed, "frames": self.live.session.asked,
                                 "frames_made": self.frames, "url": f"/v1/videos/{self.name}"}
        if self.status == "queued":
            facts["place"] = self.place
        if self.error:
            facts["error"] = self.error
        if self.status == "done":
            facts["record"] = record_of(self.live.session)
            if self.surprises:
                facts["bits_per_dimension"] = sum(self.surprises) / len(self.surprises)
        return facts


class Jobs:
    """Those of one server; of the event loop alone."""

    def __init__(self, most: int) -> None:
        self._most, self._folder = most, Path(tempfile.mkdtemp(prefix="starflow_serve_"))
        self._jobs: dict[str, Job] = {}

    def room(self) -> bool:
        """Make room for another one, by forgetting the oldest that is over; False: there is none."""
        if len(self._jobs) >= self._most:
            over = next((name for name, job in self._jobs.items() if job.over), None)
            if over is None:
                return False
            self.forget(over)
        return True

    def begin(self, asked: Asked, live: Live, height: int) -> Job:
        """Make a session's frames a file. height: of a frame."""
        name = secrets.token_urlsafe(12)
        job = self._jobs[name] = Job(name, asked, live, self._folder / f"{secrets.token_hex(8)}.mp4")
        job.task = asyncio.create_task(_make(job, height))
        return job

    def get(self, name: str) -> Job | None:
        """None: there is none of that name."""
        return self._jobs.get(name)

    def forget(self, name: str) -> bool:
        """End it and delete its file; False: there is none."""
        job = self._jobs.pop(name, None)
        if job is None:
            return False
        job.live.close()
        if job.task:
            job.task.cancel()
        job.file.unlink(missing_ok=True)
        return True

    async def close(self) -> None:
        """Forget all of them."""
        tasks = [job.task for job in self._jobs.values() if job.task]
        for name in list(self._jobs):
            self.forget(name)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)
        shutil.rmtree(self._folder, ignore_errors=True)


async def _make(job: Job, height: int) -> None:
    encoder = Encoder(job.live, height)
    try:
        with open(job.file, "wb") as file:
            async for event in events_of(job.live):
                if isinstance(event, Place):
                    job.place = event.place
                elif isinstance(event, Begun):
                    job.status = "running"
                elif isinstance(event, Frames):
                    file.write(await encoder.piece(event.frames_THWC))
                    job.frames += len(event.frames_THWC)
                    job.surprises += [] if event.surprise is None else [event.surprise]
                elif isinstance(event, Ended):
                    file.flush()
                    done = event.why == "end"
                    job.status, job.error = ("done", "") if done else ("failed", event.why)
    except OSError:
        job.status, job.error = "failed", "the server has no room for the video"
    finally:
        job.live.close()  # which has ended, if nothing went wrong
        encoder.close()
        if job.status == "failed":
            job.file.unlink(missing_ok=True)
