"""The built-in data set: clips that change and say so, captions that say what is seen, atomic files."""

import dataclasses
import multiprocessing
import pathlib

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data.digits import captions, reader, scene
from starflow_jax.data.digits import dataset as md
from starflow_jax.data.digits.scene import MovingDigitsConfig
from starflow_jax.io.files import ARRIVING

SMALL = MovingDigitsConfig(train_clips=40, validation_clips=5, test_clips=10, wraps=True)


def test_without_wrapping_clips_are_short_and_nothing_changes():
    for example in md.generate_clips(dataclasses.replace(SMALL, wraps=False), "train"):
        assert len(example["frames"]) == example["change"] == 17
        assert all(example[name] == example[f"later_{name}"] for name in captions.ATTRIBUTES)


def test_half_of_the_clips_are_long_half_of_these_change_and_say_so():
    examples = list(md.generate_clips(dataclasses.replace(SMALL, train_clips=1000), "train"))
    lengths = np.array([len(example["frames"]) for example in examples])
    changes = np.array([example["change"] for example in examples])
    assert set(lengths) == {17, 33} and abs((lengths == 33).mean() - 0.5) < 0.07
    assert abs((changes < lengths).mean() - 0.25) < 0.06
    for example in examples:
        before, after = ([example[name + key] for key in captions.ATTRIBUTES] for name in ("", "later_"))
        assert list(captions.parse_caption(example["later_caption_long"])) == after
        assert list(captions.parse_caption(example["later_caption_short"])) == after
        assert (before != after) == (example["change"] < len(example["frames"]))
        assert example["change"] in (17, len(example["frames"]))


def test_a_clip_that_changes_goes_on_from_where_it_was():
    examples = [example for example in md.generate_clips(dataclasses.replace(SMALL, train_clips=400), "train")
                if example["change"] < len(example["frames"])]
    for example in examples:
        centre = reader._centre(example["frames"][None].max(-1).astype(float))[0]
        step = (np.diff(centre, axis=0) + 12) % 24 - 12  # around the torus
        same_digit = example["digit"] == example["later_digit"]
        moved = np.array(list(captions.DIRECTIONS.values()))[[example["direction"], example["later_direction"]]]
        np.testing.assert_array_equal(np.sign(np.rint(step[:16].mean(0) * 4)), moved[0])
        np.testing.assert_array_equal(np.sign(np.rint(step[17:].mean(0) * 4)), moved[1])
        if same_digit:  # another digit has its centre elsewhere in its box
            np.testing.assert_allclose(step[16], step[17:].mean(0), atol=0.05)  # rounded to 256 levels


def test_long_clips_are_as_long_as_asked_and_read_as_they_are_captioned():
    clips = list(md.long_clips(SMALL, "test", 20, 101))
    frames = np.stack([clip["frames"] for clip in clips])
    assert frames.shape == (20, 101, 24, 24, 3)
    labels = reader.labels_of([clip["caption_long"] for clip in clips])
    np.testing.assert_array_equal(labels, [[clip[key] for key in captions.ATTRIBUTES] for clip in clips])
    for stretch in (frames[:, :13], frames[:, -13:]):
        _, colours, directions = reader.default_reader().read(stretch)
        np.testing.assert_array_equal(np.stack([colours, directions], axis=1), labels[:, 1:])
    (again,) = md.long_clips(SMALL, "test", 1, 101)
    np.testing.assert_array_equal(frames[0], again["frames"])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    md.prepare(SMALL, folder)
    return folder


@pytest.mark.parametrize("split", scene.SPLITS)
def test_source_gives_back_the_generated_clips(data_dir, split):
    source = md.source(SMALL, split, data_dir)
    examples = list(md.generate_clips(SMALL, split))
    assert len(source) == len(examples) == SMALL.clips(split)
    for index in reversed(range(len(source))):
        stored, made = source[index], examples[index]
        np.testing.assert_array_equal(stored["frames"], made["frames"])
        assert stored["frames"].dtype == np.uint8 and stored["frames"].shape[1:] == (24, 24, 3)
        label = tuple(int(stored[key]) for key in captions.ATTRIBUTES)
        for key in ("caption_long", "caption_short", "later_caption_long", "later_caption_short"):
            assert stored[key].decode() == made[key]
        for key in ("change", *captions.ATTRIBUTES, *(f"later_{name}" for name in captions.ATTRIBUTES)):
            assert stored[key] == made[key]
        for key in ("caption_long", "caption_short"):
            assert captions.parse_caption(made[key]) == label
        assert stored["scan"] in scene.split_scan_ids(split)
        assert stored["scan"] // 500 == label[0]


def test_splits_and_seeds_differ_and_the_same_seed_repeats():
    def first(seed, split):
        return next(md.generate_clips(dataclasses.replace(SMALL, seed=seed), split))["frames"][:17]

    np.testing.assert_array_equal(first(0, "train"), first(0, "train"))
    assert (first(0, "train") != first(1, "train")).any()
    assert (first(0, "train") != first(0, "test")).any()


def test_unknown_split_is_a_user_error(data_dir):
    with pytest.raises(UserError, match='no split "dev"'):
        md.source(SMALL, "dev", data_dir)


def test_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot make the data set"):
        md.prepare(SMALL, str(tmp_path / "file"))


def test_after_a_kill_the_next_run_starts_over_cleanly(tmp_path, monkeypatch):
    made = md.generate_clips

    def dies_half_way(config, split):
        yield next(made(config, split))
        # What SIGKILL leaves behind: no clean-up ran.
        (leftover,) = tmp_path.glob(f"*/*/{ARRIVING}*")
        leftover.with_name(f"{ARRIVING}killed").mkdir()
        (leftover.with_name(f"{ARRIVING}killed") / "half.array_record").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(md, "generate_clips", dies_half_way)
    with pytest.raises(KeyboardInterrupt):
        md.prepare(SMALL, str(tmp_path))
    monkeypatch.setattr(md, "generate_clips", made)
    assert len(md.source(SMALL, "train", str(tmp_path))) == 40
    assert not list(tmp_path.glob(f"*/*/{ARRIVING}*"))


def test_all_of_it_is_on_the_disk_when_it_is_there(tmp_path, unsynced):
    md.prepare(MovingDigitsConfig(train_clips=2, validation_clips=1, test_clips=1), str(tmp_path))
    assert set(unsynced(tmp_path)) <= {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("lock")}


def _count_train_clips(folder, queue):
    queue.put(len(md.source(SMALL, "train", folder)))


def test_two_processes_at_once_share_one_data_set(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_count_train_clips, args=(str(tmp_path), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=60) for _ in processes] == [40, 40]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    (folder,) = pathlib.Path(tmp_path, "moving_digits").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["3.0.0", "lock"]


def test_an_existing_data_set_is_not_made_again(data_dir, monkeypatch):
    monkeypatch.setattr(md, "generate_clips", None)
    assert len(md.source(SMALL, "test", data_dir)) == 10


def test_nothing_is_printed_but_the_progress_bar(tmp_path, capfd):
    md.prepare(SMALL, str(tmp_path))
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and all(line.startswith("making ") for line in lines)
