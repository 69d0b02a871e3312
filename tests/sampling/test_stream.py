"""Streams: the frames of the whole clip, on one device or two, as early as they can be."""

import collections
import dataclasses
import gc
import itertools
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax.config import Mesh, Plan, UserError
from starflow_jax.io.pictures import read_image
from starflow_jax.model.system import System
from starflow_jax.planning.sampling import sampling_programs
from starflow_jax.sampling import denoise as denoise_module
from starflow_jax.sampling import stream
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.solved import solved
from starflow_jax.sampling.stream import by_frames, latency, stream_clips, stream_devices
from starflow_jax.sampling.timeline import Event, Timeline, draw_timeline
from starflow_jax.sampling.windows import denoising_windows
from starflow_jax.sharding import make_mesh
from tests.helpers import changed
from tests.small_model import CAPTIONS, CONFIG, SETTINGS

SEEDS = [5, 6, 7]


@pytest.mark.parametrize("frames,devices,renoise", [
    (9, 1, False), (9, 2, False), (21, 2, False), (21, 2, True), (9, 4, False)])
def test_stream_equals_the_whole_clip(system: System, params, frames: int, devices: int, renoise: bool) -> None:
    """Within the window and beyond it, also with another caption meanwhile and noised anew; bit for bit but for the
    denoiser, which has its own order of additions. The solver ends alike."""
    for denoise in ("denoiser",) if renoise else ("denoiser", "none"):
        settings = changed(SETTINGS, frames=frames, devices=devices, frames_per_step=1, denoise=denoise,
                           renoise=renoise, changes=f"13: {CAPTIONS[1]}" if renoise else "")
        made, timeline = generate_clips(system, params, CAPTIONS, SEEDS, settings), Timeline()
        parts = list(stream_clips(system, params, CAPTIONS, SEEDS, settings, timeline=timeline))
        ended = solved(timeline.deep_reports, timeline.shallow_reports)
        for field in dataclasses.fields(ended):
            np.testing.assert_array_equal(getattr(ended, field.name), getattr(made.solved, field.name), field.name)
        assert [part.shape[1] for part in parts] == [1] + [4] * ((frames - 1) // 4)
        difference = np.abs(np.int32(np.concatenate(parts, axis=1)) - np.int32(made.frames_BTHWC))
        assert difference.max() <= (denoise == "denoiser") and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("devices", [2, 4])
def test_more_devices_give_the_same_stream(system: System, params, devices: int) -> None:
    """Bit for bit."""
    settings = changed(SETTINGS, frames=21, frames_per_step=1)
    alone, parted = (np.concatenate(list(stream_clips(system, params, CAPTIONS, SEEDS, dataclasses.replace(
        settings, devices=count))), axis=1) for count in (1, devices))
    np.testing.assert_array_equal(parted, alone)


def test_given_frames_lead_the_stream(system: System, params) -> None:
    known = np.random.default_rng(1).integers(0, 256, (3, 5, 8, 8, 3), np.uint8)
    settings = changed(SETTINGS, frames_per_step=1)
    whole = generate_clips(system, params, CAPTIONS, SEEDS, settings, known)
    streamed = np.concatenate(list(stream_clips(system, params, CAPTIONS, SEEDS, settings, known)), axis=1)
    difference = np.abs(np.int32(streamed) - np.int32(whole.frames_BTHWC))
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_a_frame_leaves_one_frame_after_it_is_made(system: System, params) -> None:
    """The deep block has made n + 2 frames, and no more, when frame n is handed out."""
    timeline = Timeline()
    frames = stream_clips(system, params, CAPTIONS, SEEDS, changed(SETTINGS, frames=21), timeline=timeline)
    asked = []
    for _ in frames:
        asked.append(timeline.asked["deep"])
    assert asked[:4] == [3, 4, 5, 6]
    events = timeline.close()
    assert sorted(e.frame for e in events if e.stage == "deep") == list(range(6))
    assert all(e.asked <= e.done for e in events)


def test_a_stream_leaves_no_thread_and_no_array_behind(system: System, params) -> None:
    """Neither one that ended nor one that was left, with and without a timeline."""
    def run(take: int, *, watched: bool = False) -> None:
        settings, timeline = changed(SETTINGS, frames=9, frames_per_step=1), Timeline() if watched else None
        for _ in itertools.islice(stream_clips(system, params, CAPTIONS, SEEDS, settings, timeline=timeline), take):
            pass
        if timeline:
            timeline.close()

    def held() -> tuple[int, int]:
        gc.collect()
        return threading.active_count(), len(jax.live_arrays())

    run(3)
    first = held()
    run(3)
    run(1)
    run(3, watched=True)
    run(1, watched=True)
    assert held() == first


def test_a_timeline_that_nobody_closes_leaves_no_thread_behind() -> None:
    timeline = Timeline()
    for stage in ("deep", "rest"):
        timeline.watch(stage, 0, jax.numpy.ones(3))
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("timeline")]
    assert len(threads) >= 2
    del timeline
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_timeline_notes_what_was_dispatched() -> None:
    timeline = Timeline()
    timeline.watch("deep", 0, jax.numpy.ones(3))
    timeline.watch("rest", 4, jax.numpy.ones(3))
    assert {(event.stage, event.frame) for event in timeline.close()} == {("deep", 0), ("rest", 4)}
    assert timeline.asked == {"deep": 1, "rest": 1}


