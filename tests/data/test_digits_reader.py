"""The reader: how well it reads real clips, and that it says so when a clip does not match its caption."""

import numpy as np
import pytest

from starflow_jax.config import UserError
from starflow_jax.data.digits import captions, scene
from starflow_jax.data.digits import reader as reading
from starflow_jax.data.digits.reader import Reader, default_reader, labels_of


@pytest.fixture(scope="module")
def reader():
    return default_reader()


def make_clips(count, size, digit_size, frames, recorded, seed=0, wraps=True):
    """Clips of scans that the reader was not fitted on, and their labels (digit, colour, direction)."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(np.concatenate([scene.split_scan_ids("validation"), scene.split_scan_ids("test")]), count)
    colours, directions = np.arange(count) % len(captions.COLOURS), np.arange(count) % len(captions.DIRECTIONS)
    config = scene.MovingDigitsConfig(size=size, digit_size=digit_size, frames=recorded, wraps=wraps)
    position = scene.random_motion(rng, directions, config).positions(recorded)
    scans = scene.load_scans(ids, digit_size)
    clips = scene.render_clips(scans, colours, position, size=size)
    return clips[:, :frames], np.stack([ids // 500, colours, directions], axis=1)


@pytest.mark.parametrize(
    "size,digit_size,frames,recorded,wraps",
    [(24, 15, 13, 17, True), (24, 15, 13, 17, False), (24, 15, 9, 17, False), (32, 20, 16, 16, True)],
)
def test_real_clips_are_read_as_they_were_made(reader, size, digit_size, frames, recorded, wraps):
    clips, labels = make_clips(168, size, digit_size, frames, recorded, wraps=wraps)
    shares = reader.adherence(labels, clips)
    assert shares["digit"] >= 0.94
    assert shares["colour"] == shares["direction"] == 1.0


def test_a_clip_is_read_the_same_wherever_it_is_on_the_torus(reader):
    clips, _ = make_clips(56, 24, 15, 13, 17)
    for plain, rolled in zip(reader.read(clips), reader.read(np.roll(clips, (11, 7), axis=(2, 3)))):
        np.testing.assert_array_equal(plain, rolled)


@pytest.mark.parametrize("noise", [10, 25])
def test_moderate_noise_does_not_confuse_the_reader(reader, noise):
    clips, labels = make_clips(112, 24, 15, 13, 17)
    noisy = clips + np.random.default_rng(1).normal(0, noise, clips.shape)
    shares = reader.adherence(labels, np.clip(noisy, 0, 255).astype(np.uint8))
    assert shares["digit"] >= 0.92
    assert shares["colour"] == shares["direction"] == 1.0


def test_specks_change_nothing(reader):
    clips, _ = make_clips(56, 32, 20, 9, 17)
    specked = clips.copy()
    peak_BT = np.broadcast_to(clips.max((1, 2, 3, 4))[:, None], clips.shape[:2])  # brighter ones would dim the digit
    for row, column in ((0, 0), (16, 31)):  # where no digit touches them
        around = [clips[:, :, (row + down) % 32, (column + right) % 32]
                  for down in range(-2, 3) for right in range(-2, 3)]
        empty_BT = np.max(around, axis=(0, -1)) == 0
        specked[:, :, row, column, 0][empty_BT] = peak_BT[empty_BT]
    assert (specked != clips).any()
    for plain, with_speck in zip(reader.read(clips), reader.read(specked)):
        np.testing.assert_array_equal(plain, with_speck)


def test_a_dim_clip_reads_like_a_bright_one(reader):
    clips, _ = make_clips(28, 24, 15, 13, 17)
    even = clips // 2 * 2
    for bright, dim in zip(reader.read(even), reader.read(even // 2)):
        np.testing.assert_array_equal(bright, dim)


def test_played_backwards_only_the_direction_turns_round(reader):
    clips, labels = make_clips(56, 24, 15, 13, 17)
    digits, colours, directions = reader.read(clips[:, ::-1])
    np.testing.assert_array_equal(digits, reader.read(clips)[0])
    np.testing.assert_array_equal(colours, labels[:, 1])
    steps = np.array(list(captions.DIRECTIONS.values()))
    np.testing.assert_array_equal(steps[directions], -steps[labels[:, 2]])


def test_each_share_counts_its_own_label(reader):
    clips, _ = make_clips(40, 24, 15, 13, 17)
    asked = np.stack(reader.read(clips), axis=1)
    assert reader.adherence(asked, clips) == {"digit": 1.0, "colour": 1.0, "direction": 1.0}
    asked[:10, 0] = (asked[:10, 0] + 1) % 10
    asked[:20, 1] = (asked[:20, 1] + 1) % len(captions.COLOURS)
    asked[:30, 2] = (asked[:30, 2] + 1) % len(captions.DIRECTIONS)
    assert reader.adherence(asked, clips) == {"digit": 0.75, "colour": 0.5, "direction": 0.25}


def test_nothing_is_read_where_nothing_is_seen_or_moves(reader):
    black = np.zeros((1, 13, 24, 24, 3), np.uint8)
    assert [int(values[0]) for values in reader.read(black)] == [-1, -1, -1]
    clips, labels = make_clips(10, 24, 15, 13, 17)
    still = np.repeat(clips[:, :1], 13, axis=1)
    _, colours, directions = reader.read(still)
    assert colours.tolist() == labels[:, 1].tolist() and directions.tolist() == [-1] * 10


def test_a_frame_that_went_black_does_not_spoil_the_rest(reader):
    clips, labels = make_clips(56, 24, 15, 13, 17)
    clips[:, 4] = 0
    np.testing.assert_array_equal(reader.read(clips)[1:], labels[:, 1:].T)


def test_fitting_twice_gives_the_same_reader():
    ids = scene.split_scan_ids("train")[::20]
    scans = scene.load_scans(ids, 15)
    clips, _ = make_clips(40, 24, 15, 5, 17)
    scores = [
        Reader.fit(scans, ids // 500)._classifier.decision_function(
            reading._cutouts(reading._centred_ink(clips)[0])
        )
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*scores)


def test_labels_of_captions():
    labels = labels_of(["a red seven moves right", "white 0 drifts up and to the left"])
    names = [(digit, captions.COLOUR_NAMES[colour], captions.DIRECTION_NAMES[way]) for digit, colour, way in labels]
    assert names == [(7, "red", "right"), (0, "white", "upper left")]
    with pytest.raises(UserError, match="colour"):
        labels_of(["a seven moves right"])
