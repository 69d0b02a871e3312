"""Batches: what is in them, and that they are the same however they are read."""

import hashlib
import itertools
import json
import pickle
from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax.config import Data, UserError
from starflow_jax.data import examples, pipeline
from starflow_jax.data.evaluation import evaluation_batches
from starflow_jax.data.examples import ClipLength, TextInput

RECORDED = 17


class FakeSource:
    """Clip i shows the number i in every pixel's red, the frame's number in green."""

    def __init__(self, clips, frames=RECORDED):
        self.clips, self.frames = clips, frames

    def __len__(self):
        return self.clips

    def __getitem__(self, index):
        frames = np.zeros((self.frames, 2, 2, 3), np.uint8)
        frames[..., 0], frames[..., 1] = index, np.arange(self.frames)[:, None, None]
        return {"frames": frames, "caption_long": f"long {index}".encode(), "caption_short": f"short {index}"}


def format_caption(caption, is_image):
    return f"{'image' if is_image else 'video'}:{caption}"


def encode_text(texts):
    """Characters as ids, so that tests can read the text back."""
    return np.array([list(text.ljust(40).encode()) for text in texts], np.int64)


def texts_of(batch):
    return [bytes(row.tolist()).decode().rstrip() for row in batch.text_ids_BS]


TEXT = TextInput(format_caption, encode_text)


def train(source=None, pixel_frames=13, text=TEXT, **changes):
    """Training batches; changes: of fields of Data, and of arguments of train_batches."""
    of_data = {name: changes.pop(name) for name in Data.__dataclass_fields__ if name in changes}
    settings = {"batch_size": 8, "image_batch_size": 12, "seed": 3} | changes
    return pipeline.train_batches(source or FakeSource(40), Data(**of_data), ClipLength(pixel_frames), text, **settings)


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


def joined(parts):
    """The global batches, of those of several processes."""
    return [jax.tree.map(lambda *arrays: np.concatenate(arrays), *step) for step in zip(*parts, strict=True)]


def clip_ids(batch):
    return batch.frames_BTHWC[:, 0, 0, 0, 0].tolist()


def test_shapes_types_and_whole_clips():
    for batch in take(train(), 10):
        frames, size = (1, 12) if batch.is_image else (RECORDED, 8)
        assert batch.frames_BTHWC.shape == (size, frames, 2, 2, 3)
        assert batch.frames_BTHWC.dtype == np.uint8
        assert batch.text_ids_BS.shape == (size, 40) and batch.text_ids_BS.dtype == np.int32
        if batch.is_image:
            assert batch.drop_first_B is None
        else:
            assert batch.drop_first_B.shape == (size,) and batch.drop_first_B.dtype == bool
            green = batch.frames_BTHWC[:, :, 0, 0, 1]
            np.testing.assert_array_equal(green, np.tile(np.arange(RECORDED), (size, 1)))


def test_every_caption_belongs_to_its_clip_and_its_kind():
    seen = set()
    for batch in take(train(caption_drop=0.3, short_caption=0.4), 60):
        drops = [None] * 12 if batch.is_image else batch.drop_first_B
        for clip, text, dropped in zip(clip_ids(batch), texts_of(batch), drops, strict=True):
            if dropped is None:
                expected = {"image:", f"image:long {clip}", f"image:short {clip}"}
            elif dropped:
                expected = {"video:", f"video:(extend) long {clip}", f"video:(extend) short {clip}"}
            else:
                expected = {"video:", f"video:long {clip}", f"video:short {clip}"}
            assert text in expected
            seen.add(text.replace(f" {clip}", ""))
    assert len(seen) == 8


class SeenSource(FakeSource):
    """Clips whose camera n is at x = n, with a focal length of the clip's number."""

    def __getitem__(self, index):
        pose_T34 = np.tile(np.eye(3, 4, dtype=np.float32), (self.frames, 1, 1))
        pose_T34[:, 0, 3] = -np.arange(self.frames)
        intrinsics_T4 = np.full((self.frames, 4), index, np.float32)
        return {**super().__getitem__(index), "world_to_camera": pose_T34, "intrinsics": intrinsics_T4}


