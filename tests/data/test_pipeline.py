"""Batches: what is in them, and that they are the same however they are read."""

import itertools
import json

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data import pipeline

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
    return [bytes(row.tolist()).decode().rstrip() for row in batch["text_ids_BS"]]


def train(source=None, **changes):
    settings = {"batch_size": 8, "image_batch_size": 12, "seed": 3, "pixel_frames": 13} | changes
    return pipeline.train_batches(
        source or FakeSource(40), **settings, encode_text=encode_text, format_caption=format_caption
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def clip_ids(batch):
    return batch["frames_BTHWC"][:, 0, 0, 0, 0].tolist()


def is_image(batch):
    return batch["frames_BTHWC"].shape[1] == 1


def test_shapes_types_and_whole_clips():
    for batch in take(train(), 10):
        frames, size = (1, 12) if is_image(batch) else (RECORDED, 8)
        assert batch["frames_BTHWC"].shape == (size, frames, 2, 2, 3)
        assert batch["frames_BTHWC"].dtype == np.uint8
        assert batch["text_ids_BS"].shape == (size, 40) and batch["text_ids_BS"].dtype == np.int32
        assert batch["drop_first_B"].shape == (size,) and batch["drop_first_B"].dtype == bool
        if not is_image(batch):
            green = batch["frames_BTHWC"][:, :, 0, 0, 1]
            np.testing.assert_array_equal(green, np.tile(np.arange(RECORDED), (size, 1)))


def test_every_caption_belongs_to_its_clip_and_its_kind():
    seen = set()
    for batch in take(train(caption_drop=0.3, short_caption=0.4), 60):
        for clip, text, dropped in zip(clip_ids(batch), texts_of(batch), batch["drop_first_B"]):
            if is_image(batch):
                assert not dropped
                expected = {"image:", f"image:long {clip}", f"image:short {clip}"}
            elif dropped:
                expected = {"video:", f"video:(extend) long {clip}", f"video:(extend) short {clip}"}
            else:
                expected = {"video:", f"video:long {clip}", f"video:short {clip}"}
            assert text in expected
            seen.add(text.replace(f" {clip}", ""))
    assert len(seen) == 8


def test_rates_are_the_given_probabilities():
    batches = take(train(FakeSource(250), batch_size=50, image_batch_size=50), 100)
    videos = [batch for batch in batches if not is_image(batch)]
    assert len(videos) == 80
    texts = [text for batch in batches for text in texts_of(batch)]
    count, video_count = 5_000, 4_000

    def check(hits, probability, trials):  # within four standard deviations
        assert abs(hits / trials - probability) < 4 * np.sqrt(probability * (1 - probability) / trials)

    check(sum(text.endswith(":") for text in texts), 0.1, count)
    check(sum("short" in text for text in texts), 0.1 * 0.9, count)
    check(sum(batch["drop_first_B"].sum() for batch in videos), 0.25, video_count)


def test_zero_and_one_are_never_and_always():
    settings = {"first_frame_drop": 0.0, "caption_drop": 0.0, "short_caption": 0.0}
    for batch in take(train(image_probability=0.0, **settings), 20):
        assert not is_image(batch) and not batch["drop_first_B"].any()
        assert texts_of(batch) == [f"video:long {clip}" for clip in clip_ids(batch)]
    assert all(is_image(batch) for batch in take(train(image_probability=1.0), 20))
    assert all(
        batch["drop_first_B"].all() for batch in take(train(image_probability=0, first_frame_drop=1), 5)
    )


def test_images_are_spread_evenly_and_show_every_frame():
    batches = take(train(), 100)
    for begin in range(0, 100, 5):
        assert sum(map(is_image, batches[begin : begin + 5])) == 1
    shown = {
        int(green) for batch in batches if is_image(batch) for green in batch["frames_BTHWC"][:, 0, 0, 0, 1]
    }
    assert shown == set(range(RECORDED))


def test_every_epoch_has_every_clip_once_in_its_own_order():
    ids = [clip for batch in take(train(image_probability=0), 15) for clip in clip_ids(batch)]
    epochs = [ids[begin : begin + 40] for begin in (0, 40, 80)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(40))


def test_random_choices_differ_between_epochs():
    dropped = [batch["drop_first_B"] for batch in take(train(image_probability=0, first_frame_drop=0.5), 30)]
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
    whole = take(train(), 20)
    parts = [take(train(process_index=i, process_count=process_count), 20) for i in range(process_count)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)]
    same(joined, whole)


@pytest.mark.parametrize("done", [0, 1, 7, 23])
def test_a_saved_state_goes_on_with_the_next_batch(done):
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
        green = batch["frames_BTHWC"][:, :, 0, 0, 1].astype(int)
        np.testing.assert_array_equal(green - green[:, :1], np.tile(np.arange(9), (8, 1)))
        starts |= set(green[:, 0].tolist())
    assert starts == set(range(RECORDED - 9 + 1))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"caption_drop": 1.5}, "caption_drop is 1.5"),
        ({"image_probability": -0.1}, "image_probability is -0.1"),
        ({"pixel_frames": 12}, "pixel_frames is 12: the codec takes 1"),
        ({"pixel_frames": 17}, "use at most 13"),
        ({"process_count": 3}, "batch of 8 cannot be shared by 3 processes"),
        ({"image_batch_size": 6, "process_count": 4}, "batch of 6 cannot be shared by 4 processes"),
        ({"process_index": 1}, "process 1 of 1"),
        ({"batch_size": 0}, "batch of 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        train(**changes)


def evaluate(clips=10, **changes):
    settings = {"batch_size": 4, "limit": 100, "pixel_frames": 13} | changes
    source = FakeSource(clips)
    return list(
        pipeline.evaluation_batches(
            source, **settings, encode_text=encode_text, format_caption=format_caption
        )
    )


@pytest.mark.parametrize("clips,limit", [(10, 100), (30, 10)])
def test_evaluation_reads_each_clip_once_in_order_with_long_captions(clips, limit):
    batches = evaluate(clips, limit=limit)
    assert [batch["valid_B"].tolist() for batch in batches] == [
        [True] * 4,
        [True] * 4,
        [True, True, False, False],
    ]
    valid_ids = np.concatenate([np.array(clip_ids(batch))[batch["valid_B"]] for batch in batches])
    assert valid_ids.tolist() == list(range(10))
    for batch in batches:
        assert batch["frames_BTHWC"].shape == (4, 13, 2, 2, 3)
        assert batch["frames_BTHWC"][0, :, 0, 0, 1].tolist() == list(range(13))
        assert batch["captions_B"].tolist() == [f"long {clip}" for clip in clip_ids(batch)]
        assert texts_of(batch) == [f"video:long {clip}" for clip in clip_ids(batch)]


def test_evaluation_of_images_and_full_batches():
    batches = evaluate(8, pixel_frames=1)
    assert len(batches) == 2 and all(batch["valid_B"].all() for batch in batches)
    assert texts_of(batches[0])[0] == "image:long 0"


def test_evaluation_parts_of_all_processes_are_the_global_batches():
    parts = [evaluate(process_index=i, process_count=2) for i in range(2)]
    joined = [{key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)]
    same(joined, evaluate())


def test_evaluation_refuses_more_frames_than_recorded():
    with pytest.raises(UserError, match="pixel_frames is 18"):
        evaluate(pixel_frames=18)
