"""Prepared data in training: every example once, the same in any number of workers, latents as the codec gives."""

import collections
import itertools
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from starflow_jax.config import Prepare, UserError
from starflow_jax.data import examples, prepared
from starflow_jax.data.evaluation import evaluation_batches
from starflow_jax.data.examples import ClipLength, TextInput
from starflow_jax.data.raw import clips, latents, shards
from starflow_jax.data.raw.building import prepare_clips
from starflow_jax.data.raw.job import Bucket, Job
from tests.data.test_pipeline import joined, same, take, texts_of
from tests.data.test_pipeline import train as train_of
from tests.prepared_input import scene, write_inputs

FRAMES, DIM, LENGTH = 9, 3, 64  # 9 frames are prepared: 5 are trained on; letters of a prompt
MADE_BY = {"codec": "means of 8 x 8"}


def format_caption(caption, is_image, fps=0, aspect_ratio=""):
    return f"{'image' if is_image else f'{fps} fps'} {aspect_ratio}:{caption}"


def encode_text(texts):
    return np.array([list(text.ljust(LENGTH).encode()) for text in texts], np.int64)


def encode(frames_BTHWC):
    """A codec that can be checked by eye: blocks of 8x8 pixels, the first frame and then every fourth."""
    assert len(frames_BTHWC) == 2
    batch, _, height, width, _ = frames_BTHWC.shape
    blocks = frames_BTHWC[:, ::4].reshape(batch, -1, height // 8, 8, width // 8, 8, 3)
    return blocks.mean((3, 5)).astype(np.float32) / 100


def latent_shape(shape_THWC):
    frames, height, width, _ = shape_THWC
    return 1 + (frames - 1) // 4, height // 8, width // 8, 3


def encode_prompts(prompts):
    """(B, LENGTH, DIM): as many rows as the prompt has letters, which say where and which they are."""
    assert len(prompts) == 2
    features = np.zeros((len(prompts), LENGTH, DIM), np.float32)
    for row_SD, prompt in zip(features, prompts):
        for place, letter in enumerate(prompt):
            row_SD[place] = place + 1, ord(letter), 1
    return features


def prompts_of(bucket, clip):
    record = {**clip, "fps": int(clip["fps"]), "aspect_ratio": bucket["aspect_ratio"]}
    return examples.prompts_of(record, format_caption, bucket["frames"] == 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(videos of two shapes, pictures), with latents and features."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs / "videos")
    (inputs / "pictures").mkdir()
    for index in range(3):
        Image.fromarray(scene(1, 32, 32, seed=20 + index)[0]).save(inputs / "pictures" / f"{index}.png")
        (inputs / "pictures" / f"{index}.txt").write_text(f"picture {index}")
    made = []
    for name in ("videos", "pictures"):
        settings = Prepare(
            input=str(inputs / name), fps=0, max_upscale=1.0, min_brightness=0.0, min_motion=0.0, cut_threshold=0.0,
            items_per_part=3, long_captions="long", short_captions="txt", validation_share=0.0, test_share=0.0,
            clips_per_shard=4)
        folder = str(tmp_path_factory.mktemp(name) / "prepared")
        buckets = (Bucket(16, 24, "3:2"), Bucket(24, 16, "2:3"), Bucket(16, 16, "1:1"))
        prepare_clips(Job(settings, folder, buckets, FRAMES), processes=1)
        latents.write_latents(folder, encode, latent_shape, batch_size=2, made_by=MADE_BY)
        latents.write_text_features(folder, encode_prompts, DIM, prompts_of, batch_size=2, made_by={"text": 1})
        made.append(folder)
    return made


TEXT = TextInput(format_caption, encode_text, LENGTH)


def train(source, pixel_frames=5, **changes):
    settings = {"batch_size": 2, "image_batch_size": 3} | changes
    return train_of(source, pixel_frames, TEXT, **settings)


def test_buckets_and_images_are_mixed_by_their_sizes(folders):
    source = prepared.source(",".join(folders), "train")
    assert [(bucket.name, len(bucket)) for bucket in source.videos] == [("16x24_9f", 8), ("24x16_9f", 1)]
    assert [(bucket.name, len(bucket)) for bucket in source.images] == [("16x16_1f", 3)]
    assert len(source) == 8 and source[0]["frames"].shape == (9, 16, 24, 3)
    batches = take(train(source, image_probability=0.2), 45)
    shapes = collections.Counter(batch.frames_BTHWC.shape for batch in batches)
    assert shapes == {(2, 9, 16, 24, 3): 32, (2, 9, 24, 16, 3): 4, (3, 1, 16, 16, 3): 9}
    for batch in batches:
        for text in texts_of(batch):
            begin = {16: "image 1:1:", 24: "8 fps 3:2:"}[batch.frames_BTHWC.shape[3]] \
                if batch.frames_BTHWC.shape[2] == 16 else "8 fps 2:3:"
            assert text.startswith(begin)


def test_without_pictures_images_are_frames_of_videos(folders):
    images = [batch for batch in take(train(prepared.source(folders[0], "train"), image_probability=1.0), 12)]
    assert {batch.frames_BTHWC.shape for batch in images} == {(3, 1, 16, 24, 3), (3, 1, 24, 16, 3)}


def test_every_epoch_has_every_clip_once(folders):
    source = prepared.source(folders[0], "train")
    batches = take(train(source, image_probability=0.0, caption_drop=0.0, short_caption=0.0, first_frame_drop=0.0), 18)
    wide = [batch for batch in batches if batch.frames_BTHWC.shape[2] == 16]
    shown = [batch.frames_BTHWC[index].tobytes() for batch in wide for index in range(2)]
    assert len(shown) == 32 and {len(set(shown[begin:begin + 8])) for begin in range(0, 32, 8)} == {8}
    by_text = collections.defaultdict(set)
    for text, clip in zip(itertools.chain(*map(texts_of, wide)), shown):
        by_text[text].add(clip)
    assert {text: len(found) for text, found in by_text.items()} == {
        f"8 fps 3:2:a block moves over backdrop {index}": 2 for index in range(4)}


@pytest.mark.parametrize("derived_by", [{}, {"latents_by": MADE_BY, "features_by": {"text": 1}}])
def test_any_number_of_workers_and_any_resumption_gives_the_same(folders, derived_by):
    source = prepared.source(",".join(folders), "train", **derived_by)
    expected = take(train(source), 12)
    same(take(train(source), 12), expected)
    workers = train(source, workers=2)
    same(take(workers, 7), expected[:7])
    state = json.loads(json.dumps(workers.get_state()))
    workers.close()
    resumed = train(source, read_threads=5)
    resumed.set_state(state)
    same(take(resumed, 5), expected[7:])
    sizes = {"batch_size": 4, "image_batch_size": 6}
    whole = take(train(source, **sizes), 9)
    two = [train(source, **sizes, share=(index, 2)) for index in range(2)]
    same(joined([take(part, 4) for part in two]), whole[:4])
    # Resumed in the middle, the second process with workers, and each on what the other one read before.
    states = [json.loads(json.dumps(part.get_state())) for part in two]
    later = [train(source, **sizes, share=(index, 2), workers=index) for index in range(2)]
    for part, state in zip(later, reversed(states)):
        part.set_state(state)
    same(joined([take(part, 3) for part in later]), whole[4:7])
    # And then by one process alone.
    alone = train(source, **sizes)
    alone.set_state(later[0].get_state())
    same(take(alone, 2), whole[7:])
    for part in (*two, *later):
        part.close()


def test_latents_are_those_of_the_clips(folders):
    source = prepared.source(",".join(folders), "train", latents_by=MADE_BY)
    for bucket in (*source.videos, *source.images):
        for record in (bucket[index] for index in range(len(bucket))):
            frames = clips.decode(record._clip()["media"])
            expected = encode(np.stack([frames, frames]))[0]
            np.testing.assert_array_equal(record["latents"], expected.astype(np.float16))
            np.testing.assert_array_equal(record["frames"], frames)


def test_training_on_latents_drops_one_end_and_never_decodes(folders, monkeypatch):
    source = prepared.source(",".join(folders), "train", latents_by=MADE_BY)
    by_caption = collections.defaultdict(list)
    for bucket in source.videos:
        for record in (bucket[index] for index in range(len(bucket))):
            by_caption[record["caption_long"].decode()].append(np.array(record["latents"]))
    monkeypatch.setattr(clips, "decode", lambda media: pytest.fail("a clip was decoded"))
    dropped = set()
    for batch in take(train(source, caption_drop=0.0, first_frame_drop=0.5), 40):
        latents = batch.latents_BNhwC
        assert latents.dtype == np.float16 and batch.frames_BTHWC is None
        if latents.shape[1] == 1:
            assert latents.shape == (3, 1, 2, 2, 3)
            continue
        trained_on = np.asarray(batch.without_one_end(latents))
        assert trained_on.dtype == np.float16
        for latent, text, drop in zip(trained_on, texts_of(batch), batch.drop_first_B, strict=True):
            caption = text.split(":", 2)[2].removeprefix("(extend) ")
            whole = by_caption[caption]
            assert any(np.array_equal(latent, clip[1:] if drop else clip[:-1]) for clip in whole)
            assert ("(extend) " in text) == drop
            dropped.add(bool(drop))
    assert dropped == {True, False}


def test_features_are_those_of_the_prompts(folders):
    made_by = {"latents_by": MADE_BY, "features_by": {"text": 1}}
    source = prepared.source(",".join(folders), "train", **made_by)
    settings = dict(seed=5, caption_drop=0.3, first_frame_drop=0.5)
    with_ids = take(train(prepared.source(",".join(folders), "train", latents_by=MADE_BY), **settings), 30)
    for batch, other in zip(take(train(source, **settings), 30), with_ids):
        assert batch.features_BSD.dtype == np.float16 and batch.text_ids_BS is None
        texts = texts_of(other)
        for begin in range(0, len(texts), 2):
            pair = (texts[begin:begin + 2] * 2)[:2]
            count = len(texts[begin:begin + 2])
            np.testing.assert_array_equal(batch.features_BSD[begin:begin + count], encode_prompts(pair)[:count])


def test_a_prompt_that_was_not_foreseen_is_named(folders):
    record = prepared.source(folders[0], "train", latents_by=MADE_BY, features_by={"text": 1})[0]
    with pytest.raises(UserError, match="no prepared text features of 'another'"):
        examples.features_of(record, "another")


def test_latents_resume_after_a_stop_and_can_be_shared(folders, tmp_path):
    import shutil

    def written(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
                if path.is_file() and path.parts[-4] == shards.LATENTS}

    original = tmp_path / "a" / "prepared"
    shutil.copytree(folders[0], original)
    expected = written(original)
    assert sum("array_record" in name for name in expected) == 3
    for name in ("stopped", "shared"):
        shutil.rmtree(original / shards.LATENTS)
        if name == "shared":
            for part in (1, 0):
                latents.write_latents(str(original), encode, latent_shape, batch_size=2, made_by=MADE_BY,
                                      share=(part, 2))
        else:
            calls = itertools.count()

            def stopping(frames, calls=calls):
                if next(calls) == 3:
                    raise KeyboardInterrupt
                return encode(frames)

            with pytest.raises(KeyboardInterrupt):
                latents.write_latents(str(original), stopping, latent_shape, batch_size=2, made_by=MADE_BY)
            with pytest.raises(UserError, match="holds no latents yet, or not all"):
                prepared.source(str(original), "train", latents_by=MADE_BY)
            latents.write_latents(str(original), encode, latent_shape, batch_size=2, made_by=MADE_BY)
        assert written(original) == expected


def test_what_does_not_fit_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="is not prepared data"):
        prepared.source(str(tmp_path), "train")
    with pytest.raises(UserError, match="there are no validation clips"):
        prepared.source(folders[0], "validation")
    with pytest.raises(UserError, match='no split "tests"'):
        prepared.source(folders[0], "tests")
    with pytest.raises(UserError, match="was made by"):
        prepared.source(folders[0], "train", latents_by={"codec": "another"})
    with pytest.raises(UserError, match="was made by"):
        latents.write_latents(folders[0], encode, latent_shape, batch_size=2, made_by={"codec": "another"})
    with pytest.raises(UserError, match="the data holds no videos"):
        train(prepared.source(folders[1], "train"))
    with pytest.raises(UserError, match="use at most 5"):
        train(prepared.source(folders[0], "train"), pixel_frames=9)
    with pytest.raises(UserError, match="use at most 5"):
        train(prepared.source(folders[0], "train", latents_by=MADE_BY), pixel_frames=9)
    with pytest.raises(FloatingPointError, match="latents reach 1e"):
        latents.to_half(np.array([1e6]), "latents")


def test_evaluation_goes_through_all_sizes(folders):
    source = prepared.source(folders[0], "train")
    batches = list(evaluation_batches(source, ClipLength(5), TEXT, batch_size=4, limit=100))
    assert [batch.frames_BTHWC.shape for batch in batches] == [(4, 5, 16, 24, 3)] * 2 + [(4, 5, 24, 16, 3)]
    assert sum(batch.valid_B.sum() for batch in batches) == 9
    assert texts_of(batches[-1])[0] == "8 fps 2:3:a tall picture"
    assert len(list(evaluation_batches(source, ClipLength(5), TEXT, batch_size=4, limit=3))) == 1


def test_evaluation_takes_what_is_prepared(folders):
    source = prepared.source(folders[0], "train", latents_by=MADE_BY, features_by={"text": 1})
    kinds = []
    for with_features in (True, False):
        given = source if with_features else prepared.source(folders[0], "train", latents_by=MADE_BY)
        kinds.append(list(evaluation_batches(
            given, ClipLength(5), TextInput(format_caption, encode_text, length=6), batch_size=4, limit=100)))
    for batch, other in zip(*kinds, strict=True):
        assert batch.frames_BTHWC is None and batch.text_ids_BS is None
        np.testing.assert_array_equal(batch.latents_BNhwC, other.latents_BNhwC)
        texts = texts_of(other)
        np.testing.assert_array_equal(batch.features_BSD[:2], encode_prompts(texts[:2])[:, :6])
    first = source.videos[0][0]
    np.testing.assert_array_equal(kinds[0][0].latents_BNhwC[0], first["latents"][:2])


def test_sources_travel_to_other_processes(folders):
    source = prepared.source(",".join(folders), "train", latents_by=MADE_BY)
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[3]["latents"], source[3]["latents"])
