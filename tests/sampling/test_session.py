"""Sessions: streams without an end that are steered while they are made, saved, and made again."""

import dataclasses
import gc
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import starflow_jax as sf
from starflow_jax.flow.control import fresh_control
from starflow_jax.io.compiled import count_programs
from starflow_jax.io.video import read_video
from starflow_jax.sampling import stream
from starflow_jax.sampling.api import Model
from starflow_jax.sampling.conditions import caption_text
from starflow_jax.sampling.generate import generate_clips
from starflow_jax.sampling.likelihood import frame_nll
from starflow_jax.sampling.mesh import sampling_mesh
from starflow_jax.sampling.session import Session
from starflow_jax.sampling.steered import Steered
from starflow_jax.sampling.stream import stream_clips
from tests.conftest import memory
from tests.helpers import random_params
from tests.robustness.soak import give_back_freed
from tests.small_model import CAPTIONS, CONFIG, SETTINGS, small_system

STRIDE = CONFIG.codec.time_stride


@pytest.fixture(scope="module")
def model(params) -> Model:
    """The small model, with a window of four, that can follow a camera."""
    return steerable(dataclasses.replace(CONFIG.model, frames=4), params)


def steerable(of: Any, params: Any) -> Model:
    config = dataclasses.replace(CONFIG, model=of, sample=dataclasses.replace(SETTINGS, batch_size=1))
    control = fresh_control(of, 12, STRIDE, jax.random.key(3))
    for name in ("out", "qkv"):  # nothing at first
        kernel = control["layers"][name]["kernel"]
        control["layers"][name]["kernel"] = 0.3 * jax.random.normal(jax.random.key(4), kernel.shape)
    mesh = sampling_mesh(config, 1, jax.local_devices()[:1])
    return Model(small_system(config), {**params, "control": control}, "small", "0123", mesh)


compiled = pytest.fixture(scope="module")(count_programs)


def whole(parts: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(parts))


def near(one: np.ndarray, other: np.ndarray) -> bool:
    difference = np.abs(np.int32(one) - np.int32(other))
    return bool(difference.max() <= 1 and (difference > 0).mean() < 1e-2)


@pytest.mark.parametrize("camera", ["", "pan_right:9; zoom_in"])
def test_a_session_that_changes_nothing_is_the_stream_and_the_video(model: Model, camera: str) -> None:
    """Of nine latent frames, but for the last one, which in an endless session sees one more."""
    settings = dict(seed=5, camera=camera)
    frames = 1 + 8 * STRIDE
    stream = whole(model.stream(CAPTIONS[0], frames=frames, **settings))
    with model.stream(CAPTIONS[0], **settings) as session:
        endless = whole(itertools.islice(session, 10))
    assert len(stream) == frames and len(endless) == frames + STRIDE
    last = frames - STRIDE
    if not camera:  # whose moves without a number have their share of the frames there are
        np.testing.assert_array_equal(endless[:last], stream[:last])
        assert np.abs(np.int32(endless[last:frames]) - stream[last:]).max() > 0
        batch = stream_clips(model.system, model.params, [CAPTIONS[0]], [5], dataclasses.replace(
            model.config.sample, frames=frames, stream=True))
        np.testing.assert_array_equal(whole(part_BTHWC[0] for part_BTHWC in batch), stream)
    assert near(model.generate(CAPTIONS[0], frames=frames, **settings).frames, stream)


def test_a_change_holds_from_the_next_latent_frame_that_is_not_begun(model: Model) -> None:
    """Of the prompt as sample.changes says; nothing before that frame is different."""
    frames = 1 + 9 * STRIDE
    plain = whole(model.stream(CAPTIONS[0], seed=5, frames=frames))
    pose = np.eye(4)[:3] + [[0, 0, 0, 0.3], [0] * 4, [0] * 4]
    for name, value in (("prompt", CAPTIONS[1]), ("guidance", 0.25), ("camera", "roll_left"), ("camera", pose)):
        with model.stream(CAPTIONS[0], seed=5, frames=frames) as session:
            parts = list(itertools.islice(session, 2))
            first = session.next_frame
            setattr(session, name, value)
            parts += session
        assert first == 1 + 3 * STRIDE  # two latent frames were shown, and two more begun: one ahead, one under way
        made = np.concatenate(parts)
        np.testing.assert_array_equal(made[:first - STRIDE], plain[:first - STRIDE])
        # The frame before sees the first changed one, by the denoiser's look-ahead.
        assert np.abs(np.int32(made[first:]) - plain[first:]).max() > 3, name
        assert list(session.record.changes) == [4]
        if name == "prompt":
            by_settings = model.generate(CAPTIONS[0], seed=5, frames=frames, changes=f"{first}: {CAPTIONS[1]}")
            assert near(by_settings.frames, made)


