"""A control module gives what it gives whatever its model is computed on and in: devices that share tokens, heads and
parameters, rematerialised layers, bfloat16, an int8 base."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax import config as settings_of
from starflow_jax import sharding
from starflow_jax.config import REMAT
from starflow_jax.flow import generation
from starflow_jax.flow.control import control_of, fresh_control, window_rays
from starflow_jax.flow.inversion import SEQUENTIAL
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.quantize import quantize_params
from starflow_jax.nn.quantized import Quantized
from starflow_jax.nn.transformer import Control
from starflow_jax.planning import program_cost
from starflow_jax.training.losses import gradients_from_features
from tests.flow.test_steering import STRIDE, cameras
from tests.helpers import latents, random_flow, random_variables, text, tiny_model
from tests.sharded_run import difference

MODEL = tiny_model(frames=3, shallow_layers=(1,))  # 3 slots of text and 18 behind them, which 2 and 4 do not divide
FLOW, VARIABLES = random_flow(MODEL)
FRESH = fresh_control(MODEL, 8, STRIDE, jax.random.key(0))
CONTROL: Any = random_variables(jax.eval_shape(lambda: FRESH))
CLIPS = 2


def batch() -> tuple[jax.Array, jax.Array, jax.Array]:
    """(latents, text features, rays) of clips that each have a camera of their own."""
    rays = [window_rays(cameras(3, seed), MODEL) for seed in range(CLIPS)]
    features = text(MODEL, CLIPS)
    assert features is not None
    return latents(MODEL, CLIPS), features, jnp.concatenate(rays)


@partial(jax.jit, static_argnums=0)
def gradients(flow: STARFlow, control: Any, frozen: Any, x: jax.Array, features: jax.Array, rays: jax.Array) -> Any:
    """(of the module's parameters, losses)."""
    return gradients_from_features(flow, {"control": control}, x, lambda _: features,
                                   lambda trained: {"flow": frozen, **trained}, rays)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def found(mesh: settings_of.Mesh | None = None, **changes: Any) -> Any:
    """What `gradients` gives, on a mesh or on one device, of the model with other settings; in float64, in which
    rounding hides nothing."""
    model = dataclasses.replace(MODEL, **changes)
    object.__setattr__(model, "dtype", "float64")  # not a training type: for this comparison alone
    params, data = in_float64({"control": CONTROL, "flow": VARIABLES["params"]}), in_float64(batch())
    with jax.enable_x64(True):
        if mesh is None:
            return gradients(STARFlow(model), params["control"], params["flow"], *data)
        devices = sharding.make_mesh(mesh, jax.devices())
        sharding.check_model(model, devices)
        with jax.set_mesh(devices):
            params = jax.device_put(params, sharding.parameter_shardings(params, devices))
            return gradients(STARFlow(model), params["control"], params["flow"], *sharding.put_batch(data, devices))


@pytest.fixture(scope="module")
def one_device() -> Any:
    grads, losses = found()
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) > 0
    return grads, losses


def test_on_devices_that_share_tokens_and_parameters_with_layers_computed_again(one_device: Any) -> None:
    mesh = settings_of.Mesh(data=1, fsdp=2, sequence=2)
    assert difference(found(mesh, remat="attention"), one_device) < 1e-12


@pytest.mark.slow  # quick: above; tests/nn/test_sequence_parallel.py has each choice without a module
@pytest.mark.parametrize(("choice", "mesh"), [
    ("ulysses", dict(fsdp=2, tensor=2)), ("all_gather", dict(sequence=4)), ("all_gather", dict(tensor=2, sequence=2)),
    ("ring", dict(sequence=4)), ("ring", dict(data=2, sequence=2))])
def test_on_devices_however_they_share(choice: str, mesh: dict[str, int], one_device: Any) -> None:
    ours = found(settings_of.Mesh(**{"data": 1, **mesh}), sequence_parallel=choice)
    assert difference(ours, one_device) < 1e-12


