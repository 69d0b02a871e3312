"""Raw files to shards: what comes out, that nothing stops it, and that kills and workers leave no trace in it."""

import collections
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from starflow_jax.config import Prepare, UserError
from starflow_jax.data.raw import building, clips, shards
from starflow_jax.data.raw.building import cut_unit, plan_shards, prepare_clips, split_of, write_shard
from starflow_jax.data.raw.job import Bucket, Job, by_setting
from starflow_jax.io.video import write_mp4
from tests.prepared_input import changed, kill_and_start_again, scene, write_inputs

ROOT = Path(__file__).parents[2]
JOB = Job(
    Prepare(fps=0, max_upscale=1.0, min_brightness=5.0, min_motion=0.01, cut_threshold=0.0, items_per_part=2,
            validation_share=0.3, test_share=0.2, long_captions="caption_long", short_captions="txt,caption",
            clips_per_shard=4),
    folder="", buckets=(Bucket(16, 24, "3:2"), Bucket(24, 16, "2:3")), frames=5)
REASONS = {"cut": "damaged", "empty": "unreadable", "text": "unreadable", "mute": "no caption", "short": "too short"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    Image.fromarray(scene(1)[0]).save(folder / "picture.png")
    (folder / "picture.json").write_text('{"caption": "a still", "caption_long": "a picture of a block"}')
    return folder


def job(inputs, folder, **changes):
    return changed(JOB, **{"input": str(inputs), "folder": str(folder), **changes})


@pytest.fixture(scope="session")
def whole(inputs, tmp_path_factory):
    """What a run that nobody disturbs makes."""
    folder = tmp_path_factory.mktemp("whole")
    prepare_clips(job(inputs, folder), processes=1)
    return folder


def tree(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def examples(folder):
    """All clips, as TFDS reads them, by (bucket, split)."""
    found = {}
    for info in sorted(Path(folder).glob("clips/*/*/dataset_info.json")):
        builder = tfds.builder_from_directory(info.parent)
        for split in builder.info.splits:
            found[info.parent.parent.name, split] = list(builder.as_data_source(split=split))
    return found


def test_every_clip_is_where_it_belongs_and_tfds_reads_it(inputs, whole):
    found = examples(whole)
    starts = collections.defaultdict(list)
    for (bucket, split), clips_of in found.items():
        for clip in clips_of:
            key = clip["key"].decode()
            frames = clips.decode(clip["media"])
            expected = {"tall": "24x16_5f", "picture": "16x24_1f"}.get(key, "16x24_5f")
            assert bucket == expected and split == split_of(job(inputs, whole), key)
            assert f"{frames.shape[1]}x{frames.shape[2]}_{frames.shape[0]}f" == bucket
            assert clip["fps"] == (0 if key == "picture" else 8)
            starts[key].append(float(clip["start"]))
            if key.startswith("wide"):
                assert clip["caption_long"].decode() == f"a block moves over backdrop {key[-1]}"
                made = list(clips.cut(_item(inputs, key), JOB))[len(starts[key]) - 1]
                assert np.abs(frames.astype(int) - made.frames_THWC).mean() < 4
            if key == "picture":
                assert (clip["caption_long"], clip["caption_short"]) == (b"a picture of a block", b"a still")
    assert starts == {**{f"wide{index}": [0.0, 0.625, 1.25, 1.875] for index in range(4)}, "tall": [0.0, 0.625],
                      "picture": [0.0]}
    builder = tfds.builder("clips/16x24_5f", data_dir=whole)
    assert builder.info.splits.total_num_examples == 16


def _item(inputs, key):
    return building.clips.Item(key, str(inputs / f"{key}.mp4"), False, "", "")


def test_names_that_are_no_utf8_are_taken(inputs, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    name = os.fsdecode(b"n\xe9")
    try:
        shutil.copy(inputs / "wide0.mp4", source / f"{name}.mp4")
    except OSError:
        pytest.skip("this file system has no such names")
    (source / f"{name}.txt").write_text("named in Latin-1")
    assert prepare_clips(job(source, tmp_path / "out"), processes=1)["clips"] == 4
    assert {clip["key"] for of_split in examples(tmp_path / "out").values() for clip in of_split} == {b"n?"}


def test_all_of_it_is_on_the_disk_in_the_end(inputs, tmp_path, unsynced):
    (tmp_path / "in").mkdir()
    for name in ("wide0.mp4", "wide0.txt"):
        shutil.copy(inputs / name, tmp_path / "in")
    assert prepare_clips(job(tmp_path / "in", tmp_path / "out"), processes=1)["clips"] == 4
    assert unsynced(tmp_path / "out") == ["."]  # that its parts are gone; if they come back, they are removed again


def test_a_file_that_vanishes_while_it_is_read_is_one_line(whole, tmp_path):
    path = epath.Path(shutil.copy(next((whole / "clips").rglob("*.array_record*")), tmp_path))
    with pytest.raises(UserError, match=r"damaged \(open\(\) failed: No such file"), shards.records(path) as found:
        path.unlink()
        found.__getitems__([0])


def test_what_is_left_out_is_counted_and_listed(whole):
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    assert {entry["key"]: entry["reason"].partition(":")[0] for entry in rejected} == REASONS
    prepared = json.loads((whole / "prepared.json").read_text())
    assert prepared["items"] == 11 and prepared["clips"] == 19
    assert prepared["rejected"] == dict(collections.Counter(REASONS.values()))
    found = {name: bucket["clips"] for name, bucket in prepared["buckets"].items()}
    for (bucket, split), clips_of in examples(whole).items():
        assert found[bucket].pop(split) == len(clips_of)
    assert not any(found.values())
    assert prepared["buckets"]["24x16_5f"] | {"clips": 0} == {
        "height": 24, "width": 16, "frames": 5, "aspect_ratio": "2:3", "clips": 0}
    assert not (whole / ".parts").exists()


def test_what_a_hostile_folder_holds_costs_one_line_each(inputs, tmp_path):
    source, outside = tmp_path / "in", tmp_path / "outside"
    for folder in (source, outside):
        folder.mkdir()
    shutil.copy(inputs / "wide0.mp4", source / "good.mp4")
    for name in ("good", "playlist"):
        (source / f"{name}.txt").write_text("a caption")
    (source / "playlist.mp4").write_text(f"ffconcat version 1.0\nfile '{inputs / 'wide1.mp4'}'\n")
    shutil.copy(inputs / "wide0.mp4", source / "deep.mp4")
    (source / "deep.json").write_text("[" * 100_000)
    (source / "loop").symlink_to(source)
    (source / "outside").symlink_to(outside)
    (outside / "back").symlink_to(source)
    done = prepare_clips(job(source, tmp_path / "out"), processes=1)
    assert (done["items"], done["clips"]) == (3, 4)
    assert [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()] == [
        {"key": "deep", "reason": "unreadable JSON: nested too deeply"},
        {"key": "playlist", "reason": "not a video file of a known kind; playlists are not followed"}]


def test_shards_are_even_and_in_order(inputs, whole):
    sizes = [shard.count for shard in shards.written_shards(epath.Path(whole), shards.CLIPS)
             if shard.bucket == "16x24_5f"]
    assert sum(sizes) == 16 and max(sizes) <= 4 and len(sizes) >= 4
    gatherings = plan_shards(job(inputs, whole), [{"a.train": 3}, {}, {"a.train": 6, "a.test": 1}])
    pieces = {(task.shard.split, task.shard.index, task.shard.of, task.shard.count): task.pieces for task in gatherings}
    assert pieces == {("test", 0, 1, 1): ((2, 0, 1),), ("train", 0, 3, 3): ((0, 0, 3),),
                      ("train", 1, 3, 3): ((2, 0, 3),), ("train", 2, 3, 3): ((2, 3, 6),)}


def test_splits_are_by_video_and_of_the_asked_for_size(inputs, tmp_path):
    settings = job(inputs, tmp_path, validation_share=0.2, test_share=0.1)
    counts = collections.Counter(split_of(settings, f"video{index}") for index in range(2_000))
    for split, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        assert abs(counts[split] / 2_000 - share) < 4 * np.sqrt(share * (1 - share) / 2_000)
    for index in range(50):
        assert len({split_of(settings, f"video{index}.mp4#{row}") for row in range(5)}) == 1


class Stop(Exception):
    pass


def test_a_run_that_ends_anywhere_resumes_to_the_same_bytes(inputs, whole, tmp_path, monkeypatch):
    calls = {"left": 0}

    def stopping(function):
        def run(*arguments):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise Stop
            return function(*arguments)
        return run

    monkeypatch.setattr(building, "cut_unit", stopping(cut_unit))
    monkeypatch.setattr(building, "write_shard", stopping(write_shard))
    stops = 0
    for _ in range(40):
        calls["left"] = 2
        try:
            prepare_clips(job(inputs, tmp_path), processes=1)
            break
        except Stop:
            stops += 1
    assert stops >= 5 and tree(tmp_path) == tree(whole)


def test_a_part_that_fails_half_way_leaves_nothing(inputs, tmp_path, monkeypatch):
    settings = job(inputs, tmp_path, items_per_part=20)
    encode = clips.encode
    made = []

    def failing(clip, crf):
        made.append(clip)
        if len(made) == 7:
            raise MemoryError
        return encode(clip, crf)

    monkeypatch.setattr(clips, "encode", failing)
    with pytest.raises(MemoryError):
        prepare_clips(settings, processes=1)
    left = [path.name for path in (tmp_path / ".parts").rglob("*") if path.is_file()]
    assert sorted(left) == ["0000000.at", "job.json", "units.jsonl"] and not (tmp_path / "clips").exists()


KILLED = """
import sys
sys.path.insert(0, {root!r})
from tests.data.test_prepare import job, prepare_clips
if __name__ == "__main__":
    prepare_clips(job(sys.argv[1], sys.argv[2]), processes=2)
"""

def test_killed_and_started_again_on_two_processes_it_makes_the_same_bytes(inputs, whole, tmp_path):
    folder = tmp_path / "out"
    kill_and_start_again(KILLED, tmp_path / "run.py", inputs, folder)
    assert tree(folder) == tree(whole)


def test_what_was_added_to_the_input_since_is_not_seen(inputs, whole, tmp_path, monkeypatch):
    source = tmp_path / "in"
    shutil.copytree(inputs, source)
    settings = job(source, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(building.tasks, "run", lambda *_, **__: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            prepare_clips(settings)
    shutil.copy(source / "wide0.mp4", source / "added.mp4")
    (source / "added.txt").write_text("added")
    assert prepare_clips(settings, processes=1)["items"] == 11
    found, expected = tree(tmp_path / "out"), tree(whole)
    for name in found:
        assert name == "prepared.json" or found[name] == expected[name]


@pytest.mark.parametrize("name", ["job.json", "units.jsonl"])
def test_damaged_notes_of_a_run_are_one_line(inputs, tmp_path, monkeypatch, name):
    settings = job(inputs, tmp_path / "out")
    monkeypatch.setattr(building.tasks, "run", lambda *_, **__: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        prepare_clips(settings)
    (tmp_path / "out" / ".parts" / name).write_text('{"')
    with pytest.raises(UserError, match=rf"{name}: damaged .*; delete .*\.parts and start again"):
        prepare_clips(settings)


def test_what_another_version_began_is_not_gone_on_with(inputs, whole, tmp_path, monkeypatch):
    """Its clips have other bytes. What it finished stays as it is."""
    settings = job(inputs, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(building.tasks, "run", lambda *_, **__: (_ for _ in ()).throw(Stop))
        patched.setattr("starflow_jax.data.raw.job.VERSION", 1)
        with pytest.raises(Stop):
            prepare_clips(settings)
    with pytest.raises(UserError, match="out: was begun by another version of this program"):
        prepare_clips(settings)
    shutil.copytree(whole, tmp_path / "older")
    path = tmp_path / "older" / "prepared.json"
    held = json.loads(path.read_text())
    assert held["job"].pop("version") == 2
    path.write_text(json.dumps(held))
    assert prepare_clips(job(inputs, tmp_path / "older"))["clips"] == 19


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(inputs, whole):
    before = tree(whole)
    assert prepare_clips(job(inputs, whole), processes=1)["clips"] == 19
    with pytest.raises(UserError, match="was begun with prepare.clips_per_shard 4, not 5"):
        prepare_clips(job(inputs, whole, clips_per_shard=5))
    with pytest.raises(UserError, match="was begun with prepare.crf 13, not 11"):
        prepare_clips(job(inputs, whole, crf=11))
    assert tree(whole) == before


def test_a_folder_is_known_again_by_the_settings_that_made_it():
    """Also one from before the settings were described by their names; where it lies does not matter."""
    described = {
        "source": "in", "items_per_unit": 2, "captions": {"long": ["caption_long"], "short": ["txt", "caption"]},
        "recipe": {"buckets": [{"height": 16, "width": 24, "aspect_ratio": "3:2"},
                               {"height": 24, "width": 16, "aspect_ratio": "2:3"}],
                   "frames": 5, "fps": 0, "clips_per_video": 0, "max_upscale": 1.0, "min_brightness": 5.0,
                   "min_motion": 0.01, "cut_threshold": 0.0, "crf": 10},
        "validation_share": 0.3, "test_share": 0.2, "clips_per_shard": 4}
    now = changed(JOB, input="in", folder="anywhere", latents=True, processes=3, crf=10).described()
    assert (now | {"version": 1}).items() <= by_setting(described).items()
    assert by_setting(now) == now and "anywhere" not in str(now) and "processes" not in now


def test_an_input_without_one_good_clip_says_so(inputs, tmp_path):
    settings = _only_small(inputs, tmp_path)
    with pytest.raises(UserError, match="not one clip came out of it; 10 times: too small"):
        prepare_clips(settings, processes=1)
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 10
    # A corrected input is read again.
    write_mp4(tmp_path / "in" / "3.mp4", scene(6, height=64, width=64), 8)
    assert prepare_clips(settings, processes=1)["clips"] == 1


def test_a_full_disk_is_said(inputs, whole, tmp_path, monkeypatch):
    settings = job(inputs, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(shards, "RecordWriter", full_disk_after(7))
        with pytest.raises(UserError, match="out: write.. failed: No space left on device; writing .*; what is done"):
            prepare_clips(settings, processes=1)
    assert list((tmp_path / "out").glob(".parts/*/summary.json"))
    prepare_clips(settings, processes=1)
    assert tree(tmp_path / "out") == tree(whole)


def full_disk_after(records):
    """A RecordWriter as it is when the disk fills up: array_record says so when it closes the file."""
    left = [records]

    class Full(shards.RecordWriter):
        def __exit__(self, *exception):
            left[0] -= self.count
            if left[0] < 0:
                writer, self._writer = self._writer, self
                writer.close()
            super().__exit__(*exception)

        def close(self):
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 1048576; Failed to close")

    return Full


def _only_small(inputs, folder):
    source = folder / "in"
    source.mkdir()
    for index in range(10):
        shutil.copy(inputs / "wide0.mp4", source / f"{index}.mp4")
        (source / f"{index}.txt").write_text("small")
    return job(source, folder / "out", buckets=(Bucket(64, 64, "1:1"),))


def test_an_item_that_ends_its_process_is_left_out(inputs, whole, tmp_path, monkeypatch):
    """As when a decoder crashes: the parent finds out at which item, and the unit is done without it."""
    settings = job(inputs, tmp_path)
    building._open_parts(settings)
    units = building._units(settings)
    unit = next(unit for unit in units if "wide1.mp4" in unit.entries)
    cut_as_is = clips.cut

    def crashing(item, job):
        if item.key == "wide1":
            raise Stop
        return cut_as_is(item, job)

    def attempt(function, task):
        with contextlib.suppress(Stop):
            function(task)

    monkeypatch.setattr(clips, "cut", crashing)
    monkeypatch.setattr(building.tasks, "attempt", attempt)
    with pytest.raises(Stop):
        cut_unit(settings, unit)
    building._skip_what_crashes(settings, unit)
    done = prepare_clips(settings, processes=1)
    assert done["clips"] == 15 and done["rejected"]["unreadable"] == 3
    rejected = (tmp_path / "rejected.jsonl").read_text()
    assert '{"key": "wide1", "reason": "unreadable: it ends the process that decodes it"}' in rejected


def test_what_workers_import_brings_no_jax():
    """A process per core must not claim the accelerator, nor take the seconds that JAX takes to start."""
    code = ("import sys; import starflow_jax.data.raw.building, starflow_jax.data.raw.tasks; "
            "assert not {'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules)")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_apache_beam_makes_the_same_bytes(inputs, whole, tmp_path):
    pytest.importorskip("apache_beam")
    prepare_clips(job(inputs, tmp_path), beam="--runner=DirectRunner --direct_num_workers=1")
    assert tree(tmp_path) == tree(whole)


def test_without_beam_it_is_said_how_to_get_it(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'starflow_jax\[beam\]'"):
        prepare_clips(job(inputs, tmp_path), beam="--runner=DirectRunner")


def test_an_object_store_holds_the_same_bytes(inputs, whole, tmp_path, monkeypatch):
    """gs:// is played by a folder: etils asks fsspec for the driver of Google's store."""
    pytest.importorskip("fsspec")
    from etils.epath import backend
    from fsspec.implementations.dirfs import DirFileSystem
    from fsspec.implementations.local import LocalFileSystem

    class Store(DirFileSystem):
        def __init__(self, **options):
            super().__init__(path=str(tmp_path / "store"), fs=LocalFileSystem(auto_mkdir=True))

        def _join(self, path):
            return super()._join(path if isinstance(path, list) else os.fspath(path).removeprefix("gs://"))

    (tmp_path / "store").mkdir()
    shutil.copytree(inputs, tmp_path / "store" / "bucket" / "in")
    # For this test alone: another driver that is registered in its place would not be loaded afterwards.
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gcs", Store)
    backend.fsspec_backend._get_filesystem.cache_clear()
    try:
        prepare_clips(job("gs://bucket/in", "gs://bucket/out"), processes=1)
    finally:
        backend.fsspec_backend._get_filesystem.cache_clear()
    found = tree(tmp_path / "store" / "bucket" / "out")
    expected = tree(whole)
    assert found.keys() == expected.keys()
    # Of an empty file ffmpeg says other words when it is read through Python; the input's name is another.
    assert {name for name in found if found[name] != expected[name]} <= {"prepared.json", "rejected.jsonl"}