def test_timeline_is_drawn_to_scale(tmp_path: Path) -> None:
    """A bar begins when its work could: asked for, and the frame before it done. Ten seconds are 840 pixels."""
    events = [Event("deep", 0, 0.0, 2.0), Event("deep", 1, 0.0, 5.0), Event("rest", 0, 3.0, 4.0),
              Event("rest", 1, 8.0, 10.0)]
    draw_timeline(tmp_path / "timeline.png", events, width=900)
    picture = read_image(tmp_path / "timeline.png")
    even, odd = (picture == (0x4C, 0x78, 0xA8)).all(-1), (picture == (0xF5, 0x85, 0x18)).all(-1)

    def bar(row: int, found: np.ndarray) -> tuple[int, int]:
        columns = np.flatnonzero(found[row * 34 + 6])  # above the number in the bar
        return int(columns[0]), int(columns[-1])

    bars = [bar(0, even), bar(0, odd), bar(1, even), bar(1, odd)]
    seconds = [(0, 2), (2, 5), (3, 4), (8, 10)]
    np.testing.assert_allclose(bars, 50 + 84 * np.array(seconds), atol=1)


@pytest.mark.parametrize("model, alone", [
    (dict(frames=3), [True, False, False, True]),  # of the last one two frames are taken
    (dict(frames=8), [True, True]), (dict(frames=4, denoiser_window=10), [True, False, True]),
    (dict(frames=4, denoiser_window=10, denoiser_lookahead=0), [True, False, False]),
    (dict(frames=8, denoiser_window=10, denoiser_lookahead=0), [True, True, True]),  # of the last one frame is taken
    (dict(frames=4, denoiser_window=10, denoiser="every_layer"), [False] * 3)])
def test_the_denoiser_works_at_once_on_windows_that_move_on_by_a_frame(
    model: dict[str, Any], alone: list[bool]
) -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))
    total = {3: 6, 4: 6, 8: 11}[config.model.frames]
    assert [by_frames(config, window) for window in denoising_windows(config, total)] == alone


def test_a_plan_counts_the_denoisers_steps(system: System, params, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of three frames over six: those of the first and of the last one frame by frame, the others at once."""
    run: collections.Counter[str] = collections.Counter()
    for module, name in ((stream, "score_next"), (denoise_module, "denoiser_step")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, of=name, function=function, **keywords: (
            run.update([of]), function(*args, **keywords))[1])
    settings = changed(SETTINGS, frames=21, frames_per_step=1, stream=True)
    list(stream_clips(system, params, CAPTIONS, SEEDS, settings))
    monkeypatch.undo()
    mesh = make_mesh(Mesh(), jax.local_devices()[:1])
    with jax.set_mesh(mesh):
        programs = sampling_programs(dataclasses.replace(
            CONFIG, plan=Plan(step="sample", videos=3), sample=settings), mesh)
    planned: collections.Counter[str] = collections.Counter()
    for program in programs:
        planned.update({program.lowered.as_text().split("module @jit_", 1)[1].split()[0]: program.times})
    assert run == {name: planned[name] for name in run} and run["denoiser_step"] == 2


def test_what_cannot_be_streamed_is_refused(system: System) -> None:
    with pytest.raises(UserError, match="sample.devices=999"):
        stream_devices(999)
    with pytest.raises(UserError, match="sample.denoise=score"):
        latency(system, changed(SETTINGS, denoise="score"))
