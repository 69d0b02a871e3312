"""The built-in data set: split by scan, exact motion, captions that say what is seen, atomic files."""

import dataclasses
import multiprocessing
import pathlib

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data.digits import captions
from starflow_jax.data.digits import dataset as md
from starflow_jax.data.digits.dataset import MovingDigitsConfig

SMALL = MovingDigitsConfig(train_clips=40, validation_clips=5, test_clips=10)


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
    travel = np.array([[8.0, -8.0], [0.0, 7.3], [-7.9, 7.9]], np.float32)
    clips = md.render_clips(scan, np.array([0, 6, 3]), start, travel, frames=17, size=24)
    ink_BTHW = clips.max(-1).astype(float)
    grid = np.arange(24)
    rows_BT = (ink_BTHW.sum(3) @ grid) / ink_BTHW.sum((2, 3))
    columns_BT = (ink_BTHW.sum(2) @ grid) / ink_BTHW.sum((2, 3))
    moved = np.stack([rows_BT - rows_BT[:, :1], columns_BT - columns_BT[:, :1]], -1)
    expected = np.linspace(0, 1, 17)[:, None] * travel[:, None]
    np.testing.assert_allclose(moved, expected, atol=0.02)  # rounding to uint8


def test_at_a_whole_pixel_the_scan_itself_is_painted_in_its_colour():
    scan = md.load_scans(md.split_scan_ids("test")[:1], 15)
    clip = md.render_clips(scan, np.array([3]), np.array([[2, 5]]), np.array([[0, 4]]), frames=5, size=24)[0]
    for frame in range(5):
        expected = np.zeros((24, 24, 3), np.uint8)
        expected[2:17, 5 + frame : 20 + frame, :2] = scan[0, :, :, None]  # yellow: red and green
        np.testing.assert_array_equal(clip[frame], expected)


@pytest.mark.parametrize("size,digit_size", [(24, 15), (32, 20)])
def test_the_whole_path_stays_inside_and_is_long_enough_to_see(size, digit_size):
    room = size - digit_size
    directions = np.arange(4000) % 8
    start, travel = md.random_starts_and_travels(np.random.default_rng(0), directions, room)
    for position in (start, start + travel):
        assert position.min() >= -1e-5 and position.max() <= room + 1e-5
    steps = np.array(list(captions.DIRECTIONS.values()))[directions]
    np.testing.assert_array_equal(np.sign(travel), steps)
    distances = np.abs(travel[steps != 0])
    assert 0.78 * room <= distances.min() and distances.max() <= room
    assert distances.std() > 0.03 * room


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
        assert stored["frames"].dtype == np.uint8 and stored["frames"].shape == (17, 24, 24, 3)
        label = tuple(int(stored[key]) for key in ("digit", "colour", "direction"))
        for key in ("caption_long", "caption_short"):
            assert stored[key].decode() == made[key]
            assert captions.parse_caption(made[key]) == label
        assert stored["scan"] in md.split_scan_ids(split)
        assert stored["scan"] // 500 == label[0]


def test_splits_and_seeds_differ_and_the_same_seed_repeats():
    def first(seed, split):
        return next(md.generate_clips(dataclasses.replace(SMALL, seed=seed), split))["frames"]

    np.testing.assert_array_equal(first(0, "train"), first(0, "train"))
    assert (first(0, "train") != first(1, "train")).any()
    assert (first(0, "train") != first(0, "test")).any()


def test_every_setting_has_its_own_folder():
    changed = [
        MovingDigitsConfig(**{field: getattr(SMALL, field) + 1})
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
        # What SIGKILL leaves behind: TFDS's clean-up did not run.
        (leftover,) = tmp_path.glob("*/*/incomplete.*")
        leftover.with_name("incomplete.KILLED_1.0.0").mkdir()
        (leftover.with_name("incomplete.KILLED_1.0.0") / "half.array_record").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(md, "generate_clips", dies_half_way)
    with pytest.raises(KeyboardInterrupt):
        md.prepare(SMALL, str(tmp_path))
    monkeypatch.setattr(md, "generate_clips", made)
    assert len(md.source(SMALL, "train", str(tmp_path))) == 40
    assert not list(tmp_path.glob("*/*/incomplete.*"))


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
    assert sorted(path.name for path in folder.iterdir()) == ["1.0.0", "lock"]


def test_an_existing_data_set_is_not_made_again(data_dir, monkeypatch):
    monkeypatch.setattr(md, "generate_clips", None)
    assert len(md.source(SMALL, "test", data_dir)) == 10


def test_nothing_is_printed_but_the_progress_bar(tmp_path, capfd):
    md.prepare(SMALL, str(tmp_path))
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert lines and all(line.startswith("making ") for line in lines)
