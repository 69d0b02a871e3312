"""The one thread that has all live sessions made, latent frame by latent frame, together.

Each round takes the sessions that want another latent frame and hands out what was made. On an accelerator the deep
block's steps of all of them are one program (flow/together.py); on a CPU there is a thread for each core, which works
on one session at a time. Sessions join and leave between rounds. What a session shows is what it would show alone.
"""

import collections
import queue
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Serve, UserError
from starflow_jax.flow.generation import Ask
from starflow_jax.flow.together import answer_together, warm_up
from starflow_jax.io.memory import cores
from starflow_jax.kernels.attention import takes_lanes
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.memory import check_sessions
from starflow_jax.sampling.mesh import on_mesh
from starflow_jax.serving.live import Begun, Changed, Ended, Frames, Live, Place, Refused, Shown
from starflow_jax.serving.metrics import Metrics

TICK = 0.25  # seconds between looks at clients that may have gone
HEAD_START = 1.0  # seconds, before those who wait for no other prompt


class Full(Exception):
    """As many sessions wait as may."""


class Engine:
    """Starts with `start`, ends with `stop`; `begin` may be called from any thread."""

    def __init__(self, model: Model, settings: Serve, metrics: Metrics, ended: Callable[[], None] = lambda: None
                 ) -> None:
        """ended: called, from its thread, when it makes no more sessions. Raises UserError for a way of making sessions
        together that this model can't be served in, and for more sessions than there is memory for."""
        self._model, self._settings, self._metrics = model, settings, metrics
        self._lock = threading.Condition()
        self._live: list[Live] = []
        self._queue: collections.deque[Live] = collections.deque()
        self._stopping, self._ready, self._stopped_at = False, False, 0.0
        self._error: Exception | None = None  # that has ended it
        self._tell_ended = ended
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._warm = True
        self._together = way_of(model, settings.together)
        self._sizes = batch_sizes(settings.sessions) if self._together == "batch" else [1]
        check_sessions(model.config, model.mesh, settings.sessions, as_batches=len(self._sizes) > 1)
        self._free = min(settings.sessions, cores())  # of the workers, each of which makes a session's next frames
        self._to_work: queue.SimpleQueue[Live | None] = queue.SimpleQueue()  # None: no more
        self._workers = [threading.Thread(target=self._work, name="worker", daemon=True)
                         for _ in range(self._free if self._together == "cores" else 0)]

    @property
    def model(self) -> Model:
        """Whose sessions these are."""
        return self._model

    @property
    def ready(self) -> bool:
        """Whether everything is compiled."""
        return self._ready and self._thread.is_alive()

    def start(self, warm: bool = True) -> None:
        """warm: compile all that a session may need before the first one begins."""
        self._warm = warm
        for thread in (*self._workers, self._thread):
            thread.start()

    def stop(self, seconds: float = 8.0) -> None:
        """End all sessions, and wait for the thread until so long after it was first asked to stop."""
        self.begin_to_stop()
        self._thread.join(max(0.0, self._stopped_at + seconds - time.monotonic()))

    def begin_to_stop(self) -> None:
        """The same without waiting; also from a signal's handler, since the lock may be taken twice."""
        with self._lock:
            self._stopping, self._stopped_at = True, self._stopped_at or time.monotonic()
            self._lock.notify_all()

    def check(self) -> None:
        """Raises what has ended it, if it was not asked to stop; a UserError where memory was too little."""
        if self._error is not None and _is_memory(self._error):
            raise UserError(f"serve.sessions={self._settings.sessions}: the device's memory is too little to serve "
                            "this model; serve fewer sessions, or take a larger device") from self._error
        if self._error is not None:
            raise self._error

    def begin(self, prompt: str, *, paced: bool, frames: int = 0, image: np.ndarray | None = None,
              video: np.ndarray | None = None, guidance: float | None = None, **settings: Any) -> Live:
        """A session of `Model.stream`'s arguments, which begins when there is a place. frames: 0: as many as one may
        have. Raises UserError for what can't be, and Full."""
        if frames > self.most_frames:
            raise UserError(f"frames={frames}: at most {self.most_frames} here")
        model = self._model
        # For who steers, a change that holds soon counts for more than a device that never waits.
        session = model.stream(prompt, frames=frames, image="" if image is None else image, video=video,
                               recording=False, ahead=not paced, **settings)
        if guidance is not None:  # no setting of its own, or the unguided would need programs of their own
            session.guidance = guidance
        live = Live(session, self._lock, paced, model.config.codec.time_stride)
        with self._lock:
            most = self._settings.sessions + self._settings.queue
            if self._stopping or len(self._live) + len(self._queue) >= most:
                raise Full
            self._queue.append(live)
            self._lock.notify_all()
        return live

    @property
    def most_frames(self) -> int:
        """Of a session: as many whole latent frames as serve.frames has."""
        stride = self._model.config.codec.time_stride
        return 1 + (self._settings.frames - 1) // stride * stride

    def _run(self) -> None:
        try:
            if self._warm:
                self._warm_up()
            self._ready = True
            while self._wait():
                self._round(self._wanting())
        except Exception as error:
            self._break_down(error)
        finally:
            self._end_all()
            self._tell_ended()

    def _end_all(self) -> None:
        for live in (*self._live, *self._queue):
            if not live._at_work:
                self._end(live, Ended("stopped"))
        with self._lock:
            self._lock.wait_for(lambda: not any(live._at_work for live in self._live))
        for live in list(self._live):
            self._end(live, Ended("stopped"))
        for _ in self._workers:
            self._to_work.put(None)

    def _break_down(self, error: Exception) -> None:
        self._metrics.errors.inc()
        self._error = error
        self.begin_to_stop()

    def _warm_up(self) -> None:
        """Compile all that sessions can need; those that begin with a camera begin otherwise."""
        answer = partial(warm_up, sizes=self._sizes, compiled=set())
        given = given_sizes(self._model.config, self.most_frames)
        cameras = ("", "still") if "control" in self._model.params else ("",)
        for camera in cameras:
            self._model.warm_up(surprise=True, answer=answer, given=given, camera=camera)

    def _wait(self) -> bool:
        """Until a session wants another latent frame; False: the server stops."""
        while True:
            with self._lock:
                if self._stopping:
                    return False
                overdue = [(live, why) for live in (*self._live, *self._queue)
                           if not live._at_work and (why := live._overdue(self._settings.idle_seconds))]
            for live, why in overdue:
                self._end(live, Ended(why))
            self._admit()
            with self._lock:
                if self._wanting():
                    return True
                waits = not self._queue or len(self._live) >= self._settings.sessions
                if waits and not self._stopping:
                    self._lock.wait(TICK if self._live or self._queue else None)

    def _admit(self) -> None:
        """Those who wait, as far as there are places; the others are told theirs."""
        while self._queue and len(self._live) < self._settings.sessions:
            with self._lock:
                live = self._queue.popleft()
                self._live.append(live)
                live._place = 0
                live._hear()
            live._tell(Begun())
        for place, live in enumerate(list(self._queue), start=1):
            if live._place != place:
                live._place = place
                live._tell(Place(place))
        self._metrics.sessions.set(len(self._live))
        self._metrics.queue.set(len(self._queue))

    def _wanting(self) -> list[Live]:
        """Who can be made another latent frame, first those who wait longest; who waits for another prompt has a head
        start."""
        with self._lock:
            idle = [live for live in self._live if not live._at_work]
            for live in idle:
                wants = live._wants_more() and not live._closed
                live._since = (live._since or time.monotonic()) if wants else 0.0
            wanting = [live for live in idle if live._since] if self._free else []
            return sorted(wanting, key=lambda live: live._since - HEAD_START * live._hurried)

    def _round(self, wanting: list[Live]) -> None:
        wanting = wanting[:self._free] if self._together == "cores" else wanting
        for live in wanting:
            if live._ask is None:  # or the step is drawn already
                self._guarded([live], partial(self._change, live))
        if self._together != "cores":
            return self._advance(wanting)
        for live in wanting:
            with self._lock:
                self._free -= 1
                live._at_work = True
            self._to_work.put(live)

    def _work(self) -> None:
        """What a worker does: to sessions that nobody else touches meanwhile."""
        while live := self._to_work.get():
            try:
                self._advance([live])
            except Exception as error:
                self._break_down(error)
            finally:
                with self._lock:
                    self._free += 1
                    live._at_work = False
                    self._lock.notify_all()

    def _advance(self, wanting: list[Live]) -> None:
        """Make another latent frame of each."""
        asking = []
        for live in wanting:
            live._since = live._since or time.monotonic()
            ask = self._guarded([live], partial(self._next_ask, live))
            if ask is not None:
                asking.append((live, ask))
        lives = [live for live, _ in asking]
        self._guarded(lives, lambda: self._answer([ask for _, ask in asking]))
        for live in lives:
            if not live._ended:
                live._ask = self._guarded([live], partial(self._show, live))
        for live in wanting:
            live._seconds += time.monotonic() - live._since
            live._since = 0.0

    def _next_ask(self, live: Live) -> Ask | None:
        """The session's next step; None where frames could be shown without one, or it has ended."""
        if live._ask is not None:
            ask, live._ask = live._ask, None
            return ask
        return None if live._ended else self._show(live)

    def _answer(self, asks: list[Ask]) -> None:
        with on_mesh(self._model.mesh):
            answer_together(asks, self._sizes)

    def _show(self, live: Live) -> Ask | None:
        """Hand out the frames that are there; or the step that must be made first."""
        part = live._session.advance()
        if isinstance(part, Ask):
            return part
        if part is None:
            self._end(live, Ended("end"))
            return None
        session, now = live._session, time.monotonic()
        first, seconds = session.shown - len(part), live._seconds + now - live._since
        if not first:
            self._metrics.first_frame.observe(seconds)
        self._metrics.frames.inc(len(part))
        live._tell(Frames(part, first, seconds, session.surprise, session.other_surprise, session.surprise_map))
        while live._changed and live._changed[0][0] < session.shown:
            frame, asked_at = live._changed.popleft()
            self._metrics.change.observe(now - asked_at)
            live._tell(Shown(frame, now - asked_at))
        self._rest(live)
        if session.shown >= self.most_frames:
            self._end(live, Ended("end"))
        return None

    def _change(self, live: Live) -> None:
        """What was asked for holds from the step on that is drawn next."""
        with self._lock:
            asked, live._asked = live._asked, {}
            asked_at = live._asked_at
        names = []
        for name, value in asked.items():
            try:
                if name == "other_prompt" and value is not None:
                    self._check_compared(live)
                setattr(live._session, name, value)
            except UserError as error:
                live._tell(Refused(str(error)))
            else:
                if name != "other_prompt":  # which changes nothing of the video
                    names.append(name)
        if names:
            frame = live._session.next_frame
            live._changed.append((frame, asked_at))
            live._tell(Changed(tuple(names), frame))
        self._rest(live)

    def _rest(self, live: Live) -> None:
        """No hurry any more, once nothing that was asked for is still to be shown."""
        with self._lock:
            live._hurried &= bool(live._changed or live._asked)

    def _check_compared(self, live: Live) -> None:
        """Raises UserError where so many other sessions are compared that this one would take too much of their time:
        each is worked on by itself, once more for every latent frame."""
        with self._lock:
            compared = sum(other is not live and other._session.other_prompt is not None for other in self._live)
        if compared >= self._settings.compared:
            raise UserError(f"other_prompt: {compared} sessions are compared with another prompt, and no more may be "
                            "(serve.compared); try again later")

    def _guarded(self, lives: list[Live], work: Callable[[], Any]) -> Any:
        """Do what is for these sessions; whatever goes wrong ends them, and no others."""
        try:
            return work() if lives else None
        except UserError as error:
            why = str(error)
        except Exception as error:
            if _is_memory(error):
                self._metrics.out_of_memory.inc()
                why = "the device has no memory left for this session; try again later"
            else:
                traceback.print_exc()
                self._metrics.errors.inc()
                why = "an error of the server ended this session"
        for live in lives:
            self._end(live, Ended(why, failed=True))
        return None

    def _end(self, live: Live, event: Ended) -> None:
        with self._lock:
            if live._ended:
                return
            live._ended, live._ask = True, None
            if live in self._live:
                self._live.remove(live)
            elif live in self._queue:
                self._queue.remove(live)
        live._session.close()
        live._tell(event)


