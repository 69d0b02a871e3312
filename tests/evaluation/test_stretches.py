"""Figures of stretches against those of the frames that they are of."""

import numpy as np
import pytest

from starflow_jax.config import UserError, changed
from starflow_jax.data.digits.captions import parse_caption
from starflow_jax.evaluation.horizon import (
    Shown,
    add_frechet,
    change_figures,
    changing_prompts,
    plain_prompts,
    stretches_in,
)
from starflow_jax.evaluation.measures import temporal_flickering
from starflow_jax.evaluation.stretches import Measures, Stretches, in_stretches
from tests.small_model import CONFIG


def video(frames: int, batch: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (batch, frames, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("part", [1, 4, 7, 30])
def test_a_stream_falls_into_stretches(part: int) -> None:
    """Of five frames and then eight each, however it arrives; what does not fill one is left out."""
    whole = video(30)
    parts = (whole[:, begin:begin + part] for begin in range(0, 30, part))
    found = list(in_stretches(parts, 5, 8))
    assert [frames.shape[1] for frames in found] == [5, 8, 8, 8]
    np.testing.assert_array_equal(np.concatenate(found, axis=1), whole[:, :29])


def test_figures_are_means_over_the_videos_of_all_batches() -> None:
    first, second = video(6), video(6, batch=1, seed=1) // 2
    found = Stretches()
    for frames in (first, second):
        found.add(0, frames, None)
        found.add(1, frames[:, :1], None)
    found.add_bits(np.array([[1.0, 2.0, 3.0, 5.0], [3.0, 2.0, 3.0, 3.0]]), 2)
    found.add_bits(np.array([[2.0, 6.0, 0.0, 1.0]]), 2)
    row, still = found.means()
    together = np.concatenate([first, second]).astype(float)
    assert row["mean_pixel"] == pytest.approx(together.mean(), rel=1e-5)
    assert row["pixel_variance"] == pytest.approx(np.mean([clip.var() for clip in together]), rel=1e-5)
    assert row["flickering"] == pytest.approx(temporal_flickering(together), rel=1e-5)
    assert row["bits_per_dim"] == pytest.approx((1.5 + 2.5 + 4.0) / 3) and "flickering" not in still
    assert found.standard_errors()[0]["bits_per_dim"] == pytest.approx(np.std([1.5, 2.5, 4.0]) / np.sqrt(3))


def test_prompts_that_change_say_what_their_labels_do() -> None:
    """The direction at the third training length, the colour at the fifth, ...: each to another one."""
    labels = np.array([[7, 0, 4], [3, 6, 7], [1, 2, 3]])
    prompts = changing_prompts(["a", "b", "c"], labels, stretches=8, length=4)
    assert list(prompts.changes) == [8, 16, 24]
    for at, captions in prompts.changes.items():
        np.testing.assert_array_equal([parse_caption(caption) for caption in captions], prompts.labels_NB3[at // 4])
    differs = np.diff(prompts.labels_NB3, axis=0) != 0
    expected = np.zeros((7, 3, 3), bool)
    expected[[1, 5], :, 2] = expected[3, :, 1] = True
    np.testing.assert_array_equal(differs, expected)
    part = prompts.batch(2, 2)
    assert part.captions == ["c", "c"] and part.changes[8] == [prompts.changes[8][2]] * 2
    assert part.labels_of(0).tolist() == [[1, 2, 3]] and plain_prompts(["a"], None, 3).labels_of(1) is None


def test_changes_are_counted_in_the_training_length_that_follows_them() -> None:
    found = Stretches()
    for stretch, (digit, colour, direction) in enumerate([(1, 1, 1), (1, 1, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)]):
        found._keep(stretch, digit=np.array([1.0, digit]), colour=np.array([colour, 0.0]),
                    direction=np.array([1.0, direction]))
    figures = change_figures(found, 8)
    assert [(one["stretch"], one["changed"], one["read"], one["digit_kept"]) for one in figures["changes"]] == [
        (2, "direction", 0.5, 0.75), (4, "colour", 0.0, 1.0)]
    assert (figures["direction_read"], figures["colour_read"], figures["read"]) == (0.5, 0.0, 0.25)
    assert figures["digit_kept"] == 0.875 and figures["every_latent_frames"] == 8
    few = Stretches()
    few.add(0, video(2), None)
    assert change_figures(few, 8) == {}


def test_the_first_videos_are_shown_at_the_first_stretch_and_the_last() -> None:
    shown = Shown(20)
    for stretch in range(20):
        shown.add(stretch, np.full((3, 5, 2, 2, 3), stretch, np.uint8))
        shown.add(stretch, np.full((4, 5, 2, 2, 3), 100 + stretch, np.uint8))
    assert shown.frames.shape == (7, 5, 3, 2, 2, 3) and shown.stretches[0] == 0 and shown.stretches[-1] == 19
    assert shown.frames[-1, :, 0, 0, 0, 0].tolist() == [19, 19, 19, 119, 119]


def test_drift_is_the_distance_to_the_first_stretch_of_real_clips() -> None:
    """Features that move on by their mean alone: the square of how far."""
    features = np.random.default_rng(0).normal(size=(50, 4))
    real, made = Stretches(), Stretches()
    real._keep(0, features=features)
    for stretch in range(3):
        made._keep(stretch, features=features + [2.0 * stretch, 0, 0, 0], mean_pixel=np.ones(50))
    rows = made.means()
    add_frechet(rows, made, real)
    np.testing.assert_allclose([row["frechet_distance"] for row in rows], [0, 4, 16], atol=1e-6)
    assert set(rows[0]) == {"mean_pixel", "frechet_distance"}


def test_networks_see_as_many_frames_as_are_asked_for() -> None:
    seen = []

    def network(frames: np.ndarray) -> np.ndarray:
        seen.append(frames.shape)
        return np.zeros((len(frames), 400))

    found = Stretches(Measures(i3d=network, frames=9))  # type: ignore[arg-type]
    found.add(0, video(13, batch=6), None)
    assert seen == [(4, 9, 8, 8, 3)] * 2 and found.of(0, "features").shape == (6, 400)


def test_fewer_than_two_training_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="evaluate.latent_frames=5: must be two training lengths or more, 6"):
        stretches_in(changed(CONFIG, "evaluate", {"latent_frames": 5}))
    assert stretches_in(changed(CONFIG, "evaluate", {"latent_frames": 11})) == 3