@pytest.mark.parametrize("camera", ["", "pan_right:9; zoom_in"])
def test_a_latent_frames_surprise_is_its_exact_likelihood(model: Model, camera: str) -> None:
    """That of the latents of the whole video, in the first window, under its prompt and another; its map's mean; and
    none where none was asked for."""
    frames = 1 + 3 * STRIDE
    with model.stream(CAPTIONS[0], frames=frames, seed=5, camera=camera, surprise=True) as session:
        session.other_prompt = CAPTIONS[1]
        found = [(session.surprise, session.other_surprise, session.surprise_map) for _ in session]
    own, other, maps = zip(*found)
    settings = dataclasses.replace(model.config.sample, frames=frames, camera=camera)
    clips = generate_clips(model.system, model.params, [CAPTIONS[0]], [5], settings)
    other_text = dataclasses.replace(clips.text, first=caption_text(model.system, model.params, [CAPTIONS[1]], 4).first)
    for shown, text in ((own, clips.text), (other, other_text)):
        nll = frame_nll(model.system, model.params, clips.noisy_BNhwC, text)[0]
        np.testing.assert_allclose(shown, nll / clips.noisy_BNhwC[0, 0].size / np.log(2), rtol=1e-3)
    assert len(found) == 4 and np.ptp(own) > 1e-2 and np.abs(np.subtract(own, other)).max() > 1e-3
    np.testing.assert_allclose([one.mean() for one in maps], own, rtol=1e-5)
    assert {one.shape for one in maps} == {model.system.token_grid} and min(np.ptp(one) for one in maps) > 1e-2
    plain = model.stream(CAPTIONS[0])
    assert next(plain) is not None and plain.surprise is plain.surprise_map is plain.other_surprise is None
    with pytest.raises(sf.UserError, match="begin it with surprise=True"):
        plain.other_prompt = CAPTIONS[1]


