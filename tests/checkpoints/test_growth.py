"""Growth keeps the function by value, what it adds can learn, and what it can't do it refuses by name."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from starflow_jax.checkpoints.growth import changes, grow
from starflow_jax.config import Model, UserError
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.initialise import fresh_denoiser
from tests.helpers import latents, randomised, text, tiny_model

SMALL = tiny_model()
DEEPER = dataclasses.replace(SMALL, deep_layers=5)
LARGE = dataclasses.replace(SMALL, deep_width=100, deep_layers=3)


def random_params(model: Model, seed: int = 1) -> dict[str, Any]:
    """{"flow/deep/...": array}, none of them zero, with means far from zero in the residual stream."""
    flow = STARFlow(model)
    shapes = jax.eval_shape(flow.init, jax.random.key(0), latents(model), text(model))["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    flat = traverse_util.flatten_dict(randomised(zeros, scale=1.0, seed=seed), sep="/")
    for part in ("proj_in", "transformer/layers/layer/proj", "transformer/layers/layer/mlp_out"):
        flat[f"deep/{part}/bias"] += 0.7
    return {name if name.startswith("denoiser/") else f"flow/{name}": value + name.endswith("scale")
            for name, value in flat.items()}


def variables(arrays: dict[str, Any]) -> dict[str, Any]:
    flat = {name.removeprefix("flow/"): jax.device_put(np.asarray(array)) for name, array in arrays.items()}
    return {"params": traverse_util.unflatten_dict(flat, sep="/")}


@partial(jax.jit, static_argnums=0)
def forward(model: Model, params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    out: Any = STARFlow(model).apply(params, x, text(model, x.shape[0]), method=STARFlow.forward)
    return out.z_BTSK, out.logdets[-1]


def grown_to(target: Model, source: Model = SMALL) -> dict[str, Any]:
    return grow(random_params(source), source, target, partial(fresh_denoiser, target, 0))


@pytest.mark.parametrize("large", [DEEPER, LARGE], ids=["deeper", "wider and deeper"])
def test_a_larger_deep_block_is_the_same_function(large: Model) -> None:
    x = latents(SMALL, 2)
    grown = variables(grown_to(large))
    shapes = jax.eval_shape(STARFlow(large).init, jax.random.key(0), x, text(large, 2))
    assert jax.tree.map(jnp.shape, grown) == jax.tree.map(jnp.shape, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(grown)} == {np.dtype(np.float32)}
    before, after = forward(SMALL, variables(random_params(SMALL)), x), forward(large, grown, x)
    for ours, theirs in zip(after, before, strict=True):
        assert np.abs(theirs).max() > 0.5
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    if large == DEEPER:  # nothing was rescaled
        assert all((ours == theirs).all() for ours, theirs in zip(after, before, strict=True))


def test_what_was_added_learns() -> None:
    x = latents(SMALL, 2)

    def loss(params: Any) -> jax.Array:
        z, logdet = forward(LARGE, params, x)
        return 0.5 * jnp.mean(z**2) - jnp.mean(logdet)

    params = variables(grown_to(LARGE))
    gradient = jax.jit(jax.grad(loss))(params)["params"]["deep"]
    layers, grown = (tree["transformer"]["layers"]["layer"] for tree in (gradient, params["params"]["deep"]))
    for part in ("proj", "mlp_out"):  # layer 1 is a copy, silent as yet
        assert not np.asarray(grown[part]["kernel"][1]).any() and np.asarray(grown[part]["kernel"][0]).any()
        assert np.abs(layers[part]["kernel"][1]).min() > 0
    added = np.asarray(layers["mlp_out"]["kernel"][0])
    assert np.abs(added[160:]).min() > 0  # added hidden units
    assert np.abs(layers["proj"]["kernel"][0, 40:]).min() > 0  # an added head
    columns = added[:, 40:]  # what is written to the added channels: each its own way
    assert np.abs(columns - columns.mean(axis=1, keepdims=True)).max() > 0.1 * np.abs(columns).max()


def test_bfloat16_weights_stay_bfloat16_and_near() -> None:
    x = latents(SMALL, 2)
    stored = {name: np.asarray(value).astype(jnp.bfloat16) for name, value in random_params(SMALL).items()}
    grown = grow(stored, SMALL, LARGE, dict)
    assert {array.dtype for array in grown.values()} == {np.dtype(jnp.bfloat16)}
    as_float = [variables({name: np.asarray(array, np.float32) for name, array in arrays.items()})
                for arrays in (stored, grown)]
    before, after = forward(SMALL, as_float[0], x)[0], forward(LARGE, as_float[1], x)[0]
    error = np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))
    assert 0 < error < 0.02  # the grown weights are rounded again


def test_an_image_model_becomes_a_video_model() -> None:
    image = tiny_model(frames=1, local_shallow=False, rope_extent=2.0, noise_std=0.3)
    video = tiny_model(frames=3, rope_extent=2.0, deep_layers=3, denoiser="first_layer", denoiser_layers=1)
    grown = variables(grown_to(video, image))
    x = latents(image, 2)
    before, after = forward(image, variables(random_params(image)), x), forward(video, grown, x)
    assert all((ours == theirs).all() for ours, theirs in zip(after, before, strict=True))
    clip = latents(video, 1)
    z, _ = forward(video, grown, clip)
    of_image, _ = forward(image, variables(random_params(image)), clip[:, :1])
    np.testing.assert_allclose(z[:, :1], of_image, atol=1e-5)  # a clip begins as the image model's image
    score = STARFlow(video).apply(grown, clip, text(video), method=STARFlow.score)
    assert not np.asarray(score).any() and np.abs(grown["params"]["denoiser"]["proj_in"]["kernel"]).max() > 0
    effects = {name: (old, new, effect) for name, old, new, effect in changes(image, video)}
    assert set(effects) == {"frames", "local_shallow", "noise_std", "deep_layers", "denoiser"}
    assert effects["deep_layers"] == ("2", "3", "same function")
    assert not any("CHANGES the function" in effect for _, _, effect in effects.values())


def test_what_changes_the_function_is_said() -> None:
    other = tiny_model(rope_extent=5.0, text_length=4, height=4)
    effects = {name: effect for name, *_, effect in changes(SMALL, other)}
    assert set(effects) == {"height", "extent", "text_length"}
    assert "CHANGES the function" in effects["extent"] and "CHANGES the function" in effects["text_length"]
    assert changes(SMALL, SMALL) == []
    assert [row[0] for row in changes(tiny_model(denoiser="every_layer"), SMALL)] == ["denoiser"]
    assert "denoiser/sos" not in grow({"denoiser/sos": np.ones(1)}, tiny_model(denoiser="every_layer"), SMALL, dict)


def test_what_cannot_grow_is_refused_by_name() -> None:
    with pytest.raises(UserError) as error:
        changes(tiny_model(deep_width=60, deep_layers=3, denoiser="every_layer", denoiser_layers=2),
                tiny_model(channels=3, shallow_layers=(2, 1), text_length=0, denoiser="every_layer"))
    message = str(error.value)
    for part in ("model.channels=3 (source: 2)", "model.shallow_layers=(2, 1) (source: (1, 1))",
                 "model.deep_layers=2 (source: 3, more)", "model.deep_width=40 (source: 60, more)",
                 "model.denoiser_layers=8 (source: 2)", "model.text_length=0 (source: 3)"):
        assert part in message
    assert "head_dim" not in message and "\n" not in message
