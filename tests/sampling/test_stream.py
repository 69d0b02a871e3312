"""Streams: the frames of the whole clip, on one device or two, as early as they can be."""

import dataclasses
import gc
import itertools
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.io.pictures import read_image
from starflow_jax.model.system import System
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.solved import solved
from starflow_jax.sampling.stream import latency, stream_clips, stream_devices
from starflow_jax.sampling.timeline import Event, Timeline, draw_timeline
from tests.helpers import changed
from tests.small_model import CAPTIONS, SETTINGS

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


def test_what_cannot_be_streamed_is_refused(system: System) -> None:
    with pytest.raises(UserError, match="sample.devices=999"):
        stream_devices(999)
    with pytest.raises(UserError, match="sample.denoise=score"):
        latency(system, changed(SETTINGS, denoise="score"))
