"""The whole flow: log-determinant, causality, orders, images, and the paper's sizes."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starflow_jax.config import Config, from_config_dict
from starflow_jax.flow.starflow import STARFlow
from tests.helpers import depends, forward, latents, random_flow, text, tiny_model

CONFIGS = Path(__file__).parents[2] / "configs"


def paper_config(name: str, variant: str) -> Config:
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(variant))


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters of the flow by part, by shapes alone."""
    model = config.model
    x = jnp.zeros((1, model.frames, model.height, model.width, model.channels))
    features = jnp.zeros((1, model.text_length, model.text_dim))
    shapes = jax.eval_shape(STARFlow(model).init, jax.random.key(0), x, features)["params"]
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    counts = {"total": count(shapes), "deep": count(shapes["deep"])}
    counts["shallow"] = sum(count(part) for name, part in shapes.items() if name.startswith("shallow"))
    counts["denoiser"] = count(shapes.get("denoiser", {}))
    return counts


@pytest.mark.parametrize("local", [True, False])
def test_log_determinant_is_the_jacobians(local: bool) -> None:
    with jax.enable_x64(True):
        model = tiny_model(local_shallow=local)
        object.__setattr__(model, "dtype", "float64")  # not a training type: for this comparison alone
        flow, variables = random_flow(model)
        x, features = latents(model), text(model)

        def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out: Any = flow.apply(variables, x, features, method=STARFlow.forward)
            return out.z_BTSK, sum(part.sum() for part in out.logdets)

        jacobian, logdet = jax.jit(jax.jacfwd(forward, has_aux=True))(x)
        sign, expected = np.linalg.slogdet(jacobian.reshape(x.size, x.size))
    assert abs(sign) == 1
    assert abs(expected) > 0.1
    np.testing.assert_allclose(logdet, expected, atol=1e-5)


def frame_jacobians(local: bool) -> tuple[Any, np.ndarray]:
    """Derivatives (N, S, K, N, H, W, C) of each stage of the flow, and of z by the text (N, S, K, T, D)."""
    model = tiny_model(frames=3, local_shallow=local)
    flow, variables = random_flow(model)

    def stages(x: jax.Array, features: jax.Array) -> list[jax.Array]:
        outputs = flow.apply(variables, x, features, method=STARFlow.forward).block_outputs
        return [tokens[0] for tokens in outputs]

    jacobians = jax.jit(jax.jacfwd(stages, argnums=(0, 1)))(latents(model), text(model))
    by_x, by_text = zip(*jacobians)
    return [np.asarray(stage)[:, :, :, 0] for stage in by_x], np.asarray(by_text[-1])[:, :, :, 0]


def test_later_frames_change_nothing() -> None:
    stages, by_text = frame_jacobians(local=True)
    assert np.array_equal(depends(stages[-2], 0, 3), np.eye(3, dtype=bool))  # u_n = f_S(x_n)
    assert np.array_equal(depends(stages[-1], 0, 3), np.tril(np.ones((3, 3), bool)))
    assert depends(by_text, 0, 3).all()


def test_global_shallow_blocks_see_every_frame() -> None:
    stages, _ = frame_jacobians(local=False)
    assert depends(stages[-2], 0, 3).all()


def test_even_shallow_blocks_read_a_frame_backwards() -> None:
    model = tiny_model(frames=1)
    stages = [stage.reshape(12, 12) for stage in _one_frame_jacobians(model)]
    per_token = lambda matrix: np.abs(matrix).reshape(6, 2, 6, 2).max(axis=(1, 3))  # noqa: E731
    backwards, forwards, deep = (per_token(now @ np.linalg.inv(before)) for before, now in zip(stages, stages[1:]))
    assert np.abs(np.tril(backwards, -1)).max() < 1e-5 < np.triu(backwards, 1)[np.triu_indices(6, 1)].min()
    for matrix in (forwards, deep):
        assert np.abs(np.triu(matrix, 1)).max() < 1e-5 < matrix[np.tril_indices(6, -1)].min()


def _one_frame_jacobians(model) -> list[np.ndarray]:
    flow, variables = random_flow(model)
    features = text(model)
    outputs = lambda x: flow.apply(variables, x, features, method=STARFlow.forward).block_outputs  # noqa: E731
    return [np.asarray(stage) for stage in jax.jit(jax.jacfwd(outputs))(latents(model))]


def test_an_image_is_a_video_of_one_frame() -> None:
    model = tiny_model(frames=3)
    flow, variables = random_flow(model)
    video = forward(flow, variables, latents(model), text(model))
    image = forward(flow, variables, latents(model)[:, :1], text(model))
    np.testing.assert_allclose(image.z_BTSK, video.z_BTSK[:, :1], atol=1e-5)
    by_global = forward(STARFlow(tiny_model(frames=3, local_shallow=False)), variables, latents(model)[:, :1],
                        text(model))
    np.testing.assert_allclose(image.z_BTSK, by_global.z_BTSK, atol=1e-5)


def test_patches_hold_the_latents() -> None:
    model = tiny_model(height=4, width=6, patch_size=2)
    flow, variables = random_flow(model)
    x = latents(model, batch=2)
    tokens = flow.tokens(x)
    assert tokens.shape == (2, 2, 6, 8)
    np.testing.assert_array_equal(tokens[1, 1, 4], x[1, 1, 2:4, 2:4].reshape(-1))  # row 1, column 1 of the tokens
    np.testing.assert_array_equal(flow.latents(tokens, 2), x)
    assert forward(flow, variables, x, text(model, 2)).z_BTSK.shape == tokens.shape


def test_the_video_model_has_the_released_size() -> None:
    assert parameter_counts(paper_config("t2v", "7b")) == {
        "total": 6_890_096_528, "deep": 4_842_107_024, "shallow": 1_135_104_720, "denoiser": 912_884_784}


def test_the_image_model_has_the_released_size() -> None:
    counts = parameter_counts(paper_config("t2i", "released"))
    assert (counts["total"], counts["denoiser"]) == (3_858_281_544, 0)