@pytest.mark.slow  # quick: above, and tests/training/test_step.py without a module
@pytest.mark.parametrize("remat", REMAT[1:])
def test_with_layers_computed_again(remat: str, one_device: Any) -> None:
    assert difference(found(remat=remat), one_device) < 1e-12


def test_steering_a_layer_moves_nothing_among_devices_that_share_heads() -> None:
    """Its features are made on each device, and what its queries, keys and values get where their heads lie."""
    mesh = sharding.make_mesh(settings_of.Mesh(data=1, tensor=4), jax.devices())
    layers = {"control": {"layers": CONTROL["layers"]}}
    x, tokens = jnp.ones((1, 6, MODEL.deep_width)), jnp.ones((1, 6, 8))
    with jax.set_mesh(mesh):
        placed = jax.device_put(layers, sharding.parameter_shardings(layers, mesh))["control"]["layers"]

        def added(layers: Any, x: jax.Array, tokens: jax.Array) -> Any:
            return Control(tokens, layers).added(x, jax.tree.map(lambda leaf: leaf[0], layers))

        compiled = jax.jit(added).lower(placed, x, tokens).compile()
        assert program_cost.count(compiled).collective_bytes == {}
        into_input, into_qkv = compiled(placed, *jax.device_put((x, tokens), sharding.replicated(mesh)))
    assert into_qkv.addressable_shards[0].data.size == into_qkv.size / 4
    expected = added(CONTROL["layers"], x, tokens)
    assert difference((into_input, into_qkv), expected) < 1e-5


@partial(jax.jit, static_argnums=0)
def noise(flow: STARFlow, variables: Any, params: Any) -> jax.Array:
    """z of the batch."""
    x, features, rays = batch()
    return flow.apply(variables, x, features, control_of((params, rays)), method=STARFlow.forward).z_BTSK


def test_in_bfloat16_to_its_rounding() -> None:
    """What a module changes is what it changes in float32; and one that has learned nothing changes nothing."""
    halved = STARFlow(dataclasses.replace(MODEL, dtype="bfloat16"))
    steered, plain = (noise(FLOW, VARIABLES, params) for params in (CONTROL, FRESH))
    rough, rough_plain = (noise(halved, VARIABLES, params) for params in (CONTROL, FRESH))
    assert 0 < difference(rough_plain, plain) < 0.02 and difference(rough, steered) < 0.02
    assert difference(steered, plain) > 0.1 and difference(rough - rough_plain, steered - plain) < 0.04


@pytest.mark.slow  # quick: above
def test_in_bfloat16_sampling_undoes_what_likelihood_does() -> None:
    flow = STARFlow(dataclasses.replace(MODEL, dtype="bfloat16"))
    x, features, rays = batch()
    plain = jax.jit(lambda: flow.apply(VARIABLES, x, features, method=STARFlow.forward).z_BTSK)()
    np.testing.assert_array_equal(noise(flow, VARIABLES, FRESH), plain)
    out = jax.jit(lambda: flow.apply(VARIABLES, x, features, control_of((CONTROL, rays)), method=STARFlow.forward))()
    made = generation.generate(flow, VARIABLES, out.z_BTSK, features[None], token_grid=(2, 3), solver=SEQUENTIAL,
                               steer=lambda begin, first, frames: (CONTROL, rays[:, first:first + frames]))
    u = np.concatenate([np.asarray(u) for u, _ in made], axis=1)
    assert difference(u, out.block_outputs[-2]) < 0.05


def test_beside_an_int8_base_as_beside_its_rounded_matrices() -> None:
    quantized = quantize_params({"flow": VARIABLES["params"]})["flow"]
    rounded = jax.tree.map(
        lambda leaf: leaf.q * leaf.scale[:, None] if isinstance(leaf, Quantized) else leaf, quantized,
        is_leaf=lambda leaf: isinstance(leaf, Quantized))
    steered = noise(FLOW, {"params": quantized}, CONTROL)
    assert difference(steered, noise(FLOW, {"params": rounded}, CONTROL)) < 1e-5
    assert 1e-4 < difference(steered, noise(FLOW, VARIABLES, CONTROL)) < 0.05
