"""The engine, which has all live sessions made."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import starflow_jax as sf
from starflow_jax.config import Serve, changed
from starflow_jax.flow.generation import Ask
from starflow_jax.io.compiled import count_programs
from starflow_jax.sampling import memory
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.session import Session
from starflow_jax.serving import engine as engine_module
from starflow_jax.serving.engine import Engine, Full, batch_sizes, given_sizes, way_of
from starflow_jax.serving.live import Begun, Changed, Ended, Event, Frames, Live, Place, Refused, Shown
from starflow_jax.serving.metrics import Metrics
from tests.sampling.test_session import near, steerable, whole
from tests.small_model import CAPTIONS, CONFIG

STRIDE = CONFIG.codec.time_stride
PATIENCE = 60.0  # seconds that no test ever waits for
compiled = pytest.fixture(scope="module")(count_programs)


@pytest.fixture(scope="module")
def model(params) -> Model:
    return steerable(dataclasses.replace(CONFIG.model, frames=4), params)


@pytest.fixture
def engines(model: Model) -> Iterator[Callable[..., Engine]]:
    made = []

    def start(warm: bool = False, **settings: Any) -> Engine:
        made.append(Engine(model, Serve(**settings), Metrics()))
        made[-1].start(warm)
        return made[-1]

    yield start
    for engine in made:
        engine.stop()


def until(live: Live, kind: type[Event], held: list[Event]) -> Any:
    """Take events, which are added to those held, until there is one of a kind; that one."""
    while not (found := [event for event in held if isinstance(event, kind)]):
        events = live.wait(PATIENCE)
        assert events, f"no {kind.__name__} came"
        held += events
    return found[0]


def shown(events: list[Event]) -> np.ndarray:
    parts = [event for event in events if isinstance(event, Frames)]
    assert [part.first for part in parts] == [0, *np.cumsum([len(part.frames_THWC) for part in parts])[:-1]]
    return whole(part.frames_THWC for part in parts)


def settled(live: Live, count: int) -> list[Event]:
    """What has come once so many frames have."""
    held: list[Event] = []
    while sum(len(event.frames_THWC) for event in held if isinstance(event, Frames)) < count:
        events = live.wait(PATIENCE)
        assert events
        held += events
    return held


@pytest.mark.parametrize("together", ["batch", "cores", "turns"])
def test_sessions_together_show_what_each_shows_alone(model: Model, engines, together: str) -> None:
    """To a shade in a batch, else bit for bit."""
    engine = engines(sessions=3, together=together)
    lengths = [1 + 7 * STRIDE, 1 + 3 * STRIDE, 1 + 5 * STRIDE, 1]
    lives = [engine.begin(CAPTIONS[index % 3], paced=False, frames=length, seed=index)
             for index, length in enumerate(lengths)]
    for index, (live, length) in enumerate(zip(lives, lengths)):
        held: list[Event] = []
        assert until(live, Ended, held) == Ended("end")
        alone = whole(model.stream(CAPTIONS[index % 3], frames=length, seed=index))
        assert near(shown(held), alone) and (together == "batch" or np.array_equal(shown(held), alone))
        assert isinstance([event for event in held if not isinstance(event, Place)][0], Begun)
    assert batch_sizes(3) == [1, 2, 3] and batch_sizes(1) == [1] and batch_sizes(8) == [1, 2, 4, 8]
    text = engine._metrics.text().decode()
    assert f"starflow_frames_total {float(sum(lengths))}" in text and "starflow_sessions 0.0" in text
    assert "starflow_first_frame_seconds_count 4.0" in text


def test_sessions_begin_with_all_of_a_window_but_the_frame_to_make() -> None:
    config = changed(CONFIG, "sample", {"context_frames": 1})
    for frames, most, sizes in ((4, 3600, [1, 2, 3]), (21, 3600, [1, 2, 4, 8, 16, 20]), (4, 1 + 2 * STRIDE, [1, 2]),
                                (4, 1 + STRIDE, [1]), (2, 3600, [1]), (1, 1, [1])):
        assert given_sizes(dataclasses.replace(config, model=dataclasses.replace(CONFIG.model, frames=frames)),
                           most) == sizes


def test_how_sessions_are_made_together(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default on a CPU's cores, in batches on an accelerator, where its kernel makes them; in turns on a mesh."""
    assert [way_of(model, way) for way in ("auto", "batch", "turns")] == ["cores", "batch", "turns"]
    gpu, several = (dataclasses.replace(model, mesh=SimpleNamespace(  # type: ignore[arg-type]
        size=size, devices=np.array([SimpleNamespace(platform="gpu", device_kind="H100")] * size))) for size in (1, 2))
    assert way_of(gpu, "auto") == "batch" and way_of(several, "auto") == "turns"
    monkeypatch.setattr("starflow_jax.serving.engine.takes_lanes", lambda queries, keys: False)
    assert way_of(gpu, "auto") == "turns"
    with pytest.raises(sf.UserError, match="serve.together=batch: .* on 1 H100; set it to turns"):
        way_of(gpu, "batch")
    for mesh, device in ((gpu, "1 H100"), (several, "2 H100")):
        with pytest.raises(sf.UserError, match=f"serve.together=cores: .* on {device}; set it to turns"):
            way_of(mesh, "cores")


