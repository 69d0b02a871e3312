"""Decoding with an int8 cache: near the float cache's samples, the same on a mesh, never scaled back as a whole."""

import importlib.util
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.flow import decode, generation
from starflow_jax.flow.inversion import Solver
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.io.compiled import nothing_kept
from starflow_jax.kernels.int8 import Int8Slots
from starflow_jax.nn.transformer import unstacked
from starflow_jax.planning.topology import topology
from tests.helpers import random_flow, text, tiny_model

MODEL = tiny_model(frames=3)
BLOCKS, WAVEFRONT = Solver(block_size=6, tolerance=1e-9), Solver(block_size=6, updates=3)


@pytest.fixture(scope="module")
def setting() -> tuple[STARFlow, Any]:
    return random_flow(MODEL)


def sampled(setting: tuple[STARFlow, Any], cache: str, solver: Solver = BLOCKS) -> np.ndarray:
    """(B, T, S, K), guided."""
    flow, variables = setting
    texts = jnp.stack([text(MODEL, 2), text(MODEL, 2, seed=21)])
    noise = jnp.asarray(np.random.default_rng(4).normal(size=(2, 3, 6, 2)), jnp.float32)
    made = generation.generate(flow, variables, noise, texts, token_grid=(2, 3), solver=solver, guidance=1.5,
                               cache=cache)
    return np.concatenate([np.asarray(frames) for frames, _ in made], axis=1)


@pytest.mark.parametrize("solver", [BLOCKS, pytest.param(WAVEFRONT, marks=pytest.mark.slow)],
                         ids=["blocks", "wavefront"])
def test_samples_stay_near_those_of_a_float_cache(setting: tuple[STARFlow, Any], solver: Solver) -> None:
    exact = sampled(setting, "", solver)
    found = sampled(setting, "int8", solver)
    assert 1e-5 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.02
    flow, variables = setting
    np.testing.assert_allclose(sampled((flow, unstacked(variables)), "int8", solver), found, atol=2e-3)


def test_the_state_holds_int8(setting: tuple[STARFlow, Any]) -> None:
    flow, variables = setting
    state = jax.eval_shape(partial(decode.start_window, flow, window=3, token_grid=(2, 3), cache="int8"), variables,
                           jnp.zeros((1, 0, 6, 2)), text(MODEL)[None])
    cache = state.known.cache
    assert isinstance(cache.k_LBPHD, Int8Slots) and isinstance(cache.v_LBPHD, Int8Slots)
    assert cache.k_LBPHD.q_BPGD.dtype == jnp.int8 and cache.k_LBPHD.shape == (2, 1, 21, 2, 20)


def test_heads_over_two_devices_give_what_one_gives(setting: tuple[STARFlow, Any]) -> None:
    flow, variables = setting
    mesh = sharding.make_mesh(settings_of.Mesh(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    expected = sampled(setting, "int8")
    with jax.set_mesh(mesh):
        placed = jax.device_put(variables, sharding.parameter_shardings(variables, mesh))
        np.testing.assert_allclose(sampled((flow, placed), "int8"), expected, atol=2e-3)


LONG = tiny_model(channels=4, frames=7, height=32, width=32, shallow_width=64, deep_layers=4, deep_width=512,
                  head_dim=64, text_length=128, dtype="bfloat16")
SLOTS = 8192  # of its cache: long enough for attention by kernels


def decoding_a_frame(device: jax.Device, cache: str) -> Any:
    """The compiled program."""
    def shaped(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return shaped(jax.ShapeDtypeStruct(shape, jnp.float32))

    flow, window = STARFlow(LONG), dict(window=7, token_grid=(32, 32))
    variables = jax.eval_shape(flow.init, jax.random.key(0), array(1, 7, 32, 32, 4), array(1, 128, LONG.text_dim))
    variables = jax.tree.map(shaped, sharding.layers_as(variables, jnp.bfloat16))
    start: Any = partial(decode.start_window, flow, cache=cache, **window)
    state = jax.tree.map(shaped, jax.eval_shape(start, variables, array(1, 0, 1024, 4),
                                                array(2, 1, 128, LONG.text_dim)))
    lowered = decode.decode_frames.lower(flow, variables, state, array(1, 1, 1024, 4), array(), solver=Solver(256),
                                         branches=2, **window)
    with nothing_kept():
        return lowered.compile()


def largest_float(program: Any) -> int:
    """Entries of the largest float array with an axis of a head's channels, in slots of a layer's cache."""
    shapes = [[int(size) for size in found.split(",")]
              for found in re.findall(r"= (?:f32|bf16)\[([\d,]+)\]", program.as_text())]
    return max(math.prod(shape) for shape in shapes if LONG.head_dim in shape) // (2 * LONG.deep_width)


def test_no_layers_cache_is_scaled_back_as_a_whole() -> None:
    programs = {cache: decoding_a_frame(jax.devices()[0], cache) for cache in ("", "int8")}
    assert largest_float(programs["int8"]) <= 1024  # a frame of all layers, twice a chunk of the reference's
    assert largest_float(programs[""]) == 4 * SLOTS  # all layers: the measure can tell
    sizes = [program.memory_analysis().argument_size_in_bytes for program in programs.values()]
    assert sizes[0] - sizes[1] > 0.46 * 2 * 4 * 2 * SLOTS * LONG.deep_width * 2  # of two branches' keys and values


def test_on_a_tpu_the_cache_is_scaled_back_within_the_kernel() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, TPUs' compiler, is not installed: pip install -e '.[tpu]'")
    program = decoding_a_frame(topology("v5e:2x2")[0], "int8")
    assert largest_float(program) <= 1024
    layer = 2 * 2 * SLOTS * LONG.deep_width * 2  # in bfloat16
    assert program.memory_analysis().temp_size_in_bytes < layer / 4
