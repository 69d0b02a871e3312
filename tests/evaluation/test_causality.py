"""Local shallow blocks keep the flow causal, global ones don't."""

import dataclasses

import jax
import numpy as np

from starflow_jax.evaluation.causality import dependence
from starflow_jax.model.system import System
from tests.helpers import random_params
from tests.small_model import CONFIG, small_system


def matrix(system: System) -> np.ndarray:
    model = system.config.model
    noisy = jax.random.normal(jax.random.key(1), (2, model.frames, model.height, model.width, model.channels))
    text = jax.random.normal(jax.random.key(2), (2, model.text_length, model.text_dim))
    return dependence(system, random_params(system.config, scale=0.3), noisy, text)


def test_z_of_a_frame_depends_on_no_later_frame_with_local_shallow_blocks_alone() -> None:
    local = matrix(small_system())
    np.testing.assert_array_equal(np.triu(local, 1), 0)
    assert (local[np.tril_indices(3)] > 1e-4).all()
    whole = matrix(small_system(dataclasses.replace(CONFIG, model=dataclasses.replace(
        CONFIG.model, local_shallow=False))))
    assert (whole[np.triu_indices(3, 1)] > 1e-4).all()
