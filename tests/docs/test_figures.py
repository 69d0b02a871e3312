"""The diagrams of the manual show what its text says of them."""

import numpy as np
import pytest

from docs.figures import denoiser_mask, orders, residuals
from starflow_jax.sampling.solver import TOLERANCE


def test_orders_of_the_blocks() -> None:
    """Shallow block 0 goes backwards through each frame, 1 forwards; the deep block from frame to frame."""
    written = [[int(text.get_text()) for text in axes.texts] for axes in orders().axes]
    frame = list(range(36))
    assert written == [frame[::-1], frame[::-1], frame, frame, frame, list(range(36, 72))]


def test_only_the_first_layer_looks_ahead() -> None:
    first, others = (np.asarray(axes.images[0].get_array()) for axes in denoiser_mask(tokens=1, text=1).axes)
    differ = np.argwhere(first != others)
    assert {(query, key) for query, key in differ} == {(0, 2), *((slot, slot + 1) for slot in range(1, 8))}


@pytest.mark.slow
def test_updates_until_a_frame_stands_still() -> None:
    """Of the pretrained model: thirteen for the first frame, four or five for a later one."""
    median_NU = np.median(residuals(updates=13), axis=2)
    below = median_NU < TOLERANCE
    assert list(below.argmax(axis=1) + 1) == [13, 5, 4, 4]
