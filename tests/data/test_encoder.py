"""Data sets without media: their latents are those of the same clips, whatever processes there are and kills."""

import dataclasses
import shutil
import threading

import numpy as np
import pytest
from etils import epath

from starflow_jax.config import UserError
from starflow_jax.data import prepared
from starflow_jax.data.raw import building, clips, latents, planes, shards
from starflow_jax.data.raw.building import cut_unit, prepare_clips
from starflow_jax.data.raw.encoder import Encoder, LatentWriter, served
from tests.data.test_prepare import Stop, job, tree
from tests.data.test_prepare import inputs as inputs  # a fixture
from tests.data.test_prepare import whole as whole  # a fixture
from tests.prepared_input import kill_and_start_again

MADE_BY = {"codec": "blocks of 8 x 8"}


def blocks(frames_THWC):
    """A codec that can be checked by eye: means of 8 x 8 pixels of every fourth frame."""
    frames, height, width, _ = frames_THWC.shape
    cut = frames_THWC[::4].reshape(-1, height // 8, 8, width // 8, 8, 3).astype(np.float32)
    return cut.mean((2, 4)).astype(np.float16)


def encode_frames(batch):
    """The codec of clips as `clips.cut` makes them."""
    return np.stack([blocks(frames if isinstance(frames, np.ndarray) else planes.to_rgb(frames)) for frames in batch])


def encode_pixels(batch):
    """Another codec, of planes alone: it knows brightness."""
    return np.stack([blocks(np.stack([pixels.planes[0]] * 3, -1) if len(pixels.planes) == 3 else pixels.planes[0])
                     for pixels in batch])


def without_media(inputs, folder, encode=encode_frames, **changes):
    changed = job(inputs, folder, media=False, latents=True, **changes)
    return dataclasses.replace(changed, encoder=Encoder(encode, 3, MADE_BY))


@pytest.fixture(scope="module")
def unkept(inputs, tmp_path_factory):
    """What a run makes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("unkept")
    prepare_clips(without_media(inputs, folder), processes=1)
    return folder


def clips_in(folder, kind=shards.CLIPS):
    for shard in shards.written_shards(epath.Path(folder), kind):
        with shards.records(shard.path(epath.Path(folder))) as records:
            yield from records.__getitems__(range(len(records)))


def test_latents_are_those_of_the_clips_that_would_have_been_kept(inputs, whole, unkept, tmp_path):
    """Bit for bit, in files of the same bytes, where the media is kept without loss; a picture's JPEG is not."""
    prepare_clips(job(inputs, tmp_path, crf=0), processes=1)
    latents.write_latents(str(tmp_path), lambda batch: np.stack([blocks(frames) for frames in batch]),
                          lambda shape: (1 + (shape[0] - 1) // 4, shape[1] // 8, shape[2] // 8, 3),
                          batch_size=2, made_by=MADE_BY)
    found, expected = tree(unkept / "latents"), tree(tmp_path / "latents")
    assert len(expected) > 8 and found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {
        name for name in found if name.startswith("16x24_1f") and shards.SUFFIX in name}
    kept = [shards.parse_clip(record) for record in clips_in(whole)]
    text = [shards.parse_clip(record, media=False) for record in clips_in(unkept)]
    assert len(text) == 19 and all(clip.pop("media") for clip in kept) and text == kept


def test_it_is_trained_on_by_its_latents_and_says_that_it_has_no_pixels(unkept):
    source = prepared.source(str(unkept), "train", latents_by=MADE_BY)
    record = source[0]
    assert record["latents"].shape == (2, 2, 3, 3) and record["caption_short"]
    with pytest.raises(UserError, match=r"has latents but no pixels.*prepare.media=false; train on it with data.lat"):
        record["frames"]
    assert prepared.source(str(unkept), "train")[0]["caption_long"]
    with pytest.raises(UserError, match="was made by .*; prepare the videos in another folder, or use the model"):
        prepared.source(str(unkept), "train", latents_by={"codec": "another"})


def test_text_features_are_made_of_it(unkept, tmp_path):
    shutil.copytree(unkept, tmp_path / "out")
    latents.write_text_features(str(tmp_path / "out"), lambda prompts: np.ones((len(prompts), 4, 2), np.float32), 2,
                                lambda bucket, clip: [clip["caption_long"].decode()], batch_size=2, made_by={"text": 1})
    found = prepared.source(str(tmp_path / "out"), "train", latents_by=MADE_BY, features_by={"text": 1})[0]
    np.testing.assert_array_equal(found["text"][found["caption_long"].decode()], np.ones((4, 2)))


def test_a_run_that_ends_anywhere_resumes_to_the_same_bytes(inputs, unkept, tmp_path, monkeypatch):
    calls = {"left": 0}

    def stopping(batch):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise Stop
        return encode_frames(batch)

    settings, stops = without_media(inputs, tmp_path, stopping), 0
    for _ in range(40):
        calls["left"] = 3
        try:
            prepare_clips(settings, processes=1)
            break
        except Stop:
            stops += 1
    assert stops >= 2 and tree(tmp_path) == tree(unkept)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.data.test_encoder import encode_pixels, prepare_clips, served, without_media
if __name__ == "__main__":
    with served(encode_pixels) as encode:
        prepare_clips(without_media(sys.argv[1], sys.argv[2], encode), processes=2)
"""


@pytest.mark.slow
def test_killed_and_started_again_on_two_processes_it_makes_the_same_bytes(inputs, tmp_path):
    """The codec is called from other processes, and gets there what it would get here."""
    here = without_media(inputs, tmp_path / "here",
                         lambda batch: encode_pixels([planes.pixels_of(frames) for frames in batch]))
    prepare_clips(here, processes=1)
    folder = tmp_path / "out"
    kill_and_start_again(SCRIPT, tmp_path / "run.py", inputs, folder)
    assert tree(folder) == tree(tmp_path / "here")


def test_several_processes_of_a_run_share_the_parts(inputs, unkept, tmp_path, monkeypatch):
    """Each with its own codec, and the first one gathers."""
    meeting, cut, done = threading.Barrier(2), {}, {}

    def noting(settings, unit):
        cut.setdefault(threading.current_thread().name, []).append(unit.index)
        cut_unit(settings, unit)

    monkeypatch.setattr(building, "cut_unit", noting)

    def run(index):
        done[index] = prepare_clips(without_media(inputs, tmp_path), processes=1, share=(index, 2), meet=meeting.wait)

    threads = [threading.Thread(target=run, args=(index,), name=str(index)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[0] == done[1] and cut == {"0": [0, 2, 4], "1": [1, 3, 5]}
    assert tree(tmp_path) == tree(unkept)


def test_what_is_called_elsewhere_is_the_clips_and_the_error(inputs):
    """Planes as they are sampled, with their matrix, and pictures; what goes wrong there is raised here."""
    item = clips.Item("wide0", str(inputs / "wide0.mp4"), False, "", "")
    clip = next(clips.cut(item, job(inputs, "")))
    picture = np.arange(96, dtype=np.uint8).reshape(1, 4, 8, 3)
    seen = []

    def encode(batch):
        seen.extend(planes.Pixels(tuple(plane.copy() for plane in pixels.planes), pixels.matrix) for pixels in batch)
        if len(batch) == 1:
            raise FloatingPointError("latents reach 1e9")
        if len(batch) == 2:
            raise LookupError("some other fault")
        return np.float16([len(batch)])

    with served(encode) as called:
        assert called([clip.frames, picture, picture]) == [3]
        with pytest.raises(FloatingPointError, match="reach 1e9"):
            called([picture])
        with pytest.raises(RuntimeError, match="LookupError: some other fault"):
            called([picture] * 2)
        assert called([picture] * 4) == [4]
    first, other = seen[:2]
    assert first.matrix == planes.pixels_of(clip.frames).matrix and [one.shape for one in first.planes] == [
        (5, 16, 24), (5, 8, 12), (5, 8, 12)]
    for kept, sent in zip(planes.pixels_of(clip.frames).planes, first.planes):
        np.testing.assert_array_equal(sent, kept)
    np.testing.assert_array_equal(other.planes[0], picture)


def test_the_end_waits_for_no_call(monkeypatch):
    """Also where the thread that takes calls sees the end before it waits for another one."""
    started = threading.Thread.start

    def slow_start(thread):
        started(thread)
        if getattr(thread._target, "__name__", "") == "_answer":
            ended.wait(10)

    ended = threading.Event()
    monkeypatch.setattr(threading.Thread, "start", slow_start)

    def run():
        with served(lambda batch: np.float16([len(batch)])) as called:
            assert called([np.zeros((1, 4, 8, 3), np.uint8)]) == [1]
            threading.Timer(0.2, ended.set).start()
        done.set()

    done = threading.Event()
    threading.Thread(target=run, daemon=True).start()
    assert done.wait(10)


def test_few_clips_wait_for_others_of_their_size():
    """At most two batches, over all buckets; what waits longest in number goes first."""
    sizes = []

    def encode(batch):
        sizes.append(len(batch))
        return np.zeros((len(batch), 1, 1, 1, 1), np.float16)

    class Writers(dict):
        def __missing__(self, name):
            self[name] = type("Writer", (), {"write": lambda _, record: None})()
            return self[name]

    writer = LatentWriter(Encoder(encode, 3, {}), Writers())
    text = {"caption_long": "", "caption_short": "", "fps": 0}
    for bucket in "abacabd":
        writer.add(bucket, "train", text, np.zeros((1, 2, 2, 3), np.uint8))
    assert sizes == [3]
    for bucket in "ec":
        writer.add(bucket, "train", text, np.zeros((1, 2, 2, 3), np.uint8))
    assert sizes == [3, 2]
    writer.finish()
    assert sorted(sizes[2:]) == [1, 1, 2] and set(writer.shapes) == set("abcde")


def test_another_codec_and_lost_latents_are_one_line(inputs, unkept, tmp_path, monkeypatch):
    shutil.copytree(unkept, tmp_path / "out")
    other = without_media(inputs, tmp_path / "out")
    other = dataclasses.replace(other, encoder=Encoder(encode_frames, 3, {"codec": "another"}))
    with pytest.raises(UserError, match="was begun with latents made by .*blocks.*, not .*another"):
        prepare_clips(other, processes=1)
    with pytest.raises(UserError, match="was begun with prepare.media False, not True"):
        prepare_clips(job(inputs, tmp_path / "out"), processes=1)
    assert prepare_clips(without_media(inputs, tmp_path / "out"), processes=1)["clips"] == 19
    shutil.rmtree(tmp_path / "out" / "latents" / "24x16_5f")
    with pytest.raises(UserError, match="latents: is missing, or not whole, and prepare.media=false kept no media"):
        prepare_clips(without_media(inputs, tmp_path / "out"), processes=1)
    monkeypatch.setattr(building.tasks, "run", lambda *_, **__: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        prepare_clips(without_media(inputs, tmp_path / "begun"))
    with pytest.raises(UserError, match="was begun with latents made by"):
        prepare_clips(dataclasses.replace(other, folder=str(tmp_path / "begun")))