def test_every_frame_of_a_clip_comes_with_its_camera():
    starts = set()
    for batch in take(train(SeenSource(40, frames=21), image_probability=0.2), 40):
        if batch.is_image:
            assert batch.world_to_camera_BT34 is None and batch.intrinsics_BT4 is None
            continue
        green = batch.frames_BTHWC[:, :, 0, 0, 1]
        assert batch.world_to_camera_BT34.shape == (8, 17, 3, 4) and batch.world_to_camera_BT34.dtype == np.float32
        np.testing.assert_array_equal(-batch.world_to_camera_BT34[:, :, 0, 3], green)
        np.testing.assert_array_equal(batch.intrinsics_BT4, np.tile(batch.frames_BTHWC[:, :, 0, 0, :1], 4))
        starts |= set(green[:, 0].tolist())
        seen = batch.cameras_of_latents(4)
        # Latents of 1, 4, 4, 4 and 4 frames, without the first or the last one; the first has its one camera 4 times.
        last_B4 = np.where(batch.drop_first_B[:, None], [4, 8, 12, 16], [0, 4, 8, 12])
        of_latents = green[:, :1, None] + np.maximum(last_B4[:, :, None] + np.arange(-3, 1), 0)
        np.testing.assert_array_equal(-np.asarray(seen.world_to_camera_BNR44)[..., 0, 3], of_latents)
        np.testing.assert_array_equal(seen.world_to_camera_BNR44[..., :3], np.tile(np.eye(4, 3), (8, 4, 4, 1, 1)))
        np.testing.assert_array_equal(seen.intrinsics_BNR4[:, 0, 0, 0], clip_ids(batch))
    assert starts == set(range(5))


def test_without_cameras_there_are_none():
    for batch in take(train(), 5):
        assert batch.world_to_camera_BT34 is None and batch.intrinsics_BT4 is None


def test_evaluation_has_the_cameras_of_the_frames_that_it_shows():
    for pixel_frames in (1, 13):
        for batch in evaluation_batches(SeenSource(5), ClipLength(pixel_frames), TEXT, batch_size=4, limit=9):
            if pixel_frames == 1:
                assert batch.world_to_camera_BT34 is None
            else:
                np.testing.assert_array_equal(-batch.world_to_camera_BT34[:, :, 0, 3], [np.arange(13)] * 4)
                assert batch.intrinsics_BT4.shape == (4, 13, 4)
                assert batch.cameras_of_latents(4).world_to_camera_BNR44.shape == (4, 4, 4, 4, 4)


class ChangingSource(FakeSource):
    """Clips that another caption describes from frame 17 on."""

    def __getitem__(self, index):
        later = {"later_caption_long": f"then {index}".encode(), "later_caption_short": f"then {index}"}
        return {**super().__getitem__(index), "change": 17, **later}


def test_a_clip_that_changes_has_the_caption_of_its_end_and_changes_between_latent_frames():
    seen = set()
    for batch in take(train(ChangingSource(40, frames=33), caption_drop=0.0, short_caption=0.0), 60):
        drops = [None] * 12 if batch.is_image else batch.drop_first_B
        for clip, text, drop in zip(batch.frames_BTHWC[:, :, 0, 0], texts_of(batch), drops, strict=True):
            shown = clip[:, 1].tolist() if drop is None else (clip[1:] if drop else clip[:13])[:, 1].tolist()
            later = shown[-1] >= 17
            mixed = shown[0] < 17 <= shown[-1]
            caption = f"{'then' if later else 'long'} {clip[0, 0]}"
            kind = "image:" if drop is None else "video:(extend) " if drop or mixed else "video:"
            assert text == kind + caption
            assert drop is None or (17 - shown[0]) % 4 == (0 if drop else 1)  # of its first latent frame
            seen.add((drop, later, mixed))
    assert seen == {(None, False, False), (None, True, False), (False, False, False), (False, True, True),
                    (True, False, False), (True, True, True), (True, True, False)}


def test_rates_are_the_given_probabilities():
    batches = take(train(FakeSource(250), batch_size=50, image_batch_size=50), 100)
    videos = [batch for batch in batches if not batch.is_image]
    assert len(videos) == 80
    texts = [text for batch in batches for text in texts_of(batch)]
    count, video_count = 5_000, 4_000

    def check(hits, probability, trials):  # within four standard deviations
        assert abs(hits / trials - probability) < 4 * np.sqrt(probability * (1 - probability) / trials)

    check(sum(text.endswith(":") for text in texts), 0.1, count)
    check(sum("short" in text for text in texts), 0.1 * 0.9, count)
    check(sum(batch.drop_first_B.sum() for batch in videos), 0.25, video_count)


def test_zero_and_one_are_never_and_always():
    settings = {"first_frame_drop": 0.0, "caption_drop": 0.0, "short_caption": 0.0}
    for batch in take(train(image_probability=0.0, **settings), 20):
        assert not batch.is_image and not batch.drop_first_B.any()
        assert texts_of(batch) == [f"video:long {clip}" for clip in clip_ids(batch)]
    assert all(batch.is_image for batch in take(train(image_probability=1.0), 20))
    assert all(
        batch.drop_first_B.all() for batch in take(train(image_probability=0, first_frame_drop=1), 5)
    )


