"""Rotary positions: what attention sees of them, their frequencies and their channel order."""

import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.nn import rope

HEAD_DIM = 24  # 12 pairs: 2 for rows, 2 for columns, 8 for time


def turned(x_D: np.ndarray, position: list[float]) -> np.ndarray:
    """One vector of one head at a (row, column, time)."""
    table = rope.rope_table(np.array([position], float), x_D.size)
    return np.asarray(rope.apply_rope(jnp.asarray(x_D, jnp.float32)[None, None, None], table))[0, 0, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_products_depend_on_the_difference_of_positions(axis: int) -> None:
    random = np.random.default_rng(axis + 5)
    q, k = random.normal(size=(2, HEAD_DIM))
    first, second, shift = [2.0, 5.0, 1.0], [1.0, 0.5, 3.0], [0.0, 0.0, 0.0]
    shift[axis] = 4.0
    moved = lambda position: [a + b for a, b in zip(position, shift)]  # noqa: E731
    here = turned(q, first) @ turned(k, second)
    there = turned(q, moved(first)) @ turned(k, moved(second))
    one_moved = turned(q, moved(first)) @ turned(k, second)
    np.testing.assert_allclose(there, here, atol=1e-5)
    assert abs(one_moved - here) > 1e-2


def test_frequencies() -> None:
    """m = d/2 - 8: m/2 each of theta^(-2i/m) for row and column, then eight of theta^(-i/8) for time."""
    position = np.array([[1.3, 0.7, 2.0]])
    cos, sin = np.asarray(rope.rope_table(position, 64))[:, 0]
    angles = [1.3 * 10_000 ** (-2 * i / 24) for i in range(12)]
    angles += [0.7 * 10_000 ** (-2 * i / 24) for i in range(12)]
    angles += [2.0 * 10_000 ** (-i / 8) for i in range(8)]
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_pair_order_is_the_rotation_of_neighbouring_channels() -> None:
    """The method turns (x_2i, x_2i+1); here the same channels lie as pair_order says."""
    random = np.random.default_rng(0)
    x, position = random.normal(size=HEAD_DIM), [3.0, 1.5, 2.0]
    frequencies = [1, 0.01] * 2 + [10_000 ** (-i / 8) for i in range(8)]
    expected = np.empty(HEAD_DIM)
    for i, frequency in enumerate(frequencies):
        angle = frequency * position[0 if i < 2 else 1 if i < 4 else 2]
        even, odd = x[2 * i], x[2 * i + 1]
        expected[2 * i] = even * np.cos(angle) - odd * np.sin(angle)
        expected[2 * i + 1] = even * np.sin(angle) + odd * np.cos(angle)
    order = rope.pair_order(HEAD_DIM)
    assert sorted(order) == list(range(HEAD_DIM))
    np.testing.assert_allclose(turned(x[order], position), expected[order], atol=1e-5)


def test_grid_positions_span_the_same_range_at_every_size() -> None:
    positions = rope.grid_positions(frames=2, height=2, width=8, extent=6.0)
    assert positions.shape == (32, 3)
    scale = 6.0 / 4.0  # P / sqrt(h w)
    np.testing.assert_allclose(positions[0], [0, 0, 0])
    np.testing.assert_allclose(positions[8 + 3], [1 * scale, 3 * scale, 0])
    np.testing.assert_allclose(positions[16 + 5], [0, 5 * scale, 1])


def test_text_is_spread_over_the_time_axis() -> None:
    np.testing.assert_allclose(rope.text_positions(4, extent=6.0), [[0, 0, 0], [0, 0, 1.5], [0, 0, 3], [0, 0, 4.5]])


@pytest.mark.parametrize("head_dim", [16, 22])
def test_impossible_head_dims(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"head_dim={head_dim}"):
        rope.rope_table(np.zeros((1, 3)), head_dim)


def test_keeps_bfloat16() -> None:
    table = rope.rope_table(np.ones((1, 3)), HEAD_DIM)
    assert rope.apply_rope(jnp.ones((1, 1, 1, HEAD_DIM), jnp.bfloat16), table).dtype == jnp.bfloat16
