"""Schedule, skipped steps, clip, EMA and weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from starflow_jax.config import Train
from starflow_jax.training.optimizer import MUON_RMS, schedule
from starflow_jax.training.state import TrainState, create_state
from starflow_jax.training.step import NORM_WARMUP, apply_gradients

SETTINGS = Train(steps=100, warmup_steps=10, learning_rate=1e-2, final_learning_rate=1e-4, weight_decay=0.0,
                 denoiser_learning_rate=2e-2, clip=1.0, ema=0.5)


def toy_state(settings: Train = SETTINGS) -> TrainState:
    params = {"flow": {"w": jnp.array([1.0, -2.0])}, "denoiser": {"v": jnp.array([3.0])}}
    return create_state(params, settings)


def toy_gradients(flow: tuple[float, float] = (0.3, 0.4), denoiser: float = 0.1) -> dict[str, Any]:
    return {"flow": {"w": jnp.array(flow)}, "denoiser": {"v": jnp.array([denoiser])}}


def after(state: TrainState, grads: dict[str, Any], settings: Train = SETTINGS) -> tuple[TrainState, float, bool]:
    state, norm, skip = jax.jit(lambda s, g: apply_gradients(s, g, settings))(state, grads)
    return state, float(norm), bool(skip)


def test_schedule_values() -> None:
    rate = schedule(SETTINGS)
    halfway = 1e-4 + 0.5 * (1e-2 - 1e-4)
    for step, expected in ((0, 0.0), (5, 5e-3), (10, 1e-2), (55, halfway), (100, 1e-4), (200, 1e-4)):
        np.testing.assert_allclose(rate(step), expected, rtol=1e-5, atol=1e-9)
    assert float(schedule(Train(warmup_steps=0, learning_rate=1e-2))(0)) == pytest.approx(1e-2)


def test_a_run_shorter_than_the_warm_up_is_all_warm_up() -> None:
    rate = schedule(Train(steps=4, warmup_steps=50, learning_rate=1e-2, final_learning_rate=1e-4))
    np.testing.assert_allclose([rate(step) for step in range(5)], [0, 2.5e-3, 5e-3, 7.5e-3, 1e-2], rtol=1e-6)


@pytest.mark.parametrize("bad", [toy_gradients((float("nan"), 0.0)), toy_gradients(denoiser=float("inf"))])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: dict[str, Any]) -> None:
    before = toy_state()
    state, _, skip = after(before, bad)
    assert skip and int(state.skipped) == 1 and int(state.step) == 1
    for name in ("params", "ema", "flow_optimizer", "denoiser_optimizer", "norm_mean", "key"):
        for old, new in zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name))):
            np.testing.assert_array_equal(old, new)


def test_an_outlier_is_skipped_once_the_mean_is_known() -> None:
    grads, large = toy_gradients(), toy_gradients((30.0, 40.0))
    warm = toy_state().replace(step=jnp.int32(NORM_WARMUP), norm_mean=jnp.float32(0.5))
    state, norm, skip = after(warm, large)
    assert skip and int(state.skipped) == 1 and norm == pytest.approx(50)
    np.testing.assert_array_equal(state.params["flow"]["w"], warm.params["flow"]["w"])
    assert not after(warm, grads)[2]
    assert not after(warm.replace(step=jnp.int32(NORM_WARMUP - 1)), large)[2]  # too early to tell


def test_running_mean_of_norms() -> None:
    state, norm, _ = after(toy_state(), toy_gradients())
    np.testing.assert_allclose((norm, state.norm_mean), (0.5, 0.5), rtol=1e-6)
    state, _, _ = after(state, toy_gradients((0.6, 0.8)))
    np.testing.assert_allclose(state.norm_mean, 0.98 * 0.5 + 0.02 * 1.0, rtol=1e-6)


def test_clip_keeps_the_direction_and_the_length_one() -> None:
    """Adam's first moment after one step is 0.1 of the gradient that it was given."""
    state, norm, _ = after(toy_state(), toy_gradients((30.0, 40.0)))
    assert norm == pytest.approx(50)  # reported before the clip
    first_moment = state.flow_optimizer[1][0].mu["flow"]["w"]
    np.testing.assert_allclose(first_moment, [0.06, 0.08], rtol=1e-5)


