"""Statistics of clips whose figures are known; a classifier that tells two sets apart as far as they differ."""

import numpy as np

from starflow_jax.evaluation.two_sample import balanced_accuracy, clip_statistics
from tests.io.test_video import moving_square


def test_statistics_of_a_square_on_a_black_canvas() -> None:
    """A quarter of the pixels red at 200, another eighth at 80, which a step of one pixel moves."""
    clip_THWC = np.zeros((3, 8, 8, 3), np.uint8)
    clip_THWC[:, :4, :4, 0], clip_THWC[:, :4, 4:6, 0] = 200, 80
    mean, deviation, lit, bright, red, green, change, over_time = clip_statistics(clip_THWC[None])[0]
    assert np.isclose(mean, (200 / 4 + 80 / 8) / 3) and np.isclose(deviation, clip_THWC.std())
    assert (lit, bright, red, green, change, over_time) == (0.375, 0.25, 1.0, 0.0, 0.0, 0.0)
    still = clip_statistics(clip_THWC[None, :1])[0]
    np.testing.assert_allclose(still, [mean, deviation, lit, bright, red, green])
    clip_THWC[1] = 0  # blinks: all of the mean of a frame changes, twice
    blinks = clip_statistics(clip_THWC[None])[0]
    np.testing.assert_allclose(blinks[-2:], [1.5, 0.0], atol=1e-6)


def test_brightness_and_motion_are_seen() -> None:
    frames = moving_square()[None]
    brighter, faster = clip_statistics(np.minimum(frames, 100) // 2 * 3), clip_statistics(frames[:, ::2])
    plain = clip_statistics(np.minimum(frames, 100))
    np.testing.assert_allclose(brighter[0, :2], 1.5 * plain[0, :2], rtol=0.02)
    assert faster[0, 6] > 1.5 * clip_statistics(frames)[0, 6]


def test_a_black_clip_has_statistics() -> None:
    assert np.isfinite(clip_statistics(np.zeros((2, 3, 4, 4, 3), np.uint8))).all()


def test_sets_are_told_apart_as_far_as_they_differ() -> None:
    """Two Gaussians, d deviations apart, in the best direction: the normal distribution at d / 2."""
    random = np.random.default_rng(0)
    real, same = random.normal(size=(2, 2_000, 8))
    assert abs(balanced_accuracy(real, same) - 0.5) < 0.02
    assert abs(balanced_accuracy(real, same + np.eye(8)[3]) - 0.691) < 0.02
    assert balanced_accuracy(real, (same + 100)[:50]) == 1.0
    assert balanced_accuracy(real[:4], same) is None