def test_images_are_spread_evenly_and_show_every_frame():
    batches = take(train(), 100)
    for begin in range(0, 100, 5):
        assert sum(batch.is_image for batch in batches[begin : begin + 5]) == 1
    shown = {
        int(green) for batch in batches if batch.is_image for green in batch.frames_BTHWC[:, 0, 0, 0, 1]
    }
    assert shown == set(range(RECORDED))


def test_every_epoch_has_every_clip_once_in_its_own_order():
    ids = [clip for batch in take(train(image_probability=0), 15) for clip in clip_ids(batch)]
    epochs = [ids[begin : begin + 40] for begin in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(40))


def test_random_choices_differ_between_epochs():
    dropped = [batch.drop_first_B for batch in take(train(image_probability=0, first_frame_drop=0.5), 30)]
    ids = [clip_ids(batch) for batch in take(train(image_probability=0, first_frame_drop=0.5), 30)]
    choices = {}
    for clip, drop in zip(np.ravel(ids), np.ravel(dropped)):
        choices.setdefault(int(clip), []).append(bool(drop))
    assert all(len(drops) == 6 for drops in choices.values())
    assert sum(len(set(drops)) == 2 for drops in choices.values()) > 30


def test_the_same_seed_repeats_and_another_differs():
    same(take(train(), 20), take(train(), 20))
    assert [clip_ids(b) for b in take(train(seed=4), 20)] != [clip_ids(b) for b in take(train(), 20)]


@pytest.mark.parametrize("threads", [0, 1, 7])
def test_threads_change_nothing(threads):
    same(take(train(read_threads=threads), 20), take(train(), 20))


@pytest.mark.parametrize("process_count", [2, 4])
def test_the_parts_of_all_processes_are_the_global_batch(process_count):
    parts = [take(train(share=(i, process_count)), 20) for i in range(process_count)]
    same(joined(parts), take(train(), 20))


@pytest.mark.parametrize("done", [0, 1, 7, 23])
def test_a_saved_state_resumes_with_the_next_batch(done):
    batches = train()
    take(batches, done)
    state = json.dumps(batches.get_state())
    expected = take(batches, 10)
    resumed = train()
    take(resumed, 2)
    resumed.set_state(json.loads(state))
    same(take(resumed, 10), expected)
    same(expected, take(train(), done + 10)[done:])


def test_worker_processes_give_the_same_batches_and_states():
    here = train()
    workers = train(workers=2)
    expected = take(here, 6)
    same(take(workers, 4), expected[:4])
    state = workers.get_state()
    workers.close()
    here.set_state(state)
    same(take(here, 2), expected[4:])


