"""A smaller deep block: which parts of its teacher it begins with, and what they are."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from starflow_jax.config import Config, Student, UserError, changed
from starflow_jax.model.student import Kept, Magnitudes, chosen_layers, cut, flow_of, kept_parts
from starflow_jax.nn.transformer import unstacked
from tests.helpers import random_params
from tests.small_model import CONFIG

TEACHER = dataclasses.replace(CONFIG.model, deep_layers=4)
DEEP = random_params(dataclasses.replace(CONFIG, model=TEACHER))["flow"]["deep"]


def student(count: int, width: int = 40, **settings: object) -> Config:
    model = dataclasses.replace(TEACHER, deep_layers=count, deep_width=width)
    return dataclasses.replace(CONFIG, model=model, student=Student(**settings))  # type: ignore[arg-type]


def parts_of(deep: Any, kept: Kept) -> Any:
    return jax.jit(lambda deep: cut(deep, kept, TEACHER.head_dim))(deep)


def test_layers_are_evenly_spaced_or_named() -> None:
    assert [chosen_layers(student(count), TEACHER).tolist() for count in (1, 2, 3, 4)] == [
        [0], [0, 3], [0, 2, 3], [0, 1, 2, 3]]
    assert chosen_layers(student(2, layers="1, 2"), TEACHER).tolist() == [1, 2]
    with pytest.raises(UserError, match="student.layers='1,4': the teacher's layers are 0 to 3"):
        chosen_layers(student(2, layers="1,4"), TEACHER)
    with pytest.raises(UserError, match="model.deep_layers=5: a student begins with parts of its teacher, which has 4"):
        chosen_layers(student(5), TEACHER)
    for layers in ("2,1", "1,1", "a", "-1", "1,"):
        with pytest.raises(UserError, match="student.layers=.*whole numbers, each greater than the one before"):
            Student(layers=layers)
    with pytest.raises(UserError, match="student.layers='0,2': must name as many as model.deep_layers=1"):
        changed(changed(CONFIG, "student", {"layers": "0,2"}), "train", {"target": "student"})
    with pytest.raises(UserError, match="student.likelihood=0: of likelihood, mean and scale one needs a weight"):
        Student(likelihood=0, mean=0, scale=0)


def test_all_parts_are_the_teacher_itself() -> None:
    config = student(4)
    kept = kept_parts(chosen_layers(config, TEACHER), config.model, TEACHER, None)
    jax.tree.map(np.testing.assert_array_equal, parts_of(DEEP, kept), DEEP)


def test_the_largest_parts_are_cut_out_of_every_matrix() -> None:
    """Of two heads, forty channels and 160 hidden units half each, other ones in each of two layers."""
    random, config = np.random.default_rng(0), student(2, width=20)
    channels, units = random.uniform(1, 2, (4, 40)), random.uniform(1, 2, (4, 160))
    heads = np.array([[2, 1], [0, 0], [0, 0], [1, 2]])
    kept = kept_parts(chosen_layers(config, TEACHER), config.model, TEACHER, Magnitudes(channels, heads, units))
    assert kept.heads_lh.tolist() == [[0], [1]] and kept.units_lm.shape == (2, 80)
    assert set(kept.units_lm[1]) == set(np.argsort(units[3])[80:])
    assert set(kept.channels_d) == set(np.argsort(channels[0] + channels[3])[20:])
    block, rows, layer = parts_of(DEEP, kept), kept.channels_d, DEEP["transformer"]["layers"]["layer"]
    shapes = jax.tree.map(np.shape, random_params(config)["flow"]["deep"])
    assert jax.tree.map(np.shape, block) == shapes
    found = jax.tree.map(lambda leaf: np.asarray(leaf[1]), block["transformer"]["layers"]["layer"])
    np.testing.assert_array_equal(found["qkv"]["kernel"], layer["qkv"]["kernel"][3][rows][:, :, 20:])
    np.testing.assert_array_equal(found["proj"]["kernel"], layer["proj"]["kernel"][3][20:][:, rows])
    np.testing.assert_array_equal(found["mlp_in"]["bias"], layer["mlp_in"]["bias"][3][kept.units_lm[1]])
    np.testing.assert_array_equal(found["mlp_out"]["kernel"], layer["mlp_out"]["kernel"][3][kept.units_lm[1]][:, rows])
    np.testing.assert_array_equal(found["mlp_norm"]["scale"], layer["mlp_norm"]["scale"][3][rows])
    np.testing.assert_array_equal(block["proj_text"]["kernel"], DEEP["proj_text"]["kernel"][:, rows])
    np.testing.assert_array_equal(block["proj_out"]["kernel"], DEEP["proj_out"]["kernel"][rows])


def test_a_flow_is_told_by_the_shapes_of_its_deep_block() -> None:
    assert flow_of(CONFIG.model, DEEP).config == flow_of(CONFIG.model, unstacked(DEEP)).config == TEACHER
