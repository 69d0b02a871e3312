"""Statistics of clips whose figures are known; a classifier that tells two sets apart as far as they differ."""

import numpy as np

from starflow_jax.evaluation.two_sample import balanced_accuracy, clip_statistics


def test_statistics_of_a_square_on_a_black_canvas() -> None:
    """A quarter of the pixels red at 200, another eighth at 80."""
    clip_THWC = np.zeros((3, 8, 8, 3), np.uint8)
    clip_THWC[:, :4, :4, 0], clip_THWC[:, :4, 4:6, 0] = 200, 80
    still = clip_statistics(clip_THWC[None])[0]
    expected = [200 / 4 + 80 / 8, clip_THWC[..., 0].std(), 160, 0.375, 0.25, 1.0, 0.0]
    np.testing.assert_allclose(still, [*expected, *[0.0] * 6], atol=1e-9)
    np.testing.assert_allclose(clip_statistics(clip_THWC[None, :1])[0], expected)


def test_motion_is_seen_across_the_border() -> None:
    """A square that goes on by two pixels a frame where the canvas's sides meet; then one that blinks."""
    square = np.zeros((1, 8, 8, 3), np.uint8)
    square[:, 3:5, 5:7] = 250
    moving = np.concatenate([np.roll(square, 2 * step, axis=2) for step in range(4)])
    brightness, size, change, of_change, way, of_way = clip_statistics(moving[None])[0, 7:]
    np.testing.assert_allclose([brightness, size, change, of_change, way, of_way], [0, 0, 2, 0, 2, 0], atol=1e-6)
    blinking = np.concatenate([square, square // 2, square])
    brightness, size, change, *_ = clip_statistics(blinking[None])[0, 7:]
    np.testing.assert_allclose([brightness, size, change], [np.std([1, 0.5, 1]) / (2.5 / 3), 0.0, 0.5 / (2.5 / 3)],
                               atol=1e-6)


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
