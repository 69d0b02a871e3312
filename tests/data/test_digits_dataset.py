"""The built-in data set: split by scan, exact motion, captions that say what is seen, atomic files."""

import dataclasses
import multiprocessing
import pathlib

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data.digits import captions, reader
from starflow_jax.data.digits import dataset as md
from starflow_jax.data.digits.dataset import MovingDigitsConfig
from starflow_jax.io.files import ARRIVING

SMALL = MovingDigitsConfig(train_clips=40, validation_clips=5, test_clips=10, wraps=True)


def test_no_scan_is_in_two_splits_and_every_digit_has_400_30_70():
    splits = {split: md.split_scan_ids(split) for split in md.SPLITS}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(5000))
    for split, count in {"train": 400, "validation": 30, "test": 70}.items():
        assert np.bincount(splits[split] // 500).tolist() == [count] * 10


def test_scans_are_the_grid_cells_of_the_picture():
    scans = md.load_scans(np.arange(5000), 20)  # at their own size: no resizing
    rows = scans.reshape(50, 100, 20, 20).swapaxes(1, 2).reshape(1000, 2000)
    np.testing.assert_array_equal(rows, np.asarray(md.Image.open(md._DIGITS_PNG)))


def test_rendered_centroid_moves_at_constant_velocity():
    scan = md.load_scans(md.split_scan_ids("train")[:3], 15)
    start = np.array([[0.0, 9.0], [3.25, 1.5], [8.4, 0.0]], np.float32)
    motion = md.Motion(start, np.array([[0.5, -0.5], [0.0, 0.45], [-0.49, 0.49]], np.float32))
    clips = md.render_clips(scan, np.array([0, 6, 3]), motion.positions(17), size=24)
    ink_BTHW = clips.max(-1).astype(float)
    grid = np.arange(24)
    rows_BT = (ink_BTHW.sum(3) @ grid) / ink_BTHW.sum((2, 3))
    columns_BT = (ink_BTHW.sum(2) @ grid) / ink_BTHW.sum((2, 3))
    moved = np.stack([rows_BT - rows_BT[:, :1], columns_BT - columns_BT[:, :1]], -1)
    expected = np.arange(17)[:, None] * motion.velocity_B2[:, None]
    np.testing.assert_allclose(moved, expected, atol=0.02)  # rounding to uint8


def test_at_a_whole_pixel_the_scan_itself_is_painted_in_its_colour():
    scan = md.load_scans(md.split_scan_ids("test")[:1], 15)
    motion = md.Motion(np.array([[2, 5]]), np.array([[0, 1]]))
    clip = md.render_clips(scan, np.array([3]), motion.positions(5), size=24)[0]
    for frame in range(5):
        expected = np.zeros((24, 24, 3), np.uint8)
        expected[2:17, 5 + frame : 20 + frame, :2] = scan[0, :, :, None]  # yellow: red and green
        np.testing.assert_array_equal(clip[frame], expected)


def test_what_leaves_on_one_side_comes_back_on_the_other():
    scan = md.load_scans(md.split_scan_ids("test")[:1], 15)
    at = np.array([[[2.25, 5.5]]], np.float32)
    (inside,), (around,) = (md.render_clips(scan, np.array([0]), at + shift, size=24)
                            for shift in (0, np.array([-7.0, 24 + 13.0], np.float32)))
    np.testing.assert_array_equal(around, np.roll(inside, (-7, 13), axis=(1, 2)))


@pytest.mark.parametrize("size", [24, 32])
def test_clips_begin_anywhere_and_move_at_a_speed_of_the_canvas(size):
    directions = np.arange(4000) % 8
    motion = md.random_motion(np.random.default_rng(0), directions, MovingDigitsConfig(size=size, wraps=True))
    assert motion.start_B2.min() < 0.01 * size and motion.start_B2.max() > 0.99 * size
    steps = np.array(list(captions.DIRECTIONS.values()))[directions]
    np.testing.assert_array_equal(np.sign(motion.velocity_B2), steps)
    speeds = np.abs(motion.velocity_B2[steps != 0]) / size
    assert md.SPEED[0] - 1e-6 <= speeds.min() and speeds.max() <= md.SPEED[1] + 1e-6
    assert speeds.std() > 0.25 * (md.SPEED[1] - md.SPEED[0])


@pytest.mark.parametrize("size,digit_size", [(24, 15), (32, 20)])
def test_without_wrapping_the_whole_path_stays_inside_and_is_long_enough_to_see(size, digit_size):
    room, directions = size - digit_size, np.arange(4000) % 8
    config = MovingDigitsConfig(size=size, digit_size=digit_size)
    position = md.random_motion(np.random.default_rng(0), directions, config).positions(config.frames)
    assert position.min() >= -1e-5 and position.max() <= room + 1e-5
    travel = position[:, -1] - position[:, 0]
    steps = np.array(list(captions.DIRECTIONS.values()))[directions]
    np.testing.assert_array_equal(np.sign(travel), steps)
    distances = np.abs(travel[steps != 0])
    assert 0.78 * room - 1e-5 <= distances.min() and distances.max() <= room + 1e-5
    assert distances.std() > 0.03 * room


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
        ink, shift = reader._centred_ink(example["frames"][None])
        centre = reader._centre(ink)[0] + shift[0]
        step = (np.diff(centre, axis=0) + 12) % 24 - 12  # around the torus
        same_digit = example["digit"] == example["later_digit"]
        moved = np.array(list(captions.DIRECTIONS.values()))[[example["direction"], example["later_direction"]]]
        np.testing.assert_array_equal(np.sign(np.rint(step[:16].mean(0) * 4)), moved[0])
        np.testing.assert_array_equal(np.sign(np.rint(step[17:].mean(0) * 4)), moved[1])
        if same_digit:  # another digit has its centre elsewhere in its box
            np.testing.assert_allclose(step[16], step[17:].mean(0), atol=0.35)  # ink has a threshold


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


@pytest.mark.parametrize(
    "values",
    [
        {"digit_size": 4},
        {"size": 18},
        {"frames": 1},
        {"train_clips": 0},
        {"train_clips": 200_001},
        {"test_clips": -1},
        {"seed": -1},
    ],
)
def test_bad_settings_are_refused_by_name(values):
    with pytest.raises(UserError, match=f"data.{next(iter(values))} is"):
        MovingDigitsConfig(**values)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    md.prepare(SMALL, folder)
    return folder


@pytest.mark.parametrize("split", md.SPLITS)
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
        assert stored["scan"] in md.split_scan_ids(split)
        assert stored["scan"] // 500 == label[0]


def test_splits_and_seeds_differ_and_the_same_seed_repeats():
    def first(seed, split):
        return next(md.generate_clips(dataclasses.replace(SMALL, seed=seed), split))["frames"][:17]

    np.testing.assert_array_equal(first(0, "train"), first(0, "train"))
    assert (first(0, "train") != first(1, "train")).any()
    assert (first(0, "train") != first(0, "test")).any()


def test_every_setting_has_its_own_folder():
    changed = [
        MovingDigitsConfig(**{field: getattr(MovingDigitsConfig(), field) + 1})
        for field in MovingDigitsConfig.__dataclass_fields__
    ]
    assert len({config.name for config in [*changed, MovingDigitsConfig()]}) == len(changed) + 1


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
    assert sorted(path.name for path in folder.iterdir()) == ["2.0.0", "lock"]


def test_an_existing_data_set_is_not_made_again(data_dir, monkeypatch):
    monkeypatch.setattr(md, "generate_clips", None)
    assert len(md.source(SMALL, "test", data_dir)) == 10


def test_nothing_is_printed_but_the_progress_bar(tmp_path, capfd):
    md.prepare(SMALL, str(tmp_path))
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and all(line.startswith("making ") for line in lines)