def test_another_prompt_is_compared_only_while_one_is_asked_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of the video has the same likelihood as the other one, from the frame on that it holds for, in windows
    that move on; and the video is the same."""
    passes: list[int] = []
    of_window = stream.window_nll_per_token
    monkeypatch.setattr(stream, "window_nll_per_token", lambda *args: passes.append(1) or of_window(*args))
    made, told = [], []
    with model.stream(CAPTIONS[0], frames=1 + 8 * STRIDE, seed=5, surprise=True) as session:
        for part in session:
            made.append(part)
            told.append((session.surprise, session.other_surprise))
            if session.shown == 1:
                session.other_prompt = session.prompt = CAPTIONS[1]
            if session.shown == 1 + 5 * STRIDE:
                session.other_prompt = None
    changed, = session.record.changes
    own, other = zip(*told)
    compared = [index for index, one in enumerate(other) if one is not None]
    assert compared == list(range(compared[0], compared[-1] + 1)) and 0 < compared[0] <= changed < compared[-1] < 8
    assert len(passes) == len(own) + len(compared)
    for index in compared:
        assert (abs(own[index] - other[index]) < 1e-5) == (index >= changed)
    plain = model.stream(CAPTIONS[0], frames=1 + 8 * STRIDE, seed=5)
    plain._steered._script[changed] = {"prompt": CAPTIONS[1]}
    np.testing.assert_array_equal(whole(plain), np.concatenate(made))


def test_a_session_that_is_not_ahead_takes_a_change_a_latent_frame_earlier(model: Model) -> None:
    """And shows the same frames."""
    frames = 1 + 9 * STRIDE
    plain = whole(model.stream(CAPTIONS[0], seed=5, frames=frames))
    np.testing.assert_array_equal(whole(model.stream(CAPTIONS[0], seed=5, frames=frames, ahead=False)), plain)
    with model.stream(CAPTIONS[0], seed=5, frames=frames, ahead=False) as session:
        parts = list(itertools.islice(session, 2))
        assert session.next_frame == 1 + 2 * STRIDE  # two latent frames were shown, and one looked ahead at
        session.prompt = CAPTIONS[1]
        made = np.concatenate([*parts, *session])
    assert list(session.record.changes) == [3] and np.abs(np.int32(made) - plain).max() > 3
    again = Session(dataclasses.replace(model.system, config=session.config), model.params, model.mesh, session.record)
    np.testing.assert_array_equal(whole(again), made)


def test_a_session_begins_with_a_video_as_it_is_extended(model: Model) -> None:
    video = np.random.default_rng(1).integers(0, 256, (1 + STRIDE, 8, 8, 3), np.uint8)
    extended = model.extend(video, CAPTIONS[0], seed=5, frames=1 + 5 * STRIDE)
    assert near(whole(model.stream(CAPTIONS[0], video=video, seed=5, frames=1 + 5 * STRIDE)), extended.frames)
    with pytest.raises(sf.UserError, match="the 5 given frames fill it; ask for 9 or more"):
        model.stream(CAPTIONS[0], video=video, frames=5)
    with pytest.raises(sf.UserError, match="image and video are both given"):
        model.stream(CAPTIONS[0], video=video, image=video[0])


def test_what_is_set_before_the_first_frame_is_the_beginning(model: Model) -> None:
    with model.stream(CAPTIONS[0], seed=5, frames=9) as session:
        session.prompt, session.guidance = CAPTIONS[1], 0.25
        made = whole(session)
    np.testing.assert_array_equal(made, whole(model.stream(CAPTIONS[1], seed=5, frames=9, guidance=0.25)))
    assert session.record.changes == {} and session.record.start["prompt"] == CAPTIONS[1]


def steer(session: sf.Session, parts: int) -> np.ndarray:
    """So many parts, with changes of all kinds, among them such as change nothing."""
    shown = []
    for index, part in enumerate(itertools.islice(session, parts)):
        shown.append(part)
        if index == 1:
            session.prompt, session.camera = CAPTIONS[2], "orbit"
        if index == 3:
            session.guidance, session.prompt = 3.0, CAPTIONS[2]
        if index == 6:
            session.camera = np.eye(4) + np.eye(4, k=3) * 0.2
            session.guidance = 0.0
    return np.concatenate(shown)


@pytest.mark.parametrize("settings", [{}, dict(guidance=0.0, frames=53), dict(camera="pan_left", image=True)])
def test_a_saved_session_is_made_again_bit_for_bit(model: Model, settings: dict, tmp_path: Path) -> None:
    if settings.get("image"):
        settings = {**settings, "image": np.random.default_rng(2).integers(0, 256, (8, 8, 3), np.uint8)}
    with model.stream(CAPTIONS[0], seed=7, **settings) as session:
        made = steer(session, 12)
    session.save(tmp_path / "one.mp4")
    again = model.replay(tmp_path / "one.json")
    np.testing.assert_array_equal(whole(again), made)
    again.save(tmp_path / "two.mp4")
    for ending in ("mp4", "json"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (tmp_path / f"two.{ending}").read_bytes()
    assert len(read_video(tmp_path / "one.mp4")[0]) == len(made)
    changes = json.loads((tmp_path / "one.json").read_text())["changes"]
    assert [set(change) - {"frame", "latent_frame"} for change in changes] == [
        {"prompt", "camera"}, {"guidance"}, {"camera", "guidance"}]
    assert all(change["frame"] == 1 + (change["latent_frame"] - 1) * STRIDE for change in changes)


def test_saved_in_the_middle_it_has_what_was_shown(model: Model, tmp_path: Path) -> None:
    with model.stream(CAPTIONS[0], seed=7) as session:
        first = np.concatenate([next(session), next(session)])
        session.prompt = CAPTIONS[1]  # holds from a frame that was not shown
        session.save(tmp_path / "one.mp4")
        next(session)
        session.save(tmp_path / "longer.mp4")
    assert session.record.changes == {} and len(read_video(tmp_path / "longer.mp4")[0]) == 1 + 2 * STRIDE
    np.testing.assert_array_equal(whole(model.replay(tmp_path / "one.json")), first)


def test_a_session_leaves_nothing_behind(model: Model) -> None:
    def run() -> None:
        with model.stream(CAPTIONS[0], seed=3) as session:
            steer(session, 4)

    run()
    gc.collect()
    alive = len(jax.live_arrays())
    for _ in range(3):
        run()
    gc.collect()
    assert len(jax.live_arrays()) == alive


def test_an_abandoned_session_lets_go_of_its_encoder_at_once(model: Model) -> None:
    """Without Python looking for circles of references, which it may not do for long."""
    gc.collect()
    gc.disable()
    try:
        session = model.stream(CAPTIONS[0])
        for _ in session:
            break
        assert session._recording is not None
        encoder = session._recording._end_encoder
        del session
        assert not encoder.alive
    finally:
        gc.enable()


def test_a_camera_far_from_where_it_began_is_as_exact_as_there(model: Model) -> None:
    """A window's rays after 4,000 latent frames along a straight line are those of its beginning."""
    steered = Steered(model.system, model.params, model.config.sample,
                      {"prompt": "", "guidance": None, "camera": "pan_right"}, {})
    steered.begin_video(None, 0)
    _, early = steered.steering(1, 1, 4)
    for first in range(5, 4_000):
        steered._see(first)
    _, late = steered.steering(3_999, 3_999, 4)
    np.testing.assert_allclose(late, early, atol=1e-6)
    assert len(steered._seen) <= 2 * model.config.model.frames and np.ptp(np.asarray(early)) > 0.1