def test_longer_recordings_are_cut_at_random():
    starts = set()
    for batch in take(train(pixel_frames=5, image_probability=0), 40):
        green = batch.frames_BTHWC[:, :, 0, 0, 1].astype(int)
        np.testing.assert_array_equal(green - green[:, :1], np.tile(np.arange(9), (8, 1)))
        starts |= set(green[:, 0].tolist())
    assert starts == set(range(RECORDED - 9 + 1))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"caption_drop": 1.5}, "data.caption_drop=1.5"),
        ({"image_probability": -0.1}, "data.image_probability=-0.1"),
        ({"pixel_frames": 12}, "pixel_frames is 12: the codec takes 1"),
        ({"pixel_frames": 17}, "use at most 13"),
        ({"share": (0, 3)}, "batch of 8 cannot be shared by 3 processes"),
        ({"image_batch_size": 6, "share": (0, 4)}, "batch of 6 cannot be shared by 4 processes"),
        ({"share": (1, 1)}, "process 1 of 1"),
        ({"batch_size": 0}, "batch of 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        train(**changes)


def evaluate(clips=10, limit=100, pixel_frames=13):
    length = ClipLength(pixel_frames)
    return list(evaluation_batches(FakeSource(clips), length, TEXT, batch_size=4, limit=limit))


@pytest.mark.parametrize("clips,limit", [(10, 100), (30, 10)])
def test_evaluation_reads_each_clip_once_in_order_with_long_captions(clips, limit):
    batches = evaluate(clips, limit=limit)
    assert [batch.valid_B.tolist() for batch in batches] == [
        [True] * 4,
        [True] * 4,
        [True, True, False, False],
    ]
    valid_ids = np.concatenate([np.array(clip_ids(batch))[batch.valid_B] for batch in batches])
    assert valid_ids.tolist() == list(range(10))
    for batch in batches:
        assert batch.frames_BTHWC.shape == (4, 13, 2, 2, 3)
        assert batch.frames_BTHWC[0, :, 0, 0, 1].tolist() == list(range(13))
        assert texts_of(batch) == [f"video:long {clip}" for clip in clip_ids(batch)]


def test_evaluation_of_images_and_full_batches():
    batches = evaluate(8, pixel_frames=1)
    assert len(batches) == 2 and all(batch.valid_B.all() for batch in batches)
    assert texts_of(batches[0])[0] == "image:long 0"


def test_evaluation_refuses_more_frames_than_recorded():
    with pytest.raises(UserError, match="pixel_frames is 21, 21 frames: the clips have 1 to 17"):
        evaluate(pixel_frames=21)


class Derived:
    """Clip i: five latents, and the features of every prompt that it may have."""

    def __init__(self, clips, height, latents=5):
        self.clips, self.height, self.latents = clips, height, latents

    def __len__(self):
        return self.clips

    def __getitem__(self, index):
        values = np.arange(self.latents * self.height * 2 * 3) % 97 + 100 * index
        record = {"latents": values.reshape(self.latents, self.height, 2, 3).astype(np.float16), "fps": 8,
                  "aspect_ratio": "1:1", "caption_long": f"long {index}".encode(), "caption_short": f"short {index}"}
        prompts = dict.fromkeys(examples.prompts_of(record, format_with_metadata, self.latents == 1))
        record["text"] = {prompt: np.full((len(prompt) % 5 + 1, 4), sum(prompt.encode()) % 1009, np.float16)
                          for prompt in prompts}
        return record


class Several(Derived):
    """Videos of two sizes and images of a third."""

    videos, images = (Derived(9, 2), Derived(4, 3)), (Derived(7, 2, latents=1),)

    def __init__(self):
        super().__init__(9, 2)


def format_with_metadata(caption, is_image, fps, aspect_ratio):
    return f"{'image' if is_image else fps} {aspect_ratio}:{caption}"


def digest(batch):
    """Of what is trained on: dtypes, shapes and bytes."""
    clips, dropped = batch.clips_B, batch.drop_first_B
    if batch.latents_BNhwC is not None:
        clips = np.asarray(batch.without_one_end(clips))
    dropped = np.zeros(len(clips), bool) if dropped is None else dropped
    hashed = hashlib.sha256()
    for array in (clips, batch.text_B, dropped):
        hashed.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()[:8]


@pytest.mark.parametrize("source,text,changes,expected", [
    (FakeSource(40), TEXT, {}, "c3b84d2f 4a0367c4 7a8322fd 2880b682 a0aec6f4 810924c7 36da6f96 9af5d38b"),
    (FakeSource(40), TEXT, {"pixel_frames": 5},
     "f05cd9c8 271f4c8a 1ff395c9 8aec2bce a0aec6f4 a14c59d6 f494c5bb ac5845db"),
    (FakeSource(40), TEXT, {"share": (1, 2)},
     "fac4a734 56aa772f d076db25 c6cbb192 adee3e15 b74d243f 32537bcb 5caa8440"),
    (Several(), TextInput(format_with_metadata, encode_text, length=8), {},
     "cda5d9be 6072150b b246cd48 9fdf2ba8 06592c05 020dffbf 5795db13 1ba19f59"),
], ids=["pixels", "cut out of longer clips", "second of two processes", "latents and features of several sizes"])
def test_the_nth_example_of_a_seed_never_changes(source, text, changes, expected):
    """Digests recorded once: a run that resumes with a later version sees the very examples that it would have seen."""
    batches = train(source, text=text, batch_size=4, image_batch_size=6, first_frame_drop=0.4, caption_drop=0.3,
                    short_caption=0.4, **changes)
    assert [digest(batch) for batch in take(batches, 8)] == expected.split()


def test_what_makes_the_examples_can_be_pickled():
    make = examples.MakeExample(Data(caption_drop=0.0, short_caption=0.0), ClipLength(13), TEXT)
    copy = pickle.loads(pickle.dumps(make.image))
    assert copy(FakeSource(3)[2], np.random.default_rng(0)).prompt == "image:long 2"


@pytest.mark.parametrize("state", [{}, [], None, 5, *({"batches": value} for value in (-1, "3", True, 2**70))])
def test_a_place_in_the_data_that_is_none_is_one_line(state: Any) -> None:
    batches = object.__new__(pipeline.BatchIterator)
    with pytest.raises(UserError, match="a checkpoint's place in the data is .*, which is none"):
        batches.set_state(state)
