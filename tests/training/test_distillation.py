"""The differences of a student's predictions from its teacher's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from starflow_jax.flow.starflow import STARFlow, apply_flow
from starflow_jax.training.distillation import differences
from tests.helpers import latents, random_flow, text, tiny_model

MODEL = tiny_model()


def test_differences_are_those_of_means_and_scales_and_leave_the_teacher_alone() -> None:
    """Of blocks of two widths, from their means and scales."""
    flow, variables = random_flow(MODEL)
    _, other = random_flow(dataclasses.replace(MODEL, deep_width=20, deep_layers=1), seed=3)
    x, features = latents(MODEL, 2), text(MODEL, 2)

    @jax.jit
    def found(teacher, params):
        out = apply_flow(flow, params, STARFlow.forward, x, features)
        return differences(flow, teacher, out, (2, 3), features), out

    teacher = other["params"]["deep"]
    errors, out = found(teacher, variables)
    u = np.asarray(out.block_outputs[-2])
    (mean, scale), (other_mean, other_scale) = (
        (u - np.exp(-logdet) * z, np.exp(-logdet)) for z, logdet in (
            (np.asarray(z), np.asarray(logdet).reshape(u.shape)) for z, logdet in (
                (out.z_BTSK, out.logdets[-1]),
                apply_flow(STARFlow(dataclasses.replace(MODEL, deep_width=20, deep_layers=1)),
                           {"params": {"deep": teacher}}, STARFlow.deep_forward, jnp.asarray(u), (2, 3), features))))
    np.testing.assert_allclose(errors["mean_error"], 0.5 * (((mean - other_mean) / other_scale) ** 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(errors["scale_error"], (np.log(scale / other_scale) ** 2).mean(), rtol=1e-4)
    assert errors["mean_error"] > 1e-3
    grads = jax.jit(jax.grad(lambda teacher: sum(found(teacher, variables)[0].values())))(teacher)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
