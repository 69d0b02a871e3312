"""A session as its client has it: what it is told, and what it asks for, from any thread."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from starflow_jax.flow.generation import Ask
from starflow_jax.sampling.session import Session

MOST_PARTS = 2  # that a client may leave unread before no more are made


@dataclasses.dataclass(frozen=True)
class Place:
    """It waits; 1: it is the next one."""

    place: int


@dataclasses.dataclass(frozen=True)
class Begun:
    """It is live."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """What was made."""

    frames_THWC: np.ndarray  # uint8
    first: int  # the first one's place in the video
    seconds: float  # since it began, without the time that it waited for its client
    surprise: float | None = None  # of their latent frame, in bits per dimension
    other_surprise: float | None = None  # given the other prompt that it is compared with
    surprise_map: np.ndarray | None = None  # of that frame's tokens, (rows, columns)


@dataclasses.dataclass(frozen=True)
class Changed:
    """What was asked for holds from a frame of the video on."""

    names: tuple[str, ...]
    frame: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """The first frame that a change holds for was made, so many seconds after it was asked for."""

    frame: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Refused:
    """Something that was asked for can't be; the session goes on."""

    why: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """Nothing follows."""

    why: str  # "end", "closed", "idle", "slow", "stopped", or for `failed` one line
    failed: bool = False


Event = Place | Begun | Frames | Changed | Shown | Refused | Ended


class Live:
    """One session. The engine alone uses what begins with an underscore, under the lock that all of its sessions
    share, and the session itself; the one of its workers that a session is given to, while it works on it."""

    def __init__(self, session: Session, lock: threading.Condition, paced: bool, stride: int) -> None:
        """paced: it is steered while it plays, so that frames are made only as they are played. stride: frames of a
        latent frame."""
        self._session, self._lock, self._stride, self._paced = session, lock, stride, paced
        self._events: collections.deque[Event] = collections.deque()
        self._listener: Callable[[], None] = lambda: None
        self._asked: dict[str, Any] = {}  # changes, the last of each
        self._asked_at = 0.0
        self._changed: collections.deque[tuple[int, float]] = collections.deque()  # (frame, when it was asked for)
        self._hurried = False  # a prompt was asked for, and no frame of it is made yet
        self._played, self._paused, self._closed, self._ended = 0, False, False, False
        self._place = 0
        self._heard = self._read = time.monotonic()
        self._since = 0.0  # when the engine saw that it wants another latent frame; 0: it wants none
        self._seconds = 0.0  # that it has waited for them
        self._ask: Ask | None = None  # that a round has left to the next one
        self._at_work = False  # whether a worker makes its next frames

    @property
    def session(self) -> Session:
        """Its settings; for reading."""
        return self._session

    def listen(self, listener: Callable[[], None]) -> None:
        """Call this, from one of the engine's threads, whenever there is something to take."""
        with self._lock:
            self._listener = listener
        listener()

    def take(self) -> list[Event]:
        """What has happened since, in order."""
        with self._lock:
            events, self._events = list(self._events), collections.deque()
            self._read = time.monotonic()
            self._lock.notify_all()
        return events

    def wait(self, seconds: float) -> list[Event]:
        """`take`, once there is something, for clients with a thread of their own."""
        with self._lock:
            self._lock.wait_for(lambda: bool(self._events), seconds)
            return self.take()

    def change(self, **changes: Any) -> None:
        """Set the session's prompt, guidance, camera or other prompt."""
        with self._lock:
            self._asked_at = self._asked_at if self._asked else time.monotonic()
            self._asked |= changes
            self._hurried |= "prompt" in changes
            self._hear()

    def played(self, frame: int) -> None:
        """The video has played up to here."""
        with self._lock:
            if frame > self._played:  # who plays the same frame for ever is idle
                self._played = min(frame, self._session.shown)
                self._hear()

    def pause(self, paused: bool) -> None:
        """Make no more frames, or go on."""
        with self._lock:
            self._paused = paused
            self._hear()

    def close(self) -> None:
        """Its client is gone."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()

    def _hear(self) -> None:
        self._heard = time.monotonic()
        self._lock.notify_all()

    def _tell(self, event: Event) -> None:
        with self._lock:
            if not self._unread:  # from here on there is something to read
                self._read = time.monotonic()
            if isinstance(event, Frames):  # before which there was nothing to say
                self._heard = time.monotonic()
            if isinstance(event, Place):  # only the last one is of interest
                self._events = collections.deque(one for one in self._events if not isinstance(one, Place))
            self._events.append(event)
            self._lock.notify_all()
            listener = self._listener
        listener()

    @property
    def _unread(self) -> bool:
        return bool(self._events)

    def _wants_more(self) -> bool:
        """Whether another latent frame may be made: of a paced one, while at most one lies beyond the one that plays.
        After a prompt two more, the one that is begun already and the first that the prompt holds for: they are shown
        no sooner, but are there in time. Of a camera the next move follows soon, and would wait behind them."""
        if self._paused or sum(isinstance(one, Frames) for one in self._events) >= MOST_PARTS:
            return False
        if len(self._events) > 20 * MOST_PARTS:  # answers to changes
            return False
        beyond = 3 if self._hurried else 1
        return not self._paced or self._session.shown - self._played <= beyond * self._stride

    def _overdue(self, patience: float) -> str:
        """Why its place is given to others; "": it is not."""
        now = time.monotonic()
        if self._closed:
            return "closed"
        if self._unread:
            return "slow" if now - self._read > patience else ""
        waits = self._place or self._wants_more()  # for the server
        return "idle" if self._paced and not waits and now - self._heard > patience else ""