def test_no_more_sessions_than_there_is_memory_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch holds caches twice."""
    config = model.config
    each = memory.cache_bytes(config) + memory.latent_bytes(config, config.model.frames)
    monkeypatch.setattr(memory, "host_bytes", lambda: memory.flow_bytes(config) + 6 * each)
    for sessions, together in ((6, "cores"), (3, "batch")):
        Engine(model, Serve(sessions=sessions, together=together), Metrics())
    for sessions, together in ((7, "cores"), (4, "batch")):
        with pytest.raises(sf.UserError, match=f"serve.sessions={sessions}: at least .* serve fewer sessions"):
            Engine(model, Serve(sessions=sessions, together=together), Metrics())


@pytest.mark.parametrize("together", ["batch", "cores", "turns"])
def test_a_batch_is_one_program_and_other_sessions_are_programs_of_their_own(
    model: Model, monkeypatch: pytest.MonkeyPatch, together: str
) -> None:
    made: list[tuple[int, str]] = []
    answer = engine_module.answer_together

    def spied(asks: list[Ask], sizes: list[int]) -> None:
        made.append((len(asks), threading.current_thread().name))
        answer(asks, sizes)

    monkeypatch.setattr(engine_module, "answer_together", spied)
    engine = Engine(model, Serve(sessions=2, together=together), Metrics())
    lives = [engine.begin(CAPTIONS[0], paced=False, frames=1, seed=seed) for seed in range(2)]
    engine.start(warm=False)
    assert [until(live, Ended, []) for live in lives] == [Ended("end")] * 2
    engine.stop()
    assert made == {"batch": [(2, "engine")], "turns": [(2, "engine")], "cores": [(1, "worker")] * 2}[together]
    assert engine._sizes == ([1, 2] if together == "batch" else [1])


def test_no_more_than_a_latent_frame_is_made_ahead_of_what_plays(engines) -> None:
    engine = engines(sessions=1)
    live = engine.begin(CAPTIONS[0], paced=True, seed=1)
    for played in (0, 1, 2, 1 + STRIDE, 1 + STRIDE, 1 + 2 * STRIDE, 10**9):
        done = min(played, live.session.shown)  # nobody can have played more
        live.played(played)
        settle(engine, live)
        assert done < live.session.shown <= done + 2 * STRIDE
    before = live.session.shown
    live.pause(True)
    live.played(before)
    settle(engine, live)
    assert live.session.shown == before
    live.pause(False)
    settle(engine, live)
    assert live.session.shown == before + 2 * STRIDE  # that which plays, and one


def settle(engine: Engine, live: Live) -> None:
    """Until the engine has nothing to do for it."""
    with engine._lock:
        while live._place or live not in engine._live or live._wants_more():
            live._events.clear()
            assert engine._lock.wait(PATIENCE)


def test_a_change_holds_from_the_frame_it_says(model: Model, engines) -> None:
    engine = engines(sessions=2)
    live = engine.begin(CAPTIONS[0], paced=True, seed=1)
    held = settled(live, 1)
    live.change(prompt=CAPTIONS[1])
    live.change(guidance=-3.0)
    live.change(camera="pan_left", guidance=0.5)
    live.played(live.session.shown)
    changed = until(live, Changed, held)
    assert changed.names == ("prompt", "guidance", "camera")
    while not any(isinstance(event, Shown) for event in held):
        live.played(live.session.shown)
        held += live.wait(PATIENCE)
    assert until(live, Shown, held).frame == changed.frame
    live.close()
    until(live, Ended, held)
    record = live.session.record
    assert list(record.changes) == [1 + (changed.frame - 1) // STRIDE]
    again = Session(dataclasses.replace(model.system, config=live.session.config), model.params, model.mesh, record)
    assert near(whole(again), shown(held))


def test_a_prompts_first_frame_is_made_at_once(engines) -> None:
    """By two steps, of the latent frame that holds it and of the one that its denoiser looks ahead at, however little
    has played meanwhile. What is not a prompt waits for the video, and so does a prompt soon after another."""
    engine = engines(sessions=1)
    live = engine.begin(CAPTIONS[0], paced=True, seed=1)
    settle(engine, live)
    live.played(1)
    settle(engine, live)
    before = live.session.shown
    live.change(guidance=0.5)
    settle(engine, live)
    assert live.session.shown == before
    live.change(prompt=CAPTIONS[1])
    shown = until(live, Shown, [])
    settle(engine, live)
    assert shown.frame == before + STRIDE and live.session.shown == before + 2 * STRIDE
    live.change(prompt=CAPTIONS[2])
    settle(engine, live)
    assert live.session.shown - live._played <= 4 * STRIDE and list(live.session.record.changes) == [4]


@pytest.mark.parametrize("together", ["cores", "turns"])
def test_who_waits_for_a_prompt_is_served_first(model: Model, together: str) -> None:
    engine = Engine(model, Serve(sessions=2, together=together), Metrics())
    engine._free = 1
    order: list[int] = []
    lives = [engine.begin(CAPTIONS[0], paced=True, seed=index) for index in range(2)]
    engine._wait()
    for _ in range(2):
        for live in lives:
            engine._advance([live])
    for index, live in enumerate(lives):
        live.take()
        live._tell = lambda event, index=index: isinstance(  # type: ignore[method-assign]
            event, Frames) and order.append(index)
        live.played(live.session.shown)
    lives[1].change(prompt=CAPTIONS[1])
    rounds = iter([True, False])
    engine._wait = lambda: next(rounds)  # type: ignore[method-assign]
    engine.start(warm=False)
    engine._thread.join(PATIENCE)
    assert order[0] == 1


def test_workers_take_the_session_that_waits_longest(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, Serve(sessions=3, together="cores"), Metrics())
    engine._free = 1
    worked: list[Live] = []

    def advance(wanting: list[Live]) -> None:
        worked.extend(wanting)
        wanting[0]._since = 0.0
        if len(worked) == 7:
            engine.begin_to_stop()

    monkeypatch.setattr(engine, "_advance", advance)
    lives = [engine.begin(CAPTIONS[0], paced=False, seed=seed) for seed in range(3)]
    engine.start(warm=False)
    assert [until(live, Ended, []) for live in lives] == [Ended("stopped")] * 3
    assert worked[:6] == lives * 2


def test_who_always_waits_for_a_prompt_does_not_shut_others_out(model: Model) -> None:
    engine = Engine(model, Serve(sessions=2, together="cores"), Metrics())
    live, other = (engine.begin(CAPTIONS[0], paced=False, seed=seed) for seed in range(2))
    engine._wait()
    other._hurried, now = True, time.monotonic()
    for waited, first in ((0.5, other), (3.0, live)):
        live._since, other._since = now - waited, now
        assert engine._wanting()[0] is first


@pytest.mark.parametrize("error, raised", [
    (ValueError("no"), pytest.raises(ValueError, match="no")),
    (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), pytest.raises(sf.UserError, match="serve.sessions=2: the device's"))])
def test_an_engine_that_breaks_down_ends_all_and_says_why(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: Any
) -> None:
    ended = threading.Event()
    engine = Engine(model, Serve(sessions=2, together="cores"), Metrics(), ended.set)

    def fails(wanting: list[Live]) -> None:
        raise error

    monkeypatch.setattr(engine, "_advance", fails)
    lives = [engine.begin(CAPTIONS[0], paced=True, seed=seed) for seed in range(3)]
    engine.start(warm=False)
    assert [until(live, Ended, []) for live in lives] == [Ended("stopped")] * 3 and ended.wait(PATIENCE)
    for thread in (*engine._workers, engine._thread):
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert "starflow_errors_total 0.0" not in engine._metrics.text().decode()
    with raised:
        engine.check()


def test_an_end_tells_at_once_who_is_not_at_work(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, Serve(sessions=1, queue=1, together="cores"), Metrics())
    at_work, may_end = threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "_advance", lambda wanting: (at_work.set(), may_end.wait(PATIENCE)))
    live, waiting = (engine.begin(CAPTIONS[0], paced=True) for _ in range(2))
    engine.start(warm=False)
    assert at_work.wait(PATIENCE)
    engine.begin_to_stop()
    assert until(waiting, Ended, []) == Ended("stopped") and not live._ended
    may_end.set()
    assert until(live, Ended, []) == Ended("stopped")
    engine.stop()
    for thread in engine._workers:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_session_that_waits_for_a_worker_counts_that_time(model: Model) -> None:
    engine = Engine(model, Serve(sessions=1, together="turns"), Metrics())
    live = engine.begin(CAPTIONS[0], paced=True)
    engine._wait()
    live._since = time.monotonic() - 100
    engine._advance([live])
    engine._advance([live])
    frames, = (event for event in live.take() if isinstance(event, Frames))
    assert frames.seconds > 100 and live._since == 0


def test_what_cannot_be_is_said_and_the_session_goes_on(engines) -> None:
    engine = engines(frames=11)
    with pytest.raises(sf.UserError, match="frames=13: at most 9 here"):
        engine.begin(CAPTIONS[0], paced=True, frames=13)
    with pytest.raises(sf.UserError, match="no such move"):
        engine.begin(CAPTIONS[0], paced=True, camera="fly")
    live = engine.begin(CAPTIONS[0], paced=True)
    held = settled(live, 1)
    live.change(guidance=-3.0)
    live.played(live.session.shown)
    assert "sample.guidance=-3.0" in until(live, Refused, held).why
    while not any(isinstance(event, Ended) for event in held):
        live.played(live.session.shown)
        held += live.wait(PATIENCE)
    assert len(shown(held)) == 9 and until(live, Ended, held) == Ended("end")  # as many as one may have


def test_so_many_sessions_are_compared_with_another_prompt_and_no_more(engines) -> None:
    engine = engines(sessions=2, compared=1)
    first, second = (engine.begin(CAPTIONS[0], paced=True, surprise=True) for _ in range(2))
    told: tuple[list[Event], list[Event]] = ([], [])
    first.change(other_prompt=CAPTIONS[1])
    until(first, Frames, told[0])
    while first.session.other_prompt is None:  # the change may have come behind the first frames
        first.played(first.session.shown)
        told[0].extend(first.wait(0.1))
    second.change(other_prompt=CAPTIONS[1])
    second.played(second.session.shown)
    assert "1 sessions are compared" in until(second, Refused, told[1]).why
    assert second.session.other_prompt is None and first.session.other_prompt == CAPTIONS[1]
    for index, live, other in ((0, first, None), (1, second, CAPTIONS[2])):
        live.change(other_prompt=other)
        while live.session.other_prompt != other:
            live.played(live.session.shown)
            told[index].extend(live.wait(PATIENCE))
    assert not any(isinstance(one, Changed) for one in told[0] + told[1])


def test_who_waits_is_told_the_place_and_moves_up(engines) -> None:
    engine = engines(sessions=1, queue=2)
    first = engine.begin(CAPTIONS[0], paced=True)
    settled(first, 1)
    second, third = (engine.begin(CAPTIONS[1], paced=True) for _ in range(2))
    told: tuple[list[Event], list[Event]] = ([], [])
    assert until(second, Place, told[0]) == Place(1) and until(third, Place, told[1]) == Place(2)
    with pytest.raises(Full):
        engine.begin(CAPTIONS[2], paced=True)
    second.close()
    until(second, Ended, told[0])
    told[1].clear()
    assert until(third, Place, told[1]) == Place(1)
    first.close()
    until(third, Begun, told[1])
    assert not second.session.shown


@pytest.mark.parametrize("why", ["idle", "slow"])
def test_who_says_nothing_or_does_not_read_loses_the_place(engines, why: str) -> None:
    engine = engines(sessions=1, idle_seconds=0.5)
    live = engine.begin(CAPTIONS[0], paced=why == "idle")
    held: list[Event] = []
    if why == "idle":
        until(live, Ended, held)
    with engine._lock:
        assert engine._lock.wait_for(lambda: live._ended, PATIENCE)
    until(engine.begin(CAPTIONS[0], paced=False, frames=1), Begun, [])
    held += live.take()
    # Of what nobody reads no more is made.
    assert why == "idle" or sum(isinstance(event, Frames) for event in held) == 2
    assert held[-1] == Ended(why)


@pytest.mark.parametrize("error, words, counted", [
    (ValueError("no"), "an error of the server", "starflow_errors_total 1.0"),
    (RuntimeError("RESOURCE_EXHAUSTED: 3 GB"), "no memory left", "starflow_out_of_memory_total 1.0"),
    (sf.UserError("the solver's result is not finite"), "not finite", "starflow_errors_total 0.0")])
def test_an_error_ends_its_session_and_no_other(engines, error: Exception, words: str, counted: str) -> None:
    engine = engines(sessions=2)
    live, other = (engine.begin(CAPTIONS[0], paced=True) for _ in range(2))
    settled(live, 1), settled(other, 1)

    def fails() -> None:
        raise error

    live._session.advance = fails  # type: ignore[method-assign, assignment]
    live.played(live.session.shown), other.played(other.session.shown)
    ended = until(live, Ended, [])
    assert ended.failed and words in ended.why and counted in engine._metrics.text().decode()
    until(other, Frames, [])  # it goes on


@pytest.mark.slow  # quick: tests/sampling/test_session.py, of sessions one by one
@pytest.mark.parametrize("together", ["batch", "cores"])
def test_once_it_is_ready_nothing_is_compiled(engines, compiled, together: str) -> None:
    """With sessions that join and leave, change and follow cameras, in batches of every size."""
    jax.clear_caches()
    engine = engines(warm=True, sessions=3, queue=10, together=together)
    early = engine.begin(CAPTIONS[0], paced=False, frames=1)  # waits until all is compiled
    until(early, Ended, [])
    assert engine.ready
    before = compiled()
    random = np.random.default_rng(0)
    lives = [engine.begin(CAPTIONS[index % 3], paced=False, frames=1 + STRIDE * int(random.integers(20)), seed=index,
                          guidance=float(index % 2), surprise=index % 3 > 0, camera=("", "orbit")[index > 5])
             for index in range(8)]
    image = np.zeros((8, 8, 3), np.uint8)
    lives.append(engine.begin(CAPTIONS[0], paced=False, frames=1 + 8 * STRIDE, image=image))
    lives += [engine.begin(CAPTIONS[0], paced=False, frames=1 + 8 * STRIDE, surprise=True,
                           video=np.zeros((1 + (size - 1) * STRIDE, 8, 8, 3), np.uint8))
              for size in given_sizes(engine.model.config, engine.most_frames)]
    over: set[Live] = set()
    while len(over) < len(lives):
        for live in lives:
            if any(isinstance(event, Ended) for event in live.take()):
                over.add(live)
            change = [dict(prompt=CAPTIONS[1]), dict(guidance=0.0), dict(guidance=2.0), dict(camera="pan_left"), {},
                      dict(other_prompt=CAPTIONS[2])]
            live.change(**change[random.integers(6)])
        engine._thread.join(0.01)
    assert compiled() == before


def test_an_end_of_the_server_ends_its_sessions(engines) -> None:
    engine = engines(sessions=1, queue=1)
    live, waiting = (engine.begin(CAPTIONS[0], paced=True) for _ in range(2))
    settled(live, 1)
    engine.stop()
    assert until(live, Ended, []) == until(waiting, Ended, []) == Ended("stopped")
    assert not engine.ready
    with pytest.raises(Full):
        engine.begin(CAPTIONS[0], paced=True)
