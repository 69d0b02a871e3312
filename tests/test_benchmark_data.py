"""The benchmark does the work it times, and its figures belong together."""

import numpy as np
import pytest

from starflow_jax import benchmark_data
from starflow_jax.data.clips import Bucket


def test_decoding_is_timed_beside_bare_decoding():
    rows = benchmark_data.decoding(size=(64, 96), bucket=Bucket(32, 48, "3:2"), frames=9)
    rates = [row["clips per second and core"] for row in rows]
    assert rows[0]["times PyAV alone"] == 1 and len(rows) == 4 and min(rates) > 0
    np.testing.assert_allclose([row["times PyAV alone"] for row in rows], rates[0] / np.array(rates))


def test_reading_says_how_many_cores_feed_a_training():
    found = benchmark_data.reading(2.0, 100, latents=(4, 2, 3, 5), batch_size=2, examples=4)
    assert found["clips_per_second_needed"] == 50
    assert found["cores_needed"] == pytest.approx(50 / found["clips_per_second_and_core"])
    # 8 prompts of 120 rows of 2,048 halves, 120 latents of 2 bytes.
    assert found["megabytes_per_second_needed"] == pytest.approx(50 * (120 + 8 * 120 * 2048) * 2 / 1e6)
