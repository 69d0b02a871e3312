"""A step that trains what is beside a model alone: LoRA factors on a mesh, in microbatches, on an int8 base, with a
denoiser's; a control module; a smaller deep block."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from starflow_jax import sharding
from starflow_jax.config import Config, Data, Lora, Mesh, Student, Train, changed
from starflow_jax.data.batch import Batch
from starflow_jax.flow.control import cameras_of_latents, window_rays
from starflow_jax.model.quantize import quantize_params
from starflow_jax.training.beside_target import PARTS, abstract_beside, beside_step
from starflow_jax.training.state import create_state
from tests.flow.test_control import random_cameras
from tests.helpers import random_params
from tests.small_model import CONFIG


def config_of(lora: dict[str, Any] | None = None, **train: Any) -> Config:
    settings = Train(**{"target": "lora", "steps": 10, "warmup_steps": 0, "learning_rate": 1e-2, "ema": 0.5, **train})
    data = Data(camera=True, image_probability=0.0)
    return dataclasses.replace(CONFIG, data=data, train=settings,
                               lora=Lora(**{"rank": 2, "alpha": 4.0, **(lora or {})}))


def batch(config: Config) -> Batch:
    model, random = config.model, np.random.default_rng(0)
    shape = (4, model.frames, model.height, model.width, model.channels)
    found = Batch(latents_BNhwC=random.normal(size=shape).astype(np.float32),
                  features_BSD=random.normal(size=(4, model.text_length, model.text_dim)).astype(np.float32))
    if config.train.target != "control":
        return found
    stride = config.codec.time_stride
    paths = [random_cameras(1 + stride * (model.frames - 1), seed) for seed in range(4)]
    intrinsics, world_to_camera = map(np.stack, zip(*paths))
    return found.replace(rays_BNSK=np.asarray(window_rays(
        cameras_of_latents(intrinsics, world_to_camera[:, :, :3], stride), model)))


def trained(config: Config, mesh: Any, backbone: Any, steps: int = 2, begin: Any = None) -> tuple[Any, list[Any]]:
    """From fresh parameters, or from `begin`."""
    state = jax.jit(lambda: create_state(
        begin or PARTS[config.train.target].fresh(config, jax.random.key(0)), config.train))()
    rows, step = [], beside_step(config, mesh)
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
        abstract, backbone = abstract_beside(config, ONE)
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


def test_a_control_module_learns_alone_from_the_backbones_loss_on(one_device: tuple[Any, list[Any]]) -> None:
    """Its first loss is that of LoRA factors, which change nothing at first either."""
    config = config_of(target="control")
    state, rows = trained(config, ONE, random_params(CONFIG), steps=4)
    assert set(state.params) == {"control"}
    assert rows[0]["loss"] == one_device[1][0]["loss"] and rows[-1]["loss"] < rows[0]["loss"]
    assert all(np.abs(kernel["kernel"]).max() > 0 for kernel in state.params["control"]["layers"].values())
    width, channels, deep = config.control.width, 12 * config.codec.time_stride, CONFIG.model.deep_width
    of_layer = width * (width + deep + deep + 3 * deep)  # tokens, hidden states; what the input and q, k and v get
    held = (channels + 1) * width + (width + 1) * width + CONFIG.model.deep_layers * of_layer
    assert 4 * 4 * held <= size(state) < 4 * 4 * held + 64
    assert size(abstract_beside(config, ONE)[0]) == size(state)


@pytest.mark.slow  # the same step as above
def test_a_control_module_on_a_mesh_and_in_microbatches(one_device: tuple[Any, list[Any]]) -> None:
    expected, rows = trained(config_of(target="control"), ONE, random_params(CONFIG))
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    params = random_params(CONFIG)
    backbone = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    state, sharded_rows = trained(config_of(target="control"), mesh, backbone)
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, atol=2e-5), state.ema, expected.ema)
    np.testing.assert_allclose(sharded_rows[1]["loss"], rows[1]["loss"], rtol=1e-5)
    _, in_parts = trained(config_of(target="control", batch_size=4, accumulate=2), ONE, params)
    np.testing.assert_allclose(in_parts[1]["loss"], rows[1]["loss"], rtol=1e-4)


TEACHER = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, deep_layers=3))


def student_of(model: dict[str, Any] | None = None, **settings: Any) -> Config:
    config = dataclasses.replace(config_of(target="student"), student=Student(**{
        "teacher_layers": 3, "teacher_width": CONFIG.model.deep_width, **settings}))
    return changed(config, "model", model or {"deep_layers": 2, "deep_width": 20})


def test_a_student_learns_alone_and_is_told_from_its_teacher(one_device: tuple[Any, list[Any]]) -> None:
    """One with all of its teacher begins as near to it as rounding allows, at the teacher's own loss; of a smaller one
    both errors fall, and the state holds its deep block alone, whatever the teacher's sizes are."""
    small = random_params(CONFIG)
    _, rows = trained(student_of({"deep_layers": 1}), ONE, small, begin={"flow": {"deep": small["flow"]["deep"]}})
    assert rows[0]["mean_error"] < 1e-10 and rows[0]["scale_error"] < 1e-10 and rows[1]["mean_error"] > 1e-6
    assert rows[0]["loss"] == one_device[1][0]["loss"]  # LoRA factors change nothing at first either
    teacher, config = random_params(TEACHER), student_of()
    state, rows = trained(config, ONE, teacher, steps=4)
    assert all(rows[-1][name] < rows[0][name] for name in ("loss", "mean_error", "scale_error"))
    assert jax.tree.map(np.shape, state.params) == {"flow": {"deep": jax.tree.map(
        np.shape, random_params(config)["flow"]["deep"])}}
    held = size(random_params(config)["flow"]["deep"])
    assert 4 * held <= size(state) < 4 * held + 64  # with their average and two moments
    abstract, backbone = abstract_beside(config, ONE)
    assert size(abstract) == size(state) and size(backbone) == size(teacher)