@pytest.mark.parametrize("change, words", [
    (dict(prompt=3), "prompt: must be a text"), (dict(guidance=-1.0), "sample.guidance=-1.0"),
    (dict(camera="fly"), "no such move"), (dict(camera="pan_left; zoom_in"), "only the last move"),
    (dict(camera=np.ones((3, 4))), "no rotation"), (dict(camera=np.ones(4)), "an array of shape"),
    (dict(camera="none.txt"), "can't be read"), (dict(camera=None), "camera")])
def test_what_cannot_be_is_one_line_and_the_session_goes_on(model: Model, change: dict, words: str) -> None:
    (name, value), = change.items()
    with model.stream(CAPTIONS[0], frames=9) as session:
        next(session)
        with pytest.raises(sf.UserError, match=words) as error:
            setattr(session, name, value)
        assert "\n" not in str(error.value)
        assert len(whole(session)) == 8 and session.record.changes == {}


def test_a_model_without_a_control_module_follows_no_camera(model: Model, tmp_path: Path) -> None:
    params = {name: part for name, part in model.params.items() if name != "control"}
    other = dataclasses.replace(model, params=params)
    with pytest.raises(sf.UserError, match="this model follows no camera"):
        other.stream(CAPTIONS[0], camera="pan_left")
    with other.stream(CAPTIONS[0]) as session:
        with pytest.raises(sf.UserError, match="this model follows no camera"):
            session.camera = "pan_left"