def _is_memory(error: Exception) -> bool:
    """Whether there was too little of it."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def way_of(model: Model, together: str) -> str:
    """How sessions are made together, where it is asked for as `serve.together`. Raises UserError for a way in which
    this model can't be served on these devices."""
    of = model.config.model
    slots, heads = of.frames * of.tokens_per_frame + of.text_length, of.deep_width // of.head_dim
    queries, keys = (jax.ShapeDtypeStruct((1, length, heads, of.head_dim), jnp.dtype(of.dtype))
                     for length in (of.tokens_per_frame, slots))
    ways, best = ["turns"], "batch"
    if model.mesh.size == 1 and takes_lanes(queries, keys):
        ways.append("batch")
    # Several devices wait for one another: each must be given all programs in one order.
    if model.mesh.size == 1 and model.mesh.devices.flat[0].platform == "cpu":
        ways.append("cores")
        best = "cores"  # several programs at a time fill them better than one of all sessions: docs/pages/benchmarks.md
    if together == "auto":
        return best if best in ways else "turns"
    if together not in ways:
        raise UserError(f"serve.together={together}: this model can't be served so on {model.mesh.size} "
                        f"{model.mesh.devices.flat[0].device_kind}; set it to {' or '.join(ways)}")
    return together


def given_sizes(config: Config, most_frames: int) -> list[int]:
    """Of how many latent frames the pictures and videos are that sessions begin with: 1, 2, 4, ..., and at last one
    fewer than a window has, so that few programs are compiled. most_frames: of a session; some are still to be made."""
    latents = 1 + (most_frames - 1) // config.codec.time_stride
    return batch_sizes(max(1, min(config.model.frames, latents) - 1))


def batch_sizes(sessions: int) -> list[int]:
    """1, 2, 4, ..., and at last the number of sessions."""
    return [*(2**power for power in range(10) if 2**power < sessions), sessions]