def test_without_its_teachers_part_a_students_step_does_not_compute_it() -> None:
    def measured(**weights: float) -> set[str]:
        config = student_of(**weights)
        state, backbone = abstract_beside(config, ONE)
        return set(jax.eval_shape(beside_step(config, ONE), state, batch(config), backbone)[1])

    assert measured() - measured(mean=0.0, scale=0.0) == {"mean_error", "scale_error"}


@pytest.mark.slow  # quick: above, and tests/training/test_distillation.py
def test_weights_choose_what_a_student_learns_from() -> None:
    teacher, likelihood = random_params(TEACHER), dict(likelihood=1.0, mean=0.0, scale=0.0)
    begin = random_params(student_of())
    begin = {"flow": {"deep": begin["flow"]["deep"]}}
    alone, distilled = (trained(student_of(**weights), ONE, teacher, steps=3, begin=begin)[1] for weights in (
        likelihood, dict(likelihood=0.0, mean=1.0, scale=1.0)))
    assert "mean_error" not in alone[0] and alone[0]["loss"] == distilled[0]["loss"]
    assert distilled[-1]["mean_error"] + distilled[-1]["scale_error"] < (
        distilled[0]["mean_error"] + distilled[0]["scale_error"])
    assert alone[-1]["loss"] < alone[0]["loss"] and alone[1]["loss"] != distilled[1]["loss"]


@pytest.mark.slow  # the same step as above
def test_a_student_on_a_mesh_and_in_microbatches() -> None:
    params, config = random_params(TEACHER), student_of({"deep_layers": 2})
    # Small steps: AdamW's first ones are as large where a gradient is next to nothing, and rounding decides its sign.
    config = changed(config, "train", {"learning_rate": 1e-3})
    expected, rows = trained(config, ONE, params)
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    backbone = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    state, sharded_rows = trained(config, mesh, backbone)
    jax.tree.map(lambda ours, other: np.testing.assert_allclose(ours, other, atol=2e-5), state.ema, expected.ema)
    settings = dataclasses.replace(config.train, batch_size=4, accumulate=2)
    _, in_parts = trained(dataclasses.replace(config, train=settings), ONE, params)
    for name in ("loss", "mean_error", "scale_error"):
        np.testing.assert_allclose(sharded_rows[1][name], rows[1][name], rtol=1e-4)
        np.testing.assert_allclose(in_parts[1][name], rows[1][name], rtol=1e-4)