def test_first_step_is_adams_and_the_ema_follows() -> None:
    """Without warm-up the first update is the learning rate against each sign."""
    settings = Train(steps=100, warmup_steps=0, learning_rate=1e-2, final_learning_rate=1e-4, weight_decay=0.0,
                     denoiser_learning_rate=2e-2, ema=0.9)
    state, _, _ = after(toy_state(settings), toy_gradients(), settings)
    np.testing.assert_allclose(state.params["flow"]["w"], [1.0 - 1e-2, -2.0 - 1e-2], rtol=1e-5)
    np.testing.assert_allclose(state.params["denoiser"]["v"], [3.0 - 2e-2], rtol=1e-5)
    decay = 1 / 10  # min(ema, (1 + accepted) / (10 + accepted))
    np.testing.assert_allclose(state.ema["flow"]["w"], np.array([1.0, -2.0]) - (1 - decay) * 1e-2, rtol=1e-5)


def test_weight_decay_is_decoupled() -> None:
    settings = Train(steps=100, warmup_steps=0, learning_rate=1e-2, weight_decay=0.1)
    state, _, _ = after(toy_state(settings), toy_gradients((0.0, 0.0), 0.0), settings)
    np.testing.assert_allclose(state.params["flow"]["w"], np.array([1.0, -2.0]) * (1 - 1e-2 * 0.1), rtol=1e-6)


def test_muon_orthogonalizes_the_matrices_of_each_layer_alone() -> None:
    """Of the polar factor of each layer's gradient, queries, keys and values apart, times what gives a step the mean
    square of AdamW's; Newton-Schulz leaves singular values within 0.35 of 1. All else moves as with AdamW, with
    Nesterov's momentum."""
    def tree(draw: Any) -> dict[str, Any]:
        layer = {"qkv": {"kernel": draw(2, 8, 3, 8), "bias": draw(2, 3, 8)}, "mlp_in": {"kernel": draw(2, 8, 16)}}
        return {"flow": {"deep": {"proj_in": {"kernel": draw(4, 8)}, "transformer": {"layers": {"layer": layer}}}},
                "denoiser": {"transformer": {"layers": {"layer": {"proj": {"kernel": draw(1, 8, 8)}}}}}}

    random = np.random.default_rng(0)
    params = tree(lambda *shape: jnp.zeros(shape))
    grads = tree(lambda *shape: jnp.asarray(random.normal(size=shape) * np.arange(1, shape[0] + 1).reshape(
        -1, *(1,) * (len(shape) - 1)), jnp.float32))  # one layer's larger than another's
    settings = Train(steps=100, warmup_steps=0, learning_rate=1e-2, denoiser_learning_rate=3e-2, weight_decay=0.0,
                     optimizer="muon", clip=1e9)
    moved = after(create_state(params, settings), grads, settings)[0].params

    def kernel(tree: dict[str, Any], part: str, name: str) -> np.ndarray:
        block = tree["denoiser"] if part == "denoiser" else tree["flow"]["deep"]
        return np.asarray(block["transformer"]["layers"]["layer"][name]["kernel"])

    for part, name, rate in (("flow", "qkv", 1e-2), ("flow", "mlp_in", 1e-2), ("denoiser", "proj", 3e-2)):
        step, grad = kernel(moved, part, name), kernel(grads, part, name)
        if name == "qkv":
            step, grad = (array.swapaxes(1, 2).reshape(6, 8, 8) for array in (step, grad))
        for change, gradient in zip(step, grad):
            left, _, right = np.linalg.svd(gradient, full_matrices=False)
            turned = left.T @ (-change / (rate * MUON_RMS * max(change.shape) ** 0.5)) @ right.T
            np.testing.assert_allclose(np.diag(turned), 1, atol=0.35)
            np.testing.assert_allclose(turned - np.diag(np.diag(turned)), 0, atol=1e-3)
    proj_in, adamw = grads["flow"]["deep"]["proj_in"], optax.adamw(1e-2, b2=0.95, nesterov=True)
    expected = adamw.update(proj_in, adamw.init(proj_in), proj_in)[0]["kernel"]
    np.testing.assert_allclose(moved["flow"]["deep"]["proj_in"]["kernel"], expected, rtol=1e-5, atol=1e-5)
