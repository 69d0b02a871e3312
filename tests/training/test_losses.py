"""Likelihood in nats and bits, and the flow-score target, against what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.config import Config, Model, Text
from starflow_jax.flow.likelihood import nll_mean, nll_per_frame
from starflow_jax.flow.starflow import STARFlow
from starflow_jax.model.parameters import flow_variables
from starflow_jax.model.text import encode_text, text_encoder
from starflow_jax.training.losses import gradients, to_bits, weighted_loss
from tests.helpers import forward, fresh, latents, random_flow, random_params, text, tiny_model

IDS = jnp.ones((2, 3), jnp.int32)


def config_of(model: Model) -> Config:
    """With a text encoder as small as the model."""
    t5 = Text(vocab_size=8, layers=1, d_model=model.text_dim, d_kv=2, d_ff=4, heads=2)
    return Config("test", model, t5)


def test_nll_of_an_identity_flow_is_the_standard_normals() -> None:
    model = tiny_model()
    flow, variables = fresh(model)
    x = np.asarray(latents(model, batch=2), np.float64)
    out = forward(flow, variables, jnp.asarray(x, jnp.float32), text(model, 2))
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    expected = -np.log(density).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(nll_per_frame(out), expected, rtol=1e-5)
    bits = -np.log2(density).mean()
    np.testing.assert_allclose(to_bits(nll_mean(out).loss), bits, rtol=1e-5)


def test_nll_bits_and_mean_loss_agree() -> None:
    model = tiny_model()
    flow, variables = random_flow(model)
    x = latents(model, batch=2)
    out = forward(flow, variables, x, text(model, 2))
    total = nll_per_frame(out)
    assert total.shape == (2, 2)
    loss = nll_mean(out)
    assert abs(float(loss.loss_logdet)) > 0.05
    np.testing.assert_allclose(loss.loss, loss.loss_z + loss.loss_logdet, rtol=1e-6)
    np.testing.assert_allclose(to_bits(loss.loss), total.sum() / x.size / np.log(2), rtol=1e-5)


def test_nll_of_a_frame_is_given_the_frames_before_it() -> None:
    model = tiny_model()
    flow, variables = random_flow(model)
    x, features = latents(model), text(model)
    whole, first = (nll_per_frame(forward(flow, variables, of, features)) for of in (x, x[:, :1]))
    np.testing.assert_allclose(whole[:, :1], first, rtol=1e-5)


def test_weight_is_the_noise_level_over_its_reference() -> None:
    np.testing.assert_allclose(weighted_loss(jnp.float32(2.0), 0.3), 2.0)
    np.testing.assert_allclose(weighted_loss(jnp.float32(2.0), 0.6), 4.0)


def test_target_is_the_tweedie_step_of_an_identity_flow() -> None:
    """x - 0.3 target = x + sigma^2 score, and the standard normal's score is -x."""
    model = tiny_model(noise_std=0.5)
    flow, variables = fresh(model)
    x = latents(model, batch=2)

    def loss(x: jax.Array) -> jax.Array:
        out = forward(flow, variables, x, text(model, 2))
        return weighted_loss(nll_mean(out).loss, model.noise_std)

    target = model.noise_std * x.size * jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(x - 0.3 * target, x + 0.5**2 * -x, rtol=1e-5, atol=1e-6)


def test_denoiser_regresses_the_scaled_score() -> None:
    """With an output of 0 its loss is the mean square of the target -sigma^2/0.3 grad log p."""
    model = tiny_model(noise_std=0.5, denoiser="first_layer", denoiser_layers=1)
    whole, x = config_of(model), latents(model, batch=2)
    params = random_params(whole)
    params["denoiser"]["proj_out"] = jax.tree.map(jnp.zeros_like, params["denoiser"]["proj_out"])
    features = encode_text(text_encoder(whole), params["text"], IDS)

    @jax.jit
    @jax.value_and_grad
    def negative_log_p(x: jax.Array) -> jax.Array:
        return nll_per_frame(forward(STARFlow(whole.model), flow_variables(params), x, features)).sum()

    value, gradient = negative_log_p(x)
    target = 0.5**2 / 0.3 * gradient
    _, losses = jax.jit(lambda: gradients(whole, params, x, IDS))()
    np.testing.assert_allclose(losses["denoiser_loss"], jnp.mean(target**2), rtol=1e-4)
    np.testing.assert_allclose(losses["loss"], value / x.size - 0.5 * np.log(2 * np.pi), rtol=1e-4)
