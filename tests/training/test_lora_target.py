"""A step that trains LoRA factors alone: on a mesh, in microbatches, on an int8 base, with a denoiser's."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from starflow_jax import sharding
from starflow_jax.config import Config, Lora, Mesh, Train
from starflow_jax.data.batch import Batch
from starflow_jax.model.lora import fresh_factors
from starflow_jax.model.quantize import quantize_params
from starflow_jax.training.lora_target import abstract_lora, lora_step
from starflow_jax.training.state import create_state
from tests.helpers import random_params
from tests.small_model import CONFIG


def config_of(lora: dict[str, Any] | None = None, **train: Any) -> Config:
    settings = Train(**{"target": "lora", "steps": 10, "warmup_steps": 0, "learning_rate": 1e-2, "ema": 0.5, **train})
    return dataclasses.replace(CONFIG, train=settings, lora=Lora(**{"rank": 2, "alpha": 4.0, **(lora or {})}))


def batch(config: Config) -> Batch:
    model, random = config.model, np.random.default_rng(0)
    shape = (4, model.frames, model.height, model.width, model.channels)
    return Batch(latents_BNhwC=random.normal(size=shape).astype(np.float32),
                 features_BSD=random.normal(size=(4, model.text_length, model.text_dim)).astype(np.float32))


def trained(config: Config, mesh: Any, backbone: Any, steps: int = 2) -> tuple[Any, list[Any]]:
    state = jax.jit(lambda: create_state(fresh_factors(config, jax.random.key(0)), config.train))()
    rows, step = [], lora_step(config, mesh)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, sharding.parameter_shardings(state, mesh))
        for _ in range(steps):
            state, scalars = step(state, sharding.put_batch(batch(config), mesh), backbone)
            rows.append(jax.tree.map(float, scalars))
    return state, rows


ONE = sharding.make_mesh(Mesh(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def one_device() -> tuple[Any, list[Any]]:
    return trained(config_of(), ONE, random_params(CONFIG))


def test_factors_sharded_over_a_mesh_are_those_of_one_device(one_device: tuple[Any, list[Any]]) -> None:
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    params = random_params(CONFIG)
    backbone = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    state, rows = trained(config_of(), mesh, backbone)
    layer = state.params["flow"]["deep"]["transformer"]["layers"]["layer"]
    assert [layer["mlp_out"][name].sharding.spec for name in ("lora_a", "lora_b")] == [
        PartitionSpec(None, "tensor"), PartitionSpec(None, None, "fsdp")]
    expected, expected_rows = one_device
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, atol=2e-5), state.ema, expected.ema)
    np.testing.assert_allclose(rows[1]["loss"], expected_rows[1]["loss"], rtol=1e-5)


def test_a_state_holds_factors_alone_and_the_backbone_is_kept_in_its_own_dtype(one_device) -> None:
    state, rows = one_device
    assert rows[1]["loss"] < rows[0]["loss"] and rows[0]["grad_norm"] > 0
    width, rank = CONFIG.model.deep_width, 2
    factors = 4 * rank * width * ((1 + 3) + (1 + 1) + (1 + 4) + (4 + 1))
    assert factors * 4 <= size(state) < factors * 4 + 64  # with their average and two moments
    whole = dataclasses.replace(config_of(), model=dataclasses.replace(CONFIG.model, dtype="bfloat16"))
    for weights, kernel in (("", jnp.bfloat16), ("int8", jnp.int8)):
        config = dataclasses.replace(whole, lora=dataclasses.replace(whole.lora, weights=weights))
        abstract, backbone = abstract_lora(config, ONE)
        assert size(abstract) == size(state)
        mlp = backbone["flow"]["deep"]["transformer"]["layers"]["layer"]["mlp_in"]["kernel"]
        assert jax.tree.leaves(mlp)[0].dtype == kernel


def size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.slow  # the same step as on a float base, by tests/nn/test_lora.py and tests/model/test_lora.py
def test_int8_bases_microbatches_and_the_denoisers_factors_learn(one_device: tuple[Any, list[Any]]) -> None:
    params = random_params(CONFIG)
    state, rows = trained(config_of(dict(blocks="deep,denoiser", weights="int8"), batch_size=4, accumulate=2), ONE,
                          quantize_params(params), steps=6)
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[0]["denoiser_loss"] > 0
    moved = jax.tree.map(lambda leaf: float(np.abs(leaf).max()), state.params["denoiser"])
    assert min(jax.tree.leaves(moved)) > 0  # B was zero
    np.testing.assert_allclose(rows[0]["loss"], one_device[1][0]["loss"], rtol=0.02)