def test_what_cannot_be_saved_or_replayed_is_one_line(model: Model, tmp_path: Path) -> None:
    with model.stream(CAPTIONS[0], recording=False) as session:
        with pytest.raises(sf.UserError, match="must end in .mp4"):
            session.save(tmp_path / "one.gif")
        with pytest.raises(sf.UserError, match="keeps no frames"):
            session.save(tmp_path / "one.mp4")
    with model.stream(CAPTIONS[0]) as session:
        with pytest.raises(sf.UserError, match="no frame was shown yet"):
            session.save(tmp_path / "one.mp4")
        next(session)
        session.save(tmp_path / "one.mp4")
    with pytest.raises(sf.UserError, match="weights 0123 as float32; those of small are 4567 as float32"):
        dataclasses.replace(model, weights="4567").replay(tmp_path / "one.json")
    held = json.loads((tmp_path / "one.json").read_text())
    for name, wrong in (("frames", -1), ("seed", "x"), ("changes", [{"frame": 1}]), ("given", ["x"]), ("prompt", None),
                        ("settings", []), ("camera", "fly")):
        (tmp_path / "wrong.json").write_text(json.dumps({**held, name: wrong}))
        with pytest.raises(sf.UserError, match="no JSON of a session"):
            model.replay(tmp_path / "wrong.json")
    with pytest.raises(sf.UserError, match="can't be read"):
        model.replay(tmp_path / "none.json")
    other = model.stream(CAPTIONS[0], image=np.zeros((8, 8, 3), np.uint8))
    next(other)
    held = json.loads(other.save(tmp_path / "two.mp4").with_suffix(".json").read_text())
    (tmp_path / "wrong.json").write_text(json.dumps({**held, "given": held["given"] * 2}))
    with pytest.raises(sf.UserError, match="2 given frames of 8x8 don't suit"):
        model.replay(tmp_path / "wrong.json")
    with pytest.raises(sf.UserError, match="frames_per_step=2: a session begins one latent frame at a time"):
        model.stream(CAPTIONS[0], solver=dict(frames_per_step=2))


def test_a_window_that_cannot_move_on_has_no_endless_stream(model: Model) -> None:
    short = steerable(dataclasses.replace(CONFIG.model, frames=2), model.params)
    with pytest.raises(sf.UserError, match="frames=0: .* up to 5 frames"):
        short.stream(CAPTIONS[0])


@pytest.mark.parametrize("latent_frames, settings", [(60, dict(guidance=0.0)), *(
    pytest.param(latent_frames, settings, marks=pytest.mark.slow) for latent_frames, settings in (
        (60, {}), (60, dict(renoise=True, context_frames=1)), (60, dict(denoise="none", camera="orbit")),
        (60, dict(every_layer=True)), (10_000, dict(guidance=0.0))))])
def test_nothing_grows_and_nothing_is_compiled_in_mid_stream(
    model: Model, compiled, latent_frames: int, settings: dict
) -> None:
    """After `warm_up` alone, whatever is changed when, whatever the end, from a picture too, or begun unguided: neither
    arrays nor, of a long one, the process's memory."""
    jax.clear_caches()  # what the tests before it compiled
    if "every_layer" in settings:
        of = dataclasses.replace(model.config.model, denoiser="every_layer", denoiser_layers=2, denoiser_window=3)
        settings, model = {}, steerable(of, random_params(dataclasses.replace(CONFIG, model=of), scale=0.3))
    model.warm_up(**settings)
    before = compiled()
    with model.stream(CAPTIONS[0], seed=3, **settings) as session:
        early = steer_at_random(session, latent_frames // 2)
        resident = trimmed_memory()
        late = steer_at_random(session, latent_frames // 2)
        assert latent_frames < 1_000 or trimmed_memory() < 1.02 * resident
    assert compiled() == before
    # Texts that windows still need are held, of more changes at one time than at another.
    assert max(late) <= max(early) + 3 * model.config.model.frames
    for frames in (1, 5, 9, 13, 29):
        steer_at_random(model.stream(CAPTIONS[0], frames=frames, **settings), frames)
    steer_at_random(model.stream(CAPTIONS[0], image=np.zeros((8, 8, 3), np.uint8), **settings), 9)
    assert compiled() == before


def trimmed_memory() -> int:
    """Bytes that the process holds, without what the allocator keeps of freed memory."""
    gc.collect()
    give_back_freed()
    return memory()


def steer_at_random(session: sf.Session, parts: int) -> list[int]:
    """How many arrays are alive after each part."""
    random, held = np.random.default_rng(0), []
    for _ in itertools.islice(session, parts):
        choice = random.integers(8)
        if choice == 0:
            session.prompt = CAPTIONS[random.integers(3)]
        elif choice == 1:
            session.guidance = float(random.integers(3))
        elif choice == 2:
            session.camera = ("pan_left", "zoom_in:3", np.eye(4)[:3])[random.integers(3)]
        held.append(len(jax.live_arrays()))
    return held
