"""Likelihoods by token add up to those by frame."""

import jax
import numpy as np
import pytest

from starflow_jax.flow.likelihood import nll_per_frame, nll_per_token
from starflow_jax.flow.starflow import STARFlow, apply_flow
from tests.helpers import latents, random_flow, tiny_model


@pytest.mark.parametrize("local", [True, False])
def test_tokens_add_up_to_frames(local: bool) -> None:
    model = tiny_model(local_shallow=local, deep_layers=1, text_length=0)
    flow, variables = random_flow(model)
    out = jax.jit(lambda x: apply_flow(flow, variables, STARFlow.forward, x))(latents(model, batch=2))
    tokens = nll_per_token(flow, out)
    assert tokens.shape == (2, 2, 6)
    if local:
        np.testing.assert_allclose(tokens.sum(axis=2), nll_per_frame(out), rtol=1e-5)
    z, logdets = np.asarray(out.z_BTSK, np.float64), [np.asarray(a, np.float64) for a in out.logdets]
    noise = 0.5 * (z**2 + np.log(2 * np.pi))
    total = noise.sum(axis=(1, 2, 3)) - sum(a.reshape(2, -1).sum(axis=1) for a in logdets)
    np.testing.assert_allclose(tokens.sum(axis=(1, 2)), total, rtol=1e-5)
    # The first shallow block reverses the order: its last slot's scale belongs to the first token.
    first = logdets[0][:, :, ::-1] if local else logdets[0].reshape(2, 12, 2)[:, ::-1]
    by_token = noise - sum(a.reshape(z.shape) for a in (first, *logdets[1:]))
    np.testing.assert_allclose(tokens, by_token.sum(axis=-1), rtol=1e-4, atol=1e-4)
