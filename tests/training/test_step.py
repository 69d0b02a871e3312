"""Gradients of a training step: microbatches, and which loss reaches which parameters."""

import dataclasses

import jax
import numpy as np
import pytest

from starflow_jax.config import REMAT, Train
from starflow_jax.kernels import attention as core
from starflow_jax.planning import program_cost
from starflow_jax.training.losses import accumulated_gradients, gradients
from tests.helpers import latents, random_params, randomised, tiny_model
from tests.training.test_losses import IDS, config_of


def test_gradients_of_microbatches_average_to_the_whole_batchs() -> None:
    whole = config_of(tiny_model(denoiser="first_layer", denoiser_layers=1, deep_layers=1))
    params = random_params(whole)
    x = latents(whole.model, batch=2)
    halves = dataclasses.replace(whole, train=Train(batch_size=2, image_batch_size=2, accumulate=2))
    once, losses = jax.jit(lambda p: gradients(whole, p, x, IDS))(params)
    twice, micro_losses = jax.jit(lambda p: accumulated_gradients(halves, p, x, IDS))(params)
    for expected, ours in zip(jax.tree.leaves((once, losses)), jax.tree.leaves((twice, micro_losses))):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(expected).max()))


def test_the_denoisers_error_reaches_the_denoiser_alone() -> None:
    """Other denoiser parameters: another denoiser gradient, the same one of flow and text, bit for bit."""
    whole = config_of(tiny_model(denoiser="first_layer", denoiser_layers=1, deep_layers=1))
    params = random_params(whole)
    x = latents(whole.model, batch=2)
    run = jax.jit(lambda p: gradients(whole, p, x, IDS)[0])
    first, second = run(params), run({**params, "denoiser": randomised(params["denoiser"], seed=9)})
    assert set(first) == {"flow", "denoiser", "text"}
    for name in ("flow", "text"):
        for a, b in zip(jax.tree.leaves(first[name]), jax.tree.leaves(second[name])):
            np.testing.assert_array_equal(a, b)
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(first[name])) > 1e-4
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), first["denoiser"], second["denoiser"])
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_bfloat16_gradients_point_as_float32s_and_come_back_in_float32() -> None:
    x, found = None, {}
    for dtype in ("float32", "bfloat16"):
        whole = config_of(tiny_model(denoiser="first_layer", denoiser_layers=1, deep_layers=1, dtype=dtype))
        params = random_params(whole)
        x = latents(whole.model, batch=2)
        grads, losses = jax.jit(lambda p, whole=whole, x=x: gradients(whole, p, x, IDS))(params)
        assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {np.dtype("float32")}
        found[dtype] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)]), losses
    (exact, losses), (rough, rough_losses) = found["float32"], found["bfloat16"]
    np.testing.assert_allclose(rough_losses["loss"], losses["loss"], rtol=0.05, atol=0.02)
    assert exact @ rough > 0.995 * np.linalg.norm(exact) * np.linalg.norm(rough)
    assert np.abs(exact - rough).max() > 0  # computed in another precision


@pytest.mark.slow  # quick: tests/flow/test_steering_computed.py, with layers computed again
def test_rematerialisation_changes_work_and_no_gradient(monkeypatch) -> None:
    """Kept attention results are not computed again; whatever is, the gradients are the same."""
    monkeypatch.setattr(core, "SHORT", 0)  # the way of long sequences, whose backward pass wants the results alone
    flops, found = {}, {}
    for remat in REMAT:
        whole = config_of(tiny_model(shallow_layers=(1,), remat=remat))
        params = random_params(whole)
        x = latents(whole.model, batch=2)
        compiled = jax.jit(lambda p, whole=whole, x=x: gradients(whole, p, x, IDS)).lower(params).compile()
        flops[remat], found[remat] = program_cost.count(compiled).flops, compiled(params)
    for remat in REMAT[1:]:
        for ours, expected in zip(jax.tree.leaves(found[remat]), jax.tree.leaves(found["none"])):
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6 * max(1.0, np.abs(expected).max()))
    assert flops["none"] < flops["attention"] == flops["offload"] < flops["layer"]
